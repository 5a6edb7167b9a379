"""Labels and parallel items of the strongest training examples, compared with chance."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.stats import hypergeom


def strongest_summary(top: pa.Table, train: pa.Table, test: pa.Table) -> list[dict[str, Any]]:
    """Summarise labels and parallel items of the k strongest proponents and opponents.

    `same_label` is the share of them that has the label of the test example; its null is the
    expectation for random training examples. `distinct_items` is the mean number of different
    parallel items among the k of a test example; it is below its null if translations of one item
    are found together. Its null is the mean over random draws of k without replacement,
    `sum over items of 1 - P(no example of the item)`.

    Args:
        top: content of `top.parquet`.
        train, test: the examples with id, label and group; an example without a group is an item
            of its own.

    Returns:
        One entry per side, "proponents" and "opponents".

    Raises:
        ValueError: `top` lists an example that is not in `train` or `test`.
    """
    labels_N, labels_Q = train["label"].to_numpy(), test["label"].to_numpy()
    groups, ids = train["group"].to_pylist(), train["id"].to_pylist()
    items_N = np.array(
        [group or f"example {train_id}" for group, train_id in zip(groups, ids, strict=True)]
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
    """Return the rows of the table that have these ids.

    Raises:
        ValueError: the table lacks an id.
    """
    row_of = {name: row for row, name in enumerate(table["id"].to_pylist())}
    for name in ids.to_pylist():
        if name not in row_of:
            raise ValueError(f"top.parquet: {name!r} is not in the run's data")
    return np.array([row_of[name] for name in ids.to_pylist()])
