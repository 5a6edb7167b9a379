"""`tracmod figures`: valid files with the numbers of the tables, and readable text."""

from __future__ import annotations

import io
import json
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from make_run import LANGUAGES, add_blocks, add_courses, add_metagradient, add_retraining, make_run
from PIL import Image

from tracmod.analysis import analyze
from tracmod.cli import main
from tracmod.report.content.analysis_tables import AnalysisTables
from tracmod.report.content.figures import HeatMaps, Matrix
from tracmod.report.content.influence import accuracy, course, influence, reliance
from tracmod.report.content.subnetworks import similarity
from tracmod.report.paper.figures import draw_figures, write_figures
from tracmod.report.paper.matplotlib_plots import MOST_HEIGHT, WIDTHS, draw, palette, saved

VIEWS = ("full", "subnetwork", "random-0", "other-de")
EXPECTED = {
    *(f"influence-{m}-{model}" for m in ("proponents", "opponents", "mean-influence")
      for model in ("full", "sparse")),
    *(f"change-{m}-{models}" for m in ("proponents", "opponents", "mean-influence")
      for models in ("full", "sparse", "sparse-minus-full")),
    *(f"reliance-{m}" for m in ("proponents", "opponents")),
    *(f"reliance-by-k-{m}" for m in ("proponents", "opponents")),
    *("course", "course-full", "course-subnetwork", "course-random", "course-other", "accuracy"),
    *("subnetworks", "subnetworks-overlap", "pruning", "head-importance", "similarity"),
    *(f"similarity-{m}-{model}" for m in ("proponents", "mean-influence")
      for model in ("full", "sparse")),
    *(f"blocks-{part}-{model}" for part in ("heads", "layers") for model in ("full", "sparse")),
    "lds",
    "metagradient-full",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from which every kind of figure can be drawn."""
    path = make_run(tmp_path_factory.mktemp("figures") / "run", views=VIEWS, mask_seeds=2)
    add_blocks(path)
    add_courses(path)
    settings = json.loads((path / "run.json").read_text())
    settings["config"]["influence"]["k"] = [20, 5]
    (path / "run.json").write_text(json.dumps(settings))
    add_retraining(path)
    add_metagradient(path)
    analyze(path, bootstrap=50, permutations=200)
    return path


@pytest.fixture(scope="module")
def page(run: Path) -> dict:
    return dict(draw_figures(run, WIDTHS["page"]))


def rows_of(run: Path, table: str, **values) -> list[dict]:
    rows = pq.read_table(run / "analysis" / f"{table}.parquet").to_pylist()
    return [row for row in rows if values.items() <= row.items()]


def texts_of(figure) -> list:
    """Return every text that is drawn, with its box in pixels."""
    figure.draw_without_rendering()
    outside = [  # labels of ticks beyond the ends of an axis
        label
        for panel in figure.axes
        for axis in (panel.xaxis, panel.yaxis)
        for tick in axis.get_major_ticks()
        if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
        for label in (tick.label1, tick.label2)
    ]
    texts = figure.findobj(lambda artist: hasattr(artist, "get_fontsize"))
    shown = [text for text in texts if text.get_text().strip() and text.get_visible()]
    shown = [text for text in shown if text not in outside]
    return [(text, text.get_window_extent()) for text in shown]


@pytest.mark.parametrize("form", ["pdf", "svg", "png"])
def test_every_figure_is_valid_in_every_format(page, form):
    assert page.keys() == EXPECTED
    for name, figure in page.items():
        if form != "svg" and ("sparse" in name or "opponents" in name):
            continue  # drawn like the others
        content = saved(figure, form)
        if form == "pdf":
            assert content.startswith(b"%PDF-1.")
            assert content.rstrip().endswith(b"%%EOF")
            assert b"/Type /Page" in content
            assert b"/FontFile2" in content  # TrueType, embedded
            assert b"/Type3" not in content
            assert b"CreationDate" not in content
        elif form == "svg":
            texts = " ".join(ET.fromstring(content).itertext())
            assert "<dc:date>" not in content.decode()
            if name.startswith(("influence", "change", "reliance-p", "accuracy", "subnetworks-l")):
                assert all(language in texts for language in LANGUAGES), name
        else:
            width = Image.open(io.BytesIO(content)).width
            assert width == pytest.approx(300 * figure.get_figwidth(), abs=1)


@pytest.mark.slow
def test_the_command_writes_and_names_every_figure(run, tmp_path):
    command = ["figures", str(run), "--format", "svg", "--out", str(tmp_path)]
    result = CliRunner().invoke(main, [*command, "--width", "column"])
    assert result.exit_code == 0, result.output
    files = {path.stem: path for path in tmp_path.iterdir()}
    assert files.keys() == EXPECTED
    assert {Path(line) for line in result.stdout.splitlines()} == set(files.values())
    assert result.stderr == ""
    for path in files.values():
        assert ET.parse(path).getroot().get("width") == f"{72 * WIDTHS['column']}pt"


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_texts_are_large_enough_inside_the_figure_and_do_not_overlap(run, width):
    for name, figure in draw_figures(run, WIDTHS[width]):
        texts = texts_of(figure)
        across, up = figure.bbox.width, figure.bbox.height
        assert texts
        assert figure.get_figwidth() <= WIDTHS[width]
        assert figure.get_figheight() <= MOST_HEIGHT + 1, name
        for text, box in texts:
            where = (name, text.get_text())
            assert text.get_fontsize() >= 7, where
            assert box.x0 >= -1 and box.y0 >= -1, where  # noqa: PT018
            assert box.x1 <= across + 1 and box.y1 <= up + 1, where  # noqa: PT018
        boxes = [(text.get_text(), box) for text, box in texts]
        for position, (text, box) in enumerate(boxes):
            for other, other_box in boxes[:position]:
                assert not box.padded(-2).overlaps(other_box.padded(-2)), (name, text, other)


def test_heat_maps_show_the_tables(run, page):
    panels = page["influence-proponents-sparse"].axes
    views = ["all heads", "own subnetwork", "random masks", "other subnetworks"]
    assert [panel.get_title() for panel in panels[:4]] == views
    values = panels[1].collections[0].get_array()
    for row in rows_of(run, "matrices", model="sparse", view="subnetwork"):
        i, j = (LANGUAGES.index(row[side]) for side in ("test_language", "train_language"))
        assert values[i, j] == pytest.approx(100 * row["share_positive"])
        written = panels[1].texts[len(LANGUAGES) * i + j].get_text()
        assert float(written) == pytest.approx(100 * row["share_positive"], abs=0.5001)
    assert panels[4].get_title() == "share among proponents (%)"
    assert "null 20" in [label.get_text() for label in panels[4].get_xticklabels()]


def test_differences_show_the_table_and_clear_ones_are_bold(run, page):
    figure = page["change-mean-influence-sparse"]
    rows = rows_of(run, "changes", model="sparse", base_model="sparse", view="subnetwork",
                   base_view="full")  # fmt: skip
    title = "own subnetwork \N{MINUS SIGN} all heads"
    panel = next(panel for panel in figure.axes if panel.get_title() == title)
    values = panel.collections[0].get_array()
    unit = figure.axes[-1].get_title()
    exponent = -int(re.search("10⁻([⁰-⁹¹²³]+)", unit)[1].translate(
        str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")))  # fmt: skip
    clear = 0
    for row in rows:
        i, j = (LANGUAGES.index(row[side]) for side in ("test_language", "train_language"))
        assert values[i, j] * 10.0**exponent == pytest.approx(row["mean_influence"])
        outside = row["mean_influence_low"] > 0 or row["mean_influence_high"] < 0
        expected = outside and row["mean_influence_p_adjusted"] <= 0.05
        text = panel.texts[len(LANGUAGES) * i + j]
        assert (text.get_fontweight() == "bold") == expected
        clear += expected
    assert 0 < clear < len(rows)


def test_bars_and_whiskers_show_the_table(run, page):
    panel = page["reliance-proponents"].axes[1]
    assert panel.get_title() == "Sparse fine-tuning"
    assert [label.get_text() for label in panel.get_xticklabels()] == ["all", *LANGUAGES]
    bars = next(bars for bars in panel.containers if bars.get_label() == "own subnetwork")
    whiskers = bars.errorbar.lines[2][0].get_segments()
    summary = json.loads((run / "analysis" / "summary.json").read_text())
    total = next(entry for entry in summary["in_language"]
                 if (entry["model"], entry["view"]) == ("sparse", "subnetwork"))  # fmt: skip
    assert bars[0].get_height() == pytest.approx(100 * total["share_positive"]["value"])
    for row in rows_of(run, "matrices", model="sparse", view="subnetwork"):
        if row["test_language"] == row["train_language"]:
            position = 1 + LANGUAGES.index(row["test_language"])
            assert bars[position].get_height() == pytest.approx(100 * row["share_positive"])
            ends = [100 * row[f"share_positive_{end}"] for end in ("low", "high")]
            assert whiskers[position][:, 1].tolist() == pytest.approx(ends)
    assert bars[0].get_facecolor()[:3] == pytest.approx(
        [int(palette()["subnetwork"][i : i + 2], 16) / 255 for i in (1, 3, 5)]
    )


def test_lines_show_the_tables(run, page):
    panel = page["course-subnetwork"].axes[0]
    series = panel.containers[LANGUAGES.index("ru")].lines[0]
    rows = rows_of(run, "course", model="full", view="subnetwork", test_language="ru")
    assert series.get_xdata().tolist() == [row["epoch"] for row in rows]
    assert series.get_ydata() == pytest.approx([100 * row["share_positive"] for row in rows])
    kept = page["pruning"].axes[0].containers[0].lines[0]
    assert kept.get_xdata().tolist() == [48, 40, 30, 20]
    expected = [100 * (0.74 - 0.002 * (48 - heads)) / 0.74 for heads in (48, 40, 30, 20)]
    assert kept.get_ydata() == pytest.approx(expected)


def test_points_show_the_table_and_the_result_of_the_test(run, page):
    panel = page["similarity-proponents-full"].axes[1]
    rows = rows_of(run, "pairs", model="full", view="subnetwork")
    drawn = panel.lines[0].get_xydata().tolist()
    assert drawn == [pytest.approx([r["jaccard"], 100 * r["share_positive"]]) for r in rows]
    summary = json.loads((run / "analysis" / "summary.json").read_text())
    test = next(test for test in summary["similarity_influence"]
                if (test["model"], test["view"], test["measure"])
                == ("full", "subnetwork", "share_positive"))  # fmt: skip
    note = panel.get_title().splitlines()[1]
    assert note.startswith(f"ρ = {test['correlation']:.2f}".replace("-", "\N{MINUS SIGN}"))
    assert f"{test['p_value']:.3f}" in note


def test_subnetworks_and_their_overlap_show_the_masks(run, page):
    masks = {path.stem: np.array(json.loads(path.read_text())["mask"])
             for path in (run / "subnetworks").glob("*.json")}  # fmt: skip
    for language, panel in zip(LANGUAGES, page["subnetworks"].axes, strict=True):
        assert panel.get_title() == f"{language}: {masks[language].sum()} of 48"
        assert np.array_equal(panel.collections[0].get_array(), masks[language])
        assert panel.yaxis_inverted()
    overlap = page["subnetworks-overlap"].axes[0].collections[0].get_array()
    assert np.array_equal(overlap, sum(masks.values()))


def test_blocks_show_the_table(run, page):
    rows = rows_of(run, "blocks", model="full", view="full")
    values = page["blocks-heads-full"].axes[0].collections[0].get_array()
    ratio = {values[r["layer"], r["head"]] / r["in_language"] for r in rows
             if r["head"] is not None}  # fmt: skip
    assert min(ratio) == pytest.approx(max(ratio))
    panel = page["blocks-layers-full"].axes[0]
    total = sum(row["in_language"] for row in rows)
    heights = sum(bar.get_height() for container in panel.containers for bar in container)
    assert heights == pytest.approx(100)
    heads = panel.containers[0]
    of_layer = sum(r["in_language"] for r in rows if r["layer"] == 2 and r["head"] is not None)
    assert heads[2].get_height() == pytest.approx(100 * of_layer / total)


def test_scores_of_methods_and_their_whiskers_show_the_table(run, page):
    [panel] = page["lds"].axes
    methods = ["tracin", "bm25", "random"]
    assert [label.get_text() for label in panel.get_xticklabels()] == methods
    rows = pq.read_table(run / "retraining" / "lds.parquet").to_pylist()
    names = {"example": "loss of a test example", "language": "mean loss of a test language"}
    for level, name in names.items():
        bars = next(bars for bars in panel.containers if bars.get_label() == name)
        whiskers = bars.errorbar.lines[2][0].get_segments()
        for position, method in enumerate(methods):
            [row] = [r for r in rows if (r["method"], r["level"], r["test_language"])
                     == (method, level, None)]  # fmt: skip
            assert bars[position].get_height() == pytest.approx(row["value"])
            assert whiskers[position][:, 1].tolist() == pytest.approx([row["low"], row["high"]])


@pytest.mark.parametrize("build", [influence, reliance, similarity])
def test_the_same_run_gives_the_same_bytes(run, build):
    first, second = (
        [draw(figure, WIDTHS["page"]) for figure in build(AnalysisTables(run))] for _ in range(2)
    )
    for form in ("pdf", "svg", "png"):
        for one, other in zip(first, second, strict=True):
            assert saved(one, form) == saved(other, form), form


def test_the_style_of_the_user_changes_nothing(run):
    import matplotlib as mpl

    def accuracy_figure() -> bytes:
        [figure] = accuracy(AnalysisTables(run))
        return saved(draw(figure, WIDTHS["page"]), "svg")

    with mpl.rc_context(
        {"font.size": 3, "savefig.dpi": 20, "axes.grid": True, "text.usetex": True}
    ):
        styled = accuracy_figure()
        assert mpl.rcParams["font.size"] == 3
    assert styled == accuracy_figure()


def test_figures_without_a_table_are_left_out_and_reported(tmp_path):
    run = make_run(tmp_path / "run", num_test=2, models=("full",), views=("full",))
    shutil.rmtree(run / "subnetworks")
    shutil.rmtree(run / "models")
    analyze(run, bootstrap=10)
    result = CliRunner().invoke(main, ["figures", str(run), "--format", "svg"])
    assert result.exit_code == 0, result.output
    written = {path.stem for path in (run / "figures").iterdir()}
    assert written == {"influence-proponents-full", "influence-opponents-full",
                       "influence-mean-influence-full", "reliance-proponents",
                       "reliance-opponents", "course", "course-full"}  # fmt: skip
    for kind in ("differences", "accuracy", "subnetworks", "pruning curves", "influence by head",
                 "linear datamodeling score"):  # fmt: skip
        assert f"left out: {kind}" in result.stderr


def test_many_languages_and_long_names_stay_readable(tmp_path):
    languages = tuple(f"lng{i}_Latn" for i in range(14))
    run = make_run(tmp_path / "run", languages=languages, num_train=8, num_test=3)
    analyze(run, bootstrap=20, permutations=500)
    tables = AnalysisTables(run)
    figures = {figure.name: draw(figure, WIDTHS["column"])
               for build in (influence, reliance, course) for figure in build(tables)}  # fmt: skip
    panel = figures["influence-proponents-full"].axes[0]
    assert not panel.texts
    assert panel.get_xticklabels()[0].get_rotation() == 90
    for name in ("influence-proponents-full", "reliance-proponents", "course-full"):
        for text, box in texts_of(figures[name]):
            inside = box.x0 >= -1 and box.x1 <= figures[name].bbox.width + 1
            assert inside, (name, text.get_text())


def test_dots_replace_bold_numbers_where_there_is_no_room_for_numbers():
    names = [f"l{number}" for number in range(30)]
    clear_RC = np.zeros((30, 30), bool)
    clear_RC[[0, 4, 29], [1, 3, 29]] = True
    matrix = Matrix("", np.full((30, 30), 12.3), names, names, bold_RC=clear_RC)
    figure = HeatMaps(
        name="dots", x_axis="x", y_axis="y", panels=[matrix], color_axis="value",
        scale="diverging", limits=(-20, 20), signed=True,
    )  # fmt: skip
    panel = draw(figure, WIDTHS["column"]).axes[0]
    assert not panel.texts
    assert panel.lines[0].get_xydata().tolist() == [[1.5, 0.5], [3.5, 4.5], [29.5, 29.5]]


def test_a_run_without_analysis_and_an_unknown_format_are_errors(tmp_path):
    run = make_run(tmp_path / "run", num_test=1, models=())
    result = CliRunner().invoke(main, ["figures", str(run)])
    assert result.exit_code == 2
    assert "tracmod analyze" in result.output
    with pytest.raises(ValueError, match=r"pdf, svg, png .*got gif"):
        write_figures(run, tmp_path / "out", form="gif")
