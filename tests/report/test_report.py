"""The report: complete, self-contained, safe with hostile texts, and possible with little data."""

import base64
import gzip
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from html_page import Page
from make_run import HOSTILE, LANGUAGES, make_run

from tracmod.analysis import RunResults, analyze
from tracmod.analysis.results import VIEWS
from tracmod.report import write_report
from tracmod.report.html import page as html_page
from tracmod.report.html.explorer import explorer, explorer_data
from tracmod.report.wording import labels as words
from tracmod.report.wording.findings import findings, how_sure, seeds
from tracmod.report.wording.labels import number, percent, points, seconds, superscript


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_run(tmp_path_factory.mktemp("report") / "run")
    analyze(path, bootstrap=50, permutations=50)
    write_report(path)
    return path


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    return (run / "report" / "index.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_the_page_has_every_section_and_figure(page: Page) -> None:
    sections = {attrs["id"] for tag, attrs in page.tags if tag == "section"}
    assert sections == {
        *("summary", "reading", "accuracy", "influence", "changes", "reliance", "course"),
        *("subnetworks", "similarity", "examples", "run"),
    }
    links = {attrs["href"] for tag, attrs in page.tags if tag == "a"}
    assert links == {f"#{name}" for name in sections}
    numbers = [int(attrs["data-figure"]) for _, attrs in page.tags if "data-figure" in attrs]
    figures = page.json("figure-data")
    assert numbers == list(range(len(figures)))
    # 2 accuracy; 6 views and 8 comparisons x 3 measures; bars x 2 signs; course of the mean and
    # of 3 views; 4 similarities; 6 scatters x 2 measures.
    assert len(figures) == 2 + 3 * 6 + 3 * 8 + 2 * 2 + 2 * 4 + 4 + 2 * 6
    grids = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert len(grids) == len(LANGUAGES) + 1


def test_the_sections_of_a_study_with_everything(tmp_path: Path) -> None:
    """A study with seeds, several k, distances, shared parallel items and pairs of subnetworks."""
    views = ("full", "subnetwork", "subnetwork-own", "subnetwork-test", "union-en+de")
    run = make_run(tmp_path / "run", num_train=8, num_test=3, views=views, mask_seeds=2)
    settings = json.loads((run / "run.json").read_text())
    settings["config"]["influence"]["k"] = [20, 5]
    (run / "run.json").write_text(json.dumps(settings))
    train = pq.read_table(run / "data" / "train.parquet")
    groups = [group.replace("train", "test") for group in train["group"].to_pylist()]
    column = train.schema.get_field_index("group")
    train = train.set_column(column, "group", pa.array(groups))
    pq.write_table(train, run / "data" / "train.parquet")
    lines = ["language_a,language_b,<b>km</b>"]
    lines += [f"{a},{b},{len(a + b) + i}" for i, a in enumerate(LANGUAGES) for b in LANGUAGES[:i]]
    (tmp_path / "distances.csv").write_text("\n".join(lines))
    analyze(run, bootstrap=20, permutations=20, distances=tmp_path / "distances.csv")
    page = Page(write_report(run).read_text(encoding="utf-8"))
    sections = {attrs["id"] for tag, attrs in page.tags if tag == "section"}
    assert {"translations", "distances", "similarity"} <= sections
    assert {attrs["href"] for tag, attrs in page.tags if tag == "a"} == {f"#{s}" for s in sections}
    figures = page.json("figure-data")
    numbers = [int(attrs["data-figure"]) for _, attrs in page.tags if "data-figure" in attrs]
    assert numbers == list(range(len(figures)))
    by_k = [f for f in figures if f["layout"]["xaxis"]["title"]["text"].startswith("k, number")]
    assert len(by_k) == 2 * 2
    assert by_k[0]["data"][0]["x"] == ["5", "20"]
    assert by_k[0]["layout"]["shapes"][0]["y0"] == pytest.approx(20)
    seeds = pq.read_table(run / "analysis" / "similarity_seeds.parquet").to_pylist()
    jaccard = next(f for f in figures if f["layout"]["xaxis"]["title"]["text"] == "language")
    assert jaccard["data"][0]["z"][0][0] == pytest.approx(seeds[0]["jaccard"])
    css = Path(html_page.__file__).with_name("page.css").read_text(encoding="utf-8")
    assert all(css.count(f"--{view}:") == 2 for view in VIEWS)
    assert set(VIEWS) == set(words.VIEW_NAMES)


def _certificate(spearman: float) -> dict:
    names = ("pearson", "top_k_overlap", "rmse", "share_error_mean", "share_error_largest")
    certificate = {name: _interval(0.02, 0.01) for name in names}
    certificate |= {"spearman": _interval(spearman, 0.005), "least_spearman": 0.95}
    return certificate | {"queries": 20, "train": 200, "k": 9, "passed": spearman >= 0.95}


@pytest.mark.parametrize(("sparse", "alarms"), [(0.97, 0), (0.9, 1)])
def test_the_certificate_has_a_section_and_a_warning_if_it_failed(
    tmp_path: Path, sparse: float, alarms: int
) -> None:
    run = make_run(tmp_path / "run", num_train=8, num_test=3)
    analyze(run, bootstrap=10, permutations=10)
    certificates = {"full": _certificate(0.99), "sparse": _certificate(sparse)}
    (run / "analysis" / "fidelity.json").write_text(json.dumps(certificates))
    page = Page(write_report(run).read_text(encoding="utf-8"))
    sections = {attrs["id"] for tag, attrs in page.tags if tag == "section"}
    assert "fidelity" in sections
    assert {attrs["href"] for tag, attrs in page.tags if tag == "a"} == {f"#{s}" for s in sections}
    assert f"with a Spearman correlation of {sparse:.3f} ({sparse - 0.005:.3f}" in page.text
    assert "shares of the sample differ by 2.0 points (1.0 to 3.0) on average" in page.text
    alarmed = [attrs for _, attrs in page.tags if attrs.get("role") == "alert"]
    assert len(alarmed) == alarms == page.text.count("Fidelity too low")
    assert page.text.count("not passed") == alarms


def test_the_report_says_if_there_are_fewer_training_examples_than_k() -> None:
    texts = how_sure({**_summary(0.05, 0.04), "k": 36, "asked_k": 100})
    assert "there are only 36. All of them are counted, so every share equals the null" in texts[1]


def test_every_figure_names_its_axes(page: Page) -> None:
    for figure in page.json("figure-data"):
        for axis in ("xaxis", "yaxis"):
            assert figure["layout"][axis]["title"]["text"]


def test_heat_maps_show_the_table(run: Path, page: Page) -> None:
    rows = pq.read_table(run / "influence" / "full" / "full" / "languages.parquet").to_pylist()
    first = next(f for f in page.json("figure-data") if f["data"][0]["type"] == "heatmap")
    trace = first["data"][0]
    for row in rows:
        i, j = trace["y"].index(row["test_language"]), trace["x"].index(row["train_language"])
        assert trace["z"][i][j] == pytest.approx(100 * row["share_positive"])
    assert trace["y"] == list(LANGUAGES)


def test_the_page_loads_nothing(html: str, page: Page) -> None:
    for tag, attrs in page.tags:
        assert tag not in {"link", "iframe", "img", "object", "embed"}
        assert "src" not in attrs
        assert attrs.get("href", "#").startswith("#")
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    policy = [a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a]
    assert "default-src 'none'" in policy[0]
    assert len(html.encode()) < 10e6


def test_hostile_texts_are_shown_as_text(html: str, page: Page) -> None:
    assert HOSTILE not in html
    assert len(re.findall(r"<script\b", html.split("<script>")[0])) == 3
    data = page.json("explorer-data")
    assert any(HOSTILE in text for text in data["test"]["text_a"])
    assert len(page.scripts) == 4


def test_hostile_names_are_shown_as_text(tmp_path: Path) -> None:
    hostile = '<img src=x onerror="alert(1)">'
    run = make_run(tmp_path / "run", num_test=2, models=("full",), views=("full",))
    for path in [*run.glob("data/*.parquet"), *run.glob("influence/**/*.parquet")]:
        table = pq.read_table(path)
        for name in table.schema.names:
            if "language" in name:
                values = [hostile if v == "de" else v for v in table[name].to_pylist()]
                column = table.schema.get_field_index(name)
                table = table.set_column(column, name, pa.array(values, pa.string()))
        pq.write_table(table, path)
    settings = json.loads((run / "run.json").read_text())
    settings["config"]["name"] = settings["device"] = hostile
    (run / "run.json").write_text(json.dumps(settings))
    analyze(run, bootstrap=10)
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert hostile in page.text
    assert not any(tag == "img" for tag, _ in page.tags)
    for figure in page.json("figure-data"):
        assert "<img" not in json.dumps(figure)


def _array(text: str, dtype: str, *shape: int) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype).reshape(shape)


@pytest.mark.parametrize("position", [0, 4])
def test_the_explorer_shows_the_tables(run: Path, page: Page, position: int) -> None:
    """Check every test example, its shares, and its strongest training examples in order."""
    data = page.json("explorer-data")
    titles = [view["title"] for view in data["views"]]
    folder = run / "influence" / ("full/full" if position == 0 else "sparse/subnetwork")
    assert titles[0] == "Full fine-tuning, all heads"
    assert titles[4] == "Sparse fine-tuning, own subnetwork"
    view, num = data["views"][position], len(data["test"]["label"])
    places = _array(view["places"], "<u2", num, 2, data["shown"])
    scores = view["unit"] * _array(view["scores"], "<f2", num, 2, data["shown"]).astype(float)
    shares = _array(view["shares"], "<u2", num, 2, len(LANGUAGES)) / 10_000
    predictions = _array(view["prediction"], "<i2", num)
    test = pq.read_table(run / "data" / "test.parquet").to_pylist()
    assert data["test"]["text_b"] == [row["text_b"] for row in test]
    assert data["test"]["group"] == [row["group"] for row in test]
    train = {row["id"]: row for row in pq.read_table(run / "data" / "train.parquet").to_pylist()}
    q_of = {row["id"]: q for q, row in enumerate(test)}
    for row in pq.read_table(folder / "top.parquet").to_pylist():
        where = q_of[row["test_id"]], int(row["sign"] < 0), row["rank"] - 1
        listed, expected = places[where], train[row["train_id"]]
        for column in ("language", "label", "text_a", "text_b", "group"):
            assert data["train"][column][listed] == expected[column]
        assert scores[where] == pytest.approx(row["score"], rel=2e-3)
    for row in pq.read_table(folder / "examples.parquet").to_pylist():
        q, g = q_of[row["test_id"]], LANGUAGES.index(row["train_language"])
        assert shares[q, 0, g] == pytest.approx(row["share_positive"], abs=1e-4)
        assert shares[q, 1, g] == pytest.approx(row["share_negative"], abs=1e-4)
        assert predictions[q] == row["test_prediction"]


def test_examples_that_do_not_fit_are_left_out(run: Path) -> None:
    """First fewer training examples are listed, then fewer test examples of every language."""
    results = RunResults(run)

    def fitted(largest: int) -> dict:
        packed = explorer(results, largest)
        return json.loads(gzip.decompress(base64.b64decode(packed))) | {"size": len(packed)}

    whole = fitted(10_000_000)
    fewer = fitted(whole["size"] - 1)
    assert (whole["shown"], fewer["shown"]) == (20, 10)
    assert len(fewer["test"]["label"]) == len(whole["test"]["label"]) == whole["num_test"]
    least = fitted(10_000)
    assert least["shown"] == 5
    assert 0 < len(least["test"]["label"]) < least["num_test"]
    counts = {name: least["test"]["language"].count(name) for name in LANGUAGES}
    assert len(set(counts.values())) == 1
    assert fitted(1)["test"]["language"] == list(LANGUAGES)


def test_the_explorer_marks_examples_that_a_view_does_not_have(tmp_path: Path) -> None:
    """The view `subnetwork` has no rows of a language without a subnetwork."""
    run = make_run(tmp_path / "run", num_test=2, models=("full",), views=("full", "subnetwork"))
    for path in (run / "influence" / "full" / "subnetwork").glob("*.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.filter(pc.not_equal(table["test_language"], "zh")), path)
    data = explorer_data(RunResults(run), 20, 10)
    zh = np.array(data["test"]["language"]) == "zh"
    full, subnetwork = data["views"]
    assert (full["prediction"] >= 0).all()
    assert (subnetwork["prediction"][zh] == -1).all()
    assert (subnetwork["prediction"][~zh] >= 0).all()
    assert (subnetwork["places"][zh] == np.iinfo(np.uint16).max).all()
    assert not subnetwork["shares"][zh].any()


def test_the_page_states_how_to_reproduce_it_and_what_the_sign_means(page: Page) -> None:
    assert "tracmod run config.yaml --out runs/synthetic" in page.text
    assert "train_per_language: 40" in page.text
    assert "transformers" in page.text
    assert "lowered the test example's loss" in page.text
    assert "cosine × learning rate" in page.text
    assert "33.3%" in page.text


def test_the_same_folder_gives_the_same_page(run: Path, html: str) -> None:
    assert write_report(run).read_text(encoding="utf-8") == html


def test_a_run_with_few_results_has_fewer_sections(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_test=1, languages=("en", "de"), models=("full",))
    shutil.rmtree(run / "subnetworks")
    shutil.rmtree(run / "models")
    (run / "run.json").unlink()
    for path in (*run.glob("influence/*/*/epochs.parquet"), *run.glob("influence/*/*/top.parquet")):
        path.unlink()
    analyze(run, bootstrap=10)
    page = Page(write_report(run).read_text(encoding="utf-8"))
    sections = {attrs["id"] for tag, attrs in page.tags if tag == "section"}
    assert sections >= {"summary", "accuracy", "influence", "examples"}
    assert not sections & {"course", "subnetworks", "similarity"}


def test_without_an_analysis_the_error_names_the_command(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_test=1, models=())
    with pytest.raises(ValueError, match="tracmod analyze"):
        write_report(run)
    (run / "analysis").mkdir()
    (run / "analysis" / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match=r"earlier version .*tracmod analyze"):
        write_report(run)


def _interval(value: float, half: float) -> dict:
    return {"value": value, "low": value - half, "high": value + half}


def _change(value: float, half: float, p_adjusted: float = 0.004) -> dict:
    return {
        **_interval(value, half),
        "p_value": 0.002,
        "p_adjusted": p_adjusted,
        "effect_size": 0.3,
    }


def _summary(change: float, control: float, p_adjusted: float = 0.004) -> dict:
    base = {"share_negative": _interval(0.2, 0.01), "null_share": 0.2, "draws": 1}
    full = {"model": "full", "view": "full", "share_positive": _interval(0.3, 0.02), **base}
    names = {"model": "full", "view": "subnetwork", "base_model": "full"}
    names |= {"tested": {"clusters": 5, "permutations": 32, "exact": True}}
    return {
        "settings": {"confidence": 0.95, "bootstrap": 1000},
        "k": 100,
        "num_test": {"en": 50, "sw": 50},
        "in_language": [full],
        "changes": [
            {**names, "base_view": base, "share_positive": _change(value, 0.02, p_adjusted)}
            for base, value in (("full", change), ("random", control))
        ],
        "similarity_influence": [],
        "subnetworks": {},
        "accuracy": {
            "chance": 0.5,
            "views": [
                {
                    "model": "full",
                    "view": "full",
                    "languages": {"en": _interval(0.8, 0.1), "sw": _interval(0.55, 0.1)},
                }
            ],
        },
    }


@pytest.mark.parametrize(
    ("change", "control", "phrases"),
    [
        (0.05, 0.04, ("raises the own", "higher than under random masks")),
        (0.05, 0.01, ("raises the own", "cannot be distinguished")),
        (0.01, 0.01, ("does not clearly change", "cannot be distinguished")),
        (-0.05, -0.03, ("lowers the own", "lower than under random masks")),
    ],
)
def test_the_summary_claims_what_the_intervals_allow(
    change: float, control: float, phrases: tuple[str, str]
) -> None:
    texts = findings(_summary(change, control))
    assert texts[0].startswith("In sw, the fine-tuned model is not clearly better than chance. ")
    assert "30.0% (28.0 to 32.0)" in texts[1]
    assert "more than on the others" in texts[1]
    for text in texts:
        verdict, rest = words.verdict(text)
        assert not any(sign.isdigit() for sign in verdict)
        assert f"{verdict} {rest}" == text
    assert all(phrase in texts[2] for phrase in phrases)
    assert len(texts) == 3
    assert "1,000 bootstrap resamples of 100 test examples" in how_sure(_summary(0, 0))[0]


def test_a_change_is_not_clear_if_its_adjusted_p_is_above_the_level() -> None:
    text = findings(_summary(0.05, 0.04, p_adjusted=0.06))[2]
    assert "does not clearly change" in text
    assert "cannot be distinguished" in text
    assert "adjusted p = 0.060, d = 0.30" in text
    texts = how_sure(_summary(0, 0))
    assert "adjusted for 2 comparisons" in texts[1]
    assert "only 5 parallel items" in texts[2]
    assert texts[2].endswith("is 0.062.")


def test_the_summary_mentions_translations_seeds_partial_tests_and_distances() -> None:
    summary = _summary(0.05, 0.04)
    share = {"share_positive": _interval(0.3, 0.02), "null_share": 0.2}
    view = {"model": "full", "view": "full", "strongest": 0.9, "within_k": 1.0, "with": share}
    view |= {"without": share, "change": {"share_positive": _change(-0.05, 0.02)}}
    summary["same_group"] = {"num_test": 100, "num_with_same_group": 40, "views": [view]}
    summary["same_group"] |= {"strongest_null": 0.004, "within_k_null": 0.3}
    summary["seed_baseline"] = {
        "within": {"jaccard": 0.6, "corrected_jaccard": 0.2},
        "between": {"jaccard": 0.5, "corrected_jaccard": 0.1},
        "test": {"p_value": 0.008, "permutations": 120, "exact": True},
    }
    test = {"model": "full", "view": "full", "measure": "share_positive", "correlation": -0.7}
    test |= {"p_value": 0.01, "p_adjusted": 0.02, "pairs": 10, "exact": True, "permutations": 120}
    summary["similarity_influence"] = [test]
    controls = ["label_distance", "seed_similarity"]
    summary["partial_similarity_influence"] = [{**test, "p_adjusted": 0.4, "controls": controls}]
    summary["distance_influence"] = [
        {**test, "metric": "syntactic"},
        {**test, "metric": "genetic", "p_adjusted": 0.3},
    ]
    text = "\n".join(findings(summary))
    assert "40 of 100 test examples have training examples of their own parallel item" in text
    assert "strongest proponent for 90.0% of them (0.4% by chance)" in text
    assert "Leaving them out lowers the own-language share" in text
    assert "mean Jaccard similarity of 0.60 (0.20 beyond chance), those of two" in text
    assert "Only the difference is evidence" in text
    assert "are more alike" in seeds(summary)
    assert "0.50 (0.10; permutation test p = 0.008)" in seeds(summary)
    summary["seed_baseline"]["test"]["p_value"] = 0.06
    assert "not clearly more alike than those of two languages" in seeds(summary)
    summary["seed_baseline"]["test"] = None
    assert "not clearly more alike than those of two languages" in seeds(summary)
    assert "Controlling for differences in label balance and agreement between seeds" in text
    assert "syntactic (Spearman \N{MINUS SIGN}0.70, adjusted p = 0.020)" in text


def test_formats_of_numbers() -> None:
    assert percent(0.2034) == "20.3%"
    assert points(-0.0312) == "\N{MINUS SIGN}3.1"
    assert points(-0.0001) == "+0.0"
    assert number(-0.001) == "0.00"
    assert superscript(-5) == "⁻⁵"
    assert [seconds(s) for s in (3.21, 65, 7810)] == ["3.2 s", "1 min 05 s", "2 h 10 min"]
