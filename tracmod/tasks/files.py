"""Example files of users: the columns of `SCHEMA` under any names, checked row by row."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa

from tracmod.choices import LossKind
from tracmod.config import TaskConfig
from tracmod.tasks.columns import NO_LANGUAGE, check_columns, check_language, choose_columns
from tracmod.tasks.examples import POOL_SCHEMA, SCHEMA, SPLITS, Corpus, Pool
from tracmod.tasks.label_vectors import (
    LARGEST_TARGET,
    expected_label_list,
    label_list_text,
    label_vector,
)
from tracmod.tasks.readers import read_rows, shown, shown_names, stated_class_names, text_fault

MOST_DIGITS = 18  # of a whole number that int64 holds
# A text in quotation marks, with doubled ones within: what writers of quoted TSV make of quotes.
QUOTED_AS_IN_CSV = re.compile(r'"(?:[^"]|"")*""(?:[^"]|"")*"')


def read_examples(
    path: str | Path,
    columns: Mapping[str, str] | None = None,
    language: str | None = None,
    label_names: Sequence[str] | None = None,
) -> pa.Table:
    """Read and check one file of examples.

    Args:
        path: TSV (texts with doubled quotation marks are unquoted), CSV, JSON lines or Parquet,
            each also gzipped.
        columns: our column name -> the name in the file, where they differ.
        language: the language of all rows; the file then needs no language column.
        label_names: the names of the classes. Numbers (of JSON or Parquet) are class numbers. Text
            is the name of a class if all labels of the file are names, and a class number
            otherwise. With a single name, labels are real numbers. With None, the classes are those
            that the schema of the file names, if it does; else whole numbers are class numbers, and
            other labels are numbered in sorted order.

    Returns:
        A table with `SCHEMA`, rows in the order of the file. With a single name of a class, the
        labels are float64.

    Raises:
        ValueError: a malformed row; the message names file and line.
    """
    file = warn_of_notes(_RawFile.read(path, columns or {}, language))
    if label_names is not None:
        return _model_tables([file], label_names)[0]
    label_names = file.class_names or _distinct_labels([file])
    number_of = _numbered(label_names)
    if file.class_names is None and are_numbers(label_names):
        number_of = {label: int(label) for label in label_names}
    return file.numbered_table(number_of).select(SCHEMA.names)


def read_model_examples(
    path: str | Path,
    label_names: Sequence[str],
    columns: Mapping[str, str] | None = None,
    language: str | None = None,
) -> pa.Table:
    """Read one file of examples whose labels are the classes of a model; see `read_model_files`."""
    return read_model_files([path], label_names, columns, language)[0]


def read_model_files(
    paths: Sequence[str | Path],
    label_names: Sequence[str],
    columns: Mapping[str, str] | None = None,
    language: str | None = None,
    *,
    loss_kind: LossKind = "cross_entropy",
    model_inputs: Collection[str] = (),
    notes: list[str] | None = None,
) -> list[pa.Table]:
    """Read files of examples whose labels are the classes of a model, by name or by number.

    - Numbers of JSON lines and Parquet are class numbers.
    - Where the schema of a Parquet file names the classes of its numbers (`datasets` does), these
      names count.
    - Text is names or class numbers. This is decided for all files together, because one file may
      not tell: if the classes 0 to 4 have the names 1 to 5, a file with the labels 3 and 4 only is
      ambiguous. Where the files together are neither, each is decided by itself: names in one file
      and numbers in the other are accepted.
    - True and false are the classes of these names, or 0 and 1 of two classes without names of
      their own (`LABEL_0`, `LABEL_1`).
    - A file without the column id has the numbers of its rows, from 0, as ids. A file without the
      column language is of the language given, or else of "und" (undetermined).

    Args:
        paths: files, as for `read_examples`.
        label_names: the model's `id2label`, in the order of the classes. With a single name the
            model has one output, and labels are real numbers.
        columns: our column name -> the name in the files, where they differ; a file without that
            column may have it under our name. An empty name: the column is not read.
        language: the language of the examples of files without a column of languages.
        loss_kind: the kind of the model's loss. With `binary_cross_entropy`, a label is a list of
            names, or of a number from 0 to 1 for each label; with `squared_error` and several
            outputs, a list of targets. The labels of the tables are then lists of float64.
        model_inputs: columns that are refused, because they are inputs of the model, which takes
            texts here.
        notes: gets a sentence for everything that a file does not say: its ids, its language.

    Raises:
        ValueError: a missing column (the message suggests a mapping), a malformed row (the message
            names file and line), labels that could be both names and numbers, of different classes,
            or files whose schemas name other classes.
    """
    columns = columns or {}
    check_columns(columns)
    if language is not None:
        check_language(language)
    has_lists = loss_kind == "binary_cross_entropy" or (
        loss_kind == "squared_error" and len(label_names) > 1
    )
    files = [
        _RawFile.read(
            path, columns, language, required=False, refused=model_inputs, label_lists=has_lists
        )
        for path in paths
    ]
    for name_in_file in columns.values():
        if name_in_file and all(name_in_file not in file.names_in_file for file in files):
            raise ValueError(
                f"{paths[0]}: expected a column {name_in_file}, got "
                f"{shown_names(files[0].names_in_file)}"
            )
    if language is not None and all(file.has_languages for file in files):
        raise ValueError(
            f"language: expected none, because every file has a column of languages, got "
            f"{language!r}"
        )
    if has_lists:
        tables = [file.vector_table(loss_kind, label_names).select(SCHEMA.names) for file in files]
    else:
        tables = _model_tables(files, label_names)
    if notes is not None:
        notes.extend(note for file in files for note in file.notes)
    return tables


def _model_tables(files: Sequence[_RawFile], label_names: Sequence[str]) -> list[pa.Table]:
    """Return the rows of files, labels as numbers of a model's classes or as its targets."""
    if len(label_names) == 1:
        return [file.target_table().select(SCHEMA.names) for file in files]
    _check_stated_names(files, label_names)
    by_name = _text_is_names(files, label_names)
    return [
        file.class_table(label_names, names).select(SCHEMA.names)
        for file, names in zip(files, by_name, strict=True)
    ]


def load_files(config: TaskConfig) -> Corpus:
    """Read the task `files`; splits without a file of their own are drawn from the train file."""
    assert config.train_file is not None  # checked by the config
    splits_of: dict[str, list[str]] = {}
    for split in SPLITS:
        template = getattr(config, f"{split}_file") or config.train_file
        splits_of.setdefault(template, []).append(split)
    files_of = {
        template: _read_languages(template, config, splits)
        for template, splits in splits_of.items()
    }
    label_names = _distinct_labels(file for files in files_of.values() for file in files)
    if len(label_names) < 2:
        raise ValueError(
            f"{config.train_file}: expected two labels or more, got only {label_names[0]}"
        )
    pools = [
        Pool(
            pa.concat_tables(
                [file.numbered_table(_numbered(label_names)) for file in files_of[template]]
            ),
            tuple(splits),
        )
        for template, splits in splits_of.items()
    ]
    check_disjoint(pools)
    return Corpus(label_names, config.parallel, pools)


def _read_languages(template: str, config: TaskConfig, splits: list[str]) -> list[_RawFile]:
    """Read a file of all languages, or one file per language that a split needs."""
    if "{language}" not in template:
        return [warn_of_notes(_RawFile.read(template, config.columns, None))]
    files = []
    needed = {language for split in splits for language in config.languages_of(split)}
    for language in [language for language in config.languages if language in needed]:
        path = template.replace("{language}", language)
        file = warn_of_notes(_RawFile.read(path, config.columns, language))
        # Parallel files usually number their rows alike; ids must differ between languages.
        file.values["id"] = [f"{language}-{number}" for number in file.values["id"]]
        files.append(file)
    return files


def check_disjoint(pools: list[Pool]) -> None:
    """Check that no example is in two pools."""
    pool_of: dict[tuple[Any, ...], Pool] = {}
    columns = ["id", "language", "text_a", "text_b"]
    for pool in pools:
        values: list[list[Any]] = [pool.table[name].to_pylist() for name in columns]
        for example in zip(*values, strict=True):
            if pool_of.setdefault(example, pool) is not pool:
                raise ValueError(
                    f"example {example[0]!r}: expected in one file only, got it in the file for "
                    f"{', '.join(pool_of[example].splits)} and in the file for "
                    f"{', '.join(pool.splits)}"
                )


@dataclass(frozen=True)
class _RawFile:
    """The checked rows of a file under our column names, with labels as text.

    Attributes:
        path: the file.
        lines: the line number of each row.
        values: column name -> value of each row.
        label_kinds: what the label of each row is in the file: text, number, boolean, list, or
            stated (a number that the schema of the file has a name for; its value is the name).
        class_names: the names of the label numbers, if the schema of the file states them.
        names_in_file: the names of the columns in the file.
        has_languages: whether the file states the language of its rows.
        notes: sentences on what the file does not say, and on what was made of its texts.
    """

    path: Path
    lines: list[int]
    values: dict[str, list[Any]]
    label_kinds: list[str]
    class_names: list[str] | None
    names_in_file: list[str]
    has_languages: bool
    notes: list[str]

    @classmethod
    def read(
        cls,
        path: str | Path,
        columns: Mapping[str, str],
        language: str | None,
        *,
        required: bool = True,
        refused: Collection[str] = (),
        label_lists: bool = False,
    ) -> _RawFile:
        """Read and check a file.

        Args:
            path: the file.
            columns: our column name -> the name in the file, where they differ.
            language: the language of all rows (if not `required`: of a file without a language
                column), or None.
            required: whether the file must have ids and languages; if not, see `choose_columns`.
            refused: columns that the file must not have.
            language: the language of all rows, or None if the file has a language column.
            label_lists: whether labels may be lists; they become JSON text, of the kind list.

        Raises:
            ValueError: an unknown or a missing column, no rows, or a malformed row.
        """
        check_columns(columns, POOL_SCHEMA.names)
        names = {name: columns.get(name, name) for name in POOL_SCHEMA.names}
        names_in_file: list[str] = []
        notes: list[str] = []
        values: dict[str, list[Any]] = {name: [] for name in POOL_SCHEMA.names}
        lines: list[int] = []
        unquoted: list[int] = []
        label_kinds: list[str] = []
        class_names: list[str] | None = None
        language_names: list[str] | None = None
        ids: set[str] = set()
        is_tsv = ".tsv" in [suffix.lower() for suffix in Path(path).suffixes[-2:]]
        for row_number, (line, row) in enumerate(read_rows(path)):
            fault = None
            # Later rows of JSON lines may leave out empty values, and have further columns.
            new_names = [name for name in row if name not in names_in_file]
            if new_names:
                names_in_file += new_names
                check_refused(path, new_names, refused)
            if not required and (new_names or not row_number):
                choice = choose_columns(path, names_in_file, columns, language)
                late = {"id", "language"} & (choice.names.keys() - names.keys())
                if row_number and late:
                    fault = f"column {', '.join(late)}, which the first row does not have"
                # A second text or a group may also come later.
                optional = {name: columns.get(name, name) for name in ("text_b", "group")}
                names, notes = optional | choice.names, choice.notes
            if not row_number:
                if required:
                    _check_required(path, names_in_file, names, columns, language)
                stated = stated_class_names(path)
                class_names = stated.get(names["label"])
                language_names = stated.get(names.get("language", ""))
            cells = {name: row.get(names.get(name, "")) for name in POOL_SCHEMA.names}
            if "id" not in names:
                cells["id"] = str(row_number)
            if "language" not in names or (required and language is not None):
                cells["language"] = NO_LANGUAGE if language is None else language
            elif language_names is not None:
                cells["language"] = stated_name(cells["language"], language_names)
            kind = _label_kind(cells["label"])
            list_text = label_list_text(cells["label"], class_names) if label_lists else None
            if list_text is not None:
                kind, cells["label"] = "list", list_text
            fault = fault or clean(cells)
            if fault is None and is_tsv and _unquote(cells):
                unquoted.append(line)
            if fault is None and class_names is not None and kind == "number":
                kind, number = "stated", str(cells["label"])
                if are_numbers([number]) and int(number) < len(class_names):
                    cells["label"] = class_names[int(number)]
                else:
                    fault = (
                        f"unknown label {number}, expected a number from 0 to "
                        f"{len(class_names) - 1}: the schema names {', '.join(class_names)}"
                        f"{_mark_of(number)}"
                    )
            if fault is None and cells["id"] in ids:
                fault = f"id {cells['id']!r} occurs twice"
            if fault is not None:
                raise ValueError(f"{path}:{line}: {fault}")
            ids.add(str(cells["id"]))
            lines.append(line)
            label_kinds.append(kind)
            for name, value in cells.items():
                values[name].append(value)
        if not lines:
            raise ValueError(f"{path}: expected examples, got none")
        texts = values["text_b"]
        if any(texts) and not all(texts):
            line = lines[texts.index(None)]
            raise ValueError(f"{path}:{line}: empty text_b, but other rows have one")
        if unquoted:
            # A new list: `choose_columns` made the other one.
            notes = [
                *notes,
                f"{path}: {len(unquoted)} rows have a text that is quoted as in CSV, first in line "
                f"{unquoted[0]}; its quotation marks were removed",
            ]
        has_languages = names.get("language") in names_in_file
        return cls(
            Path(path), lines, values, label_kinds, class_names, names_in_file, has_languages, notes
        )

    def labels(self, kind: str) -> set[str]:
        """Return the distinct labels of a kind."""
        pairs = zip(self.values["label"], self.label_kinds, strict=True)
        return {label for label, label_kind in pairs if label_kind == kind}

    def numbered_table(self, number_of: Mapping[str, int]) -> pa.Table:
        """Return the rows with `POOL_SCHEMA`, with the class number of every label, as text."""
        numbers = [number_of[label] for label in self.values["label"]]
        return pa.table(self.values | {"label": numbers}, POOL_SCHEMA)

    def class_table(self, label_names: Sequence[str], text_is_names: bool) -> pa.Table:
        """Return the rows as a table with `POOL_SCHEMA`, labels as class numbers.

        Args:
            label_names: the names of the classes.
            text_is_names: whether labels of the kind text are names of classes, not numbers.

        Raises:
            ValueError: a label is neither.
        """
        number_of: dict[tuple[str, str], int | None] = {}
        numbers = []
        for line, label, kind in zip(
            self.lines, self.values["label"], self.label_kinds, strict=True
        ):
            if (label, kind) not in number_of:
                number_of[label, kind] = self._class_number(label, kind, label_names, text_is_names)
            number = number_of[label, kind]
            if number is None:
                expected = f"one of {', '.join(label_names)}, or their numbers from 0"
                if kind == "boolean":
                    expected += " (a boolean only for two classes without names)"
                raise ValueError(
                    f"{self.path}:{line}: unknown label {shown(label)}, expected "
                    f"{expected}{_mark_of(label)}"
                )
            numbers.append(number)
        return pa.table(self.values | {"label": numbers}, POOL_SCHEMA)

    def _class_number(
        self, label: str, kind: str, label_names: Sequence[str], text_is_names: bool
    ) -> int | None:
        """Return the class of a label, or None if it has none."""
        if kind == "boolean":
            name = _boolean_name(label, label_names)
            if name is not None:
                return label_names.index(name)
            # A name such as `not_entailment` for class 1 may mean either.
            unnamed = len(label_names) == 2 and are_unnamed(label_names)
            return int(label == "True") if unnamed else None
        if kind == "stated" and self.class_names is not None:
            if not stated_by_number(self.class_names, label_names):
                return label_names.index(label) if label in label_names else None
            label = str(self.class_names.index(label))
        if kind == "text" and text_is_names:
            name = _boolean_name(label, label_names) or label
            return label_names.index(name) if name in label_names else None
        return int(label) if are_numbers([label]) and int(label) < len(label_names) else None

    def target_table(self) -> pa.Table:
        """Return the rows with `POOL_SCHEMA`, but labels as float64, the targets of a regression.

        Raises:
            ValueError: a label is not a number, or too large for float32.
        """
        targets = []
        for line, label, kind in zip(
            self.lines, self.values["label"], self.label_kinds, strict=True
        ):
            target = target_of(label) if kind in ("text", "number") else None
            if target is None:
                raise ValueError(
                    f"{self.path}:{line}: unknown label {shown(label)}, expected a finite number, "
                    "because the model has one output"
                )
            targets.append(target)
        label_field = pa.field("label", pa.float64())
        schema = POOL_SCHEMA.set(POOL_SCHEMA.get_field_index("label"), label_field)
        return pa.table(self.values | {"label": targets}, schema)

    def vector_table(self, kind: LossKind, label_names: Sequence[str]) -> pa.Table:
        """Return the rows with `POOL_SCHEMA`, but labels as lists of float64, one per output.

        Raises:
            ValueError: a label is no such list.
        """
        vectors = []
        for line, label, label_kind in zip(
            self.lines, self.values["label"], self.label_kinds, strict=True
        ):
            vector = label_vector(label, kind, label_names) if label_kind == "list" else None
            if vector is None:
                raise ValueError(
                    f"{self.path}:{line}: unknown label {label}, expected "
                    f"{expected_label_list(kind, label_names)}"
                )
            vectors.append(vector)
        label_field = pa.field("label", pa.list_(pa.float64()))
        schema = POOL_SCHEMA.set(POOL_SCHEMA.get_field_index("label"), label_field)
        return pa.table(self.values | {"label": vectors}, schema)


def target_of(text: str) -> float | None:
    """Return the number that a text is, or None if it is none or not finite in float32."""
    # Not float() alone, which takes `1_000`, `nan` and the digits of other scripts.
    if re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text) is None:
        return None
    number = float(text)
    return number if abs(number) <= LARGEST_TARGET else None


def target_text(target: float) -> str:
    """Return the text of a target, without decimals where it is whole."""
    return repr(float(target)).removesuffix(".0")


def _check_required(
    path: str | Path,
    names_in_file: Sequence[str],
    names: Mapping[str, str],
    columns: Mapping[str, str],
    language: str | None,
) -> None:
    """Refuse a file without ids, texts, labels, languages or a column that was mapped."""
    required = {"id", "text_a", "label", *columns} | ({"language"} if language is None else set())
    missing = sorted({names[name] for name in required} - set(names_in_file))
    if missing:
        raise ValueError(
            f"{path}: expected a column {', '.join(missing)}, got {shown_names(names_in_file)}"
        )


def check_refused(path: str | Path, names_in_file: Sequence[str], refused: Collection[str]) -> None:
    """Refuse a file with columns that the model takes and that are not passed to it."""
    inputs = [name for name in names_in_file if name in refused]
    if inputs:
        raise ValueError(
            f"{path}: column {', '.join(inputs)}: expected none of the inputs of the model, which "
            "takes only texts from a file"
        )


def stated_name(number: Any, names: Sequence[str]) -> Any:
    """Return the name that a schema states for a number; anything else as it is."""
    is_known = type(number) is int and 0 <= number < len(names)
    return names[number] if is_known else number


def _unquote(cells: dict[str, Any]) -> bool:
    """Take the marks off the texts of a row of TSV that are quoted as in CSV, and say if any were.

    Published TSV is often written by a CSV writer, which quotes a text that has quotation marks in
    it and doubles these. A text that only begins and ends with marks is left as it is.
    """
    quoted = [
        name
        for name in ("text_a", "text_b")
        if cells[name] is not None and QUOTED_AS_IN_CSV.fullmatch(cells[name].strip())
    ]
    for name in quoted:
        cells[name] = cells[name].strip()[1:-1].replace('""', '"')
    return bool(quoted)


def warn_of_notes(file: _RawFile) -> _RawFile:
    """Return a file of a study after warning of what was made of it."""
    for note in file.notes:
        warnings.warn(note, stacklevel=3)
    return file


def _mark_of(label: Any) -> str:
    """Return what a label that is no class usually means, to follow it in a message."""
    marks = {"-1": "examples without a label", "-100": "examples that a loss leaves out"}
    return f"; {label} is the usual mark of {marks[label]}" if label in marks else ""


def _label_kind(label: Any) -> str:
    """Return what a label is in its file: boolean, number or text."""
    if isinstance(label, bool):
        return "boolean"
    return "number" if isinstance(label, (int, float, Decimal)) else "text"


def clean(row: dict[str, Any]) -> str | None:
    """Convert the values of a row to text in place, and return what is wrong with it, if anything.

    Blank values become None.
    """
    for name in ("id", "language", "group", "split_group", "label"):
        value = row[name]
        if isinstance(value, (list, tuple, dict, bytes)):
            return f"{name} is neither text nor a number: {shown(value)}"
        if name == "language" and isinstance(value, bool):
            return f"language is not text: {value} (an unquoted `no` of YAML is false)"
        if isinstance(value, (float, Decimal)):
            if not math.isfinite(value):
                return f"{name} is not finite: {value}"
            if value == int(value):
                value = int(value)  # readers give a column of whole numbers with gaps as floats
        row[name] = ("" if value is None else str(value).strip()) or None
    for name in ("id", "language", "label"):
        if row[name] is None:
            return f"no {name}"
    for name in ("text_a", "text_b"):
        if row[name] is not None and not isinstance(row[name], str):
            return f"{name} is not text: {shown(row[name])}"
        row[name] = row[name] if row[name] and not row[name].isspace() else None
    for name, value in row.items():
        fault = None if value is None else text_fault(value)
        if fault is not None:
            return f"{name} {fault}"
    return "empty text_a" if row["text_a"] is None else None


def _numbered(label_names: Sequence[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(label_names)}


def are_numbers(labels: Iterable[str]) -> bool:
    return all(
        label.isascii() and label.isdigit() and len(label) <= MOST_DIGITS for label in labels
    )


def are_unnamed(label_names: Sequence[str]) -> bool:
    """Return whether names of classes are their numbers only, as transformers gives them."""
    pattern = re.compile(r"(?:label_)?([0-9]+)", re.IGNORECASE)
    matches = [pattern.fullmatch(name) for name in label_names]
    return all(match and match[1] == str(number) for number, match in enumerate(matches))


def _boolean_name(label: str, label_names: Sequence[str]) -> str | None:
    """Return the class that is named true or false like a label, in any case."""
    if label in label_names or label.casefold() not in ("true", "false"):
        return label if label in label_names else None
    same = [name for name in label_names if name.casefold() == label.casefold()]
    return same[0] if len(same) == 1 else None


def stated_by_number(class_names: Sequence[str], label_names: Sequence[str]) -> bool:
    """Return whether the numbers of a file are a model's, because one of both has no names."""
    if set(class_names) <= set(label_names):
        return False
    return are_unnamed(class_names) or are_unnamed(label_names)


def _check_stated_names(files: Sequence[_RawFile], label_names: Sequence[str]) -> None:
    """Refuse files whose schemas give the same numbers other names, where numbers count."""
    stated = [
        (file.path, file.class_names)
        for file in files
        if file.class_names is not None and stated_by_number(file.class_names, label_names)
        and not are_unnamed(file.class_names)
    ]  # fmt: skip
    for path, class_names in stated[1:]:
        if class_names != stated[0][1]:
            raise ValueError(
                f"{path}: expected the classes {', '.join(stated[0][1])} in its schema, as in "
                f"{stated[0][0]}, got {', '.join(class_names)}; the model has no names that could "
                "tell which are which"
            )


def _text_is_names(files: Sequence[_RawFile], label_names: Sequence[str]) -> list[bool]:
    """Return, for each file, whether labels that are text are names of classes, not numbers."""
    texts = [
        {_boolean_name(label, label_names) or label for label in file.labels("text")}
        for file in files
    ]
    labels, names = set().union(*texts), set(label_names)
    if not labels <= names:
        # In one file names, in another one numbers; or else a label that is neither.
        numbers = are_numbers(labels)
        return [not numbers and (own <= names or not are_numbers(own)) for own in texts]
    digits = [str(number) for number in range(len(label_names))]
    # Numbers beside names that are numbers, too: were they meant as names?
    typed = {
        label
        for file in files
        for label in file.labels("number")
        if labels and label in names and label_names.index(label) != int(label)
    }
    ambiguous = labels <= set(digits) and any(label_names[int(label)] != label for label in labels)
    if ambiguous or typed:
        raise ValueError(
            f"{files[0].path}: labels {', '.join(sorted(labels | typed))} are names of the classes "
            f"{', '.join(label_names)} and could also be their numbers from 0; "
            f"write class numbers as numbers, in JSON lines or Parquet"
        )
    return [True] * len(files)


def _distinct_labels(files: Iterable[_RawFile]) -> list[str]:
    """Return the labels of the files, in the order of their schemas, of numbers or of text."""
    files = list(files)
    labels = {label for file in files for label in file.values["label"]}
    stated = files[0].class_names
    if stated is not None and all(file.class_names == stated for file in files):
        return [name for name in stated if name in labels]
    return sorted(labels, key=int) if are_numbers(labels) else sorted(labels)
