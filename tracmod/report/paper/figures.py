"""Figures for papers from a run's analysis: `tracmod figures`.

Shapes: L layers, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from tracmod.analysis import RunResults, head_usage
from tracmod.analysis.languages import MEASURES
from tracmod.analysis.results import MODELS, VIEWS, view_kind
from tracmod.files.durable import read_json, write_file
from tracmod.report.html.blocks import PART_COLORS, PART_NAMES, layer_shares
from tracmod.report.paper.matplotlib_plots import (
    FORMATS,
    WIDTHS,
    Cloud,
    Matrix,
    Plot,
    Series,
    bars,
    clouds,
    heatmaps,
    lines,
    saved,
)
from tracmod.report.wording import labels as words

if TYPE_CHECKING:
    from tracmod.report.paper.matplotlib_plots import Figure

Drawn = tuple[str, "Figure"]
TEST_AXIS, TRAIN_AXIS = "language of test examples", "language of training examples"
OWN_SHARE = {
    "share_positive": "own language\namong proponents (%)",
    "share_negative": "own language\namong opponents (%)",
}
SIMILARITIES = {
    "jaccard": "Jaccard",
    "corrected_jaccard": "Jaccard beyond chance",
    "overlap": "overlap coefficient",
    "cosine": "cosine",
}
LEVELS = {"example": ("loss of a test example", "series-0"),
          "language": ("mean loss of a test language", "series-4")}  # fmt: skip


@dataclass(frozen=True)
class Written:
    """What `write_figures` did.

    Attributes:
        files: written, in order.
        left_out: kinds of figures that were not drawn, and what they lack.
    """

    files: list[Path] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def write_figures(
    run_dir: str | Path, out: str | Path, *, form: str = "pdf", width: str = "page"
) -> Written:
    """Draw what the tables of a run's analysis allow, a file per figure.

    The same run gives the same bytes. Text is 7 points or more; fonts are embedded in PDF, and text
    stays text in SVG. No figure has a title that its caption would repeat; the file's name says
    what it is.

    Args:
        run_dir: a run folder that `analyze` has been through.
        out: folder for the files, made if it is not there.
        form: `pdf`, `svg` or `png` (300 dots per inch).
        width: `column` (3.3 inches) or `page` (6.9 inches).

    Raises:
        ValueError: no analysis in the folder, or an unknown format or width.
    """
    if form not in FORMATS or width not in WIDTHS:
        raise ValueError(
            f"figures: expected a format of {', '.join(FORMATS)} and a width of "
            f"{', '.join(WIDTHS)}, got {form} and {width}"
        )
    tables = AnalysisTables(run_dir)
    written, out = Written(), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for draw, what, source in KINDS:
        some = False
        for name, figure in draw(tables, WIDTHS[width]):
            path = out / f"{name}.{form}"
            write_file(path, saved(figure, form))
            written.files.append(path)
            some = True
        if not some:
            written.left_out.append(f"{what} ({source})")
    return written


def draw_figures(run_dir: str | Path, width: float = WIDTHS["page"]) -> Iterator[Drawn]:
    """Every figure of a run by the name of its file, without ending, as matplotlib's own.

    Args:
        run_dir: a run folder that `analyze` has been through.
        width: inches.
    """
    tables = AnalysisTables(run_dir)
    for draw, _, _ in KINDS:
        yield from draw(tables, width)


class AnalysisTables:
    """The tables in `analysis/` and `retraining/` of a run, each read when it is asked for."""

    def __init__(self, run_dir: str | Path) -> None:
        """Open a run folder; raises ValueError if it was not analysed."""
        self.run = RunResults(run_dir)
        self.folder = self.run.path / "analysis"
        if not (self.folder / "summary.json").is_file():
            raise ValueError(
                f"{self.run.path}: no analysis/summary.json; run `tracmod analyze` first"
            )

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What summary.json holds."""
        return read_json(self.folder / "summary.json")

    @cached_property
    def unit(self) -> str:
        """Unit of influence."""
        return words.influence_unit(self.run.section("influence"))

    @cached_property
    def retraining(self) -> Path | None:
        """The folder; None where the config asks for none, whatever an earlier one left."""
        return self.run.path / "retraining" if self.run.section("retrain") else None

    def table(self, name: str) -> pd.DataFrame:
        """`analysis/<name>.parquet`; empty where it is not there."""
        return _read(self.folder / f"{name}.parquet")

    def retrained(self, name: str) -> pd.DataFrame:
        """`retraining/<name>.parquet`; empty where it is not there or no longer asked for."""
        folder = self.retraining
        return pd.DataFrame() if folder is None else _read(folder / f"{name}.parquet")

    def scaling(self, values: pd.Series) -> tuple[float, str]:
        """Factor that makes influences readable, and the unit that they then have."""
        exponent = words.power_of_ten(float(values.abs().max()))
        return 10.0**-exponent, f"10{words.superscript(exponent)} {self.unit}"


def _read(path: Path) -> pd.DataFrame:
    return pd.read_parquet(path) if path.is_file() else pd.DataFrame()


# --- language x language --------------------------------------------------------------------


def influence(tables: AnalysisTables, width: float) -> Iterator[Drawn]:
    """Heat maps per measure and model, a panel per view; the models of a measure on one scale."""
    table = tables.table("matrices")
    for measure in MEASURES if len(table) else ():
        factor, unit, shares = *_measure_unit(tables, table, measure), measure != "mean_influence"
        top = float(table[measure].abs().max() * factor) or 1.0
        nulls = {round(100 * share, 6) for share in table["null_share"]}
        mark = (next(iter(nulls)), f"null {next(iter(nulls)):.0f}") if len(nulls) == 1 else None
        for model, of_model in table.groupby("model", sort=False):
            yield f"influence-{_short(measure)}-{model}", heatmaps(
                _matrices(
                    table,
                    ((words.VIEW_NAMES[str(view)], rows)
                     for view, rows in of_model.groupby("view", sort=False)),
                    measure,
                    factor,
                ),
                width,
                scale="sequential" if shares else "diverging",
                limits=(0.0 if shares else -top, top),
                axes=(TRAIN_AXIS, TEST_AXIS),
                unit=unit,
                signed=not shares,
                mark=mark if shares and mark and mark[0] <= top else None,
            )  # fmt: skip


def changes(tables: AnalysisTables, width: float) -> Iterator[Drawn]:
    """Differences of views and models, a panel per comparison; clear ones in bold."""
    table = tables.table("changes")
    for measure in MEASURES if len(table) else ():
        factor, unit = _measure_unit(tables, table, measure, change=True)
        top = float(table[measure].abs().max() * factor) or 1.0
        for (model, base), of_models in table.groupby(["model", "base_model"], sort=False):
            name = str(model) if model == base else f"{model}-minus-{base}"
            yield f"change-{_short(measure)}-{name}", heatmaps(
                _matrices(
                    table,
                    ((words.change_title(rows.iloc[0]), rows)
                     for _, rows in of_models.groupby(["view", "base_view"], sort=False)),
                    measure,
                    factor,
                    bold=True,
                ),
                width,
                scale="diverging",
                limits=(-top, top),
                axes=(TRAIN_AXIS, TEST_AXIS),
                unit=f"{unit}\nbold or dotted: adjusted p \N{LESS-THAN OR EQUAL TO} {words.LEVEL}",
                signed=True,
            )  # fmt: skip


def _matrices(
    table: pd.DataFrame,
    parts: Iterable[tuple[str, pd.DataFrame]],
    measure: str,
    factor: float,
    bold: bool = False,
) -> list[Matrix]:
    """A matrix of each part, by its title, with the languages of the whole table."""
    tests, trains = (list(table[f"{side}_language"].unique()) for side in ("test", "train"))

    def spread(rows: pd.DataFrame, values: Any) -> np.ndarray:
        indexed = rows.assign(shown=values).pivot(
            index="test_language", columns="train_language", values="shown"
        )
        return indexed.reindex(index=tests, columns=trains).to_numpy(float)

    matrices = []
    for title, rows in parts:
        clear = [words.is_clear(_of(row, measure)) for _, row in rows.iterrows()] if bold else None
        bold_RC = None if clear is None else spread(rows, clear) == 1
        shown = spread(rows, factor * rows[measure])
        matrices.append(Matrix(title, shown, tests, trains, bold_RC))
    return matrices


def _of(row: pd.Series, measure: str) -> dict[str, Any]:
    """A change's columns of one measure under the names that `words` knows."""
    found = {key: row[f"{measure}_{key}"] for key in ("low", "high", "p_adjusted")}
    return found | {"p_adjusted": None if pd.isna(found["p_adjusted"]) else found["p_adjusted"]}


def _measure_unit(
    tables: AnalysisTables, table: pd.DataFrame, measure: str, change: bool = False
) -> tuple[float, str]:
    """Factor of a measure, and what its colour bar says."""
    if measure == "mean_influence":
        factor, unit = tables.scaling(table[measure])
        what = "change of mean influence" if change else "mean influence (+: lowers loss)"
        return factor, f"{what}, {unit}"
    what = f"share among {_short(measure)}"
    return 100.0, f"change of {what} (percentage points)" if change else f"{what} (%)"


def _short(measure: str) -> str:
    return words.MEASURE_NAMES[measure].lower().replace(" ", "-")


# --- reliance -------------------------------------------------------------------------------


def reliance(tables: AnalysisTables, width: float) -> Iterator[Drawn]:
    """In-language share per test language and over all, a bar per view, a panel per model."""
    table = tables.table("matrices")
    own = table[table["test_language"] == table["train_language"]] if len(table) else table
    for measure in OWN_SHARE if len(own) else ():
        plots = []
        for model, of_model in own.groupby("model", sort=False):
            totals = {one["view"]: one for one in tables.summary["in_language"]
                      if one["model"] == model and measure in one}  # fmt: skip
            languages = list(of_model["test_language"].unique())
            series = [
                _bar(view, rows.set_index("test_language"), totals.get(view), measure, languages)
                for view, rows in of_model.groupby("view", sort=False)
            ]
            nulls = of_model.groupby("test_language")["null_share"].first()
            overall = next((one["null_share"] for one in totals.values()), np.nan)
            marks = [100 * share for share in (overall, *nulls[languages])]
            plots.append(Plot(words.MODEL_NAMES[str(model)], series, marks))
        axes = (TEST_AXIS, OWN_SHARE[measure])
        yield f"reliance-{_short(measure)}", bars(
            plots, width, axes=axes, mark_name="null share"
        )  # fmt: skip


def _bar(
    view: Any, rows: pd.DataFrame, total: dict[str, Any] | None, measure: str, languages: list[str]
) -> Series:
    rows = rows.reindex(languages)
    ends = {"value": "", "low": "_low", "high": "_high"}
    y, low, high = (
        [
            100 * total[measure][key] if total else np.nan,
            *(100 * rows[f"{measure}{end}"]),
        ]
        for key, end in ends.items()
    )
    return Series(words.VIEW_NAMES[view], view, ["all", *languages], y, low, high)


def reliance_by_k(tables: AnalysisTables, width: float) -> Iterator[Drawn]:
    """In-language share against the number of strongest examples counted."""
    table = tables.table("shares_by_k")
    for measure in OWN_SHARE if len(table) and table["k"].nunique() > 1 else ():
        plots = []
        for model, of_model in table.groupby("model", sort=False):
            series = [
                Series(words.VIEW_NAMES[view], view, list(rows["k"]), *(
                    list(100 * rows[f"{measure}{end}"]) for end in ("", "_low", "_high")
                ))
                for view, rows in of_model.groupby("view", sort=False)
            ]  # fmt: skip
            plots.append(Plot(words.MODEL_NAMES[str(model)], series))
        null = 100 * float(table["null_share"].iloc[0])
        axes = ("k, strongest training examples counted", OWN_SHARE[measure])
        yield f"reliance-by-k-{_short(measure)}", lines(
            plots, width, axes=axes, limits=_limits(plots, null), mark=(null, "null share"),
            even=True,
        )  # fmt: skip


def course(tables: AnalysisTables, width: float) -> Iterator[Drawn]:
    """In-language share of each epoch alone: mean over languages, and per language by view."""
    table = tables.table("course")
    if not len(table):
        return
    table = table.assign(kind=table["view"].map(view_kind))
    shares = {round(100 * share, 6) for share in table["null_share"].dropna()}
    mark = (next(iter(shares)), "null share") if len(shares) == 1 else None
    axes = ("epoch", OWN_SHARE["share_positive"])
    means = [
        Plot(words.MODEL_NAMES[model], [
            _course_series(rows, words.VIEW_NAMES[kind], kind)
            for kind, rows in _in_order(of_model, "kind", VIEWS)
        ])
        for model, of_model in _in_order(table, "model", MODELS)
    ]  # fmt: skip
    limits = _limits(means, mark[0] if mark else None)
    yield "course", lines(means, width, axes=axes, limits=limits, mark=mark)
    for kind, of_kind in _in_order(table, "kind", VIEWS):
        plots = [
            Plot(words.MODEL_NAMES[model], [
                _course_series(rows, str(language), _series_color(place))
                for place, (language, rows) in enumerate(
                    of_model.groupby("test_language", sort=False))
            ])
            for model, of_model in _in_order(of_kind, "model", MODELS)
        ]  # fmt: skip
        limits = _limits(plots, mark[0] if mark else None)
        yield f"course-{kind}", lines(plots, width, axes=axes, limits=limits, mark=mark)


def _course_series(rows: pd.DataFrame, name: str, color: str) -> Series:
    """Mean over the rows of each epoch (languages, draws)."""
    means = 100 * rows.groupby("epoch")["share_positive"].mean()
    return Series(name, color, list(means.index), list(means))


def accuracy(tables: AnalysisTables, width: float) -> Iterator[Drawn]:
    """Test accuracy over the epochs, a line per language, a panel per model."""
    found = tables.summary["accuracy"]
    plots = [
        Plot(words.MODEL_NAMES[model], [
            Series(language, _series_color(place), [one["epoch"] for one in entries],
                   [100 * one["accuracy"][language] for one in entries])
            for place, language in enumerate(entries[-1]["accuracy"])
        ])
        for model, entries in found["epochs"].items() if entries
    ]  # fmt: skip
    if plots:
        chance = 100 * found["chance"]
        yield "accuracy", lines(
            plots, width, axes=("epoch", "test accuracy (%)"), limits=_limits(plots, chance),
            mark=(chance, "chance"),
        )  # fmt: skip


def _series_color(place: int) -> str:
    return f"series-{place % 8}"


def _in_order(table: pd.DataFrame, column: str, order: Any) -> list[tuple[Any, pd.DataFrame]]:
    found = dict(list(table.groupby(column, sort=False)))
    return [(name, found[name]) for name in order if name in found]


def _limits(plots: list[Plot], mark: float | None) -> tuple[float, float]:
    """Percentages with some room around, so that lines of all panels and the mark are seen."""
    ends = [np.array(end) for plot in plots for one in plot.series
            for end in (one.y, one.low, one.high) if end is not None]  # fmt: skip
    values = np.concatenate([*ends, [] if mark is None else [mark]])
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    room = max(1.0, 0.07 * (high - low))
    return max(0.0, low - room), high + room


# --- subnetworks ----------------------------------------------------------------------------


def subnetworks(tables: AnalysisTables, width: float) -> Iterator[Drawn]:
    """Which heads each language's subnetwork keeps, and how many languages keep each head."""
    masks = tables.run.masks
    if not masks:
        return
    kept = [
        _head_matrix(f"{language}: {int(mask.sum())} of {mask.size}", mask)
        for language, mask in masks.items()
    ]
    yield (
        "subnetworks",
        heatmaps(
            kept, width, scale="mask", limits=(0, 1), axes=("head", "layer"), unit="", digits=()
        ),
    )
    yield (
        "subnetworks-overlap",
        heatmaps(
            [_head_matrix("", head_usage(masks))],
            min(width, WIDTHS["column"]),
            scale="sequential",
            limits=(0, len(masks)),
            axes=("head", "layer"),
            unit="languages that keep the head",
            digits=(0,),
        ),
    )


def pruning(tables: AnalysisTables, width: float) -> Iterator[Drawn]:
    """Score left while heads are masked, and the importance that orders them."""
    entries = tables.run.subnetworks
    courses = {language: one["course"] for language, one in entries.items()
               if one.get("course") and one.get("full_score")}  # fmt: skip
    if not courses:
        return
    series = [
        Series(language, _series_color(place), [step["heads"] for step in steps],
               [100 * step["score"] / steps[0]["score"] for step in steps])
        for place, (language, steps) in enumerate(courses.items())
    ]  # fmt: skip
    threshold = 100 * next(iter(entries.values()))["threshold"]
    plots = [Plot("", series)]
    yield (
        "pruning",
        lines(
            plots,
            min(width, WIDTHS["column"]),
            axes=("heads kept", "share of full score (%)"),
            limits=_limits(plots, threshold),
            mark=(threshold, "threshold"),
        ),
    )
    maps = {language: np.array(steps[0]["importance"]) for language, steps in courses.items()
            if steps[0].get("importance") is not None}  # fmt: skip
    if maps:
        yield (
            "head-importance",
            heatmaps(
                [_head_matrix(language, values_LH) for language, values_LH in maps.items()],
                width,
                scale="sequential",
                limits=(0.0, max(float(values_LH.max()) for values_LH in maps.values()) or 1.0),
                axes=("head", "layer"),
                unit="importance, each layer of norm 1",
                digits=(),
            ),
        )


def _head_matrix(title: str, values_LH: np.ndarray) -> Matrix:
    layers, heads = values_LH.shape
    return Matrix(
        title, values_LH.astype(float), [str(la) for la in range(layers)],
        [str(h) for h in range(heads)],
    )  # fmt: skip


def similarity(tables: AnalysisTables, width: float) -> Iterator[Drawn]:
    """How alike subnetworks of two languages are; on the diagonal, of two seeds of one."""
    pairs, seeds = tables.table("similarity"), tables.table("similarity_seeds")
    languages = list(tables.run.masks)
    if not len(pairs):
        return
    known = pd.concat([pairs, pairs.rename(columns={"language_a": "language_b",
                                                    "language_b": "language_a"})])  # fmt: skip
    if len(seeds):
        known = pd.concat([known, seeds[seeds["language_a"] == seeds["language_b"]]])
    matrices = [
        Matrix(name, known.pivot(index="language_a", columns="language_b", values=measure)
               .reindex(index=languages, columns=languages).to_numpy(), languages, languages)
        for measure, name in SIMILARITIES.items()
    ]  # fmt: skip
    negative = min(float(np.nanmin(one.values_RC)) for one in matrices) < 0
    yield "similarity", heatmaps(
        matrices, width, scale="diverging" if negative else "sequential",
        limits=(-1.0 if negative else 0.0, 1.0), axes=("language", "language"),
        unit="similarity of subnetworks", digits=(2,),
    )  # fmt: skip


def similarity_influence(tables: AnalysisTables, width: float) -> Iterator[Drawn]:
    """Influence between two languages against the similarity of their subnetworks, and its test."""
    pairs = tables.table("pairs")
    tests = {(one["model"], one["view"], one["measure"]): one
             for one in tables.summary["similarity_influence"]}  # fmt: skip
    for measure in ("share_positive", "mean_influence") if len(pairs) else ():
        factor, unit = _measure_unit(tables, pairs, measure)
        for model, of_model in pairs.groupby("model", sort=False):
            plots = [
                Cloud(
                    words.VIEW_NAMES[view], list(rows["jaccard"]), list(factor * rows[measure]),
                    [f"{a}\N{EN DASH}{b}" for a, b in zip(rows["language_a"], rows["language_b"],
                                                          strict=True)],
                    _test_note(tests.get((model, view, measure))),
                )
                for view, rows in of_model.groupby("view", sort=False)
            ]  # fmt: skip
            axes = ("Jaccard similarity of subnetworks", unit)
            yield f"similarity-{_short(measure)}-{model}", clouds(plots, width, axes=axes)


def _test_note(test: Mapping[str, Any] | None) -> str:
    if test is None or test["p_value"] is None:
        return "no test"
    p_text = words.p_value(test["p_value"])
    return f"ρ = {words.number(test['correlation'])}, Mantel {p_text}"


# --- heads and layers -----------------------------------------------------------------------


def blocks(tables: AnalysisTables, width: float) -> Iterator[Drawn]:
    """In-language influence through each head, and by layer, a panel per view."""
    table = tables.table("blocks")
    known = table[table["in_language"].notna()] if len(table) else table
    heads = known[known["head"].notna()] if len(known) else known
    if len(heads):
        factor, unit = tables.scaling(heads["in_language"])
        top = float(heads["in_language"].abs().max() * factor) or 1.0
    for model, of_model in _in_order(known, "model", MODELS) if len(known) else ():
        of_heads = [(view, rows[rows["head"].notna()])
                    for view, rows in of_model.groupby("view", sort=False)]  # fmt: skip
        maps = [_head_matrix(_view_name(view), _spread_heads(rows, factor))
                for view, rows in of_heads if len(rows)]  # fmt: skip
        if maps:
            yield f"blocks-heads-{model}", heatmaps(
                maps, width, scale="diverging", limits=(-top, top), axes=("head", "layer"),
                unit=f"in-language influence\n{unit}", signed=True,
            )  # fmt: skip
        plots = [_layer_plot(view, rows) for view, rows in of_model.groupby("view", sort=False)]
        if plots := [plot for plot in plots if plot.series]:
            axes = ("layer", "share of in-language influence\n(% of all parts' sizes)")
            yield f"blocks-layers-{model}", bars(plots, width, axes=axes, stacked=True)


def _view_name(view: Any) -> str:
    return words.VIEW_NAMES.get(view_kind(view), view)


def _spread_heads(rows: pd.DataFrame, factor: float) -> np.ndarray:
    return factor * rows.pivot(index="layer", columns="head", values="in_language").to_numpy()


def _layer_plot(view: Any, rows: pd.DataFrame) -> Plot:
    """Heads and rest of each layer, and what lies outside, as shares of all."""
    names, shares = layer_shares(rows.astype(object).where(rows.notna(), None).to_dict("records"))
    series = [
        Series(PART_NAMES[part], PART_COLORS[part], names, values)
        for part, values in shares.items()
    ]
    return Plot(_view_name(view), series)


# --- retraining -----------------------------------------------------------------------------


def lds(tables: AnalysisTables, width: float) -> Iterator[Drawn]:
    """Linear datamodelling score of each method, of test examples and of test languages."""
    table = tables.retrained("lds")
    if not len(table):
        return
    series = []
    for level, (name, color) in LEVELS.items():
        rows = table[table["test_language"].isna() & (table["level"] == level)]
        y, low, high = (list(rows[end]) for end in ("value", "low", "high"))
        series.append(Series(name, color, list(rows["method"]), y, low, high))
    axes = ("method", "linear datamodelling score\n(Spearman)")
    yield "lds", bars([Plot("", series)], width, axes=axes)


# What is drawn, its name where it is left out, and what it is drawn from.
KINDS: list[tuple[Callable[[AnalysisTables, float], Iterator[Drawn]], str, str]] = [
    (influence, "influence by language", "no analysis/matrices.parquet"),
    (changes, "differences", "no analysis/changes.parquet"),
    (reliance, "in-language reliance", "no test language with training data of its own"),
    (reliance_by_k, "reliance by k", "influence.k is one number"),
    (course, "course over epochs", "no analysis/course.parquet"),
    (accuracy, "accuracy", "no models/*/metrics.json"),
    (subnetworks, "subnetworks", "no subnetworks/*.json"),
    (pruning, "pruning curves", "no course in subnetworks/*.json"),
    (similarity, "similarity of subnetworks", "no analysis/similarity.parquet"),
    (similarity_influence, "similarity against influence", "no analysis/pairs.parquet"),
    (blocks, "influence by head and layer", "no analysis/blocks.parquet; influence.blocks=true"),
    (lds, "linear datamodelling score", "no retraining/lds.parquet; `retrain` in the config"),
]
