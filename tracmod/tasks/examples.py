"""The schema of examples, and the containers that hold a task's data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

SPLITS = ("train", "dev", "test")
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("language", pa.string()),
        ("text_a", pa.string()),
        ("text_b", pa.string()),
        ("label", pa.int64()),
        ("group", pa.string()),
    ]
)
# Examples before they are split: `split_group` (null: `group`, else `id`) stays in one split.
POOL_SCHEMA = SCHEMA.append(pa.field("split_group", pa.string()))


@dataclass(frozen=True)
class TaskData:
    """A task's sampled examples.

    Attributes:
        name: the task's name.
        label_names: one per class, in the order of the labels 0, 1, ...
        languages: in the order asked for.
        parallel: `group` names the same item in every language.
        train, dev, test: tables with `SCHEMA`; ids are unique within a table, and no group is in
            two tables (but with `test_from_train`, where every test group is in train).
        known: further tables by name, of a task whose influence has known answers.
    """

    name: str
    label_names: list[str]
    languages: list[str]
    parallel: bool
    train: pa.Table
    dev: pa.Table
    test: pa.Table
    known: Mapping[str, pa.Table] = field(default_factory=dict)


def check_classes(data: TaskData) -> TaskData:
    """The data, after a check that there is something to learn, and to lose by pruning.

    Raises:
        ValueError: all training examples, or all dev examples of a language, are of one class.
    """
    _check_two_classes(data.train, data.label_names, "train")
    for language in data.languages:
        own = data.dev.filter(pc.equal(data.dev["language"], language))
        _check_two_classes(own, data.label_names, f"dev, language {language}")
    return data


def _check_two_classes(table: pa.Table, label_names: list[str], where: str) -> None:
    found = pc.unique(table["label"]).to_pylist()
    if len(found) == 1 and len(table) > 1:
        raise ValueError(
            f"task: {where}: expected examples of several classes, got {len(table)}, all "
            f"{label_names[found[0]]}"
        )


@dataclass(frozen=True)
class Pool:
    """Examples (`POOL_SCHEMA`) that one or several splits are drawn from."""

    table: pa.Table
    splits: tuple[str, ...]


@dataclass(frozen=True)
class Corpus:
    """All there is of a task, before sampling; groups of different pools are different items."""

    label_names: list[str]
    parallel: bool
    pools: list[Pool]


def pool_from_rows(rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """A table with `POOL_SCHEMA` from rows by column name; what a row leaves out is null."""
    columns: dict[str, list[Any]] = {name: [] for name in POOL_SCHEMA.names}
    for row in rows:
        for name, values in columns.items():
            values.append(row.get(name))
    return pa.table(columns, POOL_SCHEMA)


def rows_digest(table: pa.Table, start: int, stop: int) -> str:
    """SHA-256 of rows [start, stop): of what they say, not of the file that says it."""
    digest = hashlib.sha256()
    for name in table.column_names:
        values = table[name].slice(start, stop - start).to_pylist()
        digest.update(json.dumps([name, values]).encode())
    return digest.hexdigest()
