"""Influence of training examples that belong to the test example's own parallel group.

Such examples are its translations. They are often the strongest proponents, whatever their
language, so influence is also reported without them.

Shape suffixes: Q test examples, N training examples, G training languages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.stats import hypergeom

from tracmod.analysis.changes import adjusted_over, in_language_change, paired_difference
from tracmod.analysis.languages import MEASURES
from tracmod.analysis.reliance import in_language
from tracmod.analysis.results import RunResults, ViewResults, counts_under
from tracmod.analysis.statistics import Resampling


def same_group_rows(train: pa.Table, test: pa.Table) -> list[list[int]]:
    """Return, for each of the Q test examples, the rows of the training examples of its group."""
    rows_of: dict[str, list[int]] = {}
    for row, group in enumerate(train["group"].to_pylist()):
        if group:
            rows_of.setdefault(group, []).append(row)
    return [rows_of.get(group, []) if group else [] for group in test["group"].to_pylist()]


def remaining_sizes(train: pa.Table, left_out: Sequence[Sequence[int]]) -> np.ndarray:
    """Count the training examples per language that each test example has left.

    Args:
        train: the N training examples.
        left_out: for each of the Q test examples the rows of training examples to leave out.

    Returns:
        (Q, G) int, languages sorted by name.
    """
    languages = train["language"].to_pylist()
    column_of = {language: column for column, language in enumerate(sorted(set(languages)))}
    columns_N = np.array([column_of[language] for language in languages])
    sizes_QG = np.tile(np.bincount(columns_N), (len(left_out), 1))
    for query, rows in enumerate(left_out):
        np.subtract.at(sizes_QG[query], columns_N[list(rows)], 1)
    return sizes_QG


def same_group_summary(
    run: RunResults, views: Sequence[ViewResults], resampling: Resampling
) -> dict[str, Any] | None:
    """Summarise the influence of the test example's own group (`same_group` of summary.json).

    Over the test examples that have training examples of their group, `strongest` is the share
    whose first proponent is such an example, and `within_k` the share with such an example among
    the k strongest, each beside its expectation for random training examples; with several draws of
    masks they are means. Over all test examples, `with` and `without` are `in_language` with and
    without these training examples, and `change` their paired difference (without - with), tested
    like all changes.

    Returns:
        num_test, num_with_same_group, strongest_null, within_k_null, and `views` with model, view,
        strongest, within_k and, for views that have the influence without these examples, with,
        without and change. None if no group is in both train and test, or k is not recorded.
    """
    train, test = run.examples("train"), run.examples("test")
    rows = same_group_rows(train, test)
    sizes = np.array([len(group_rows) for group_rows in rows if group_rows])
    if not len(sizes) or not run.ks:
        return None
    total, k = len(train), run.ks[0]
    summary: dict[str, Any] = {
        "num_test": len(rows),
        "num_with_same_group": len(sizes),
        "strongest_null": float(np.mean(sizes / total)),
        "within_k_null": float(np.mean(hypergeom.sf(0, total, sizes, k))),
        "views": [],
    }
    train_ids = train["id"].to_pylist()
    same_of = {
        test_id: {train_ids[row] for row in group_rows}
        for test_id, group_rows in zip(test["id"].to_pylist(), rows, strict=True)
        if group_rows
    }
    without = {(view.model, view.name): view for view in run.views(without_group=True)}
    null_Q = _own_nulls(run, remaining_sizes(train, rows))
    for view in views:
        ranks = [_first_ranks(run, view.model, folder, same_of) for folder in view.folders]
        ranks = [draw for draw in ranks if len(draw)]
        if ranks:
            entry: dict[str, Any] = {
                "model": view.model,
                "view": view.name,
                "strongest": float(np.mean([np.mean(draw == 1) for draw in ranks])),
                "within_k": float(np.mean([np.mean(draw <= k) for draw in ranks])),
            }
            if (view.model, view.name) in without:
                rest = without[view.model, view.name]
                entry["with"] = in_language(run, view.measures, resampling)
                entry["without"] = in_language(run, rest.measures, resampling, null_Q)
                change = paired_difference(rest, view)
                entry["change"] = in_language_change(run, change, resampling)
            summary["views"].append(entry)
    changes = [entry.get("change", {}) for entry in summary["views"]]
    adjusted_over([change for change in changes if "num_test" in change], MEASURES)
    return summary


def _own_nulls(run: RunResults, sizes_QG: np.ndarray) -> np.ndarray:
    """Return the (Q,) share of the own language among the remaining training examples."""
    order = [sorted(run.num_train).index(language) for language in run.num_train]
    own_Q = sizes_QG[:, order][np.arange(len(sizes_QG)), run.own_columns]
    return own_Q / sizes_QG.sum(axis=1)


def _first_ranks(
    run: RunResults, model: str, folder: str, same_of: dict[str, set[str]]
) -> np.ndarray:
    """Return the rank of the first proponent of the own group, for every test example that counts.

    Args:
        run: the run.
        model, folder: model and view folder.
        same_of: test id -> ids of the training examples of its group.

    Returns:
        Ranks from 1, infinity where `top.parquet` lists none; empty without a top.parquet.
    """
    path = run.path / "influence" / model / folder / "top.parquet"
    if not path.is_file():
        return np.array([])
    columns = ("test_id", "test_language", "sign", "rank", "train_id")
    table = pq.read_table(path, columns=list(columns))
    first_rank: dict[str, float] = {}
    for test_id, language, sign, rank, train_id in zip(
        *(table[name].to_pylist() for name in columns), strict=True
    ):
        if sign > 0 and test_id in same_of and counts_under(folder, language):
            own_rank = rank if train_id in same_of[test_id] else np.inf
            first_rank[test_id] = min(first_rank.get(test_id, np.inf), own_rank)
    return np.array(list(first_rank.values()))
