"""Influence by head and layer of a run: within and across languages, and the share of the heads."""

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
    """Mean influence of every block, by model and view (`analysis/blocks.parquet`).

    `in_language` is the mean over languages of the influence of a language's training examples on
    its own test examples; `cross_language` the mean over pairs of two languages. Null where there
    is no such pair. layer and head as in `blocks.parquet`: no head is the rest of the layer, no
    layer what lies outside.

    Returns:
        None where no view has a blocks.parquet.
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
    values: dict[tuple[int | None, int | None], dict[str, list[float]]] = {}
    for row in rows:
        own = row["test_language"] == row["train_language"]
        of_block = values.setdefault(
            (row["layer"], row["head"]), {"in_language": [], "cross_language": []}
        )
        of_block["in_language" if own else "cross_language"].append(row["influence"])
    return [
        {"layer": layer, "head": head}
        | {name: float(np.mean(found)) if found else None for name, found in kinds.items()}
        for (layer, head), kinds in values.items()
    ]


def block_shares(table: pa.Table) -> list[dict[str, Any]]:
    """How much of the mean influence flows through the heads, the rest of the layers, and outside.

    Args:
        table: of `block_table`.

    Returns:
        By model, view and kind (`in_language`, `cross_language`): `total`, the mean influence, and
        the shares `heads`, `layers` and `outside` of it, which add up to 1. Blocks may work against
        each other: a share can be negative or above 1. A kind that no pair of languages is of, or
        whose total is 0, is left out.
    """
    sums: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in table.to_pylist():
        part = "outside" if row["layer"] is None else "layers" if row["head"] is None else "heads"
        for kind in ("in_language", "cross_language"):
            if row[kind] is not None:
                parts = sums.setdefault((row["model"], row["view"], kind), {})
                parts[part] = parts.get(part, 0.0) + row[kind]
    found = []
    for (model, view, kind), parts in sums.items():
        total = sum(parts.values())
        if total != 0:
            shares = {part: parts.get(part, 0.0) / total for part in ("heads", "layers", "outside")}
            found.append({"model": model, "view": view, "kind": kind, "total": total, **shares})
    return found
