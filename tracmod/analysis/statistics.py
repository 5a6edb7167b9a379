"""Intervals and tests: cluster bootstrap of means and paired differences, Mantel permutations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.stats import norm, rankdata

# Matrices of up to seven languages have at most 5,040 orders: all of them, rather than a sample.
ENUMERATE_UP_TO = 5040
_BLOCK_NUMBERS = 1 << 22


@dataclass(frozen=True)
class Interval:
    """A mean with a percentile interval; each array has the shape of one row of the data."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def bootstrap_mean(
    values: np.ndarray,
    clusters: Sequence[Any] | np.ndarray | None = None,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Mean over rows with a percentile bootstrap interval; whole clusters are resampled.

    Rows of one cluster (the translations of one test item) are not independent, so they are drawn
    together; the mean of a resample is the sum of its rows over their number. With a single
    cluster nothing can be resampled: low = high = value. (`scipy.stats.bootstrap` knows no
    clusters, hence this function.)

    Args:
        values: (Q,) or (Q, D) float, Q >= 1.
        clusters: (Q,) one key per row; absent: every row is its own cluster.
        resamples: number of bootstrap draws.
        confidence: coverage aimed at, in (0, 1).
        seed: of `numpy.random.default_rng`.

    Returns:
        Interval of shape () or (D,).

    Raises:
        ValueError: no rows, or another number of cluster keys than rows.

    Source: Efron and Tibshirani 1993, chapter 13; Cameron, Gelbach and Miller 2008 (clusters).
    """
    rows_QD = np.asarray(values, dtype=np.float64)
    if len(rows_QD) == 0:
        raise ValueError("bootstrap_mean: expected at least one row, got none")
    flat_QD = rows_QD.reshape(len(rows_QD), -1)
    sums, counts = _cluster_sums(flat_QD, clusters)
    means = _resampled_means(sums, counts, resamples, np.random.default_rng(seed))
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    value = flat_QD.mean(axis=0)
    if len(sums) == 1:
        low = high = value
    shape = rows_QD.shape[1:]
    return Interval(value.reshape(shape), low.reshape(shape), high.reshape(shape))


def bootstrap_difference(
    a: np.ndarray,
    b: np.ndarray,
    clusters: Sequence[Any] | np.ndarray | None = None,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Mean of a - b, paired row by row, with the interval of `bootstrap_mean`.

    Raises:
        ValueError: a and b differ in shape.
    """
    if np.shape(a) != np.shape(b):
        raise ValueError(
            f"bootstrap_difference: rows are paired, expected equal shapes, "
            f"got {np.shape(a)} and {np.shape(b)}"
        )
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    return bootstrap_mean(
        difference, clusters, resamples=resamples, confidence=confidence, seed=seed
    )


def wilson_interval(share: float, number: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of a share of `number` independent trials; sensible at 0 and 1 too (Wilson 1927)."""
    z = float(norm.ppf((1 + confidence) / 2))
    centre = (share + z * z / (2 * number)) / (1 + z * z / number)
    spread = share * (1 - share) / number + z * z / (4 * number * number)
    half = z * math.sqrt(spread) / (1 + z * z / number)
    return centre - half, centre + half


def _cluster_sums(
    rows_QD: np.ndarray, clusters: Sequence[Any] | np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    if clusters is None:
        return rows_QD, np.ones(len(rows_QD))
    keys = np.asarray(clusters)
    if len(keys) != len(rows_QD):
        raise ValueError(
            f"bootstrap_mean: expected one cluster key per row ({len(rows_QD)}), got {len(keys)}"
        )
    _, cluster_of_row = np.unique(keys, return_inverse=True)
    counts = np.bincount(cluster_of_row).astype(np.float64)
    sums = np.zeros((len(counts), rows_QD.shape[1]))
    np.add.at(sums, cluster_of_row, rows_QD)
    return sums, counts


def _resampled_means(
    sums_nD: np.ndarray, counts_n: np.ndarray, resamples: int, rng: np.random.Generator
) -> np.ndarray:
    n = len(sums_nD)
    block = max(1, _BLOCK_NUMBERS // n)
    means = []
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        drawn = rng.integers(n, size=(size, n)) + np.arange(size)[:, None] * n
        times_drawn = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n)
        means.append((times_drawn @ sums_nD) / (times_drawn @ counts_n)[:, None])
    return np.concatenate(means)


@dataclass(frozen=True)
class MantelResult:
    """`p_value` is two-sided; `exact` says that every order of the items was tried."""

    correlation: float
    p_value: float
    permutations: int
    exact: bool
    pairs: int


def mantel(
    a: np.ndarray,
    b: np.ndarray,
    *,
    permutations: int = 1000,
    seed: int = 0,
    method: Literal["spearman", "pearson"] = "spearman",
) -> MantelResult:
    """Correlation of two symmetric matrices' off-diagonal entries, tested by permutation.

    Pairs of languages share languages and are not independent, so rows and columns of `a` are
    permuted together: p = (1 + number of permutations with |r| >= the observed |r|) /
    (1 + permutations). When the number of orders n! is at most 5,040 all of them are tried, the
    observed one being the 1; else `permutations` are drawn.

    Args:
        a, b: (n, n) symmetric float, n >= 3; diagonals are not read.
        permutations: draws when n! is larger than 5,040.
        seed: of `numpy.random.default_rng`.
        method: rank (Spearman) or product-moment (Pearson) correlation.

    Raises:
        ValueError: shapes differ or are not square, fewer than 3 items, a matrix that is not
            symmetric or not finite, or one without any variation.

    Source: Mantel 1967; Phipson and Smyth 2010 (the 1 + in p).
    """
    a_nn, b_nn = _symmetric(a, "first"), _symmetric(b, "second")
    if a_nn.shape != b_nn.shape:
        raise ValueError(f"mantel: expected equal shapes, got {a_nn.shape} and {b_nn.shape}")
    n = len(a_nn)
    rows, columns = np.triu_indices(n, k=1)
    a_unit_nn = np.zeros((n, n))
    a_unit_nn[rows, columns] = _standardised(a_nn[rows, columns], method, "first")
    a_unit_nn += a_unit_nn.T
    b_unit = _standardised(b_nn[rows, columns], method, "second")
    orders, exact = _orders(n, permutations, seed)
    correlations = a_unit_nn[orders[:, rows], orders[:, columns]] @ b_unit
    observed = float(a_unit_nn[rows, columns] @ b_unit)
    # Orders that give the same pairs give the same r up to rounding: they must count as equal.
    at_least = int(np.sum(np.abs(correlations) >= abs(observed) - 1e-12))
    p_value = (1 + at_least) / (1 + len(orders))
    return MantelResult(observed, p_value, len(orders) + exact, exact, len(rows))


def _orders(n: int, permutations: int, seed: int) -> tuple[np.ndarray, bool]:
    """Orders to try, without the observed one; and whether they are all there are."""
    if math.factorial(min(n, 20)) <= ENUMERATE_UP_TO:
        return np.array(list(itertools.permutations(range(n)))[1:]), True
    rng = np.random.default_rng(seed)
    return rng.permuted(np.tile(np.arange(n), (permutations, 1)), axis=1), False


def _symmetric(matrix: np.ndarray, which: str) -> np.ndarray:
    matrix = np.array(matrix, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"mantel: {which} matrix: expected (n, n), got {matrix.shape}")
    if len(matrix) < 3:
        raise ValueError(f"mantel: expected at least 3 items, got {len(matrix)}")
    np.fill_diagonal(matrix, 0.0)
    if not np.isfinite(matrix).all() or not np.allclose(matrix, matrix.T, rtol=1e-9, atol=1e-12):
        raise ValueError(f"mantel: {which} matrix: expected a symmetric one of finite numbers")
    return matrix


def _standardised(values: np.ndarray, method: str, which: str) -> np.ndarray:
    """Centred and of length 1, so that a dot product is the correlation."""
    if method == "spearman":
        values = rankdata(values)
    centred = values - values.mean()
    length = np.linalg.norm(centred)
    if length <= 1e-12 * max(1.0, float(np.abs(values).max())):
        raise ValueError(f"mantel: {which} matrix: every pair has the same value")
    return centred / length
