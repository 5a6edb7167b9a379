"""The analysis of a whole run folder: correct, reproducible, and possible with few results."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from html_page import Page
from make_run import LANGUAGES, make_run
from scipy.stats import false_discovery_control

from tracmod.analysis import RunResults, analyze, sign_flip_test
from tracmod.analysis.language_pairs import read_distances
from tracmod.report import write_report

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


def _entry(entries: list[dict], **values: str) -> dict:
    """The first entry with these values."""
    return next(e for e in entries if all(e[key] == value for key, value in values.items()))


def test_in_language_share_is_the_mean_over_test_examples(run: Path) -> None:
    found = _entry(_summary(run)["in_language"], model="full", view="subnetwork")
    expected = np.mean(list(_own(run, "full", "subnetwork").values()))
    assert found["share_positive"]["value"] == pytest.approx(expected)
    assert found["null_share"] == pytest.approx(0.2)
    assert found["num_test"] == 8 * len(LANGUAGES)


def test_every_view_has_a_summary_of_its_strongest_examples(run: Path) -> None:
    found = _summary(run)["strongest"]
    sides = {(row["model"], row["view"], row["side"]) for row in found}
    assert len(sides) == len(found) == 2 * len(VIEWS) * 2
    assert all(0 <= row["same_label"] <= 1 <= row["distinct_items"] <= row["k"] for row in found)


def test_a_listed_example_that_is_missing_in_the_data_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_test=3, models=("full",), views=("full",))
    path = run / "influence" / "full" / "full" / "top.parquet"
    top = pq.read_table(path)
    foreign = pa.array(["foreign", *top["train_id"].to_pylist()[1:]])
    pq.write_table(
        top.set_column(top.schema.get_field_index("train_id"), "train_id", foreign), path
    )
    with pytest.raises(ValueError, match=r"top\.parquet.*'foreign'"):
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


def test_every_view_of_the_study_has_its_comparisons(tmp_path: Path) -> None:
    views = ("full", "subnetwork", "subnetwork-own", "subnetwork-test", "union-en+de")
    views += ("union-ru+en", "intersection-en+de")
    run = make_run(tmp_path / "run", num_test=4, models=("full",), views=views)
    summary = analyze(run, bootstrap=20, permutations=20)
    assert [(e["view"], e["draws"], e["num_test"]) for e in summary["in_language"]] == [
        ("full", 1, 20),
        ("subnetwork", 1, 20),
        ("subnetwork-own", 1, 20),
        ("subnetwork-test", 1, 20),
        ("union", 2, 12),
        ("intersection", 1, 8),
    ]
    english, russian = _own(run, "full", "union-en+de"), _own(run, "full", "union-ru+en")
    both = [(english[i] + russian[i]) / 2 for i in english if "-en-" in i]
    both += [english[i] for i in english if "-de-" in i] + [
        russian[i] for i in english if "-ru-" in i
    ]
    found = _entry(summary["in_language"], view="union")
    assert found["share_positive"]["value"] == pytest.approx(np.mean(both))
    assert [(e["view"], e["base_view"]) for e in summary["changes"]] == [
        ("subnetwork", "full"),
        ("subnetwork-own", "full"),
        ("subnetwork-own", "subnetwork"),
        ("subnetwork-test", "full"),
        ("subnetwork-test", "subnetwork"),
        ("union", "subnetwork"),
        ("intersection", "subnetwork"),
    ]
    course = pq.read_table(run / "analysis" / "course.parquet").to_pylist()
    assert {e["test_language"] for e in course if e["view"] == "union-ru+en"} == {"ru", "en"}
    text = write_report(run).read_text(encoding="utf-8")
    shown = [view["title"] for view in Page(text).json("explorer-data")["views"]]
    assert "Full fine-tuning, own subnetwork" in shown
    assert "Full fine-tuning, union of two subnetworks" not in shown
    assert "union of two subnetworks \N{MINUS SIGN} own subnetwork" in text


def test_changes_are_tested_and_corrected(run: Path) -> None:
    names = {"model": "full", "view": "subnetwork", "base_model": "full", "base_view": "full"}
    summary = _summary(run)
    found = _entry(summary["changes"], **names)["share_positive"]
    new, base = _own(run, "full", "subnetwork"), _own(run, "full", "full")
    ids = [row["id"] for row in pq.read_table(run / "data" / "test.parquet").to_pylist()]
    groups = [test_id.rsplit("-", 1)[1] for test_id in ids]  # the parallel item
    test = sign_flip_test(np.array([new[i] - base[i] for i in ids]), groups, permutations=100)
    assert (found["p_value"], test.clusters, test.exact) == (float(test.p_value), 8, True)
    assert found["effect_size"] == pytest.approx(float(test.effect_size))
    p_values = [entry["share_positive"]["p_value"] for entry in summary["changes"]]
    adjusted = [entry["share_positive"]["p_adjusted"] for entry in summary["changes"]]
    assert adjusted == pytest.approx(false_discovery_control(p_values))
    table = pq.read_table(run / "analysis" / "changes.parquet").to_pylist()
    cells = [row for row in table if names.items() <= row.items()]
    assert [row["mean_influence_p_adjusted"] for row in cells] == pytest.approx(
        false_discovery_control([row["mean_influence_p_value"] for row in cells])
    )
    cell = _entry(cells, test_language="ru", train_language="ru")
    russian = np.array([new[i] - base[i] for i in ids if "-ru-" in i])
    assert cell["share_positive_p_value"] == pytest.approx(float(sign_flip_test(russian).p_value))
    assert cell["share_positive_effect_size"] == pytest.approx(russian.mean() / russian.std(ddof=1))


def test_shares_by_k_are_counted_from_the_ranks(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_test=4, models=("full",), views=("random-0", "random-1"))
    settings = json.loads((run / "run.json").read_text())
    settings["config"]["influence"]["k"] = [20, 3, 7000]
    (run / "run.json").write_text(json.dumps(settings))
    summary = analyze(run, bootstrap=20)
    assert summary["k"] == 20
    rows = pq.read_table(run / "analysis" / "shares_by_k.parquet").to_pylist()
    assert [(row["model"], row["view"], row["k"]) for row in rows] == [
        ("full", "random", 3),
        ("full", "random", 20),
        ("full", "random", 200),
    ]
    tops = [
        pq.read_table(run / "influence" / "full" / f"random-{draw}" / "top.parquet").to_pylist()
        for draw in (0, 1)
    ]
    for row in rows[:2]:
        for name, sign in (("share_positive", 1), ("share_negative", -1)):
            own = [
                entry["test_language"] == entry["train_language"]
                for top in tops
                for entry in top
                if entry["sign"] == sign and entry["rank"] <= row["k"]
            ]
            assert row[name] == pytest.approx(np.mean(own))
        assert row["null_share"] == pytest.approx(0.2)
    share = summary["in_language"][0]["share_positive"]
    assert [rows[1][f"share_positive{end}"] for end in ("", "_low", "_high")] == pytest.approx(
        [share["value"], share["low"], share["high"]]
    )
    assert [entry["k"] for entry in summary["strongest"]] == [20] * 4
    assert "By the number of strongest examples" in write_report(run).read_text(encoding="utf-8")


def test_seeds_and_label_balance_are_controls_of_the_partial_test(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_test=4, models=("full",), views=("full",), mask_seeds=3)
    summary = analyze(run, bootstrap=20)
    assert [e["controls"] for e in summary["partial_similarity_influence"]] == [
        ["seed_similarity"]  # labels are balanced alike in every language
    ] * 2
    train = pq.read_table(run / "data" / "train.parquet")
    labels = [
        0 if language in ("en", "ru") else label
        for language, label in zip(
            train["language"].to_pylist(), train["label"].to_pylist(), strict=True
        )
    ]
    column = train.schema.get_field_index("label")
    pq.write_table(
        train.set_column(column, "label", pa.array(labels)), run / "data" / "train.parquet"
    )
    summary = analyze(run, bootstrap=20)
    partial = summary["partial_similarity_influence"][0]
    assert partial["controls"] == ["label_distance", "seed_similarity"]
    assert (partial["exact"], partial["pairs"]) == (True, 10)
    pairs = pq.read_table(run / "analysis" / "pairs.parquet").to_pylist()
    apart = {(p["language_a"], p["language_b"]): p["label_distance"] for p in pairs}
    shares = np.bincount(train["label"].to_numpy()[:40], minlength=3) / 40
    assert apart["en", "ru"] == apart["de", "zh"] == 0
    assert apart["en", "de"] == pytest.approx(1 - shares[0])
    seeds = pq.read_table(run / "analysis" / "similarity_seeds.parquet").to_pylist()
    within = {s["language_a"]: s["jaccard"] for s in seeds if s["language_a"] == s["language_b"]}
    assert summary["seed_baseline"]["within"]["jaccard"] == pytest.approx(
        np.mean(list(within.values()))
    )
    pair = _entry(pairs, language_a="en", language_b="zh")
    assert pair["seed_similarity"] == pytest.approx((within["en"] + within["zh"]) / 2)
    text = write_report(run).read_text(encoding="utf-8")
    assert "Controlling for other differences" in text
    assert "Diagonal: similarity between seeds of one language" in text


def test_distances_are_compared_with_influence(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_test=4, models=("full",), views=("full",))
    names = {"en": "eng", "de": "deu", "ru": "rus", "zh": "zho", "ar": "arb"}
    pairs = pq.read_table(_pairs(run)).to_pylist()
    rows = ["iso_a\tiso_b\tsyntactic\tgeographic_km\tgenetic"]
    for number, pair in enumerate(pairs):
        a, b = names[pair["language_b"]], names[pair["language_a"]]
        km = "" if "arb" in (a, b) else number
        rows.append(f"{a}\t{b}\t{-pair['share_positive']!r}\t{km}\t{1 if a == 'rus' else ''}")
    table = tmp_path / "distances.tsv"
    table.write_text("\n".join([*rows, "xxx\tyyy\t1\t1\t1"]))
    summary = analyze(run, bootstrap=20, distances=table, distance_names=names)
    found = {
        t["metric"]: t for t in summary["distance_influence"] if t["measure"] == "share_positive"
    }
    assert found["syntactic"]["correlation"] == pytest.approx(-1)
    assert found["syntactic"]["p_value"] == pytest.approx(1 / 120)
    assert found["syntactic"]["left_out"] == []
    assert (found["geographic_km"]["left_out"], found["geographic_km"]["pairs"]) == (["ar"], 6)
    assert found["genetic"]["p_value"] is None
    assert "at least 3 items" in found["genetic"]["reason"]
    text = write_report(run).read_text(encoding="utf-8")
    assert "geographic_km is not known for ar." in text
    assert "This holds for the distance syntactic" in text


def _pairs(run: Path) -> Path:
    analyze(run, bootstrap=20)
    return run / "analysis" / "pairs.parquet"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["language_a\tlanguage_b", "en\tde"], r"distances.tsv.*got language_a, language_b"),
        (["language_a\tlanguage_b\tkm", "en\tde\tfar"], r":2: km.*'far'"),
        (["a\tb\tkm", "en\tde\t1", "de\ten\t2"], r":3: km of de and en.* 1\.0.* 2\.0"),
        (["a\tb\tkm", "eng\tdeu\t1"], r"ar, de, en.*distance_names"),
    ],
)
def test_bad_distances_are_named(tmp_path: Path, lines: list[str], message: str) -> None:
    path = tmp_path / "distances.tsv"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        read_distances(path, ["en", "de", "ar"])


def test_two_languages_have_no_mantel_test(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_test=3, languages=("en", "de"))
    assert analyze(run, bootstrap=20)["similarity_influence"] == []


def test_folders_without_results_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data/train\.parquet"):
        analyze(tmp_path)
    run = make_run(tmp_path / "run", num_test=2, models=())
    with pytest.raises(ValueError, match=r"no influence/"):
        analyze(run)
    other = make_run(tmp_path / "other", num_test=2, languages=("fr",), models=("full",))
    shutil.copytree(other / "influence", run / "influence")
    with pytest.raises(ValueError, match=r"examples\.parquet.*'test-fr-0'"):
        RunResults(run).views()
