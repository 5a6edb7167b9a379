"""The schema of examples, and the containers that hold the data of a task."""

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
# Examples before they are split. Examples with the same `split_group` stay in one split; where it
# is null, `group` takes its place, and then `id`.
POOL_SCHEMA = SCHEMA.append(pa.field("split_group", pa.string()))


@dataclass(frozen=True)
class TaskData:
    """The examples of a task, in splits.

    Attributes:
        name: the name of the task.
        label_names: the name of each class, in the order of the labels 0, 1, ...
        languages: the languages, in the order of the config.
        parallel: whether `group` identifies the same item in every language.
        tag_names: the names of the tags of words, in the order of their numbers, for a task of
            tokens; None for other tasks. The classes are then those of `sentence_classes`.
        train, dev, test: tables with `SCHEMA`. Ids are unique within a table. No group is in two
            tables, except with `test_from_train`, where every group of test is also in train.
        known: further tables by name, for a task with known answers.
    """

    name: str
    label_names: list[str]
    languages: list[str]
    parallel: bool
    train: pa.Table
    dev: pa.Table
    test: pa.Table
    known: Mapping[str, pa.Table] = field(default_factory=dict)
    tag_names: list[str] | None = None


def check_classes(data: TaskData) -> TaskData:
    """Return the data if training has something to learn, and pruning a score to lose.

    Raises:
        ValueError: all training examples, or all dev examples of a language, have the same label,
            or all of their words the same tag.
    """
    if "answer" in data.train.column_names:  # all questions have one class
        return data
    tables = {"train": data.train}
    for language in data.languages:
        in_language = pc.equal(data.dev["language"], language)
        tables[f"dev, language {language}"] = data.dev.filter(in_language)
    for name, table in tables.items():
        names, unit = data.label_names, "classes"
        labels = pc.unique(table["label"]).to_pylist()
        if data.tag_names is not None:
            names, unit = data.tag_names, "tags"
            tags = pc.unique(pc.list_flatten(table["tags"])).to_pylist()
            labels = [tag for tag in tags if tag >= 0]
        if len(labels) == 1 and len(table) > 1:
            raise ValueError(
                f"task: {name}: expected examples of several {unit}, got {len(table)}, all "
                f"{names[labels[0]]}"
            )
    return data


@dataclass(frozen=True)
class Pool:
    """Examples (`POOL_SCHEMA`) that one or several splits are drawn from."""

    table: pa.Table
    splits: tuple[str, ...]


@dataclass(frozen=True)
class Corpus:
    """All examples of a task, before its splits are drawn.

    Attributes:
        label_names: the name of each class, in the order of the labels 0, 1, ...
        parallel: whether `group` identifies the same item in every language.
        pools: the examples; groups of different pools are different items.
        tag_names: as in `TaskData`.
    """

    label_names: list[str]
    parallel: bool
    pools: list[Pool]
    tag_names: list[str] | None = None


def pool_from_rows(rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Return a table with `POOL_SCHEMA` of rows by column name; absent values are null."""
    columns: dict[str, list[Any]] = {name: [] for name in POOL_SCHEMA.names}
    for row in rows:
        for name, values in columns.items():
            values.append(row.get(name))
    return pa.table(columns, POOL_SCHEMA)


def rows_digest(table: pa.Table, start: int, stop: int) -> str:
    """Return the SHA-256 of the values in rows [start, stop), whatever file they come from."""
    digest = hashlib.sha256()
    for name in table.column_names:
        values = table[name].slice(start, stop - start).to_pylist()
        digest.update(json.dumps([name, values]).encode())
    return digest.hexdigest()
