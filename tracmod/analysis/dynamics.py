"""The course of influence over the epochs, and of the reliance on the own language."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from tracmod.analysis.languages import MEASURES, pivot_examples

EPOCH_SCHEMA = pa.schema(
    [
        ("epoch", pa.int64()),
        ("test_language", pa.string()),
        ("train_language", pa.string()),
        *((measure, pa.float64()) for measure in MEASURES),
    ]
)

COURSE_SCHEMA = pa.schema(
    [
        ("epoch", pa.int64()),
        ("test_language", pa.string()),
        ("share_positive", pa.float64()),
        ("share_negative", pa.float64()),
        ("mean_influence", pa.float64()),
        ("mean_influence_others", pa.float64()),
    ]
)


def epoch_table(examples_of_epoch: Mapping[int, pa.Table]) -> pa.Table:
    """Build `epochs.parquet`: means per test language at the checkpoint of each epoch alone.

    Args:
        examples_of_epoch: epoch -> `example_table` of the influence at its checkpoint.

    Returns:
        A table with `EPOCH_SCHEMA`.
    """
    rows: dict[str, list[Any]] = {name: [] for name in EPOCH_SCHEMA.names}
    for epoch, examples in sorted(examples_of_epoch.items()):
        pivot = pivot_examples(examples)
        languages = np.array(pivot.test_languages)
        for language in dict.fromkeys(pivot.test_languages):
            rows["epoch"] += [epoch] * len(pivot.train_languages)
            rows["test_language"] += [language] * len(pivot.train_languages)
            rows["train_language"] += pivot.train_languages
            for measure in MEASURES:
                means = pivot.measures[measure][languages == language].mean(axis=0)
                rows[measure] += means.tolist()
    return pa.table(rows, schema=EPOCH_SCHEMA)


def in_language_course(epochs: pa.Table) -> pa.Table:
    """Select each test language's reliance on its own training data, epoch by epoch.

    Args:
        epochs: result of `epoch_table`.

    Returns:
        A table with `COURSE_SCHEMA`, one row per epoch and test language with training data.
        `mean_influence_others` is the mean over the other training languages.
    """
    rows = []
    others: dict[tuple[int, str], list[float]] = {}
    for row in epochs.to_pylist():
        key = (row["epoch"], row["test_language"])
        if row["train_language"] == row["test_language"]:
            rows.append(row)
        else:
            others.setdefault(key, []).append(row["mean_influence"])
    for row in rows:
        values = others.get((row["epoch"], row["test_language"]))
        row["mean_influence_others"] = float(np.mean(values)) if values else None
    columns = {name: [row[name] for row in rows] for name in COURSE_SCHEMA.names}
    return pa.table(columns, schema=COURSE_SCHEMA)
