"""What the strongest training examples have in common with the test example, beside chance."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.stats import hypergeom


def strongest_summary(top: pa.Table, train: pa.Table, test: pa.Table) -> list[dict[str, Any]]:
    """Labels and parallel items of the k strongest proponents and opponents.

    `same_label`: share of them with the test example's label; its null is what drawing training
    examples at random gives. `distinct_items`: different parallel items among a test example's k
    (fewer than the null: translations of one item come together); its null is the mean over random
    draws of k without replacement, `sum_i 1 - P(no example of item i)`.

    Args:
        top: `top.parquet`.
        train, test: id, label and group; an example without group is an item of its own.

    Returns:
        One entry per side, `proponents` and `opponents`.

    Raises:
        ValueError: an example is listed that is not in `train` or `test`.
    """
    labels_N, labels_Q = train["label"].to_numpy(), test["label"].to_numpy()
    items_N = np.array(
        [g or f"example {i}" for g, i in zip(*_lists(train, "group", "id"), strict=True)]
    )
    queries, trains = _rows(top["test_id"], test), _rows(top["train_id"], train)
    signs, k = top["sign"].to_numpy(), int(top["rank"].to_numpy().max())
    sizes = np.array(list(Counter(items_N.tolist()).values()))
    chance = hypergeom(len(items_N), sizes, k)
    shares = {label: float(np.mean(labels_N == label)) for label in set(labels_Q.tolist())}
    summary = []
    for side, sign in (("proponents", 1), ("opponents", -1)):
        query, listed = queries[signs == sign], trains[signs == sign]
        pairs = set(zip(query.tolist(), items_N[listed].tolist(), strict=True))
        summary.append(
            {
                "side": side,
                "k": k,
                "same_label": float(np.mean(labels_N[listed] == labels_Q[query])),
                "same_label_null": float(np.mean([shares[label] for label in labels_Q.tolist()])),
                "distinct_items": len(pairs) / len(np.unique(query)),
                "distinct_items_null": float(np.sum(1 - chance.pmf(0))),
            }
        )
    return summary


def _rows(ids: pa.ChunkedArray, table: pa.Table) -> np.ndarray:
    """Where in the table the examples with these ids stand."""
    row_of = {name: row for row, name in enumerate(table["id"].to_pylist())}
    for name in ids.to_pylist():
        if name not in row_of:
            raise ValueError(f"top.parquet lists {name!r}, which is not in the run's data")
    return np.array([row_of[name] for name in ids.to_pylist()])


def _lists(table: pa.Table, *names: str) -> list[list[Any]]:
    return [table[name].to_pylist() for name in names]
