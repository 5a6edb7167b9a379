"""Checks of scores by retraining, on data whose truth is known: LDS, removal, leaving one out."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import rankdata, spearmanr
from tiny_models import tiny_examples, tiny_model

from tracmod.analysis.matrix_correlation import permuted_columns
from tracmod.analysis.statistics import Resampling
from tracmod.validation.baselines import bm25_scores, embedding_scores, random_scores
from tracmod.validation.lds import Draws, lds_table, linear_correlation, rank_correlation
from tracmod.validation.retrained_changes import Changes
from tracmod.validation.retraining import (
    ALL,
    HALF_OF_SEEDS,
    SIDES,
    Retrained,
    Summed,
    draw_subsets,
    language_set,
    languages_left_out,
    leave_one_out_table,
    leave_one_out_tests,
    random_set,
    removal_set,
    removal_table,
    removals_left_out,
    strongest,
    subset_lds,
    subset_set,
)

RESAMPLING = Resampling(bootstrap=200, permutations=200, confidence=0.95, seed=0)
LANGUAGES_N = ["en"] * 12 + ["de"] * 10 + ["es"] * 8
LANGUAGES_Q = ["en"] * 5 + ["de"] * 4 + ["es"] * 6
CLUSTERS_Q = [f"item {q}" for q in range(15)]
TESTED = ["en", "de", "es"]


def rng_of(seed):
    return np.random.default_rng(seed)


def summed_of(scores_QN, members_SN):
    return Summed.of(scores_QN.astype(np.float32), members_SN, LANGUAGES_Q)


def linear_world(seed=0, subsets=12, seeds=2, noise=0.0):
    """Losses that are sums of true scores, plus noise, and the scores of two methods."""
    rng = rng_of(seed)
    truth_QN = rng.standard_normal((15, 30)).astype(np.float32)
    members_SN = draw_subsets(LANGUAGES_N, subsets, 0.5, seed)
    effects_QS = truth_QN.astype(np.float64) @ members_SN.T
    losses = {
        subset_set(s): 7 - effects_QS[:, s] + noise * rng.standard_normal((seeds, 15))
        for s in range(subsets)
    }
    summed = {
        "tracin": summed_of(truth_QN, members_SN),
        "random": summed_of(random_scores(15, 30, seed), members_SN),
    }
    return summed, Retrained(losses, losses)


def row_with(table, **values):
    """The only row with these values."""
    rows = [row for row in table.to_pylist() if values.items() <= row.items()]
    assert len(rows) == 1, rows
    return rows[0]


# --- the linear datamodelling score ---------------------------------------------------------


def test_a_rank_correlation_with_counts_is_that_of_a_sample_with_repetitions():
    rng = rng_of(1)
    for _ in range(20):
        x, y = rng.integers(5, size=9) / 2, rng.standard_normal(9)
        counts = rng.multinomial(9, np.full(9, 1 / 9))
        repeated = [np.repeat(values, counts) for values in (x, y)]
        expected = spearmanr(*repeated).statistic
        assert rank_correlation(x, y, counts.astype(float)) == pytest.approx(expected, abs=1e-12)
    assert rank_correlation(np.ones(4), np.arange(4.0), np.ones(4)) == 0


def test_a_linear_correlation_with_counts_is_that_of_a_sample_with_repetitions():
    rng = rng_of(2)
    x, y = rng.standard_normal((2, 9))
    counts = rng.multinomial(9, np.full(9, 1 / 9))
    expected = np.corrcoef(np.repeat(x, counts), np.repeat(y, counts))[0, 1]
    assert linear_correlation(x, y, counts.astype(float)) == pytest.approx(expected, abs=1e-12)
    assert linear_correlation(np.ones(4), np.arange(4.0), np.ones(4)) == 0


def test_pearson_is_of_the_mean_loss_of_a_language():
    summed, retrained = linear_world(3, noise=2.0)
    table = subset_lds(summed, retrained, LANGUAGES_Q, CLUSTERS_Q, RESAMPLING)
    losses_QS = np.stack([retrained.losses[subset_set(s)].mean(0) for s in range(12)], axis=-1)
    predicted_QS = summed["tracin"].subsets_QS
    own_Q = np.array(LANGUAGES_Q) == "de"
    means = predicted_QS[own_Q].mean(axis=0), -losses_QS[own_Q].mean(axis=0)
    row = row_with(table, method="tracin", level="language", test_language="de")
    assert row["pearson"] == pytest.approx(np.corrcoef(*means)[0, 1])
    assert row["pearson_low"] <= row["pearson"] <= row["pearson_high"]
    assert row_with(table, method="tracin", level="example", test_language="de")["pearson"] is None


def test_in_a_linear_world_true_scores_have_an_lds_of_one_and_random_ones_of_about_zero():
    summed, retrained = linear_world()
    table = subset_lds(summed, retrained, LANGUAGES_Q, CLUSTERS_Q, RESAMPLING)
    for row in table.to_pylist():
        if row["method"] in ("tracin", HALF_OF_SEEDS):
            assert (row["value"], row["low"], row["high"]) == pytest.approx((1, 1, 1))
    assert {row["test_language"] for row in table.to_pylist()} == {None, *TESTED}
    rows = []
    for seed in range(20):
        summed, retrained = linear_world(seed, seeds=1)
        table = subset_lds(summed, retrained, LANGUAGES_Q, CLUSTERS_Q, RESAMPLING)
        rows.append(row_with(table, method="random", level="example", test_language=None))
    assert abs(np.mean([row["value"] for row in rows])) < 0.06
    assert sum(row["low"] <= 0 <= row["high"] for row in rows) >= 18


def test_the_lds_of_a_test_example_is_spearman_over_the_subsets():
    summed, retrained = linear_world(3, noise=2.0)
    table = subset_lds(summed, retrained, LANGUAGES_Q, CLUSTERS_Q, RESAMPLING)
    losses_QS = np.stack([retrained.losses[subset_set(s)].mean(0) for s in range(12)], axis=-1)
    predicted_QS = summed["random"].subsets_QS
    lds_Q = [spearmanr(p, -a).statistic for p, a in zip(predicted_QS, losses_QS, strict=True)]
    names = {"method": "random", "level": "example"}
    everything, german = (row_with(table, **names, test_language=name) for name in (None, "de"))
    assert everything["value"] == pytest.approx(np.mean(lds_Q))
    assert german["value"] == pytest.approx(np.mean(lds_Q[5:9]))
    of_language = [
        spearmanr(predicted_QS[own].mean(0), -losses_QS[own].mean(0)).statistic
        for own in (slice(0, 5), slice(5, 9), slice(9, 15))
    ]
    names["level"] = "language"
    everything, spanish = (row_with(table, **names, test_language=name) for name in (None, "es"))
    assert everything["value"] == pytest.approx(np.mean(of_language))
    assert spanish["value"] == pytest.approx(of_language[2])


def test_the_difference_from_the_first_method_uses_the_same_draws():
    """Two methods with common errors: their intervals overlap, but their difference is above 0."""
    rng = np.random.default_rng(0)
    effect_QS = rng.standard_normal((15, 24))
    shared_QS = effect_QS + 1.5 * rng.standard_normal((15, 24))
    predicted = {"worse": shared_QS, "better": shared_QS + 0.5 * effect_QS, "same": shared_QS}
    draws = Draws.of(CLUSTERS_Q, 24, RESAMPLING)
    table = lds_table(predicted, -effect_QS, LANGUAGES_Q, draws)
    names = {"level": "example", "test_language": None}
    worse, better, same = (row_with(table, method=name, **names) for name in predicted)
    assert worse["over_first"] is None
    assert better["over_first"] == pytest.approx(better["value"] - worse["value"])
    assert better["low"] < worse["high"]
    assert 0 < better["over_first_low"] < better["over_first"] < better["over_first_high"]
    assert [same[f"over_first{bound}"] for bound in ("", "_low", "_high")] == [0, 0, 0]


def test_scores_of_the_opposite_sign_have_an_lds_of_minus_one():
    summed, retrained = linear_world()
    negated = {name: Summed(-sums.subsets_QS, sums.means_LN) for name, sums in summed.items()}
    table = subset_lds(negated, retrained, LANGUAGES_Q, CLUSTERS_Q, RESAMPLING)
    assert row_with(table, method="tracin", level="example", test_language=None)["value"] == -1


def test_intervals_account_for_the_subsets_and_the_test_examples():
    """Each of them alone varies the result."""
    rng = rng_of(0)
    predicted_S, losses_S = rng.standard_normal((2, 12))
    alike_QS = np.tile(predicted_S, (15, 1)), np.tile(losses_S, (15, 1))
    draws = Draws.of(CLUSTERS_Q, 12, RESAMPLING)
    names = {"level": "example", "test_language": None}
    table = lds_table({"m": alike_QS[0]}, alike_QS[1], LANGUAGES_Q, draws)
    only_subsets = row_with(table, **names)
    assert only_subsets["high"] - only_subsets["low"] > 0.3
    # Half of the test examples are all right and half all wrong, whatever the subsets.
    signs_Q1 = np.where(np.arange(15) % 2, 1.0, -1.0)[:, None]
    table = lds_table({"m": signs_Q1 * alike_QS[0]}, -alike_QS[0], LANGUAGES_Q, draws)
    only_tests = row_with(table, **names)
    assert only_tests["high"] - only_tests["low"] > 0.3


def test_a_perfect_prediction_of_a_language_s_mean_has_an_interval_of_one():
    """A metagradient predicts the mean over these test examples, not over others."""
    effect_QS = rng_of(3).standard_normal((15, 12))
    predicted_QS = np.empty_like(effect_QS)
    for own in (slice(0, 5), slice(5, 9), slice(9, 15)):
        predicted_QS[own] = effect_QS[own].mean(axis=0)
    draws = Draws.of(CLUSTERS_Q, 12, RESAMPLING)
    table = lds_table({"metagradient": predicted_QS}, -effect_QS, LANGUAGES_Q, draws)
    for language in (None, *TESTED):
        row = row_with(table, level="language", test_language=language)
        names = [f"{name}{bound}" for name in ("pearson",) for bound in ("", "_low", "_high")]
        assert [row[name] for name in ("value", "low", "high", *names)] == pytest.approx([1] * 6)


def test_the_interval_of_a_language_accounts_for_the_subsets():
    predicted_S, losses_S = rng_of(0).standard_normal((2, 12))
    draws = Draws.of(CLUSTERS_Q, 12, RESAMPLING)
    tiled = [np.tile(values, (15, 1)) for values in (predicted_S, losses_S)]
    row = row_with(lds_table({"m": tiled[0]}, tiled[1], LANGUAGES_Q, draws),
                   level="language", test_language=None)  # fmt: skip
    assert row["low"] < row["value"] < row["high"]
    assert row["high"] - row["low"] > 0.3


def test_translations_of_one_item_are_drawn_together():
    draws = Draws.of(["a", "a", "b", "c"], 3, RESAMPLING)
    assert (draws.tests_BQ[:, 0] == draws.tests_BQ[:, 1]).all()
    assert (draws.tests_BQ[0] == 1).all()
    assert draws.tests_BQ[:, [0, 2, 3]].sum(axis=1) == pytest.approx(3)
    assert not np.array_equal(draws.tests_BQ[:, 0], draws.tests_BQ[:, 2])


def test_the_ceiling_is_the_lds_of_one_half_of_the_seeds_for_the_other():
    summed, quiet = linear_world(noise=0.01)
    _, loud = linear_world(noise=1000.0)
    names = {"method": HALF_OF_SEEDS, "level": "example", "test_language": None}
    for retrained, low, high in ((quiet, 0.99, 1), (loud, -0.2, 0.2)):
        table = subset_lds(summed, retrained, LANGUAGES_Q, CLUSTERS_Q, RESAMPLING)
        assert low <= row_with(table, **names)["value"] <= high
    table = subset_lds(*linear_world(seeds=1), LANGUAGES_Q, CLUSTERS_Q, RESAMPLING)
    assert HALF_OF_SEEDS not in table["method"].to_pylist()


# --- sets of training examples ---------------------------------------------------------------


def test_subsets_have_the_size_differ_and_are_reproducible():
    members_SN = draw_subsets(LANGUAGES_N, 8, 0.3, 5)
    assert (members_SN.sum(axis=1) == 9).all()
    assert len({row.tobytes() for row in members_SN}) == 8
    assert np.array_equal(members_SN, draw_subsets(LANGUAGES_N, 8, 0.3, 5))
    assert not np.array_equal(members_SN, draw_subsets(LANGUAGES_N, 8, 0.3, 6))
    # More subsets begin with the same ones, so that no training is wasted.
    assert np.array_equal(members_SN, draw_subsets(LANGUAGES_N, 12, 0.3, 5)[:8])


def test_a_subset_without_a_language_is_refused():
    with pytest.raises(ValueError, match=r"retrain.fraction.*none of es \(1 in all\)"):
        draw_subsets([*["en"] * 20, "es"], 10, 0.2, 0)


def test_the_strongest_are_the_highest_and_lowest_and_ties_are_broken_by_chance():
    rows = strongest(np.array([0.5, -3.0, 2.0, 1.0, -1.0]), 2, 0)
    assert rows["proponents"].tolist() == [2, 3]
    assert rows["opponents"].tolist() == [1, 4]
    tied = strongest(np.zeros(100), 10, 0)
    assert not set(tied["proponents"]) & set(tied["opponents"])
    assert tied["opponents"].tolist() != list(range(10))


def test_a_removal_takes_the_examples_of_the_highest_mean_score_on_a_language():
    scores_QN = rng_of(2).standard_normal((15, 30))
    summed = {"tracin": summed_of(scores_QN, np.ones((2, 30), bool)),
              "random": summed_of(-scores_QN, np.ones((2, 30), bool))}  # fmt: skip
    sets = removals_left_out(summed, TESTED, 3, 2, 0)
    assert set(sets) == {random_set(0), random_set(1)} | {
        removal_set("tracin", side, name) for side in ("proponents", "opponents") for name in TESTED
    }
    order_N = np.argsort(scores_QN[5:9].mean(axis=0))
    assert set(sets[removal_set("tracin", "proponents", "de")]) == set(order_N[-3:])
    assert set(sets[removal_set("tracin", "opponents", "de")]) == set(order_N[:3])
    assert [len(set(rows)) for rows in sets.values()] == [3] * 8


# --- removal --------------------------------------------------------------------------------


def removal_world(effect, seeds=2):
    """Each removal raises the loss of its own test language by `effect`, by side."""
    rng = rng_of(4)
    before = rng.random((seeds, 15))
    losses = {ALL: before, **{random_set(d): before + 0.01 * d for d in range(3)}}
    for side, name in itertools.product(effect, TESTED):
        after = before + 50  # must not count for other languages
        own_Q = [q for q, language in enumerate(LANGUAGES_Q) if language == name]
        after[:, own_Q] = before[:, own_Q] + effect[side]
        losses[removal_set("tracin", side, name)] = after
    correct = {name: (values < 0.5).astype(float) for name, values in losses.items()}
    return Retrained(losses, correct)


def test_a_removal_is_compared_with_the_same_seed_for_its_own_language_only():
    retrained = removal_world({"proponents": 0.4, "opponents": -0.2})
    methods = ["tracin", "random"]
    table = removal_table(methods, retrained, 3, 3, LANGUAGES_Q, CLUSTERS_Q, RESAMPLING)
    assert len(table) == (2 + 1) * (1 + 3)
    for name in (None, *TESTED):
        for side, change in (("proponents", 0.4), ("opponents", -0.2)):
            row = row_with(table, method="tracin", side=side, test_language=name)
            assert row["loss_change"] == pytest.approx(change)
            assert row["loss_change_low"] == pytest.approx(change)
            assert (row["trainings"], row["removed"]) == (2, 3)
        drawn = row_with(table, method="random", side="random", test_language=name)
        assert drawn["loss_change"] == pytest.approx(0.01)
        # Trainings do not vary here; the three draws do by 0.01 (their mean by 0.01 / 3**0.5).
        assert drawn["loss_change_low"] < 0.01 < drawn["loss_change_high"]
        width = drawn["loss_change_high"] - drawn["loss_change_low"]
        assert width == pytest.approx(2 * 1.96 * 0.01 / 3**0.5, rel=0.3)
        assert drawn["trainings"] == 6
    own_Q = slice(5, 9)
    before, after = (retrained.correct[name][:, own_Q].mean()
                     for name in (ALL, removal_set("tracin", "proponents", "de")))  # fmt: skip
    row = row_with(table, method="tracin", side="proponents", test_language="de")
    assert row["accuracy_change"] == pytest.approx(after - before)
    assert row["accuracy_before"] == pytest.approx(before)
    assert row["loss_before"] == pytest.approx(retrained.losses[ALL][:, own_Q].mean())


def trainings_world(seed, seeds, spread=0.0):
    """Losses of trainings that differ by chance alone and not on average.

    Chance acts on a training (all test examples change together), on a language in a training, and
    on each example in a training. Each example also changes without a set of training examples, the
    same with every seed. The true losses after random removals differ by `spread`.
    """
    rng = rng_of([seed, seeds])

    def chance():
        own = rng.standard_normal((seeds, 1)) + 0.7 * rng.standard_normal((seeds, 15))
        of_language = rng.standard_normal((seeds, 3))
        return own + of_language[:, [TESTED.index(name) for name in LANGUAGES_Q]]

    before, shared = rng.standard_normal(15), 3 * rng.standard_normal((seeds, 1))
    losses = {ALL: before + shared + chance()}
    at_random = [random_set(draw) for draw in range(3)]
    removals = [removal_set("tracin", side, name) for side in SIDES for name in TESTED]
    for name in (*at_random, *removals, *map(language_set, TESTED)):
        losses[name] = before + rng.standard_normal(15) + shared + chance()
        losses[name] += spread * rng.standard_normal() * (name in at_random)
    return Retrained(losses, {name: (values > 0.0) + 0.0 for name, values in losses.items()})


def removals_of(retrained):
    return removal_table(["tracin"], retrained, 3, 3, LANGUAGES_Q, CLUSTERS_Q, RESAMPLING)


def left_out_of(retrained):
    summed = {"tracin": summed_of(np.zeros((15, 30)), np.ones((2, 30), bool))}
    return leave_one_out_table(summed, retrained, LANGUAGES_N, LANGUAGES_Q, CLUSTERS_Q, RESAMPLING)


@pytest.mark.parametrize(("seeds", "spread"), [(2, 0.0), (3, 0.0), (2, 1.0)])
def test_intervals_of_few_seeds_have_their_coverage(seeds, spread):
    covered = {}
    for seed in range(150):
        retrained = trainings_world(seed, seeds, spread)
        for row in removals_of(retrained).to_pylist():
            is_covered = row["loss_change_low"] <= 0 <= row["loss_change_high"]
            covered.setdefault((row["side"], row["test_language"] is None), []).append(is_covered)
        for row in left_out_of(retrained).to_pylist():
            is_covered = row["actual_low"] <= 0 <= row["actual_high"]
            covered.setdefault("left out", []).append(is_covered)
    shares = {key: np.mean(values) for key, values in covered.items()}
    assert len(shares) == 7
    assert all(0.9 <= share <= 0.99 for share in shares.values()), shares


def test_with_one_seed_there_is_no_interval():
    retrained = trainings_world(0, 1)
    for row in removals_of(retrained).to_pylist():
        assert math.isfinite(row["loss_change"])
        for name in ("loss", "accuracy"):
            assert row[f"{name}_change_low"] is row[f"{name}_change_high"] is None
    for row in left_out_of(retrained).to_pylist():
        assert math.isfinite(row["actual"])
        assert row["actual_low"] is row["actual_high"] is None


def test_a_training_for_two_sets_counts_once():
    """If two languages have the same strongest examples, one training has one error for both."""
    rows_of = {"en": np.arange(3), "de": np.arange(3, 6)}
    chance = rng_of(0).standard_normal((3, 400, 1)) @ np.ones((1, 6))
    values = dict(zip(("all", "a", "b"), chance, strict=True))
    draws = Draws.of(list(range(6)), 1, RESAMPLING)

    def variance(same, compared):
        return Changes.of(values, same, "all", rows_of, draws, 0).variance(compared)

    own = {name: name for name in values}
    apart = variance(own, {"en": ["a"], "de": ["b"]})
    assert variance(own, {"en": ["a"], "de": ["a"]}) == pytest.approx(4 / 3 * apart)
    values["b"] = values["a"]
    twice = variance({**own, "b": "a"}, {"en": ["a"], "de": ["b"]})
    assert twice == pytest.approx(variance({**own, "b": "a"}, {"en": ["a"], "de": ["a"]}))
    # 1 (the training) + 1 (the baseline), of 400 seeds.
    assert twice == pytest.approx(2 / 400, rel=0.2)


# --- leaving a language out -----------------------------------------------------------------


def leave_one_out_world(actual_LG, predicted_QN):
    base = np.full((2, 15), 1.0)
    rows_Q = [TESTED.index(name) for name in LANGUAGES_Q]
    losses = {ALL: base}
    for column, name in enumerate(dict.fromkeys(LANGUAGES_N)):
        losses[language_set(name)] = base + actual_LG[rows_Q, column]
    summed = {"tracin": summed_of(predicted_QN, np.ones((2, 30), bool))}
    return summed, Retrained(losses, losses)


def test_the_predicted_change_is_a_sum_over_training_of_means_over_test_examples():
    predicted_QN = rng_of(5).standard_normal((15, 30))
    of_Q, of_N = ([slice(0, 5), slice(5, 9), slice(9, 15)],
                  [slice(0, 12), slice(12, 22), slice(22, 30)])  # fmt: skip
    expected_LG = np.array([[predicted_QN[q, n].mean(axis=0).sum() for n in of_N] for q in of_Q])
    summed, retrained = leave_one_out_world(expected_LG**3, predicted_QN)
    table = leave_one_out_table(summed, retrained, LANGUAGES_N, LANGUAGES_Q, CLUSTERS_Q, RESAMPLING)
    assert table["predicted"].to_numpy().reshape(3, 3) == pytest.approx(expected_LG, abs=1e-5)
    assert table["actual"].to_numpy().reshape(3, 3) == pytest.approx(expected_LG**3)
    everything, between = leave_one_out_tests(table, RESAMPLING)
    assert (everything["correlation"], everything["cells"]) == (pytest.approx(1), 9)
    assert (between["correlation"], between["cells"]) == (pytest.approx(1), 6)
    assert everything["p_value"] == pytest.approx(1 / 6)  # only the observed of all 6 orders
    left_out = languages_left_out(LANGUAGES_N)
    assert left_out[language_set("de")].tolist() == list(range(12, 22))


def test_the_permutation_test_ignores_that_own_cells_stand_out():
    names = [f"language {i}" for i in range(5)]
    rejected = []
    for seed in range(40):
        rng = rng_of(seed)
        a, b = rng.standard_normal((2, 5, 5)) + 10 * np.eye(5)
        result = permuted_columns(a, b, names, names)
        assert result.correlation > 0.2  # from the own cells alone
        rejected.append(result.p_value <= 0.05)
    assert np.mean(rejected) <= 0.15


def test_the_permutation_test_agrees_with_trying_all_orders():
    rng = rng_of(7)
    a, b = rng.standard_normal((2, 4, 3))
    rows, columns = ["x", "a", "b", "c"], ["a", "b", "c"]
    result = permuted_columns(a, b, rows, columns, between_only=True)
    mask = np.array([[True] * 3, *(~np.eye(3, dtype=bool)).tolist()])
    values = []
    for order in itertools.permutations(range(3)):
        moved = a[[0, *(1 + np.array(order))]][:, order]
        values.append(np.corrcoef(rankdata(moved[mask]), rankdata(b[mask]))[0, 1])
    assert result.correlation == pytest.approx(values[0])
    assert result.p_value == pytest.approx(np.mean(np.abs(values) >= abs(values[0]) - 1e-12))
    assert (result.exact, result.permutations, result.cells) == (True, 6, 9)
    assert permuted_columns(np.ones((4, 3)), b, rows, columns).p_value is None


# --- baselines ------------------------------------------------------------------------------


def test_bm25_agrees_with_its_formula_for_words_of_any_script():
    trains = ["Die Katze sitzt", "die die Maus", "猫 坐 在", "a b a"]
    queries = ["DIE Katze", "猫", "", "a", "hund"]
    found = bm25_scores(queries, trains)
    words = [text.lower().split() for text in trains]
    average = np.mean([len(own) for own in words])
    for query, row in zip(queries, found, strict=True):
        for own, score in zip(words, row, strict=True):
            expected = 0.0
            for word in query.lower().split():
                having, times = sum(word in text for text in words), own.count(word)
                idf = math.log(1 + (4 - having + 0.5) / (having + 0.5))
                expected += idf * times / (times + 1.5 * (1 - 0.75 + 0.75 * len(own) / average))
            assert score == pytest.approx(expected, abs=1e-6)
    assert found[1].argmax() == 2
    assert (found[2] == 0).all()
    assert (bm25_scores(["a"], ["", "!"]) == 0).all()


@pytest.mark.parametrize("family", ["xlm-roberta", "distilbert"])
def test_embeddings_are_means_over_the_tokens_without_padding(family):
    model = tiny_model(family, dropout=0.5)
    queries, trains = tiny_examples(3, seed=1), tiny_examples(7, seed=2)
    vectors = []
    for example in (*queries, *trains):
        ids = torch.tensor([example["input_ids"]])
        mean = model.base_model(input_ids=ids).last_hidden_state[0].mean(dim=0)
        vectors.append(mean / mean.norm())
    expected = torch.stack(vectors[:3]) @ torch.stack(vectors[3:]).T
    found = embedding_scores(model.train(), queries, trains)
    assert model.training
    assert found == pytest.approx(expected.detach().numpy(), abs=1e-5)
