"""The report's figures from the tables of `analysis/`."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tracmod.analysis.languages import MEASURES
from tracmod.analysis.results import MODELS, VIEWS, view_kind
from tracmod.report.html.plotly_plots import (
    SHOW_NUMBERS_UP_TO,
    Figure,
    Legend,
    Panel,
    bars,
    heatmap,
    lines,
    scatter,
)
from tracmod.report.wording.labels import (
    MEASURE_NAMES,
    MODEL_NAMES,
    VIEW_NAMES,
    change_heading,
    change_title,
    is_clear,
    number,
    p_value,
    percent,
    points,
    power_of_ten,
    superscript,
    tested,
)

Row = dict[str, Any]
TEST_AXIS, TRAIN_AXIS = "language of test examples", "language of training examples"
EPOCH_AXIS, OWN_SHARE_AXIS = "epoch", "share of the own language"
K_AXIS = "k, strongest training examples counted"
SIMILARITIES = {
    "jaccard": "Jaccard",
    "corrected_jaccard": "Jaccard beyond chance",
    "overlap": "Overlap coefficient",
    "cosine": "Cosine",
}
SIMILARITY_NOTES = {
    "jaccard": "Heads kept for both languages, over heads kept for either; 1: the same heads.",
    "corrected_jaccard": "Jaccard, set to 0 where random masks of the same sizes would be; 1: the "
    "same heads, below 0: less alike than random masks.",
    "overlap": "Heads kept for both languages, over those of the smaller subnetwork; 1: one is "
    "part of the other.",
    "cosine": "Heads kept for both languages, over the geometric mean of the two sizes.",
}


def influence_panels(matrices: list[Row], unit: str) -> list[Panel]:
    """One heatmap per model and view; one panel per measure, on one colour scale."""
    panels = []
    for measure in MEASURES:
        factor, axis_unit = _scaling(matrices, measure, unit)
        top = max((abs(row[measure]) for row in matrices), default=0) * factor or 1.0
        sequential = measure != "mean_influence"
        limits = (0.0 if sequential else -top, top)
        groups = [
            (
                MODEL_NAMES[model],
                [
                    _matrix(VIEW_NAMES[view], rows, measure, factor, limits, is_change=False)
                    for (view,), rows in _groups(of_model, ("view",))
                ],
            )
            for (model,), of_model in _groups(matrices, ("model",))
        ]
        panels.append(
            Panel(
                MEASURE_NAMES[measure],
                groups,
                _influence_legend(matrices, sequential, top),
                _influence_note(measure, axis_unit),
            )
        )
    return panels


def change_panels(changes: list[Row], unit: str) -> list[Panel]:
    """One heatmap per comparison; one panel per measure, on one diverging scale around 0."""
    panels = []
    for measure in MEASURES:
        factor, axis_unit = _scaling(changes, measure, unit)
        top = max((abs(row[measure]) for row in changes), default=0) * factor or 1.0
        groups = [
            (
                change_heading({"model": models[0], "base_model": models[1]}),
                [
                    _matrix(change_title(r[0]), r, measure, factor, (-top, top), is_change=True)
                    for _, r in _groups(rows, ("view", "base_view"))
                ],
            )
            for models, rows in _groups(changes, ("model", "base_model"))
        ]
        axis_unit = "percentage points" if measure != "mean_influence" else axis_unit
        ends = (number(-top, 1), f"+{number(top, 1)}")
        note = f"In {axis_unit}."
        if len(_distinct(changes, "train_language")) <= SHOW_NUMBERS_UP_TO:
            note += (
                " Bold: the interval leaves out 0, and p, adjusted for the cells of the matrix "
                "(false discovery rate), is at most 0.05."
            )
        legend = Legend("diverging", *ends, (0.5, "0"))
        panels.append(Panel(MEASURE_NAMES[measure], groups, legend, note))
    return panels


def _influence_legend(rows: list[Row], sequential: bool, top: float) -> Legend:
    if not sequential:
        return Legend("diverging", number(-top, 1), f"+{number(top, 1)}", (0.5, "0"))
    nulls = {round(row["null_share"], 6) for row in rows}
    mark = None
    if len(nulls) == 1:
        null = 100 * nulls.pop()
        mark = (null / top, f"null {null:.1f}%") if null <= top else None
    return Legend("sequential", "0%", f"{top:.1f}%", mark)


def _influence_note(measure: str, unit: str) -> str:
    if measure == "mean_influence":
        return (
            f"In {unit}. Influence averaged over all training examples of a language, strong or "
            "weak; positive = they lowered the loss of the test examples."
        )
    which = "raised" if measure == "share_negative" else "lowered"
    return (
        f"In percent. Of the training examples that most {which} a test example's loss, how many "
        "are in each language, averaged over test examples. Rows sum to 100."
    )


def _matrix(
    title: str,
    rows: list[Row],
    measure: str,
    factor: float,
    limits: tuple[float, float],
    *,
    is_change: bool,
) -> Figure:
    tests, trains = _distinct(rows, "test_language"), _distinct(rows, "train_language")
    cells = {(row["test_language"], row["train_language"]): row for row in rows}
    values = np.array([[factor * cells[a, b][measure] for b in trains] for a in tests])
    wide = len(trains) <= 5  # or two digits and a decimal run into the next cell
    text = [
        [_cell_text(cells[a, b], measure, factor, is_change, wide) for b in trains] for a in tests
    ]
    hover = [[_cell_hover(cells[a, b], measure, factor, is_change) for b in trains] for a in tests]
    return heatmap(
        title,
        values,
        text,
        hover,
        tests,
        trains,
        scale="diverging" if limits[0] < 0 else "sequential",
        limits=limits,
        axes=(TRAIN_AXIS, TEST_AXIS),
    )


def _cell_text(row: Row, measure: str, factor: float, is_change: bool, wide: bool) -> str:
    value = factor * row[measure]
    if not is_change:
        return number(value, 1)
    text = points(value / 100, 1 if wide or abs(value) < 9.95 else 0)
    return f"<b>{text}</b>" if is_clear(_of_measure(row, measure)) else text


def _of_measure(row: Row, measure: str) -> Row:
    """A change's columns of one measure under the names that summary.json gives them."""
    return {key: row[f"{measure}_{key}"] for key in ("low", "high", "p_adjusted", "effect_size")}


def _cell_hover(row: Row, measure: str, factor: float, is_change: bool) -> str:
    value, low, high = (factor * row[f"{measure}{end}"] for end in ("", "_low", "_high"))
    show = (lambda v: points(v / 100, 2)) if is_change else (lambda v: number(v, 2))
    lines_of_text = [
        f"test {html.escape(row['test_language'])}, training {html.escape(row['train_language'])}",
        f"{show(value)} ({show(low)} to {show(high)})",
    ]
    if not is_change and measure != "mean_influence":
        lines_of_text.append(f"null share {percent(row['null_share'])}")
    if is_change:
        lines_of_text.append(f"adjusted {tested(_of_measure(row, measure))}")
    lines_of_text.append(f"{row['num_test']} test examples")
    return "<br>".join(lines_of_text)


def _scaling(rows: Sequence[Row], measure: str, unit: str) -> tuple[float, str]:
    """Factor that makes the numbers readable, and the unit they then have."""
    if measure != "mean_influence":
        return 100.0, "%"
    exponent = power_of_ten(max((abs(row[measure]) for row in rows), default=0.0))
    return 10.0**-exponent, f"10{superscript(exponent)} ({unit})"


def reliance_panels(matrices: list[Row], in_language: list[Row]) -> list[Panel]:
    """Bars with intervals: share of the own language, per test language and over all."""
    panels = []
    for measure in ("share_positive", "share_negative"):
        own = [row for row in matrices if row["test_language"] == row["train_language"]]
        overall = [entry for entry in in_language if measure in entry]
        highs = [row[f"{measure}_high"] for row in own]
        upper = min(100.0, 108 * max([*highs, *(row["null_share"] for row in own)], default=0.9))
        figures = []
        for (model,), rows in _groups(own, ("model",)):
            names = ["all", *_distinct(rows, "test_language")]
            totals = {entry["view"]: entry for entry in overall if entry["model"] == model}
            series = [
                _bar_series(view, cells, totals.get(view), measure, names)
                for (view,), cells in _groups(rows, ("view",))
            ]
            nulls = {row["test_language"]: 100 * row["null_share"] for row in rows}
            first = next(iter(totals.values()), None)
            everywhere = 100 * first["null_share"] if first else None
            figures.append(
                bars(
                    MODEL_NAMES[model],
                    names,
                    series,
                    marks=[everywhere, *(nulls[name] for name in names[1:])],
                    axes=(TEST_AXIS, OWN_SHARE_AXIS),
                    upper=upper,
                )
            )
        note = (
            f"{MEASURE_NAMES[measure]} in the test example's own language. Dashed: the share "
            "expected if language played no part. Whiskers: bootstrap interval over test examples."
        )
        panels.append(Panel(MEASURE_NAMES[measure], [("", figures)], note=note))
    return panels


def _bar_series(view: str, cells: list[Row], total: Row | None, measure: str, names: Any) -> Row:
    by_language = {row["test_language"]: row for row in cells}
    rows = [by_language.get(name) for name in names[1:]]
    series: Row = {"name": VIEW_NAMES[view], "color": view}
    for key, end in (("value", ""), ("low", "_low"), ("high", "_high")):
        first = 100 * total[measure][key] if total else None
        series[key] = [first, *(100 * row[f"{measure}{end}"] if row else None for row in rows)]
    return series


def by_k_panels(by_k: list[Row]) -> list[Panel]:
    """Share of the own language against k, a line per view; nothing where there is but one k."""
    if len(_distinct(by_k, "k")) < 2:
        return []
    panels = []
    for measure in ("share_positive", "share_negative"):
        values = [100 * row[key] for row in by_k for key in (measure, "null_share")]
        limits = (max(0.0, min(values) - 5), min(100.0, max(values) + 5))
        figures = []
        for (model,), rows in _groups(by_k, ("model",)):
            series = [
                {
                    "name": VIEW_NAMES[view],
                    "color": view,
                    "x": [str(row["k"]) for row in cells],
                    "y": [100 * row[measure] for row in cells],
                }
                for (view,), cells in _groups(rows, ("view",))
            ]
            mark = (100 * rows[0]["null_share"], "null share")
            axes = (K_AXIS, OWN_SHARE_AXIS)
            title = MODEL_NAMES[model]
            figures.append(lines(title, series, axes=axes, limits=limits, mark=mark, even=True))
        note = (
            f"{MEASURE_NAMES[measure]} in the test example's own language among the k strongest. "
            "With k as large as the training data the share is the null share."
        )
        panels.append(Panel(MEASURE_NAMES[measure], [("", figures)], note=note))
    return panels


def course_panels(course: list[Row], null_share: float | None) -> list[Panel]:
    """In-language reliance over the epochs: means per view, and per language within a view."""
    mark = (100 * null_share, "null share") if null_share is not None else None
    axes = (EPOCH_AXIS, OWN_SHARE_AXIS)
    course = [{**row, "kind": view_kind(row["view"])} for row in course]
    course.sort(key=lambda row: (MODELS.index(row["model"]), VIEWS.index(row["kind"])))
    of_models = {
        MODEL_NAMES[model]: [
            _course_series(cells, VIEW_NAMES[kind], kind)
            for (kind,), cells in _groups(rows, ("kind",))
        ]
        for (model,), rows in _groups(course, ("model",))
    }
    limits = _percent_limits(
        [v for series in of_models.values() for one in series for v in one["y"]], mark
    )
    means = [
        lines(title, series, axes=axes, limits=limits, mark=mark)
        for title, series in of_models.items()
    ]
    limits = _percent_limits([100 * row["share_positive"] for row in course], mark)
    note = (
        "Each epoch's checkpoint alone: share of the own language among the strongest proponents, "
    )
    average = note + "averaged over languages."
    panels = [Panel("Mean over languages", [("", means)], note=average)]
    for (kind,), rows in _groups(course, ("kind",)):
        figures = [
            lines(
                MODEL_NAMES[model],
                [
                    _course_series(cells, language, f"series-{place % 8}")
                    for place, ((language,), cells) in enumerate(_groups(own, ("test_language",)))
                ],
                axes=axes,
                limits=limits,
                mark=mark,
            )
            for (model,), own in _groups(rows, ("model",))
        ]
        text = note + "per test language."
        panels.append(Panel(VIEW_NAMES[kind].capitalize(), [("", figures)], note=text))
    return panels


def _percent_limits(values: list[float], mark: tuple[float, str] | None) -> tuple[float, float]:
    """Ends of an axis of percentages with some room, and room for the name of a mark in it."""
    ends = [min(values, default=0) - 5, max(values, default=95) + 5]
    if mark is not None:
        ends += [mark[0] - 3, mark[0] + 5]
    return max(0.0, min(ends)), min(100.0, max(ends))


def _course_series(rows: list[Row], name: str, color: str) -> Row:
    """Mean over the rows of each epoch (languages, draws)."""
    epochs = sorted({row["epoch"] for row in rows})
    means = [np.mean([r["share_positive"] for r in rows if r["epoch"] == e]) for e in epochs]
    return {"name": name, "color": color, "x": epochs, "y": [100 * float(mean) for mean in means]}


def accuracy_figures(epochs: dict[str, list[Row]], chance: float) -> list[Figure]:
    """Test accuracy per language over the epochs, one figure per model."""
    mark = (100 * chance, "chance")
    scores = [
        100 * score
        for rows in epochs.values()
        for row in rows
        for score in row["accuracy"].values()
    ]
    limits = _percent_limits(scores, mark)
    figures = []
    for model, entries in epochs.items():
        languages = list(entries[-1]["accuracy"]) if entries else []
        series = [
            {
                "name": language,
                "color": f"series-{place % 8}",
                "x": [entry["epoch"] for entry in entries],
                "y": [100 * entry["accuracy"][language] for entry in entries],
            }
            for place, language in enumerate(languages)
        ]
        axes = (EPOCH_AXIS, "test accuracy")
        figures.append(lines(MODEL_NAMES[model], series, axes=axes, limits=limits, mark=mark))
    return figures


def similarity_panels(
    similarity: list[Row], seeds: list[Row], languages: Sequence[str]
) -> list[Panel]:
    """Pairwise similarity of subnetworks, one panel per measure.

    The diagonal is how alike two seeds' subnetworks of one language are; blank without seeds.
    """
    of_seeds = {row["language_a"]: row for row in seeds if row["language_a"] == row["language_b"]}
    pairs = {(row["language_a"], row["language_b"]): row for row in similarity}
    pairs |= {(b, a): row for (a, b), row in pairs.items()}
    blank = "<br>".join
    panels = []
    for measure, name in SIMILARITIES.items():
        values = np.full((len(languages), len(languages)), np.nan)
        hover = [["" for _ in languages] for _ in languages]
        for i, a in enumerate(languages):
            for j, b in enumerate(languages):
                if (a, b) in pairs:
                    row = pairs[a, b]
                    values[i, j] = row[measure]
                    hover[i][j] = blank(_pair_hover(row, measure, name))
                elif a == b and a in of_seeds:
                    values[i, j] = of_seeds[a][measure]
                    hover[i][j] = blank(_seed_hover(of_seeds[a], measure, name))
        text = [["" if np.isnan(v) else number(v) for v in row] for row in values]
        lowest = -1.0 if np.nanmin(values) < 0 else 0.0
        figure = heatmap(
            name,
            values,
            text,
            hover,
            languages,
            languages,
            scale="diverging" if lowest < 0 else "sequential",
            limits=(lowest, 1.0),
            axes=("language", "language"),
        )
        legend = Legend("diverging" if lowest < 0 else "sequential", number(lowest, 0), "1")
        note = SIMILARITY_NOTES[measure]
        panels.append(Panel(name, [("", [figure])], legend, note, least_columns=3))
    return panels


def _pair_hover(row: Row, measure: str, name: str) -> list[str]:
    return [
        f"{html.escape(row['language_a'])} and {html.escape(row['language_b'])}",
        f"{name} {number(row[measure])}",
        f"{row['shared_heads']} shared heads of {row['heads_a']} and {row['heads_b']}",
        f"Jaccard by chance {number(row['expected_jaccard'])}",
    ]


def _seed_hover(row: Row, measure: str, name: str) -> list[str]:
    return [
        f"{html.escape(row['language_a'])}, from seed to seed",
        f"{name} {number(row[measure])}",
        f"mean of {row['mask_pairs']} pairs of seeds",
        f"Jaccard by chance {number(row['expected_jaccard'])}",
    ]


def scatter_panels(pairs: list[Row], tests: list[Row], unit: str) -> list[Panel]:
    """Similarity of two languages' subnetworks against their influence on each other."""
    panels = []
    for measure in ("share_positive", "mean_influence"):
        factor, axis_unit = _scaling(pairs, measure, unit)
        shares = measure == "share_positive"
        axis = "share among proponents" if shares else f"mean influence, {axis_unit}"
        groups = [
            (
                MODEL_NAMES[model],
                [
                    scatter(
                        VIEW_NAMES[view],
                        [row["jaccard"] for row in rows],
                        [factor * row[measure] for row in rows],
                        [f"{row['language_a']}–{row['language_b']}" for row in rows],
                        axes=("Jaccard similarity of subnetworks", axis),
                        suffix="%" if shares else "",
                        caption=_mantel_caption(tests, (model, view), measure),
                    )
                    for (view,), rows in _groups(of_model, ("view",))
                ],
            )
            for (model,), of_model in _groups(pairs, ("model",))
        ]
        note = (
            "One point per pair of languages: the mean of the influence of each one's training "
            "examples on the other's test examples, against the similarity of their subnetworks."
        )
        panels.append(Panel(MEASURE_NAMES[measure], groups, note=note))
    return panels


def _mantel_caption(tests: list[Row], key: tuple[str, ...], measure: str) -> str:
    for test in tests:
        if (test["model"], test["view"], test["measure"]) == (*key, measure):
            if test["p_value"] is None:
                return f"No test: {test['reason'].removeprefix('mantel: ')}."
            how = "all" if test["exact"] else "random"
            return (
                f"Spearman {number(test['correlation'])}, Mantel {p_value(test['p_value'])} "
                f"({how} {test['permutations']:,} orders of the languages)"
            )
    return ""


def _groups(rows: Iterable[Row], keys: tuple[str, ...]) -> list[tuple[tuple[Any, ...], list[Row]]]:
    """Rows by the values of some columns, in order of first appearance."""
    grouped: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        grouped.setdefault(tuple(row[key] for key in keys), []).append(row)
    return list(grouped.items())


def _distinct(rows: Iterable[Row], key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))
