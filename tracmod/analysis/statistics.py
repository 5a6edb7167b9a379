"""Means and paired differences of clustered rows: intervals, sign-flip tests, effect sizes.

Test examples that are translations of each other (a parallel item) are not independent, so all
functions treat the rows of one cluster as a unit.

Shape suffixes: Q rows (test examples), D numbers per row, n clusters, P permutations.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import false_discovery_control, norm

MAX_SIGN_CHOICES = 4096  # of up to twelve clusters; more are sampled instead of enumerated
_BLOCK_NUMBERS = 1 << 22  # numbers in memory while resampling


@dataclass(frozen=True)
class Resampling:
    """Options of all bootstraps and permutation tests of an analysis.

    Attributes:
        bootstrap: resamples of the test examples (whole parallel items).
        permutations: draws of a permutation test that cannot be enumerated.
        confidence: coverage of the intervals, in (0, 1).
        seed: seed of every draw.
    """

    bootstrap: int
    permutations: int
    confidence: float
    seed: int


@dataclass(frozen=True)
class Interval:
    """A mean with a percentile interval.

    Attributes:
        value, low, high: arrays with the shape of one row of the data.
    """

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
    """Compute the mean over rows with a percentile bootstrap interval over whole clusters.

    A resample draws as many clusters as there are, with replacement; its mean is the sum of the
    rows of the drawn clusters divided by their number. With a single cluster nothing can be
    resampled, so that low = high = value. (`scipy.stats.bootstrap` has no clusters.)

    Args:
        values: (Q,) or (Q, D) float, Q >= 1.
        clusters: (Q,) cluster of each row; None makes every row a cluster of its own.
        resamples: number of bootstrap draws.
        confidence: nominal coverage, in (0, 1).
        seed: seed of `numpy.random.default_rng`.

    Returns:
        Interval of shape () or (D,).

    Raises:
        ValueError: there are no rows, or not one cluster per row.

    Source: Efron and Tibshirani 1993, chapter 13; Cameron, Gelbach and Miller 2008 (clusters).

    Examples:
        >>> import numpy as np
        >>> from tracmod.analysis import bootstrap_mean
        >>> shares = np.array([0.2, 0.4, 0.3, 0.5])
        >>> interval = bootstrap_mean(shares, clusters=["a", "a", "b", "b"])
        >>> [round(float(x), 2) for x in (interval.value, interval.low, interval.high)]
        [0.35, 0.3, 0.4]
    """
    rows_QD = np.asarray(values, dtype=np.float64)
    if len(rows_QD) == 0:
        raise ValueError("values: expected at least 1 row, got none")
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


def bootstrap_f1(
    counts_Q3: np.ndarray, clusters: np.ndarray, resampling: Resampling
) -> tuple[float, float, float]:
    """Compute the F1 of all rows together, with a percentile interval over whole clusters.

    `F1 = 2 right / (predicted + true)`, of sums over the rows; 0 if nothing is predicted or true.

    Args:
        counts_Q3: (Q, 3) numbers that are right, predicted and true in each row.
        clusters: (Q,) cluster of each row.
        resampling: number of resamples, coverage and seed.

    Returns:
        The value, and the bounds of its interval.
    """
    sums, _ = _cluster_sums(counts_Q3.astype(np.float64), clusters)
    generator = np.random.default_rng(resampling.seed)
    draws = generator.multinomial(len(sums), [1 / len(sums)] * len(sums), resampling.bootstrap)
    right, predicted, true = (draws @ sums).T
    scores = 2 * right / np.maximum(1, predicted + true)
    tail = (1 - resampling.confidence) / 2
    low, high = np.quantile(scores, [tail, 1 - tail])
    all_right, all_predicted, all_true = sums.sum(axis=0)
    value = 2 * all_right / max(1, all_predicted + all_true)
    return float(value), float(low), float(high)


def bootstrap_difference(
    a: np.ndarray,
    b: np.ndarray,
    clusters: Sequence[Any] | np.ndarray | None = None,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Compute the mean of a - b, paired row by row, with the interval of `bootstrap_mean`.

    Args:
        a, b: (Q,) or (Q, D) float, of the same shape.
        clusters, resamples, confidence, seed: as in `bootstrap_mean`.

    Raises:
        ValueError: a and b differ in shape, or as in `bootstrap_mean`.
    """
    if np.shape(a) != np.shape(b):
        raise ValueError(
            f"a and b: expected equal shapes, because rows are paired, got {np.shape(a)} and "
            f"{np.shape(b)}"
        )
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    return bootstrap_mean(
        difference, clusters, resamples=resamples, confidence=confidence, seed=seed
    )


@dataclass(frozen=True)
class SignFlipResult:
    """Result of `sign_flip_test`; arrays have the shape of one row of the data.

    Attributes:
        p_value: two-sided: how often random signs give a mean at least as far from 0.
        effect_size: Cohen's d_z over the means of clusters; NaN where these do not vary.
        permutations: choices of signs that were tried, including the observed one.
        exact: whether these are all choices there are.
        clusters: number of signs.
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
    """Test whether the mean of paired differences is 0 by flipping the signs of whole clusters.

    Under the null hypothesis the two sides of a comparison are exchangeable, so the differences of
    a cluster are as likely as their negatives: p = (1 + number of choices of signs with |mean| >=
    the observed |mean|) / (1 + permutations). For up to twelve clusters all choices are tried, and
    the observed one is the 1. The effect size is Cohen's d_z = mean / standard deviation (n - 1),
    both over the means of clusters, because rows of one cluster are not independent.
    (`scipy.stats.permutation_test` holds all rows under all choices in memory; here a choice is one
    row of a matrix product with the sums of the clusters.)

    Args:
        values: (Q,) or (Q, D) float differences, Q >= 1.
        clusters: (Q,) cluster of each row; None makes every row a cluster of its own.
        permutations: number of draws for more than twelve clusters.
        seed: seed of `numpy.random.default_rng`.

    Returns:
        A result of shape () or (D,).

    Raises:
        ValueError: there are no rows, or not one cluster per row.

    Source: Fisher 1935, section 21; Phipson and Smyth 2010 (the 1 + in p); Cohen 1988, section 2.3.

    Examples:
        >>> import numpy as np
        >>> from tracmod.analysis import sign_flip_test
        >>> result = sign_flip_test(np.array([0.3, 0.1, 0.2, 0.4, 0.2]))
        >>> result.exact, result.permutations, float(result.p_value)
        (True, 32, 0.0625)
    """
    rows_QD = np.asarray(values, dtype=np.float64)
    if len(rows_QD) == 0:
        raise ValueError("values: expected at least 1 row, got none")
    sums_nD, counts_n = _cluster_sums(rows_QD.reshape(len(rows_QD), -1), clusters)
    observed_D = np.abs(sums_nD.sum(axis=0))
    # A choice whose mean differs from the observed one only by rounding must count as equal.
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
    """Return blocks (P, n) of +1 and -1, and whether they are all choices of signs there are."""
    if 2 ** min(n, 20) <= MAX_SIGN_CHOICES:
        return iter([np.array(list(itertools.product((1.0, -1.0), repeat=n)))]), True
    rng, block = np.random.default_rng(seed), max(1, _BLOCK_NUMBERS // n)
    sizes = [min(block, permutations - start) for start in range(0, permutations, block)]
    return (2.0 * rng.integers(2, size=(size, n)) - 1 for size in sizes), False


def _effect_size(means_nD: np.ndarray) -> np.ndarray:
    """Return (D,) mean over standard deviation; NaN where the deviation is only rounding."""
    if len(means_nD) < 2:
        return np.full(means_nD.shape[1], np.nan)
    mean, spread = means_nD.mean(axis=0), means_nD.std(axis=0, ddof=1)
    varies = spread > 1e-12 * np.maximum(1e-300, np.abs(means_nD).max(axis=0))
    return np.where(varies, mean / np.where(varies, spread, 1.0), np.nan)


def adjusted_p_values(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjust the p-values of one family of tests for the false discovery rate.

    Args:
        p_values: p-value of each test; None for a test that could not be made, which stays None.

    Source: Benjamini and Hochberg 1995.
    """
    tested = [p_value for p_value in p_values if p_value is not None]
    adjusted = iter(false_discovery_control(tested) if tested else [])
    return [None if p_value is None else float(next(adjusted)) for p_value in p_values]


def wilson_interval(share: float, number: int, confidence: float = 0.95) -> tuple[float, float]:
    """Compute the Wilson score interval of a share, which is sensible at 0 and 1 too.

    (`scipy.stats.binomtest` takes whole numbers of successes only, but a share may be a mean over
    draws of masks; where both apply, half of the bounds differ in the last bit.)

    Args:
        share: share of successes, in [0, 1].
        number: number of independent trials.
        confidence: nominal coverage, in (0, 1).

    Source: Wilson 1927.
    """
    z = float(norm.ppf((1 + confidence) / 2))
    centre = (share + z * z / (2 * number)) / (1 + z * z / number)
    spread = share * (1 - share) / number + z * z / (4 * number * number)
    half = z * math.sqrt(spread) / (1 + z * z / number)
    return centre - half, centre + half


def _cluster_sums(
    rows_QD: np.ndarray, clusters: Sequence[Any] | np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the (n, D) sums of the rows of each cluster, and the (n,) numbers of rows."""
    if clusters is None:
        return rows_QD, np.ones(len(rows_QD))
    keys = np.asarray(clusters)
    if len(keys) != len(rows_QD):
        raise ValueError(f"clusters: expected {len(rows_QD)}, one per row, got {len(keys)}")
    _, cluster_of_row = np.unique(keys, return_inverse=True)
    counts = np.bincount(cluster_of_row).astype(np.float64)
    sums = np.zeros((len(counts), rows_QD.shape[1]))
    np.add.at(sums, cluster_of_row, rows_QD)
    return sums, counts


def _resampled_means(
    sums_nD: np.ndarray, counts_n: np.ndarray, resamples: int, rng: np.random.Generator
) -> np.ndarray:
    """Return (resamples, D) means of resamples of clusters."""
    n = len(sums_nD)
    block = max(1, _BLOCK_NUMBERS // n)
    means = []
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        drawn = rng.integers(n, size=(size, n)) + np.arange(size)[:, None] * n
        # (size, n): how often each cluster is in each resample; a mean is then a matrix product.
        times_drawn = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n)
        means.append((times_drawn @ sums_nD) / (times_drawn @ counts_n)[:, None])
    return np.concatenate(means)
