"""The user's own example files: any file with the contract's columns, checked row by row."""

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
        path: TSV (no quoting), CSV, JSON lines or Parquet, or one of them gzipped.
        columns: our column name -> the file's, where they differ.
        language: of all rows; the file then needs no language column.
        label_names: the classes. Numbers (of JSON or Parquet) are class numbers; text that is
            always the name of a class is that class, other text is class numbers. None: whole
            numbers are class numbers, and text stands for its place among the labels, sorted.

    Returns:
        A table with `SCHEMA`, rows in the file's order.

    Raises:
        ValueError: a malformed row, named by file and line.
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
    """`read_model_files` of one file."""
    return read_model_files([path], label_names)[0]


def read_model_files(paths: Sequence[str | Path], label_names: Sequence[str]) -> list[pa.Table]:
    """Read files of examples whose labels are a model's classes, by name or by number.

    Whether labels are names or numbers is decided for all files together: a model of stars 1 to 5
    has classes 0 to 4, and a file that happens to hold only 3 and 4 does not say which they are.

    Args:
        paths: as for `read_examples`.
        label_names: the model's `id2label`, in the order of the classes; a single name is a
            model of one output, whose labels are any whole numbers.

    Raises:
        ValueError: a malformed row, named by file and line, or labels that are both names and
            numbers of classes, and not the same ones.
    """
    files = [_RawFile.read(path, {}, None) for path in paths]
    by_name = _labels_are_names(files, label_names)
    return [file.table(label_names, by_name).select(SCHEMA.names) for file in files]


def load_files(config: TaskConfig) -> Corpus:
    """Read the `files` task; splits without a file of their own come from the train file."""
    assert config.train_file is not None  # the config has seen to it
    splits_of: dict[str, list[str]] = {}
    for split in SPLITS:
        template = getattr(config, f"{split}_file") or config.train_file
        splits_of.setdefault(template, []).append(split)
    raw = {
        template: _read_languages(template, config, splits)
        for template, splits in splits_of.items()
    }
    names = _distinct_labels(file for files in raw.values() for file in files)
    if len(names) < 2:
        raise ValueError(f"{config.train_file}: expected two labels or more, got only {names[0]}")
    pools = [
        Pool(pa.concat_tables([file.table(names) for file in raw[template]]), tuple(splits))
        for template, splits in splits_of.items()
    ]
    _refuse_shared_examples(pools)
    return Corpus(names, config.parallel, pools)


def _read_languages(template: str, config: TaskConfig, splits: list[str]) -> list[_RawFile]:
    if "{language}" not in template:
        return [_RawFile.read(template, config.columns, None)]
    files = []
    needed = {language for split in splits for language in config.languages_of(split)}
    for language in [language for language in config.languages if language in needed]:
        path = template.replace("{language}", language)
        file = _RawFile.read(path, config.columns, language)
        file.values["id"] = [f"{language}-{number}" for number in file.values["id"]]
        files.append(file)
    return files


def _refuse_shared_examples(pools: list[Pool]) -> None:
    seen: dict[tuple[Any, ...], Pool] = {}
    columns = ["id", "language", "text_a", "text_b"]
    for pool in pools:
        values: list[list[Any]] = [pool.table[name].to_pylist() for name in columns]
        for row in zip(*values, strict=True):
            if seen.setdefault(row, pool) is not pool:
                raise ValueError(
                    f"example {row[0]!r} stands in the file for {', '.join(seen[row].splits)} and "
                    f"in the file for {', '.join(pool.splits)}: expected no example in two splits"
                )


@dataclass(frozen=True)
class _RawFile:
    """A file's checked rows by our column names, labels still as the text that stands there."""

    path: Path
    lines: list[int]
    values: dict[str, list[Any]]
    typed: list[bool]  # whether the label stood there as a number, not as text

    @classmethod
    def read(cls, path: str | Path, columns: Mapping[str, str], language: str | None) -> _RawFile:
        file = cls(Path(path), [], {name: [] for name in POOL_SCHEMA.names}, [])
        theirs = _their_names(columns)
        ids: set[str] = set()
        for line, row in read_rows(path):
            if not file.lines:
                file._require_columns(row, columns, language)
            ours = {name: row.get(their_name) for name, their_name in theirs.items()}
            if language is not None:
                ours["language"] = language
            file.typed.append(isinstance(ours["label"], (int, float)))
            fault = _clean(ours)
            if fault is None and ours["id"] in ids:
                fault = f"id {ours['id']!r} stands twice"
            if fault is not None:
                raise ValueError(f"{path}:{line}: {fault}")
            ids.add(str(ours["id"]))
            file.lines.append(line)
            for name, value in ours.items():
                file.values[name].append(value)
        file._check_text_b()
        return file

    def _require_columns(
        self, row: Mapping[str, Any], columns: Mapping[str, str], language: str | None
    ) -> None:
        needed = {"id", "text_a", "label", *columns}
        needed |= {"language"} if language is None else set()
        theirs = _their_names(columns)
        missing = sorted(theirs[name] for name in needed if theirs[name] not in row)
        if missing:
            raise ValueError(
                f"{self.path}: expected a column {', '.join(missing)}, got {', '.join(row)}"
            )

    def _check_text_b(self) -> None:
        if not self.lines:
            raise ValueError(f"{self.path}: expected examples, got none")
        texts = self.values["text_b"]
        if any(texts) and not all(texts):
            line = self.lines[texts.index(None)]
            raise ValueError(f"{self.path}:{line}: empty text_b, where other rows have one")

    def table(self, label_names: Sequence[str], by_name: bool = True) -> pa.Table:
        """The rows with `POOL_SCHEMA`, labels as class numbers."""
        numbers = self._class_numbers(label_names, by_name)
        return pa.table(self.values | {"label": numbers}, POOL_SCHEMA)

    def _class_numbers(self, label_names: Sequence[str], by_name: bool) -> list[int]:
        labels = self.values["label"]
        number_of = {name: number for number, name in enumerate(label_names)}
        if by_name and all(label in number_of for label in set(labels)):
            return [number_of[label] for label in labels]
        # A single name is a model of one output: its labels are values, not classes.
        limit = len(label_names) if len(label_names) != 1 else None
        all_numbers = _are_numbers(labels)
        for line, label in zip(self.lines, labels, strict=True):
            known = limit is None or int(label) < limit if all_numbers else label in number_of
            if not known:
                raise ValueError(
                    f"{self.path}:{line}: unknown label {label!r}, expected one of "
                    f"{', '.join(label_names)}, or their numbers from 0"
                )
        return [int(label) for label in labels]


def _their_names(columns: Mapping[str, str]) -> dict[str, str]:
    unknown = sorted(set(columns) - set(POOL_SCHEMA.names))
    if unknown:
        raise ValueError(
            f"columns: expected names among {', '.join(POOL_SCHEMA.names)}, "
            f"got {', '.join(unknown)}"
        )
    return {name: columns.get(name, name) for name in POOL_SCHEMA.names}


def _clean(row: dict[str, Any]) -> str | None:
    """Bring a row's values to our types in place; say what is wrong with it, if anything is."""
    for name in ("id", "language", "group", "split_group", "label"):
        row[name] = _as_text(row[name])
    for name in ("id", "language", "label"):
        if row[name] is None:
            return f"no {name}"
    for name in ("text_a", "text_b"):
        if row[name] is not None and not isinstance(row[name], str):
            return f"{name} is not text: {row[name]!r}"
        row[name] = row[name] if row[name] and not row[name].isspace() else None
    return "empty text_a" if row["text_a"] is None else None


def _as_text(value: Any) -> str | None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of whole numbers with gaps is read as floats elsewhere
    text = "" if value is None else str(value).strip()
    return text or None


def _are_numbers(labels: Iterable[str]) -> bool:
    return all(label.isascii() and label.isdigit() for label in labels)


def _labels_are_names(files: Sequence[_RawFile], label_names: Sequence[str]) -> bool:
    """Whether the files' labels are names of classes rather than their numbers."""
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
    labels = {label for file in files for label in file.values["label"]}
    return sorted(labels, key=int) if _are_numbers(labels) else sorted(labels)
