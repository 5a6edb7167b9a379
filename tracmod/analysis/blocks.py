"""Influence by head and layer of a run, within and across languages, and the share of heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tracmod.analysis.results import MODELS, RunResults

BLOCK_SCHEMA = pa.schema(
    [
        ("model", pa.string()),
        ("view", pa.string()),
        ("layer", pa.int32()),
        ("head", pa.int32()),
        ("in_language", pa.float64()),
        ("cross_language", pa.float64()),
    ]
)


def block_table(run: RunResults) -> pa.Table | None:
    """Build `analysis/blocks.parquet`: the mean influence of every block, by model and view.

    `in_language` is the mean over languages of the influence of a language's training examples on
    its own test examples, `cross_language` the mean over pairs of two different languages; null
    where there is no such pair. layer and head are those of the run's `blocks.parquet`: without a
    head it is the rest of the layer, without a layer everything outside the layers.

    Returns:
        The table, or None if no view has a blocks.parquet.
    """
    rows = []
    for model in MODELS:
        for view in run.view_folders(model):
            path = run.path / "influence" / model / view / "blocks.parquet"
            if path.is_file():
                means = _block_means(pq.read_table(path).to_pylist())
                rows += [{"model": model, "view": view, **row} for row in means]
    return pa.Table.from_pylist(rows, schema=BLOCK_SCHEMA) if rows else None


def _block_means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the means of each block, from the rows of one blocks.parquet."""
    values: dict[tuple[int | None, int | None], dict[str, list[float]]] = {}
    for row in rows:
        kinds = values.setdefault(
            (row["layer"], row["head"]), {"in_language": [], "cross_language": []}
        )
        is_own = row["test_language"] == row["train_language"]
        kinds["in_language" if is_own else "cross_language"].append(row["influence"])
    return [
        {"layer": layer, "head": head}
        | {kind: float(np.mean(numbers)) if numbers else None for kind, numbers in kinds.items()}
        for (layer, head), kinds in values.items()
    ]


def block_shares(table: pa.Table) -> list[dict[str, Any]]:
    """Divide the mean influence among heads, the rest of the layers and everything outside them.

    Args:
        table: result of `block_table`.

    Returns:
        One entry per model, view and kind ("in_language", "cross_language"): `total`, the mean
        influence, and its shares `heads`, `layers` and `outside`, which add up to 1. Blocks may
        work against each other, so a share can be negative or above 1. A kind without pairs of
        languages, or with a total of 0, has no entry.
    """
    sums: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in table.to_pylist():
        part = "outside" if row["layer"] is None else "layers" if row["head"] is None else "heads"
        for kind in ("in_language", "cross_language"):
            if row[kind] is not None:
                parts = sums.setdefault((row["model"], row["view"], kind), {})
                parts[part] = parts.get(part, 0.0) + row[kind]
    entries = []
    for (model, view, kind), parts in sums.items():
        total = sum(parts.values())
        if total != 0:
            shares = {part: parts.get(part, 0.0) / total for part in ("heads", "layers", "outside")}
            entries.append({"model": model, "view": view, "kind": kind, "total": total, **shares})
    return entries
