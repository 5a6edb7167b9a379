"""Intervals have their coverage; sign-flip and Mantel tests have their level and power."""

import itertools

import numpy as np
import pytest
from scipy.stats import binomtest, pearsonr, permutation_test, spearmanr

from tracmod.analysis import (
    adjusted_p_values,
    bootstrap_difference,
    bootstrap_mean,
    mantel,
    partial_mantel,
    sign_flip_test,
    wilson_interval,
)


def test_bootstrap_of_a_mean_is_near_the_normal_interval() -> None:
    values = np.random.default_rng(0).normal(3, 2, size=400)
    interval = bootstrap_mean(values, resamples=4000)
    half = 1.96 * values.std() / np.sqrt(400)
    assert interval.value == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.03)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.03)


def test_columns_are_resampled_together_and_equal_each_alone() -> None:
    values = np.random.default_rng(0).normal(size=(30, 4))
    both = bootstrap_mean(values, seed=3)
    for column in range(4):
        alone = bootstrap_mean(values[:, column], seed=3)
        assert both.low[column] == pytest.approx(alone.low)
        assert both.high[column] == pytest.approx(alone.high)


def test_seed_decides_everything() -> None:
    values = np.random.default_rng(0).normal(size=20)
    lows = [float(bootstrap_mean(values, seed=seed).low) for seed in (1, 1, 2)]
    assert lows[0] == lows[1] != lows[2]


@pytest.mark.parametrize("clustered", [False, True])
def test_coverage_with_and_without_clusters(clustered: bool) -> None:
    """Of 300 samples of clustered data with mean 0, about 95% of the clustered intervals hold 0."""
    rng = np.random.default_rng(1)
    keys = np.repeat(np.arange(40), 4)
    hits = 0
    for trial in range(300):
        values = np.repeat(rng.normal(size=40), 4) + 0.3 * rng.normal(size=160)
        found = bootstrap_mean(values, keys if clustered else None, resamples=300, seed=trial)
        hits += bool(found.low <= 0 <= found.high)
    assert (270 <= hits <= 296) if clustered else hits < 240


def test_cluster_means_weigh_rows_not_clusters() -> None:
    assert bootstrap_mean(np.array([0.0, 0.0, 0.0, 4.0]), ["a", "a", "a", "b"]).value == 1.0


def test_degenerate_sizes() -> None:
    one_row = bootstrap_mean(np.array([[2.0, 3.0]]))
    assert one_row.low.tolist() == one_row.value.tolist() == one_row.high.tolist() == [2.0, 3.0]
    one_cluster = bootstrap_mean(np.array([0.1, 0.2, 0.7]), ["a"] * 3)
    assert one_cluster.low == one_cluster.value == one_cluster.high
    with pytest.raises(ValueError, match=r"values.*none"):
        bootstrap_mean(np.zeros((0, 2)))
    with pytest.raises(ValueError, match=r"clusters.*\b2\b.*got 1"):
        bootstrap_mean(np.zeros(2), ["a"])


def test_paired_difference_is_narrower_than_unpaired() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(0, 5, size=100)
    found = bootstrap_difference(base + 1 + 0.1 * rng.normal(size=100), base)
    assert 0.95 < found.low < found.value < found.high < 1.05
    with pytest.raises(ValueError, match=r"\(100,\).*\(3,\)"):
        bootstrap_difference(base, base[:3])


def test_wilson_equals_scipy() -> None:
    for right, number in ((0, 5), (7, 20), (50, 50)):
        expected = binomtest(right, number).proportion_ci(0.9, method="wilson")
        assert wilson_interval(right / number, number, 0.9) == pytest.approx(tuple(expected))


def _symmetric(rng: np.random.Generator, n: int) -> np.ndarray:
    matrix = rng.normal(size=(n, n))
    return (matrix + matrix.T) / 2


@pytest.mark.parametrize("method", ["spearman", "pearson"])
def test_mantel_equals_brute_force_over_all_orders(method: str) -> None:
    rng = np.random.default_rng(5)
    a, b = _symmetric(rng, 5), _symmetric(rng, 5)
    upper = np.triu_indices(5, k=1)
    correlate = spearmanr if method == "spearman" else pearsonr
    correlations = []
    for order in itertools.permutations(range(5)):
        permuted = a[np.ix_(order, order)]
        correlations.append(correlate(permuted[upper], b[upper]).statistic)
    result = mantel(a, b, method=method)
    observed = correlations[0]
    assert (result.exact, result.permutations, result.pairs) == (True, 120, 10)
    assert result.correlation == pytest.approx(observed)
    assert result.p_value == pytest.approx(np.mean(np.abs(correlations) >= abs(observed) - 1e-12))


def test_mantel_has_its_level_on_null_data() -> None:
    """Language effects make pairs dependent: a plain correlation test rejects far too often."""
    rng = np.random.default_rng(0)
    upper = np.triu_indices(9, k=1)
    rejected, naive, trials = 0, 0, 400
    for trial in range(trials):
        effects = rng.normal(size=(2, 9))
        a, b = (e[:, None] + e[None, :] + 0.3 * _symmetric(rng, 9) for e in effects)
        rejected += mantel(a, b, permutations=199, seed=trial).p_value <= 0.05
        naive += spearmanr(a[upper], b[upper]).pvalue <= 0.05
    assert 0.02 <= rejected / trials <= 0.085
    assert naive / trials > 0.15


def test_mantel_finds_a_planted_correlation() -> None:
    rng = np.random.default_rng(2)
    found = []
    for n in (5, 12):
        a = _symmetric(rng, n)
        noisy = 2 * a + 0.2 * _symmetric(rng, n) + np.diag(rng.normal(size=n) * 100)
        found.append(mantel(a, noisy, permutations=999))
    assert all(result.correlation > 0.8 and result.p_value <= 0.05 for result in found)
    assert [result.exact for result in found] == [True, False]
    assert found[1].p_value >= 1 / 1000


def test_mantel_refuses_matrices_that_it_cannot_test() -> None:
    good = _symmetric(np.random.default_rng(0), 4)
    with pytest.raises(ValueError, match=r"3 items.*got 2"):
        mantel(good[:2, :2], good[:2, :2])
    with pytest.raises(ValueError, match=r"first matrix.*same value"):
        mantel(np.ones((4, 4)), good)
    with pytest.raises(ValueError, match=r"first matrix.*symmetric"):
        mantel(np.triu(np.ones((4, 4))), good)
    with pytest.raises(ValueError, match=r"\(4, 4\) and \(3, 3\)"):
        mantel(good, good[:3, :3])
    with pytest.raises(ValueError, match=r"first matrix.*\(2, 4\)"):
        mantel(good[:2], good)


def test_partial_mantel_of_residuals_by_hand() -> None:
    rng = np.random.default_rng(4)
    a, b, c, d = (_symmetric(rng, 6) for _ in range(4))
    upper = np.triu_indices(6, k=1)
    design = np.column_stack([np.ones(15), c[upper], d[upper]])
    residuals = [m[upper] - design @ np.linalg.lstsq(design, m[upper])[0] for m in (a, b)]
    result = partial_mantel(a, b, [c, d, np.ones((6, 6))], method="pearson")
    assert result.correlation == pytest.approx(pearsonr(*residuals).statistic)
    assert (result.exact, result.permutations, result.pairs) == (True, 720, 15)


def test_partial_mantel_has_its_level_where_only_the_control_relates_the_two() -> None:
    """A plain Mantel test of the same matrices nearly always rejects."""
    rng = np.random.default_rng(0)
    plain = partial = trials = 0
    for trials in range(1, 301):
        control = _symmetric(rng, 9)
        a, b = (control + _symmetric(rng, 9) for _ in range(2))
        given = {"permutations": 199, "seed": trials}
        plain += mantel(a, b, **given).p_value <= 0.05
        partial += partial_mantel(a, b, [control], **given).p_value <= 0.05
    assert plain / trials > 0.8
    assert 0.015 <= partial / trials <= 0.09


def test_partial_mantel_finds_a_relation_that_the_control_does_not_explain() -> None:
    rng = np.random.default_rng(2)
    control, own = _symmetric(rng, 9), _symmetric(rng, 9)
    a, b = (control + own + 0.3 * _symmetric(rng, 9) for _ in range(2))
    found = partial_mantel(a, b, [control], permutations=999)
    assert found.correlation > 0.7
    assert found.p_value <= 0.01


def test_partial_mantel_refuses_matrices_that_it_cannot_test() -> None:
    rng = np.random.default_rng(0)
    a, b = _symmetric(rng, 5), _symmetric(rng, 5)
    with pytest.raises(ValueError, match=r"partial_mantel.*none"):
        partial_mantel(a, b, [])
    with pytest.raises(ValueError, match=r"first matrix.*controls"):
        partial_mantel(a, b, [a])
    with pytest.raises(ValueError, match=r"\(5, 5\).*\(4, 4\)"):
        partial_mantel(a, b, [a[:4, :4]])
    three = [_symmetric(rng, 3) for _ in range(3)]
    with pytest.raises(ValueError, match="3 pairs and 2"):
        partial_mantel(three[0], three[1], [three[2]])


def test_sign_flips_equal_scipy_over_every_choice() -> None:
    values = np.random.default_rng(1).normal(0.4, 1, size=(9, 3))
    found = sign_flip_test(values)
    expected = permutation_test(
        (values,), lambda x, axis: x.mean(axis), permutation_type="samples", vectorized=True
    )
    assert (found.exact, found.permutations, found.clusters) == (True, 512, 9)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert found.effect_size == pytest.approx(values.mean(0) / values.std(0, ddof=1))


def test_sign_flips_of_clusters_have_their_level_and_find_a_shift() -> None:
    """Rows of one cluster are alike: flipping rows one by one rejects far too often."""
    rng = np.random.default_rng(1)
    keys = np.repeat(np.arange(40), 4)
    null, by_row, shifted, trials = 0, 0, 0, 300
    for trial in range(trials):
        values = np.repeat(rng.normal(size=40), 4) + 0.3 * rng.normal(size=160)
        given = {"permutations": 199, "seed": trial}
        null += bool(sign_flip_test(values, keys, **given).p_value <= 0.05)
        by_row += bool(sign_flip_test(values, **given).p_value <= 0.05)
        shifted += bool(sign_flip_test(values + 1, keys, **given).p_value <= 0.05)
    assert 0.02 <= null / trials <= 0.09
    assert by_row / trials > 0.2
    assert shifted == trials


def test_sign_flips_count_clusters_not_rows() -> None:
    values = np.array([1.0, 3.0, 2.0, 2.0, -1.0])
    found = sign_flip_test(values, ["a", "a", "b", "b", "c"])
    # Sums 4, 4, -1: 7, 9, 1, 1 and their negatives; means 2, 2, -1.
    assert found.p_value == pytest.approx(4 / 8)
    assert found.effect_size == pytest.approx(1 / np.std([2, 2, -1], ddof=1))
    assert sign_flip_test(np.zeros((4, 2))).p_value.tolist() == [1, 1]
    single = sign_flip_test(values, ["a"] * 5)
    assert (single.p_value, single.clusters) == (1.0, 1)
    assert np.isnan(single.effect_size)
    with pytest.raises(ValueError, match=r"values.*none"):
        sign_flip_test(np.zeros(0))


def test_adjusted_p_values_by_hand() -> None:
    found = adjusted_p_values([0.01, None, 0.04, 0.03])
    assert found == [pytest.approx(0.03), None, pytest.approx(0.04), pytest.approx(0.04)]
    assert adjusted_p_values([None]) == [None]
