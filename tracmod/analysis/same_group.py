"""Training examples of a test example's own parallel group: its translations, and what they do.

Shape legend: Q test examples, N training examples, G training languages.
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
from tracmod.analysis.results import RunResults, View, counts_under
from tracmod.analysis.statistics import Resampling


def same_group_rows(train: pa.Table, test: pa.Table) -> list[list[int]]:
    """For each of the Q test examples, the rows of the training examples of its `group`."""
    rows_of: dict[str, list[int]] = {}
    for row, group in enumerate(train["group"].to_pylist()):
        if group:
            rows_of.setdefault(group, []).append(row)
    return [rows_of.get(group, []) if group else [] for group in test["group"].to_pylist()]


def remaining_sizes(train: pa.Table, left_out: Sequence[Sequence[int]]) -> np.ndarray:
    """(Q, G) int: training examples per language (sorted) that each test example has left."""
    languages = train["language"].to_pylist()
    column_of = {language: column for column, language in enumerate(sorted(set(languages)))}
    columns_N = np.array([column_of[language] for language in languages])
    sizes_QG = np.tile(np.bincount(columns_N), (len(left_out), 1))
    for query, rows in enumerate(left_out):
        np.subtract.at(sizes_QG[query], columns_N[list(rows)], 1)
    return sizes_QG


def same_group_summary(
    run: RunResults, views: Sequence[View], resampling: Resampling
) -> dict[str, Any] | None:
    """What training examples of the test example's own group do (`same_group` of summary.json).

    Over the test examples that have such training examples: `strongest`, the share whose proponent
    of rank 1 is one; `within_k`, whose k strongest hold one; and what drawing training examples at
    random would give. Of several draws of masks, the mean. Over all test examples: `in_language`
    with them, without them, and the paired change (without - with), tested as all changes are.

    Returns:
        num_test, num_with_same_group, strongest_null, within_k_null, and `views`: model, view,
        strongest, within_k, with, without, change (these where the influence without them is
        there). None where no group is in both train and test, or k is not recorded.
    """
    train, test = run.examples("train"), run.examples("test")
    rows = same_group_rows(train, test)
    sizes = np.array([len(one) for one in rows if one])
    if not len(sizes) or not run.ks:
        return None
    total, k = len(train), run.ks[0]
    found: dict[str, Any] = {
        "num_test": len(rows),
        "num_with_same_group": len(sizes),
        "strongest_null": float(np.mean(sizes / total)),
        "within_k_null": float(np.mean(hypergeom.sf(0, total, sizes, k))),
        "views": [],
    }
    train_ids = train["id"].to_pylist()
    same_of = {
        test_id: {train_ids[row] for row in one}
        for test_id, one in zip(test["id"].to_pylist(), rows, strict=True)
        if one
    }
    without = {(view.model, view.name): view for view in run.views(without_group=True)}
    null_Q = _own_nulls(run, remaining_sizes(train, rows))
    for view in views:
        ranks = [_first_ranks(run, view.model, folder, same_of) for folder in view.folders]
        ranks = [one for one in ranks if len(one)]
        if ranks:
            entry: dict[str, Any] = {
                "model": view.model,
                "view": view.name,
                "strongest": float(np.mean([np.mean(one == 1) for one in ranks])),
                "within_k": float(np.mean([np.mean(one <= k) for one in ranks])),
            }
            if (view.model, view.name) in without:
                rest = without[view.model, view.name]
                entry["with"] = in_language(run, view.measures, resampling)
                entry["without"] = in_language(run, rest.measures, resampling, null_Q)
                change = paired_difference(rest, view)
                entry["change"] = in_language_change(run, change, resampling)
            found["views"].append(entry)
    changes = [entry["change"] for entry in found["views"] if "num_test" in entry.get("change", {})]
    adjusted_over(changes, MEASURES)
    return found


def _own_nulls(run: RunResults, sizes_QG: np.ndarray) -> np.ndarray:
    """(Q,) the own language's part of the training examples that a test example has left."""
    order = [sorted(run.num_train).index(language) for language in run.num_train]
    own_Q = sizes_QG[:, order][np.arange(len(sizes_QG)), run.own_columns]
    return own_Q / sizes_QG.sum(axis=1)


def _first_ranks(
    run: RunResults, model: str, folder: str, same_of: dict[str, set[str]]
) -> np.ndarray:
    """The rank of the first own-group proponent (inf: none) of each test example of `same_of`."""
    path = run.path / "influence" / model / folder / "top.parquet"
    if not path.is_file():
        return np.array([])
    columns = ("test_id", "test_language", "sign", "rank", "train_id")
    table = pq.read_table(path, columns=list(columns))
    first: dict[str, float] = {}
    for test_id, language, sign, rank, train_id in zip(
        *(table[name].to_pylist() for name in columns), strict=True
    ):
        if sign > 0 and test_id in same_of and counts_under(folder, language):
            own = rank if train_id in same_of[test_id] else np.inf
            first[test_id] = min(first.get(test_id, np.inf), own)
    return np.array(list(first.values()))
