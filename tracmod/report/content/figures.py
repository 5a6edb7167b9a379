"""Figures as data: what a figure shows, independent of the library that draws it.

A figure has one or more panels that share their axes, unit and scale. `html/plotly_plots.py` and
`paper/matplotlib_plots.py` draw it. Colors are names in `html/page.css`: of a view such as
`subnetwork`, or `series-0` to `series-7`.

Shape legend: R rows, C columns of a heat map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class Matrix:
    """One panel of `HeatMaps`.

    Attributes:
        title: of the panel.
        values_RC: the values; NaN where there is none.
        rows, columns: names of rows and columns.
        intervals: lower and upper ends of the values' intervals, (R, C) each.
        bold_RC: cells whose number is bold.
        notes: further lines about each cell, R lists of C lists, for readers who point at it.
        caption: text below the panel.
    """

    title: str
    values_RC: np.ndarray
    rows: Sequence[str]
    columns: Sequence[str]
    intervals: tuple[np.ndarray, np.ndarray] | None = None
    bold_RC: np.ndarray | None = None
    notes: Sequence[Sequence[Sequence[str]]] | None = None
    caption: str = ""


@dataclass(frozen=True)
class Series:
    """The values of one line, or one bar of every group; None or NaN where there is none.

    `low` and `high` are the ends of the values' intervals. A dotted series is a reference.
    """

    name: str
    color: str
    x: Sequence[Any]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    dotted: bool = False


@dataclass(frozen=True)
class Chart:
    """One panel of `BarCharts` or `LineCharts`.

    `marks` are the heights of dashed marks across the groups of bars; None: no mark.
    """

    title: str
    series: Sequence[Series]
    marks: Sequence[float | None] = ()


@dataclass(frozen=True)
class Points:
    """One panel of `ScatterPlots`: named points, and a caption such as a test's result."""

    title: str
    x: Sequence[float]
    y: Sequence[float]
    names: Sequence[str]
    caption: str = ""


@dataclass(frozen=True)
class Mark:
    """A reference value, such as the null share, and its name."""

    value: float
    name: str


@dataclass(frozen=True, kw_only=True)
class _Figure:
    """Fields that all kinds of figures have.

    Attributes:
        name: file name of the figure in a paper, without ending.
        x_axis, y_axis: what the axes show.
        unit: unit of the values (of a chart's y axis, or of a heat map's colors).
        tab: the report shows the figures of a section that have the same tab together.
        heading: heading above the figure in the report.
        caption: how to read the figures of the tab.
    """

    name: str
    x_axis: str
    y_axis: str
    unit: str = ""
    tab: str = ""
    heading: str = ""
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class HeatMaps(_Figure):
    """Matrices with the same rows and columns.

    Attributes:
        panels: the matrices.
        color_axis: what the colors show; "": the figure has no scale of colors.
        scale: `mask` is for 0 and 1.
        limits: values at the ends of the color scale. None: each matrix has a scale of its own,
            from minus to plus its largest absolute value.
        digits: decimals of the numbers in the cells, in order of preference.
        signed: positive numbers have a plus sign.
        mark: a value that is marked on the color scale.
        bold: what bold numbers are.
    """

    panels: Sequence[Matrix]
    color_axis: str = ""
    scale: Literal["sequential", "diverging", "mask"]
    limits: tuple[float, float] | None
    digits: Sequence[int] = (1, 0)
    signed: bool = False
    mark: Mark | None = None
    bold: str = ""

    def limits_of(self, matrix: Matrix) -> tuple[float, float]:
        """Return the values at the ends of a matrix's color scale."""
        if self.limits is not None:
            return self.limits
        top = float(np.nanmax(np.abs(matrix.values_RC))) or 1.0
        return -top, top


@dataclass(frozen=True, kw_only=True)
class BarCharts(_Figure):
    """Groups of bars from 0, or parts on top of each other (`stacked`; negative ones downwards).

    `mark_name` says what the dashed marks of the charts are.
    """

    panels: Sequence[Chart]
    stacked: bool = False
    mark_name: str = ""


@dataclass(frozen=True, kw_only=True)
class LineCharts(_Figure):
    """Percentages over a number such as the epoch, or over names.

    Attributes:
        panels: the charts; they share their y axis.
        mark: height and name of a dashed line.
        evenly_spaced: x is placed at equal distances, whatever its values are.
        joined: values are joined by lines.
        from_zero: the y axis includes 0.
    """

    panels: Sequence[Chart]
    mark: Mark | None = None
    evenly_spaced: bool = False
    joined: bool = True
    from_zero: bool = False

    @property
    def limits(self) -> tuple[float, float]:
        """Ends of the y axis: all values, intervals and the mark, with some room around them."""
        lists = [values for chart in self.panels for one in chart.series
                 for values in (one.y, one.low, one.high) if values is not None]  # fmt: skip
        shown = [value for values in lists for value in values
                 if value is not None and np.isfinite(value)]  # fmt: skip
        shown += [self.mark.value] if self.mark else []
        shown += [0.0] if self.from_zero or not shown else []
        low, high = min(shown), max(shown)
        room = max(1.0, 0.07 * (high - low))
        return low - room if low < 0 else max(0.0, low - room), high + room


@dataclass(frozen=True, kw_only=True)
class ScatterPlots(_Figure):
    """Clouds of points on the same axes."""

    panels: Sequence[Points]


Figure = HeatMaps | BarCharts | LineCharts | ScatterPlots


def with_unit(text: str, unit: str) -> str:
    """`accuracy (%)`."""
    return f"{text} ({unit})" if unit else text


def series_color(position: int) -> str:
    """Color of the series at a position; colors repeat after eight."""
    return f"series-{position % 8}"
