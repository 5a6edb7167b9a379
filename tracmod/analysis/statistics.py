"""Means and paired differences of clustered rows: intervals, sign-flip tests, effect sizes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import false_discovery_control, norm

# Up to twelve clusters have at most this many choices of signs: all of them, rather than a sample.
ENUMERATE_UP_TO = 4096
_BLOCK_NUMBERS = 1 << 22


@dataclass(frozen=True)
class Resampling:
    """Of all resampling of an analysis.

    Attributes:
        bootstrap: resamples of the test examples (whole parallel items).
        permutations: draws of a permutation test where not everything can be tried.
        confidence: coverage of the intervals.
        seed: of every draw.
    """

    bootstrap: int
    permutations: int
    confidence: float
    seed: int


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


@dataclass(frozen=True)
class SignFlipResult:
    """`p_value` (two-sided) and `effect_size`, each of the shape of one row of the data.

    Attributes:
        p_value: how often signs drawn at random give a mean at least as far from 0.
        effect_size: Cohen's d_z over cluster means; NaN where they do not vary.
        permutations: choices of signs that were tried, the observed one among them.
        exact: whether these are all there are.
        clusters: how many signs are flipped.
    """

    p_value: np.ndarray
    effect_size: np.ndarray
    permutations: int
    exact: bool
    clusters: int


def sign_flip_test(
    values: np.ndarray,
    clusters: Sequence[Any] | np.ndarray | None = None,
    *,
    permutations: int = 1000,
    seed: int = 0,
) -> SignFlipResult:
    """Is the mean of paired differences other than 0: whole clusters change their sign together.

    Under the null hypothesis the two sides of a comparison can be exchanged, so that a cluster's
    differences are as likely as their negatives: p = (1 + number of choices of signs with |mean| >=
    the observed |mean|) / (1 + permutations). Of up to twelve clusters every choice is tried, the
    observed one being the 1. The effect size is Cohen's d_z = mean / standard deviation (n - 1),
    both over the clusters' means: rows of one cluster are not independent.
    (`scipy.stats.permutation_test` holds all rows under all choices in memory at once; here a
    choice is one row of a matrix product with the clusters' sums.)

    Args:
        values: (Q,) or (Q, D) float differences, Q >= 1.
        clusters: (Q,) one key per row; absent: every row is its own cluster.
        permutations: draws where there are more than twelve clusters.
        seed: of `numpy.random.default_rng`.

    Returns:
        Arrays of shape () or (D,).

    Raises:
        ValueError: no rows, or another number of cluster keys than rows.

    Source: Fisher 1935, section 21; Phipson and Smyth 2010 (the 1 + in p); Cohen 1988, section 2.3.
    """
    rows_QD = np.asarray(values, dtype=np.float64)
    if len(rows_QD) == 0:
        raise ValueError("sign_flip_test: expected at least one row, got none")
    sums_nD, counts_n = _cluster_sums(rows_QD.reshape(len(rows_QD), -1), clusters)
    observed_D = np.abs(sums_nD.sum(axis=0))
    # Choices that give the same mean up to rounding must count as equal.
    least_D = observed_D - 1e-12 * np.abs(sums_nD).sum(axis=0)
    at_least_D, tried = np.zeros(len(observed_D), dtype=np.int64), 0
    blocks, exact = _sign_choices(len(sums_nD), permutations, seed)
    for signs_Pn in blocks:
        at_least_D += np.sum(np.abs(signs_Pn @ sums_nD) >= least_D, axis=0)
        tried += len(signs_Pn)
    if not exact:
        at_least_D, tried = at_least_D + 1, tried + 1
    return SignFlipResult(
        p_value=(at_least_D / tried).reshape(rows_QD.shape[1:]),
        effect_size=_effect_size(sums_nD / counts_n[:, None]).reshape(rows_QD.shape[1:]),
        permutations=tried,
        exact=exact,
        clusters=len(sums_nD),
    )


def _sign_choices(n: int, permutations: int, seed: int) -> tuple[Iterator[np.ndarray], bool]:
    """Blocks (P, n) of +1 and -1: every choice, the observed one too, or as many as are asked."""
    if 2 ** min(n, 20) <= ENUMERATE_UP_TO:
        return iter([np.array(list(itertools.product((1.0, -1.0), repeat=n)))]), True
    rng, block = np.random.default_rng(seed), max(1, _BLOCK_NUMBERS // n)
    sizes = [min(block, permutations - start) for start in range(0, permutations, block)]
    return (2.0 * rng.integers(2, size=(size, n)) - 1 for size in sizes), False


def _effect_size(means_nD: np.ndarray) -> np.ndarray:
    if len(means_nD) < 2:
        return np.full(means_nD.shape[1], np.nan)
    mean, spread = means_nD.mean(axis=0), means_nD.std(axis=0, ddof=1)
    varies = spread > 1e-12 * np.maximum(1e-300, np.abs(means_nD).max(axis=0))
    return np.where(varies, mean / np.where(varies, spread, 1.0), np.nan)


def adjusted_p_values(p_values: Sequence[float | None]) -> list[float | None]:
    """Bounds on the false discovery rate over one family of tests; None (no test) stays None.

    Source: Benjamini and Hochberg 1995.
    """
    tested = [p_value for p_value in p_values if p_value is not None]
    adjusted = iter(false_discovery_control(tested) if tested else [])
    return [None if p_value is None else float(next(adjusted)) for p_value in p_values]


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
            f"clusters: expected one cluster key per row ({len(rows_QD)}), got {len(keys)}"
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
