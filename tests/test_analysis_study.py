"""The analysis of a whole run folder: right numbers, repeatable, and content with little."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from make_run import LANGUAGES, make_run

from tracmod.analysis import RunResults, analyze

VIEWS = ("full", "subnetwork", "random-0", "random-1", "other-en", "other-de")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_run(tmp_path_factory.mktemp("study") / "run", num_test=8, views=VIEWS)
    analyze(path, bootstrap=100, permutations=100)
    return path


def _summary(run: Path) -> dict:
    return json.loads((run / "analysis" / "summary.json").read_text())


def _own(run: Path, model: str, view: str) -> dict[str, float]:
    """Test id -> share of its own language among the proponents."""
    table = pq.read_table(run / "influence" / model / view / "examples.parquet")
    rows = [row for row in table.to_pylist() if row["test_language"] == row["train_language"]]
    return {row["test_id"]: row["share_positive"] for row in rows}


def _entry(entries: list[dict], **wanted: str) -> dict:
    return next(e for e in entries if all(e[key] == value for key, value in wanted.items()))


def test_in_language_share_is_the_mean_over_test_examples(run: Path) -> None:
    found = _entry(_summary(run)["in_language"], model="full", view="subnetwork")
    expected = np.mean(list(_own(run, "full", "subnetwork").values()))
    assert found["share_positive"]["value"] == pytest.approx(expected)
    assert found["null_share"] == pytest.approx(0.2)
    assert found["num_test"] == 8 * len(LANGUAGES)


def test_every_view_says_what_its_strongest_examples_have_in_common(run: Path) -> None:
    found = _summary(run)["strongest"]
    sides = {(row["model"], row["view"], row["side"]) for row in found}
    assert len(sides) == len(found) == 2 * len(VIEWS) * 2
    assert all(0 <= row["same_label"] <= 1 <= row["distinct_items"] <= row["k"] for row in found)


def test_a_listed_example_that_the_data_lack_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_test=3, models=("full",), views=("full",))
    path = run / "influence" / "full" / "full" / "top.parquet"
    top = pq.read_table(path)
    foreign = pa.array(["foreign", *top["train_id"].to_pylist()[1:]])
    pq.write_table(
        top.set_column(top.schema.get_field_index("train_id"), "train_id", foreign), path
    )
    with pytest.raises(ValueError, match="'foreign', which is not in the run's data"):
        analyze(run, bootstrap=20)


def test_random_is_the_mean_of_its_draws(run: Path) -> None:
    found = _entry(_summary(run)["in_language"], model="sparse", view="random")
    draws = [np.mean(list(_own(run, "sparse", f"random-{i}").values())) for i in (0, 1)]
    assert found["share_positive"]["value"] == pytest.approx(np.mean(draws))
    assert found["draws"] == 2


def test_other_leaves_out_the_own_language(run: Path) -> None:
    english, german = _own(run, "full", "other-en"), _own(run, "full", "other-de")
    expected = []
    for test_id in english:
        parts = [] if "-en-" in test_id else [english[test_id]]
        parts += [] if "-de-" in test_id else [german[test_id]]
        expected.append(np.mean(parts))
    found = _entry(_summary(run)["in_language"], model="full", view="other")
    assert found["share_positive"]["value"] == pytest.approx(np.mean(expected))


def test_changes_are_paired_per_test_example(run: Path) -> None:
    names = {"model": "sparse", "view": "subnetwork", "base_model": "full", "base_view": "full"}
    found = _entry(_summary(run)["changes"], **names)["share_positive"]
    new, base = _own(run, "sparse", "subnetwork"), _own(run, "full", "full")
    differences = [new[test_id] - base[test_id] for test_id in new]
    assert found["value"] == pytest.approx(np.mean(differences))
    assert found["low"] < found["value"] < found["high"]
    rows = pq.read_table(run / "analysis" / "changes.parquet").to_pylist()
    cell = _entry(rows, **names, test_language="ru", train_language="ru")
    russian = [new[test_id] - base[test_id] for test_id in new if "-ru-" in test_id]
    assert cell["share_positive"] == pytest.approx(np.mean(russian))
    assert len(_summary(run)["changes"]) == 11


def test_matrices_rows_sum_to_one_and_changes_to_zero(run: Path) -> None:
    for name, total in (("matrices", 1), ("changes", 0)):
        sums: dict[tuple, float] = {}
        for row in pq.read_table(run / "analysis" / f"{name}.parquet").to_pylist():
            key = tuple(row.get(part) for part in ("model", "view", "base_model", "base_view"))
            key += (row["test_language"],)
            sums[key] = sums.get(key, 0) + row["share_positive"]
        assert list(sums.values()) == pytest.approx([total] * len(sums))


def test_planted_similarity_is_found_and_symmetrised(run: Path) -> None:
    entry = _entry(
        _summary(run)["similarity_influence"], model="full", view="full", measure="share_positive"
    )
    assert entry["exact"]
    assert entry["permutations"] == 120
    assert entry["correlation"] > 0.5
    assert entry["p_adjusted"] >= entry["p_value"]
    matrices = pq.read_table(run / "analysis" / "matrices.parquet").to_pylist()
    names = {"model": "full", "view": "full"}
    there = _entry(matrices, **names, test_language="en", train_language="zh")["share_positive"]
    back = _entry(matrices, **names, test_language="zh", train_language="en")["share_positive"]
    pairs = pq.read_table(run / "analysis" / "pairs.parquet").to_pylist()
    pair = _entry(pairs, **names, language_a="en", language_b="zh")
    assert pair["share_positive"] == pytest.approx((there + back) / 2)


def test_accuracy_and_subnetworks(run: Path) -> None:
    summary = _summary(run)
    table = pq.read_table(run / "influence" / "full" / "full" / "examples.parquet").to_pylist()
    arabic = [row for row in table if row["test_language"] == row["train_language"] == "ar"]
    right = [row["test_label"] == row["test_prediction"] for row in arabic]
    view = _entry(summary["accuracy"]["views"], model="full", view="full")
    assert view["languages"]["ar"]["value"] == pytest.approx(np.mean(right))
    assert summary["accuracy"]["chance"] == pytest.approx(1 / 3)
    assert [entry["epoch"] for entry in summary["accuracy"]["epochs"]["sparse"]] == [1, 2, 3]
    assert summary["subnetworks"]["de"]["heads"] == 48
    assert summary["heads"]["used_by_none"] >= 1
    assert list(summary["num_test"]) == list(LANGUAGES)


def test_same_arguments_give_the_same_bytes(run: Path) -> None:
    before = {path.name: path.read_bytes() for path in (run / "analysis").iterdir()}
    analyze(run, bootstrap=100, permutations=100)
    assert before == {path.name: path.read_bytes() for path in (run / "analysis").iterdir()}


def test_only_the_full_model_and_no_subnetworks(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_test=3, models=("full",), views=("full",))
    shutil.rmtree(run / "subnetworks")
    shutil.rmtree(run / "models")
    (run / "run.json").unlink()
    summary = analyze(run, bootstrap=20)
    assert [(e["model"], e["view"]) for e in summary["in_language"]] == [("full", "full")]
    assert summary["changes"] == summary["similarity_influence"] == []
    assert summary["heads"] is None
    assert sorted(path.name for path in (run / "analysis").iterdir()) == [
        "course.parquet",
        "matrices.parquet",
        "summary.json",
    ]


def test_test_language_without_training_data(tmp_path: Path) -> None:
    """Zero-shot: a row in the matrices, no in-language share."""
    run = make_run(tmp_path / "run", num_test=3, models=("full",), views=("full",))
    train = pq.read_table(run / "data" / "train.parquet")
    kept = pa.array([language != "ar" for language in train["language"].to_pylist()])
    pq.write_table(train.filter(kept), run / "data" / "train.parquet")
    for name in ("examples", "top"):
        path = run / "influence" / "full" / "full" / f"{name}.parquet"
        table = pq.read_table(path)
        kept = pa.array([language != "ar" for language in table["train_language"].to_pylist()])
        pq.write_table(table.filter(kept), path)
    summary = analyze(run, bootstrap=20)
    assert summary["in_language"][0]["num_test"] == 3 * 4
    rows = pq.read_table(run / "analysis" / "matrices.parquet").to_pylist()
    assert sum(row["test_language"] == "ar" for row in rows) == 4


def test_two_languages_have_no_mantel_test(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_test=3, languages=("en", "de"))
    assert analyze(run, bootstrap=20)["similarity_influence"] == []


def test_folders_without_results_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data/train\.parquet is missing"):
        analyze(tmp_path)
    run = make_run(tmp_path / "run", num_test=2, models=())
    with pytest.raises(ValueError, match=r"no influence/"):
        analyze(run)
    other = make_run(tmp_path / "other", num_test=2, languages=("fr",), models=("full",))
    shutil.copytree(other / "influence", run / "influence")
    with pytest.raises(ValueError, match="is not in the run's data"):
        RunResults(run).views()
