"""Means over the test examples of a run, per pair of languages and for the own language.

Shape suffixes: Q all test examples of the run, G training languages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tracmod.analysis.languages import interval_columns
from tracmod.analysis.results import RunResults, ViewResults, counts_under, mean_of_known
from tracmod.analysis.statistics import Resampling, bootstrap_mean

SIGN_OF_SHARE = {"share_positive": 1, "share_negative": -1}


def known_rows(measures: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return which test examples have values of every measure, (Q,) bool."""
    return np.all([np.isfinite(values).all(axis=1) for values in measures.values()], axis=0)


def interval_table(
    run: RunResults, measures: Mapping[str, np.ndarray], resampling: Resampling
) -> pa.Table:
    """Return `interval_columns` of (Q, G) measures, over the test examples that have values."""
    known_Q = known_rows(measures)
    columns = interval_columns(
        {name: values[known_Q] for name, values in measures.items()},
        np.array(run.test["language"].to_pylist())[known_Q].tolist(),
        list(run.num_train),
        run.clusters[known_Q].tolist(),
        bootstrap=resampling.bootstrap,
        confidence=resampling.confidence,
        seed=resampling.seed,
    )
    return pa.table(columns)


def own_values(run: RunResults, values_QG: np.ndarray) -> np.ndarray:
    """Return the (Q,) value of each test example for its own language; NaN if there is none."""
    columns_Q = run.own_columns
    return np.where(columns_Q >= 0, values_QG[np.arange(len(columns_Q)), columns_Q], np.nan)


def in_language(
    run: RunResults,
    measures: Mapping[str, np.ndarray],
    resampling: Resampling,
    null_shares_Q: np.ndarray | None = None,
) -> dict[str, Any]:
    """Compute the mean over test examples of each measure's value for the example's own language.

    Args:
        run: the run.
        measures: name -> (Q, G) float.
        resampling: options of the intervals.
        null_shares_Q: (Q,) share expected for each example's own language if language plays no
            role; None for the language's share of the training examples.

    Returns:
        {measure: {value, low, high}}, num_test, and null_share (mean over the same examples); {} if
        no test example has training data in its language.
    """
    entry: dict[str, Any] = {}
    if null_shares_Q is None:
        null_shares_Q = np.array(list(run.null_shares.values()))[run.own_columns]
    for name, values_QG in measures.items():
        own_Q = own_values(run, values_QG)
        known_Q = np.isfinite(own_Q)
        if not known_Q.any():
            continue
        interval = bootstrap_mean(
            own_Q[known_Q],
            run.clusters[known_Q],
            resamples=resampling.bootstrap,
            confidence=resampling.confidence,
            seed=resampling.seed,
        )
        entry[name] = {"value": interval.value, "low": interval.low, "high": interval.high}
        entry["num_test"] = int(known_Q.sum())
        entry["null_share"] = float(null_shares_Q[known_Q].mean())
    return entry


def own_share_by_k(
    run: RunResults, views: Sequence[ViewResults], resampling: Resampling
) -> list[dict[str, Any]]:
    """Count the own language among the k strongest training examples, for every k of the run.

    Returns:
        One row per view with a top.parquet and k: model, view, k, share_positive and
        share_negative with `_low` and `_high`, num_test and null_share.
    """
    rows = []
    for view in views:
        paths = [
            run.path / "influence" / view.model / folder / "top.parquet" for folder in view.folders
        ]
        if not all(path.is_file() for path in paths):
            continue
        tables = [pq.read_table(path) for path in paths]
        for k in sorted(run.ks):
            shares = {
                measure: mean_of_known(
                    [
                        _own_share(run, table, folder, sign, k)
                        for table, folder in zip(tables, view.folders, strict=True)
                    ]
                )
                for measure, sign in SIGN_OF_SHARE.items()
            }
            # `in_language` reads the column of the own language only, so all may be the same.
            repeated = {
                measure: np.repeat(share_Q[:, None], len(run.num_train), axis=1)
                for measure, share_Q in shares.items()
            }
            entry = in_language(run, repeated, resampling)
            if entry:
                row = {"model": view.model, "view": view.name, "k": k}
                row |= {name: entry[name] for name in ("num_test", "null_share")}
                for measure in SIGN_OF_SHARE:
                    for end, key in (("", "value"), ("_low", "low"), ("_high", "high")):
                        row[f"{measure}{end}"] = float(entry[measure][key])
                rows.append(row)
    return rows


def _own_share(run: RunResults, top: pa.Table, folder: str, sign: int, k: int) -> np.ndarray:
    """Return the (Q,) share of the own language among the k strongest of one sign.

    NaN for test examples that the view folder does not count or `top` does not list.
    """
    number = run.test.num_rows
    counted = (top["sign"].to_numpy() == sign) & (top["rank"].to_numpy() <= k)
    rows = pc.index_in(top["test_id"], value_set=run.test["id"]).to_numpy()[counted]
    own = pc.equal(top["test_language"], top["train_language"]).to_numpy()[counted]
    listed_Q = np.bincount(rows, minlength=number)
    own_Q = np.bincount(rows, weights=own, minlength=number)
    under_Q = [counts_under(folder, language) for language in run.test["language"].to_pylist()]
    return np.where(np.array(under_Q) & (listed_Q > 0), own_Q / np.maximum(listed_Q, 1), np.nan)
