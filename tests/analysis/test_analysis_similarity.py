"""Similarity of head masks and its expectation, against enumeration and simulation."""

import itertools

import numpy as np
import pytest

from tracmod.analysis import head_usage, mask_similarity, similarity_table
from tracmod.analysis.similarity import (
    seed_baseline,
    seed_similarity_table,
    seed_test,
    similarity_matrix,
    usage_summary,
)


def test_plain_measures_by_hand() -> None:
    found = mask_similarity(np.array([[1, 1, 1, 0]]), np.array([[0, 1, 1, 1]]))
    assert (found["shared_heads"], found["heads_a"], found["heads_b"]) == (2, 3, 3)
    assert found["jaccard"] == pytest.approx(2 / 4)
    assert found["cosine"] == pytest.approx(2 / 3)
    assert found["overlap"] == pytest.approx(2 / 3)


def test_chance_equals_enumeration_of_all_masks() -> None:
    a = np.array([[1, 1, 0], [1, 0, 0]])
    jaccards, shared = [], []
    for kept in itertools.combinations(range(6), 2):
        b = np.zeros(6, dtype=int)
        b[list(kept)] = 1
        both = int((a.ravel() & b).sum())
        shared.append(both)
        jaccards.append(both / (5 - both))
    b = np.array([[1, 0, 0], [0, 0, 1]])
    found = mask_similarity(a, b)
    expected = np.mean(jaccards)
    assert found["expected_jaccard"] == pytest.approx(expected)
    assert found["corrected_jaccard"] == pytest.approx((1 / 4 - expected) / (1 - expected))
    assert found["chance_probability"] == pytest.approx(np.mean(np.array(shared) >= 1))


def test_random_masks_are_at_chance_on_average() -> None:
    rng = np.random.default_rng(0)
    corrected = []
    for _ in range(400):
        a, b = (rng.permutation(np.arange(48) < kept).reshape(6, 8) for kept in (20, 30))
        corrected.append(mask_similarity(a, b)["corrected_jaccard"])
    assert np.mean(corrected) == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize(("kept", "corrected"), [(0, 0.0), (4, 0.0), (2, 1.0)])
def test_equal_masks(kept: int, corrected: float) -> None:
    mask = (np.arange(4) < kept).reshape(2, 2)
    found = mask_similarity(mask, mask)
    assert found["jaccard"] == found["overlap"] == found["cosine"] == 1
    assert found["corrected_jaccard"] == pytest.approx(corrected)


def test_masks_of_two_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a_LH and b_LH.*\(2, 3\) and \(3, 2\)"):
        mask_similarity(np.ones((2, 3)), np.ones((3, 2)))


def test_table_matrix_and_usage() -> None:
    rng = np.random.default_rng(1)
    masks = {name: (rng.random((3, 4)) < 0.5).astype(int) for name in ("en", "de", "ru")}
    table = similarity_table(masks)
    assert table.num_rows == 3
    matrix = similarity_matrix(table, ["ru", "en"], "jaccard")
    expected = mask_similarity(masks["en"], masks["ru"])["jaccard"]
    assert matrix.tolist() == [[1, expected], [expected, 1]]
    usage = head_usage(masks)
    assert usage.tolist() == (masks["en"] + masks["de"] + masks["ru"]).tolist()
    summary = usage_summary(masks)
    assert summary["used_by_all"] == np.sum(usage == 3)
    assert summary["used_by_one"] == np.sum(usage == 1)
    assert summary["used_by_none"] == np.sum(usage == 0)
    kept = [mask.mean() for mask in masks.values()]
    by_hand = [
        np.prod([p if used else 1 - p for p, used in zip(kept, case, strict=True)])
        for case in itertools.product((0, 1), repeat=3)
        if sum(case) == 1
    ]
    assert summary["expected_used_by_one"] == pytest.approx(12 * sum(by_hand))


def test_seeds_of_one_language_are_the_baseline_of_two() -> None:
    rng = np.random.default_rng(1)
    masks = {
        name: [(rng.random((3, 4)) < 0.5).astype(int) for _ in range(seeds)]
        for name, seeds in (("en", 3), ("de", 2), ("ru", 1))
    }
    table = seed_similarity_table(masks)
    rows = {(row["language_a"], row["language_b"]): row for row in table.to_pylist()}
    # Two languages are compared across seeds, like the baseline: 4 of 3 x 2 pairs.
    pairs = {("en", "en"): 3, ("en", "de"): 4, ("en", "ru"): 3, ("de", "de"): 1, ("de", "ru"): 2}
    assert {key: row["mask_pairs"] for key, row in rows.items()} == pairs
    for measure in ("jaccard", "cosine", "overlap", "corrected_jaccard"):
        english = [mask_similarity(a, b) for a, b in itertools.combinations(masks["en"], 2)]
        within = np.mean([similarity[measure] for similarity in english])
        assert rows["en", "en"][measure] == pytest.approx(within)
        across = [mask_similarity(a, masks["ru"][0])[measure] for a in masks["en"]]
        assert rows["en", "ru"][measure] == pytest.approx(np.mean(across))
        two = [within, rows["de", "de"][measure]]
        assert seed_baseline(table)["within"][measure] == pytest.approx(np.mean(two))
    assert seed_similarity_table({name: seeds[:1] for name, seeds in masks.items()}) is None


def test_what_masks_of_one_training_share_is_not_a_likeness_of_languages() -> None:
    """Every language has the masks of its training: alike within a seed, and for no language."""
    rng = np.random.default_rng(2)
    trainings = [(rng.random((6, 8)) < 0.5).astype(int) for _ in range(2)]
    masks = {name: list(trainings) for name in ("en", "de", "ru", "zh", "hi")}
    baseline = seed_baseline(seed_similarity_table(masks))
    for measure in ("jaccard", "corrected_jaccard"):
        assert baseline["within"][measure] == pytest.approx(baseline["between"][measure])
    assert seed_test(masks, 100, 0) == {"p_value": 1.0, "permutations": 120, "exact": True}


@pytest.mark.parametrize("seeds", [2, 3])
def test_masks_that_belong_to_languages_are_told_from_others(seeds) -> None:
    rng = np.random.default_rng(3)
    languages = ("en", "de", "ru", "zh", "hi")
    own = {name: (rng.random((6, 8)) < 0.5).astype(int) for name in languages}
    # A few heads of each mask are others in each seed.
    noisy = {
        name: [np.where(rng.random(mask.shape) < 0.1, 1 - mask, mask) for _ in range(seeds)]
        for name, mask in own.items()
    }
    result = seed_test(noisy, 400, 0)
    if seeds == 2:
        assert result == {"p_value": 1 / 120, "permutations": 120, "exact": True}
    else:
        assert result == {"p_value": 1 / 401, "permutations": 401, "exact": False}
    drawn = {name: [(rng.random((6, 8)) < 0.5).astype(int) for _ in range(2)] for name in languages}
    matrix = np.array(
        [[mask_similarity(drawn[a][0], drawn[b][1])["corrected_jaccard"] for b in languages]
         for a in languages]
    )  # fmt: skip
    sums = [matrix[range(5), order].sum() for order in itertools.permutations(range(5))]
    expected = np.mean([total >= sums[0] - 1e-12 for total in sums])
    assert seed_test(drawn, 10, 0)["p_value"] == pytest.approx(expected)


def test_one_language_or_one_seed_is_not_tested() -> None:
    mask = np.ones((2, 2), int)
    assert seed_test({"en": [mask, mask]}, 10, 0) is None
    assert seed_test({"en": [mask, mask], "de": [mask]}, 10, 0) is None
    assert seed_test({}, 10, 0) is None
