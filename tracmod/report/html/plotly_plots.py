"""Draws figures with Plotly, without colors: one plot per panel, as Plotly's JSON.

The page's script adds the colors of its light or dark theme: the `meta` of a trace names them.

Shape legend: R rows, C columns of a heat map.
"""

from __future__ import annotations

import html
import json
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import plotly.graph_objects as go
import plotly.offline

from tracmod.report.content.figures import (
    BarCharts,
    Chart,
    Figure,
    HeatMaps,
    LineCharts,
    Matrix,
    Points,
    ScatterPlots,
    Series,
    with_unit,
)
from tracmod.report.wording.labels import number

# Wider matrices have no numbers in their cells; larger clouds have no names at their points.
SHOW_NUMBERS_UP_TO = 10
_NAME_POINTS_UP_TO = 15


@dataclass(frozen=True)
class Plot:
    """A panel of a figure: its title, Plotly's JSON, its height in pixels, and its caption."""

    title: str
    json: dict[str, Any]
    height: int
    caption: str = ""


def _escaped(text: str) -> str:
    """Return a text that Plotly, which knows some HTML, shows as it is."""
    return html.escape(text, quote=False)


def plotly_script() -> str:
    """Return Plotly's JavaScript, 4.8 MB."""
    return plotly.offline.get_plotlyjs()


def plots(figure: Figure) -> list[Plot]:
    """Draw every panel of a figure."""
    match figure:
        case HeatMaps():
            return [_heat_map(figure, panel) for panel in figure.panels]
        case BarCharts():
            return [_bars(figure, panel) for panel in figure.panels]
        case LineCharts():
            return [_lines(figure, panel) for panel in figure.panels]
        case ScatterPlots():
            return [_scatter(figure, panel) for panel in figure.panels]


def _plot(title: str, traces: list[Any], layout: dict[str, Any], height: int, caption: str) -> Plot:
    drawn = go.Figure(traces, {"template": go.layout.Template(), **layout})
    return Plot(title, json.loads(drawn.to_json()), height, caption)


# --- heat maps ------------------------------------------------------------------------------


def _heat_map(figure: HeatMaps, panel: Matrix) -> Plot:
    """Draw a matrix with its first row at the top."""
    columns, rows = list(map(_escaped, panel.columns)), list(map(_escaped, panel.rows))
    lowest, highest = figure.limits_of(panel)
    few = len(columns) <= SHOW_NUMBERS_UP_TO
    trace = go.Heatmap(
        z=[_finite(row) for row in panel.values_RC],
        x=columns,
        y=rows,
        # The page draws the numbers itself, dark or light depending on each cell's color.
        text=_cells(panel, lambda i, j: _cell_text(figure, panel, i, j)) if few else None,
        hovertext=_cells(panel, lambda i, j: _cell_hover(figure, panel, i, j)),
        hovertemplate="%{hovertext}<extra></extra>",
        hoverongaps=False,
        zmin=lowest,
        zmax=highest,
        showscale=False,
        xgap=2,
        ygap=2,
        meta={"scale": figure.scale},
    )
    axis = {"type": "category", "showgrid": False, "dtick": 1}
    layout = {
        "xaxis": {"title": {"text": figure.x_axis}, **axis},
        "yaxis": {"title": {"text": figure.y_axis}, "autorange": "reversed", **axis},
    }
    if few:
        height = 70 + 40 * len(rows)
    else:  # the names of columns are upright
        height = 60 + 18 * len(rows) + 7 * max(len(name) for name in panel.columns)
    return _plot(panel.title, [trace], layout, height, panel.caption)


def _cells(panel: Matrix, text: Callable[[int, int], str]) -> list[list[str]]:
    rows, columns = panel.values_RC.shape
    return [
        [text(i, j) if np.isfinite(panel.values_RC[i, j]) else "" for j in range(columns)]
        for i in range(rows)
    ]


def _cell_text(figure: HeatMaps, panel: Matrix, i: int, j: int) -> str:
    value = float(panel.values_RC[i, j])
    text = number(value, figure.digits[0] if figure.digits else 2, figure.signed)
    if len(panel.columns) > 5 and len(text) > 4:  # it would run into the next cell
        text = number(value, figure.digits[-1] if figure.digits else 2, figure.signed)
    return f"<b>{text}</b>" if panel.bold_RC is not None and panel.bold_RC[i, j] else text


def _cell_hover(figure: HeatMaps, panel: Matrix, i: int, j: int) -> str:
    digits = 1 + (figure.digits[0] if figure.digits else 2)

    def written(values_RC: np.ndarray) -> str:
        return number(float(values_RC[i, j]), digits, figure.signed)

    value = written(panel.values_RC)
    if panel.intervals:
        low, high = map(written, panel.intervals)
        value += f" ({low} to {high})"
    where = f"{figure.y_axis} {panel.rows[i]}, {figure.x_axis} {panel.columns[j]}"
    notes = panel.notes[i][j] if panel.notes else []
    return "<br>".join(map(_escaped, [where, value, *notes]))


# --- bars and lines -------------------------------------------------------------------------


def _bars(figure: BarCharts, panel: Chart) -> Plot:
    traces = []
    for series in panel.series:
        label = _escaped(series.name)
        labels = list(map(_escaped, series.x))
        ends = (series.y, series.low or series.y, series.high or series.y)
        y, low, high = map(_finite, ends)
        hover = [
            f"{name}, {label}<br>{_value(figure.unit, *value)}"
            for name, *value in zip(labels, y, low, high, strict=True)
        ]
        traces.append(
            go.Bar(
                name=label,
                x=labels,
                y=y,
                error_y=_whiskers(series),
                hovertext=hover,
                hovertemplate="%{hovertext}<extra></extra>",
                meta={"color": series.color},
            )
        )
    layout: dict[str, Any] = {
        "barmode": "relative" if figure.stacked else "group",
        "bargap": 0.22,
        "bargroupgap": 0 if figure.stacked else 0.08,
        "shapes": [
            _dashed(mark, x0=position - 0.46, x1=position + 0.46)
            for position, mark in enumerate(panel.marks)
            if mark is not None and np.isfinite(mark)
        ],
        "xaxis": {"title": {"text": figure.x_axis}, "type": "category", "showgrid": False},
        "yaxis": _value_axis(figure),
        "showlegend": len(panel.series) > 1,
    }
    if not figure.stacked:  # one scale for all panels
        heights = [value for chart in figure.panels for series in chart.series
                   for value in _finite([*(series.high or series.y), *chart.marks])]  # fmt: skip
        top = 1.08 * max((value for value in heights if value is not None), default=1.0)
        layout["yaxis"]["range"] = [0, min(100.0, top) if figure.unit == "%" else top]
    return _plot(panel.title, traces, layout, 360, "")


def _lines(figure: LineCharts, panel: Chart) -> Plot:
    whiskers = any(series.low is not None for series in panel.series)
    traces = []
    for position, series in enumerate(panel.series):
        label = _escaped(series.name)
        line = {"width": 1.5, "dash": "dot"} if series.dotted else {"width": 1.8}
        mode = "lines" if series.dotted else "lines+markers" if figure.joined else "markers"
        is_number = not figure.evenly_spaced
        traces.append(
            go.Scatter(
                name=label,
                x=list(series.x) if is_number else [_escaped(str(x)) for x in series.x],
                y=_finite(series.y),
                mode=mode,
                cliponaxis=False,
                line=line,
                marker={"size": 7, "symbol": position % 7},
                error_y=_whiskers(series),
                hovertemplate=f"{label}<br>{figure.x_axis} %{{x}}: %{{y:.1f}}%<extra></extra>",
                offsetgroup=label if whiskers and not series.dotted else None,
                meta={"color": series.color},
            )
        )
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": figure.x_axis}, "showgrid": False},
        "yaxis": _value_axis(figure) | {"range": list(figure.limits)},
        "showlegend": True,
    }
    if whiskers:  # points stand side by side, so that their whiskers can be told apart
        layout |= {"scattermode": "group", "scattergap": 0.8}
    if figure.evenly_spaced:
        layout["xaxis"] |= {"type": "category", "dtick": 1}
    else:
        layout["xaxis"] |= _number_axis(sorted({x for one in panel.series for x in one.x}))
    if figure.mark is not None:
        layout["shapes"] = [_dashed(figure.mark.value, xref="paper", x0=0, x1=1)]
        layout["annotations"] = [
            {
                "xref": "paper",
                "x": 1,
                "y": figure.mark.value,
                "xanchor": "right",
                "yanchor": "bottom",
                "text": figure.mark.name,
                "showarrow": False,
            }
        ]
    return _plot(panel.title, traces, layout, 380 if whiskers else 340, "")


def _number_axis(values: Sequence[float]) -> dict[str, Any]:
    """Return ticks at the values, if they are few, and a range with room at its ends."""
    if not values:
        return {}
    room = 0.3 * min((b - a for a, b in pairwise(values)), default=1.0)
    ticks: dict[str, Any] = {"tickvals": list(values)}
    if len(values) > 12:
        ticks = {"dtick": max(1, (values[-1] - values[0] + 1) // 12)}
    return ticks | {"range": [values[0] - room, values[-1] + room]}


def _value_axis(figure: BarCharts | LineCharts | ScatterPlots) -> dict[str, Any]:
    """Return the y axis; its title has lines that fit beside a low plot."""
    title = figure.y_axis if figure.unit == "%" else with_unit(figure.y_axis, figure.unit)
    axis = {"title": {"text": "<br>".join(textwrap.wrap(title, 24))}}
    return axis | ({"ticksuffix": "%"} if figure.unit == "%" else {})


def _value(unit: str, value: float | None, low: float | None, high: float | None) -> str:
    suffix = "%" if unit == "%" else ""
    interval = "" if low == high else f" ({number(low, 1)} to {number(high, 1)})"
    return f"{number(value, 1)}{suffix}{interval}"


def _whiskers(series: Series) -> dict[str, Any] | None:
    if series.low is None or series.high is None:
        return None
    y, low, high = (
        np.array(_finite(ends), dtype=float) for ends in (series.y, series.low, series.high)
    )
    return {
        "type": "data",
        "symmetric": False,
        "array": _finite(high - y),
        "arrayminus": _finite(y - low),
        "thickness": 1.2,
        "width": 3,
    }


def _dashed(height: float, **span: Any) -> dict[str, Any]:
    return {"type": "line", "y0": height, "y1": height, "line": {"dash": "dash"}, **span}


# --- points ---------------------------------------------------------------------------------


def _scatter(figure: ScatterPlots, panel: Points) -> Plot:
    """Draw points with their names; names that would cover others appear on hover only."""
    names = list(map(_escaped, panel.names))
    labels, sides = _place_labels(panel.x, panel.y, names)
    x_title, y_title = _escaped(figure.x_axis), _escaped(figure.y_axis)
    suffix = "%" if figure.unit == "%" else ""
    trace = go.Scatter(
        x=list(panel.x),
        y=list(panel.y),
        mode="markers+text",
        text=labels,
        textposition=sides,
        textfont={"size": 11},
        cliponaxis=False,
        marker={"size": 9},
        hovertext=[
            f"{name}<br>{x_title}: {x:.3f}<br>{y_title}: {y:.3g}{suffix}"
            for name, x, y in zip(names, panel.x, panel.y, strict=True)
        ],
        hovertemplate="%{hovertext}<extra></extra>",
        meta={"color": "full"},
    )
    layout = {
        "xaxis": {"title": {"text": figure.x_axis}, "range": _padded(panel.x, 0.18)},
        "yaxis": _value_axis(figure) | {"range": _padded(panel.y, 0.14)},
    }
    return _plot(panel.title, [trace], layout, 340, panel.caption)


def _padded(values: Sequence[float], share: float) -> list[float]:
    """Return the range of an axis that leaves room for labels beside the outermost points."""
    margin = share * ((max(values) - min(values)) or abs(max(values)) or 1.0)
    return [min(values) - margin, max(values) + margin]


def _place_labels(
    x: Sequence[float], y: Sequence[float], names: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Give each point's name the first free side, in a plot of about 220 x 200 pixels."""
    if len(names) > _NAME_POINTS_UP_TO:
        return [""] * len(names), ["top center"] * len(names)
    points = [
        (
            220 * (a - min(x)) / ((max(x) - min(x)) or 1),
            200 * (b - min(y)) / ((max(y) - min(y)) or 1),
        )
        for a, b in zip(x, y, strict=True)
    ]
    taken = [(a - 6, b - 6, a + 6, b + 6) for a, b in points]
    labels, positions = [], []
    for (a, b), name in zip(points, names, strict=True):
        width = 6.5 * len(name)
        sides = {
            "top center": (a - width / 2, b + 6, a + width / 2, b + 20),
            "bottom center": (a - width / 2, b - 20, a + width / 2, b - 6),
            "middle right": (a + 7, b - 7, a + 7 + width, b + 7),
            "middle left": (a - 7 - width, b - 7, a - 7, b + 7),
        }
        free = [
            side
            for side, box in sides.items()
            if box[0] > -40 and box[2] < 260 and not any(_overlap(box, other) for other in taken)
        ]
        labels.append(name if free else "")
        positions.append(free[0] if free else "top center")
        if free:
            taken.append(sides[free[0]])
    return labels, positions


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _finite(values: Any) -> list[float | None]:
    """Return floats, None where a value is missing or not finite."""
    return [float(v) if v is not None and np.isfinite(v) else None for v in values]
