"""Example files of users: the columns of `SCHEMA` under any names, checked row by row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from tracmod.config import TaskConfig
from tracmod.tasks.examples import POOL_SCHEMA, SCHEMA, SPLITS, Corpus, Pool
from tracmod.tasks.readers import read_rows


def read_examples(
    path: str | Path,
    columns: Mapping[str, str] | None = None,
    language: str | None = None,
    label_names: Sequence[str] | None = None,
) -> pa.Table:
    """Read and check one file of examples.

    Args:
        path: TSV (without quoting), CSV, JSON lines or Parquet, each also gzipped.
        columns: our column name -> the name in the file, where they differ.
        language: the language of all rows; the file then needs no language column.
        label_names: the names of the classes. Numbers (of JSON or Parquet) are class numbers. Text
            is the name of a class if all labels of the file are names, and a class number
            otherwise. With None, whole numbers are class numbers, and other labels are numbered in
            sorted order.

    Returns:
        A table with `SCHEMA`, rows in the order of the file.

    Raises:
        ValueError: a malformed row; the message names file and line.
    """
    file = _RawFile.read(path, columns or {}, language)
    if label_names is None:
        label_names = _distinct_labels([file])
        if _are_numbers(label_names):
            label_names = [str(number) for number in range(int(label_names[-1]) + 1)]
        return file.table(label_names).select(SCHEMA.names)
    by_name = _labels_are_names([file], label_names)
    return file.table(label_names, by_name).select(SCHEMA.names)


def read_model_examples(path: str | Path, label_names: Sequence[str]) -> pa.Table:
    """Read one file of examples whose labels are the classes of a model; see `read_model_files`."""
    return read_model_files([path], label_names)[0]


def read_model_files(paths: Sequence[str | Path], label_names: Sequence[str]) -> list[pa.Table]:
    """Read files of examples whose labels are the classes of a model, by name or by number.

    Whether labels are names or numbers is decided for all files together, because one file may not
    tell: if the classes 0 to 4 have the names 1 to 5, a file with the labels 3 and 4 only is
    ambiguous.

    Args:
        paths: files, as for `read_examples`.
        label_names: the model's `id2label`, in the order of the classes. With a single name the
            model has one output, and labels are any whole numbers.

    Raises:
        ValueError: a malformed row (the message names file and line), or labels that could be both
            names and numbers, of different classes.
    """
    files = [_RawFile.read(path, {}, None) for path in paths]
    by_name = _labels_are_names(files, label_names)
    return [file.table(label_names, by_name).select(SCHEMA.names) for file in files]


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
            pa.concat_tables([file.table(label_names) for file in files_of[template]]),
            tuple(splits),
        )
        for template, splits in splits_of.items()
    ]
    _check_disjoint(pools)
    return Corpus(label_names, config.parallel, pools)


def _read_languages(template: str, config: TaskConfig, splits: list[str]) -> list[_RawFile]:
    """Read a file of all languages, or one file per language that a split needs."""
    if "{language}" not in template:
        return [_RawFile.read(template, config.columns, None)]
    files = []
    needed = {language for split in splits for language in config.languages_of(split)}
    for language in [language for language in config.languages if language in needed]:
        path = template.replace("{language}", language)
        file = _RawFile.read(path, config.columns, language)
        # Parallel files usually number their rows alike; ids must differ between languages.
        file.values["id"] = [f"{language}-{number}" for number in file.values["id"]]
        files.append(file)
    return files


def _check_disjoint(pools: list[Pool]) -> None:
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
        typed: whether the label of each row is a number in the file, rather than text.
    """

    path: Path
    lines: list[int]
    values: dict[str, list[Any]]
    typed: list[bool]

    @classmethod
    def read(cls, path: str | Path, columns: Mapping[str, str], language: str | None) -> _RawFile:
        """Read and check a file.

        Args:
            path: the file.
            columns: our column name -> the name in the file, where they differ.
            language: the language of all rows, or None if the file has a language column.

        Raises:
            ValueError: an unknown or a missing column, no rows, or a malformed row.
        """
        unknown = sorted(set(columns) - set(POOL_SCHEMA.names))
        if unknown:
            raise ValueError(
                f"columns: expected names among {', '.join(POOL_SCHEMA.names)}, "
                f"got {', '.join(unknown)}"
            )
        names_in_file = {name: columns.get(name, name) for name in POOL_SCHEMA.names}
        required = {"id", "text_a", "label", *columns}
        if language is None:
            required.add("language")
        file = cls(Path(path), [], {name: [] for name in POOL_SCHEMA.names}, [])
        ids: set[str] = set()
        for line, row in read_rows(path):
            # Checked in the first row only: later rows of JSON lines may leave out empty values.
            if not file.lines:
                missing = sorted({names_in_file[name] for name in required} - set(row))
                if missing:
                    raise ValueError(
                        f"{path}: expected a column {', '.join(missing)}, got {', '.join(row)}"
                    )
            values = {name: row.get(name_in_file) for name, name_in_file in names_in_file.items()}
            if language is not None:
                values["language"] = language
            file.typed.append(isinstance(values["label"], (int, float)))
            fault = _clean(values)
            if fault is None and values["id"] in ids:
                fault = f"id {values['id']!r} occurs twice"
            if fault is not None:
                raise ValueError(f"{path}:{line}: {fault}")
            ids.add(str(values["id"]))
            file.lines.append(line)
            for name, value in values.items():
                file.values[name].append(value)
        if not file.lines:
            raise ValueError(f"{path}: expected examples, got none")
        texts = file.values["text_b"]
        if any(texts) and not all(texts):
            line = file.lines[texts.index(None)]
            raise ValueError(f"{path}:{line}: empty text_b, but other rows have one")
        return file

    def table(self, label_names: Sequence[str], by_name: bool = True) -> pa.Table:
        """Return the rows as a table with `POOL_SCHEMA`, labels as class numbers.

        Args:
            label_names: the names of the classes.
            by_name: whether labels may be names of classes; else they are class numbers.

        Raises:
            ValueError: a label is neither.
        """
        labels = self.values["label"]
        number_of = {name: number for number, name in enumerate(label_names)}
        if by_name and all(label in number_of for label in set(labels)):
            numbers = [number_of[label] for label in labels]
            return pa.table(self.values | {"label": numbers}, POOL_SCHEMA)
        # A single name stands for a model with one output, whose labels are values, not classes.
        limit = len(label_names) if len(label_names) != 1 else None
        all_numbers = _are_numbers(labels)
        for line, label in zip(self.lines, labels, strict=True):
            known = limit is None or int(label) < limit if all_numbers else label in number_of
            if not known:
                raise ValueError(
                    f"{self.path}:{line}: unknown label {label!r}, expected one of "
                    f"{', '.join(label_names)}, or their numbers from 0"
                )
        return pa.table(self.values | {"label": [int(label) for label in labels]}, POOL_SCHEMA)


def _clean(row: dict[str, Any]) -> str | None:
    """Convert the values of a row to text in place, and return what is wrong with it, if anything.

    Blank values become None.
    """
    for name in ("id", "language", "group", "split_group", "label"):
        value = row[name]
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # readers give a column of whole numbers with gaps as floats
        row[name] = ("" if value is None else str(value).strip()) or None
    for name in ("id", "language", "label"):
        if row[name] is None:
            return f"no {name}"
    for name in ("text_a", "text_b"):
        if row[name] is not None and not isinstance(row[name], str):
            return f"{name} is not text: {row[name]!r}"
        row[name] = row[name] if row[name] and not row[name].isspace() else None
    return "empty text_a" if row["text_a"] is None else None


def _are_numbers(labels: Iterable[str]) -> bool:
    return all(label.isascii() and label.isdigit() for label in labels)


def _labels_are_names(files: Sequence[_RawFile], label_names: Sequence[str]) -> bool:
    """Return whether the labels of the files are names of classes rather than their numbers."""
    if all(all(file.typed) for file in files):
        return False
    labels = set(_distinct_labels(files))
    numbers = [str(number) for number in range(len(label_names))]
    if not labels <= set(label_names):
        return False
    if labels <= set(numbers) and any(label_names[int(label)] != label for label in labels):
        raise ValueError(
            f"{files[0].path}: labels {', '.join(sorted(labels))} are names of the classes "
            f"{', '.join(label_names)} and could also be their numbers from 0; "
            f"write class numbers as numbers, in JSON lines or Parquet"
        )
    return True


def _distinct_labels(files: Iterable[_RawFile]) -> list[str]:
    """Return the labels of the files, sorted as numbers if all are numbers."""
    labels = {label for file in files for label in file.values["label"]}
    return sorted(labels, key=int) if _are_numbers(labels) else sorted(labels)
