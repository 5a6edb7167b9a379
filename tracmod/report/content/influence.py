"""Figures of influence between languages: matrices, changes, own-language shares, accuracy.

Shape legend: R test languages, C training languages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from tracmod.analysis.languages import MEASURES
from tracmod.analysis.results import MODELS, VIEWS, view_kind
from tracmod.report.content.analysis_tables import AnalysisTables
from tracmod.report.content.figures import (
    BarCharts,
    Chart,
    HeatMaps,
    LineCharts,
    Mark,
    Matrix,
    Series,
    series_color,
)
from tracmod.report.wording import labels as words

Row = Mapping[str, Any]
SHARES = ("share_positive", "share_negative")
TEST_AXIS, TRAIN_AXIS = "test language", "training language"
_MATRIX_CAPTIONS = {
    "share_positive": "Of the training examples that most lowered a test example's loss, the "
    "percentage in each language, averaged over test examples. Rows sum to 100.",
    "share_negative": "Of the training examples that most raised a test example's loss, the "
    "percentage in each language, averaged over test examples. Rows sum to 100.",
    "mean_influence": "Influence averaged over all training examples of a language, strong or "
    "weak. Positive: they lowered the loss of the test examples.",
}


def influence(tables: AnalysisTables) -> Iterator[HeatMaps]:
    """Yield test language x training language per measure and model, with a panel per view.

    All matrices of a measure share one color scale.
    """
    table = tables.table("matrices")
    for measure in MEASURES if len(table) else ():
        factor, color_axis, unit = measure_axis(tables, table, measure)
        top = float(table[measure].abs().max() * factor) or 1.0
        is_share, languages = measure in SHARES, _languages(tables, table)
        mark, null = None, _common_null_share(table)
        if is_share and null is not None and null <= top:
            mark = Mark(null, f"null {null:.0f}")
        for model, of_model in table.groupby("model", sort=False):
            yield HeatMaps(
                name=f"influence-{words.measure_id(measure)}-{model}",
                tab=words.MEASURE_NAMES[measure],
                heading=words.MODEL_NAMES[str(model)],
                caption=_MATRIX_CAPTIONS[measure],
                x_axis=TRAIN_AXIS,
                y_axis=TEST_AXIS,
                panels=[
                    _matrix(words.VIEW_NAMES[str(view)], rows, languages, measure, factor)
                    for view, rows in of_model.groupby("view", sort=False)
                ],
                color_axis=color_axis,
                unit=unit,
                scale="sequential" if is_share else "diverging",
                limits=(0.0 if is_share else -top, top),
                signed=not is_share,
                mark=mark,
            )


def changes(tables: AnalysisTables) -> Iterator[HeatMaps]:
    """Yield differences between views and models, with a panel per comparison; clear ones bold."""
    table = tables.table("changes")
    for measure in MEASURES if len(table) else ():
        factor, color_axis, unit = measure_axis(tables, table, measure, change=True)
        top = float(table[measure].abs().max() * factor) or 1.0
        languages = _languages(tables, table)
        for (model, base), of_models in table.groupby(["model", "base_model"], sort=False):
            models = str(model) if model == base else f"{model}-minus-{base}"
            yield HeatMaps(
                name=f"change-{words.measure_id(measure)}-{models}",
                tab=words.MEASURE_NAMES[measure],
                heading=words.change_heading({"model": model, "base_model": base}),
                x_axis=TRAIN_AXIS,
                y_axis=TEST_AXIS,
                panels=[
                    _matrix(
                        words.change_title(rows.iloc[0]), rows, languages, measure, factor, True
                    )
                    for _, rows in of_models.groupby(["view", "base_view"], sort=False)
                ],
                color_axis=color_axis,
                unit=unit,
                scale="diverging",
                limits=(-top, top),
                signed=True,
                bold=f"adjusted p \N{LESS-THAN OR EQUAL TO} {words.LEVEL}",
            )


def measure_axis(
    tables: AnalysisTables, table: pd.DataFrame, measure: str, change: bool = False
) -> tuple[float, str, str]:
    """Return the factor of a measure in figures, the name of its axis, and its unit."""
    if measure in SHARES:
        axis = f"share among {words.measure_id(measure)}"
        change_unit = "percentage points"
        return 100.0, f"change in {axis}" if change else axis, change_unit if change else "%"
    factor, unit = tables.scaling(table[measure])
    return factor, "change in mean influence" if change else "mean influence, + lowers loss", unit


def _languages(tables: AnalysisTables, table: pd.DataFrame) -> tuple[list[str], list[str]]:
    """Return the test and the training languages of a table, in the order of the run."""
    tests, trains = (
        [name for name in tables.summary["languages"][side] if name in {*table[f"{side}_language"]}]
        for side in ("test", "train")
    )
    return tests, trains


def _matrix(
    title: str,
    rows: pd.DataFrame,
    languages: tuple[list[str], list[str]],
    measure: str,
    factor: float,
    change: bool = False,
) -> Matrix:
    """Return a panel of some rows, with these test and training languages."""
    tests, trains = languages
    cells = {(row["test_language"], row["train_language"]): row for row in rows.to_dict("records")}

    def spread(value: Callable[[Row], Any], missing: Any) -> list[list[Any]]:
        return [[value(cells[a, b]) if (a, b) in cells else missing for b in trains] for a in tests]

    def values(column: str) -> np.ndarray:
        return factor * np.array(spread(lambda row: row[column], np.nan), dtype=float)

    def is_clear(row: Row) -> bool:
        return words.is_clear(words.of_measure(row, measure))

    def notes(row: Row) -> list[str]:
        lines = [f"{row['num_test']} test examples"]
        if change:
            lines.insert(0, f"adjusted {words.tested(words.of_measure(row, measure))}")
        elif measure in SHARES:
            lines.insert(0, f"null share {words.percent(row['null_share'])}")
        return lines

    return Matrix(
        title,
        values(measure),
        tests,
        trains,
        intervals=(values(f"{measure}_low"), values(f"{measure}_high")),
        bold_RC=np.array(spread(is_clear, False)) if change else None,
        notes=spread(notes, []),
    )


def _common_null_share(table: pd.DataFrame) -> float | None:
    """Return the null share in percent; None if it differs between languages."""
    shares = table["null_share"].dropna()
    return 100 * float(shares.iloc[0]) if len(shares) and np.ptp(shares) < 1e-9 else None


# --- own-language shares --------------------------------------------------------------------


def reliance(tables: AnalysisTables) -> Iterator[BarCharts]:
    """Yield own-language shares, over all test examples and per language, with a bar per view."""
    table = tables.table("matrices")
    own = table[table["test_language"] == table["train_language"]] if len(table) else table
    for measure in SHARES if len(own) else ():
        panels = []
        for model, of_model in own.groupby("model", sort=False):
            totals = {entry["view"]: entry for entry in tables.summary["in_language"]
                      if entry["model"] == model and measure in entry}  # fmt: skip
            languages = list(of_model["test_language"].unique())
            series = []
            for view, rows in of_model.groupby("view", sort=False):
                total = totals[view][measure] if view in totals else {}
                rows = rows.set_index("test_language").reindex(languages)
                y, low, high = (
                    [100 * total.get(key, np.nan), *(100 * rows[f"{measure}{end}"])]
                    for key, end in (("value", ""), ("low", "_low"), ("high", "_high"))
                )
                name = words.VIEW_NAMES[str(view)]
                series.append(Series(name, str(view), ["all", *languages], y, low, high))
            nulls = of_model.groupby("test_language")["null_share"].first()
            overall = next((entry["null_share"] for entry in totals.values()), np.nan)
            marks = [100 * share for share in (overall, *nulls[languages])]
            panels.append(Chart(words.MODEL_NAMES[str(model)], series, marks))
        yield BarCharts(
            name=f"reliance-{words.measure_id(measure)}",
            tab=words.MEASURE_NAMES[measure],
            caption=f"Own-language share among the strongest {words.measure_id(measure)}. Dashed "
            "lines: the null share, expected if language played no role. Whiskers: bootstrap "
            "intervals over test examples.",
            x_axis=TEST_AXIS,
            y_axis=f"own-language share among {words.measure_id(measure)}",
            unit="%",
            panels=panels,
            mark_name="null share",
        )


def reliance_by_k(tables: AnalysisTables) -> Iterator[LineCharts]:
    """Yield own-language shares against the number of strongest examples that are counted."""
    table = tables.table("shares_by_k")
    for measure in SHARES if len(table) and table["k"].nunique() > 1 else ():
        panels = []
        for model, of_model in table.groupby("model", sort=False):
            series = []
            for view, rows in of_model.groupby("view", sort=False):
                y, low, high = (list(100 * rows[measure + end]) for end in ("", "_low", "_high"))
                name, k = words.VIEW_NAMES[str(view)], list(rows["k"])
                series.append(Series(name, str(view), k, y, low, high))
            panels.append(Chart(words.MODEL_NAMES[str(model)], series))
        yield LineCharts(
            name=f"reliance-by-k-{words.measure_id(measure)}",
            tab=words.MEASURE_NAMES[measure],
            caption=f"Own-language share among the k strongest {words.measure_id(measure)}. With k "
            "as large as the training data, it is the null share.",
            x_axis="k, number of strongest training examples",
            y_axis=f"own-language share among {words.measure_id(measure)}",
            unit="%",
            panels=panels,
            mark=Mark(100 * float(table["null_share"].iloc[0]), "null share"),
            evenly_spaced=True,
        )


def course(tables: AnalysisTables) -> Iterator[LineCharts]:
    """Yield own-language shares at each epoch: mean over languages, and per language and view."""
    table = tables.table("course")
    if not len(table):
        return
    table = table.assign(kind=table["view"].map(view_kind))
    null = _common_null_share(table)
    caption = (
        "Own-language share among the strongest proponents at the checkpoint of each epoch alone"
    )
    shared: dict[str, Any] = {
        "x_axis": "epoch",
        "y_axis": "own-language share among proponents",
        "unit": "%",
        "mark": None if null is None else Mark(null, "null share"),
    }
    yield LineCharts(
        name="course",
        tab="Mean over languages",
        caption=f"{caption}, averaged over languages.",
        panels=[
            Chart(words.MODEL_NAMES[model], [
                _course_of(rows, words.VIEW_NAMES[kind], kind)
                for kind, rows in _in_order(of_model, "kind", VIEWS)
            ])
            for model, of_model in _in_order(table, "model", MODELS)
        ],
        **shared,
    )  # fmt: skip
    for kind, of_kind in _in_order(table, "kind", VIEWS):
        yield LineCharts(
            name=f"course-{kind}",
            tab=words.VIEW_NAMES[kind].capitalize(),
            caption=f"{caption}, for each test language.",
            panels=[
                Chart(words.MODEL_NAMES[model], [
                    _course_of(rows, str(language), series_color(position))
                    for position, (language, rows) in enumerate(
                        of_model.groupby("test_language", sort=False))
                ])
                for model, of_model in _in_order(of_kind, "model", MODELS)
            ],
            **shared,
        )  # fmt: skip


def _course_of(rows: pd.DataFrame, name: str, color: str) -> Series:
    """Return the mean over the rows (languages, draws) of each epoch."""
    means = 100 * rows.groupby("epoch")["share_positive"].mean()
    return Series(name, color, list(means.index), list(means))


def _in_order(
    table: pd.DataFrame, column: str, order: tuple[str, ...]
) -> list[tuple[str, pd.DataFrame]]:
    groups = dict(list(table.groupby(column, sort=False)))
    return [(name, groups[name]) for name in order if name in groups]


def accuracy(tables: AnalysisTables) -> Iterator[LineCharts]:
    """Yield test accuracy over the epochs, with a line per language and a panel per model."""
    results = tables.summary["accuracy"]
    panels = [
        Chart(words.MODEL_NAMES[model], [
            Series(language, series_color(position), [entry["epoch"] for entry in entries],
                   [100 * entry["accuracy"][language] for entry in entries])
            for position, language in enumerate(entries[-1]["accuracy"])
        ])
        for model, entries in results["epochs"].items() if entries
    ]  # fmt: skip
    if panels:
        yield LineCharts(
            name="accuracy",
            x_axis="epoch",
            y_axis=f"test {results.get('score', 'accuracy')}",
            unit="%",
            panels=panels,
            mark=Mark(100 * results["chance"], "chance"),
        )
