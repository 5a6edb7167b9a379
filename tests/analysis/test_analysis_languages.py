"""Shares of languages, their intervals and their course over epochs, against brute force."""

import numpy as np
import pyarrow as pa
import pytest

from tracmod.analysis import epoch_table, example_table, in_language_course, language_table
from tracmod.analysis.languages import LANGUAGE_SCHEMA, MEASURES, language_shares

LANGUAGES = ["en", "de", "sw"]


def _influence(num_train: int, num_test: int, k: int, seed: int = 0) -> dict:
    """Random scores (Q, N) and the rankings and sums of `top_influences` for them."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(num_test, num_train))
    groups = rng.integers(3, size=num_train)
    order = np.argsort(-scores, axis=1)
    pad = np.full((num_test, max(0, k - num_train)), -1)
    return {
        "scores": scores,
        "groups": groups,
        "top": np.concatenate([order[:, :k], pad], axis=1),
        "bottom": np.concatenate([order[:, ::-1][:, :k], pad], axis=1),
        "sums": np.stack([scores[:, groups == g].sum(axis=1) for g in range(3)], axis=1),
        "test_languages": [LANGUAGES[q % 2] for q in range(num_test)],
    }


def _table(influence: dict, **changes) -> pa.Table:
    arguments = {
        "languages": LANGUAGES,
        "train_languages": [LANGUAGES[g] for g in influence["groups"]],
        "test_ids": [f"q{q}" for q in range(len(influence["scores"]))],
        "test_languages": influence["test_languages"],
        "test_labels": [q % 3 for q in range(len(influence["scores"]))],
        "test_predictions": [0] * len(influence["scores"]),
    }
    sums = changes.pop("group_sums", influence["sums"])
    return example_table(influence["top"], influence["bottom"], sums, **(arguments | changes))


@pytest.mark.parametrize(("num_train", "k"), [(31, 7), (5, 5), (4, 9), (1, 1)])
def test_example_table_equals_counting_by_hand(num_train: int, k: int) -> None:
    influence = _influence(num_train, 6, k)
    rows = _table(influence).to_pylist()
    assert len(rows) == 6 * 3
    for row in rows:
        q, g = int(row["test_id"][1:]), LANGUAGES.index(row["train_language"])
        best = sorted(range(num_train), key=lambda n: -influence["scores"][q, n])[:k]
        worst = sorted(range(num_train), key=lambda n: influence["scores"][q, n])[:k]
        for name, listed in (("share_positive", best), ("share_negative", worst)):
            expected = sum(influence["groups"][n] == g for n in listed) / len(listed)
            assert row[name] == pytest.approx(expected)
        own = [influence["scores"][q, n] for n in range(num_train) if influence["groups"][n] == g]
        assert row["mean_influence"] == pytest.approx(sum(own) / max(1, len(own)), abs=1e-12)
        assert (row["test_label"], row["test_prediction"]) == (q % 3, 0)


def test_rows_without_any_example_have_no_shares() -> None:
    shares = language_shares([[-1, -1], [0, -1]], [1], 2)
    assert shares.tolist() == [[0, 0], [0, 1]]


def test_language_rows_sum_to_one_and_state_the_null() -> None:
    influence = _influence(50, 9, 11)
    sizes = dict(zip(LANGUAGES, np.bincount(influence["groups"]).tolist(), strict=True))
    table = language_table(_table(influence), sizes, bootstrap=200)
    assert table.schema.names == LANGUAGE_SCHEMA.names
    for language, number in (("en", 5), ("de", 4)):
        rows = [row for row in table.to_pylist() if row["test_language"] == language]
        for share in ("share_positive", "share_negative", "null_share"):
            assert sum(row[share] for row in rows) == pytest.approx(1)
        assert [row["num_test"] for row in rows] == [number] * 3
        assert [row["num_train"] for row in rows] == list(sizes.values())
        assert rows[0]["null_share"] == pytest.approx(sizes["en"] / 50)
        for row in rows:
            for measure in MEASURES:
                assert row[f"{measure}_low"] <= row[measure] <= row[f"{measure}_high"]


def test_language_means_are_means_over_the_test_examples() -> None:
    examples = _table(_influence(20, 7, 5))
    table = language_table(examples, dict.fromkeys(LANGUAGES, 1), bootstrap=10).to_pylist()
    for row in table:
        cells = [
            other
            for other in examples.to_pylist()
            if (other["test_language"], other["train_language"])
            == (row["test_language"], row["train_language"])
        ]
        for measure in MEASURES:
            assert row[measure] == pytest.approx(np.mean([cell[measure] for cell in cells]))


def test_the_order_of_the_rows_does_not_matter() -> None:
    examples = _table(_influence(20, 8, 5))
    shuffled = examples.take(np.random.default_rng(0).permutation(examples.num_rows))
    sizes = dict.fromkeys(LANGUAGES, 1)
    keys = [("test_language", "ascending"), ("train_language", "ascending")]
    tables = [language_table(t, sizes, bootstrap=10).sort_by(keys) for t in (examples, shuffled)]
    for measure in MEASURES:
        assert np.allclose(tables[0][measure].to_numpy(), tables[1][measure].to_numpy())


def test_one_test_example_has_an_interval_of_no_width() -> None:
    influence = _influence(20, 1, 5)
    for row in language_table(_table(influence), dict.fromkeys(LANGUAGES, 1)).to_pylist():
        for measure in MEASURES:
            assert row[f"{measure}_low"] == row[measure] == row[f"{measure}_high"]


def test_invalid_arguments_are_named() -> None:
    influence = _influence(10, 4, 3)
    with pytest.raises(ValueError, match=r"group_sums.*\(4, 3\).*got \(4, 2\)"):
        _table(influence, group_sums=influence["sums"][:, :2])
    with pytest.raises(ValueError, match=r"train_languages.*'xx'"):
        _table(influence, train_languages=["xx"] * 10)
    with pytest.raises(ValueError, match=r"examples.*4.*3.*got 11 rows"):
        language_table(_table(influence).slice(1), dict.fromkeys(LANGUAGES, 1))


def test_course_takes_the_diagonal_of_each_epoch() -> None:
    of_epoch = {2: _table(_influence(20, 6, 5, seed=2)), 1: _table(_influence(20, 6, 5, seed=1))}
    epochs = epoch_table(of_epoch)
    assert epochs["epoch"].to_pylist() == [1] * 6 + [2] * 6
    course = in_language_course(epochs).to_pylist()
    assert [(row["epoch"], row["test_language"]) for row in course] == [
        (1, "en"),
        (1, "de"),
        (2, "en"),
        (2, "de"),
    ]
    cells = [row for row in of_epoch[2].to_pylist() if row["test_language"] == "de"]
    own = [cell["share_positive"] for cell in cells if cell["train_language"] == "de"]
    others = [cell["mean_influence"] for cell in cells if cell["train_language"] != "de"]
    assert course[3]["share_positive"] == pytest.approx(np.mean(own))
    assert course[3]["mean_influence_others"] == pytest.approx(np.mean(others))
