"""Figures of the comparison of influence with actual retraining, from `retraining/`.

Shape legend: R rows, C columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from tracmod.report.content.analysis_tables import AnalysisTables
from tracmod.report.content.figures import BarCharts, Chart, HeatMaps, Matrix, Series
from tracmod.report.wording.labels import power_of_ten, superscript
from tracmod.report.wording.retraining import method_name
from tracmod.validation.retraining import RANDOM

# Level of the score -> name of its bars, and their color.
_LEVELS = {
    "example": ("loss of a test example", "series-0"),
    "language": ("mean loss of a test language", "series-4"),
}


def lds(tables: AnalysisTables) -> Iterator[BarCharts]:
    """Yield the linear datamodeling score of each method, for test examples and test languages."""
    table = tables.retraining_table("lds")
    if not len(table):
        return
    series = []
    for level, (name, color) in _LEVELS.items():
        rows = table[table["test_language"].isna() & (table["level"] == level)]
        y, low, high = (list(rows[end]) for end in ("value", "low", "high"))
        series.append(Series(name, color, list(rows["method"]), y, low, high))
    yield BarCharts(
        name="lds",
        x_axis="method",
        y_axis="linear datamodeling score",
        unit="Spearman",
        panels=[Chart("", series)],
    )


def leave_one_out(tables: AnalysisTables) -> Iterator[HeatMaps]:
    """Yield what leaving a language out changed, and what each method predicts."""
    table = tables.retraining_table("leave_one_out")
    if not len(table):
        return
    methods = dict(list(table.groupby("method", sort=False)))
    first = next(iter(methods.values()))  # the actual changes are the same beside every method
    matrices = [("Actual: change in mean loss", first, "actual")]
    matrices += [(f"Predicted: {method_name(method)}", rows, "predicted")
                 for method, rows in methods.items()]  # fmt: skip
    panels = []
    for title, rows, value in matrices:
        tests, trains = (list(rows[f"{side}_language"].unique()) for side in ("test", "train"))
        values_RC = rows[value].to_numpy().reshape(len(tests), len(trains))
        panels.append(scaled(title, values_RC, tests, trains))
    yield HeatMaps(
        name="leave-one-out",
        tab="Without a language",
        caption="Blue: the loss of the test language rises when the training language is left out; "
        "orange: it falls. Predictions are sums of the scores of the training language's examples, "
        "in the unit of the method; each matrix has its own color scale.",
        x_axis="language left out",
        y_axis="test language",
        panels=panels,
        scale="diverging",
        limits=None,
        digits=(2,),
    )


def removal(tables: AnalysisTables) -> Iterator[HeatMaps]:
    """Yield the change in loss and accuracy per test language without the strongest examples."""
    table = tables.retraining_table("removal")
    own = table[table["test_language"].notna()] if len(table) else table
    if not len(own):
        return
    languages = list(own["test_language"].unique())
    removals = own[["method", "side"]].drop_duplicates().itertuples(index=False)
    names = ["drawn at random" if side == RANDOM else f"{side}, {method_name(method)}"
             for method, side in removals]  # fmt: skip
    panels = []
    for title, column, factor in (
        ("Change in mean loss", "loss_change", 1.0),
        ("Change in accuracy, points", "accuracy_change", 100.0),
    ):
        changes_RC = own[column].to_numpy().reshape(len(names), len(languages))
        values_RC = np.round(factor * changes_RC, 9)  # differences of rounding alone become 0
        panels.append(scaled(title, values_RC, names, languages))
    yield HeatMaps(
        name="removal",
        tab="Without the strongest examples",
        caption=f"Without the {own['removed'].iloc[0]:,} training examples of the highest "
        "(proponents) or lowest (opponents) mean score on the examples of a test language, "
        "compared with training on all examples.",
        x_axis="test language",
        y_axis="left out",
        panels=panels,
        scale="diverging",
        limits=None,
        digits=(2,),
    )


def scaled(
    title: str, values_RC: np.ndarray, rows: Sequence[str], columns: Sequence[str]
) -> Matrix:
    """Return a matrix divided by a power of ten, named in the title, if that is easier to read."""
    top = float(np.abs(values_RC).max())
    exponent = 0 if 0.1 <= top < 10 or top == 0 else power_of_ten(top)
    suffix = f" (× 10{superscript(exponent)})" if exponent else ""
    return Matrix(title + suffix, values_RC * 10.0**-exponent, rows, columns)
