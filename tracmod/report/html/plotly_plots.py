"""Kinds of plots: heatmap, bars, lines, scatter, as Plotly figures without colours.

Colours come in the page, from its light or dark theme: a trace's `meta` names a scale or a series.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from tracmod.report.wording.labels import number

SHOW_NUMBERS_UP_TO = 10
NAME_POINTS_UP_TO = 15


@dataclass(frozen=True)
class Legend:
    """A colour scale drawn once for several heatmaps; `mark` = (place 0..1, text)."""

    scale: str
    low: str
    high: str
    mark: tuple[float, str] | None = None


@dataclass(frozen=True)
class Figure:
    """One plot: its title, what to say under it, and Plotly's JSON."""

    title: str
    plot: dict[str, Any]
    height: int
    caption: str = ""


@dataclass(frozen=True)
class Panel:
    """Groups of figures shown together, each group under its heading (or none).

    The panels of a section are switched between.
    """

    label: str
    groups: list[tuple[str, list[Figure]]]
    legend: Legend | None = None
    note: str = ""
    least_columns: int = 2

    @property
    def columns(self) -> int:
        """Figures side by side where the page is wide enough."""
        most = max((len(figures) for _, figures in self.groups), default=1)
        return max(self.least_columns, min(3, most))


def heatmap(
    title: str,
    values: np.ndarray,
    text: list[list[str]],
    hover: list[list[str]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    scale: str,
    limits: tuple[float, float],
    axes: tuple[str, str],
    caption: str = "",
) -> Figure:
    """A matrix; rows from top to bottom. `scale`: sequential or diverging."""
    trace = go.Heatmap(
        z=[_finite(row) for row in values],
        x=[html.escape(name) for name in columns],
        y=[html.escape(name) for name in rows],
        # The page writes the text itself, dark or light by each cell's own colour.
        text=text if len(columns) <= SHOW_NUMBERS_UP_TO else None,
        hovertext=hover,
        hovertemplate="%{hovertext}<extra></extra>",
        hoverongaps=False,
        zmin=limits[0],
        zmax=limits[1],
        showscale=False,
        xgap=2,
        ygap=2,
        meta={"scale": scale},
    )
    layout = {
        "xaxis": {
            "title": {"text": axes[0]},
            "type": "category",
            "showgrid": False,
            "dtick": 1,
        },
        "yaxis": {
            "title": {"text": axes[1]},
            "type": "category",
            "autorange": "reversed",
            "showgrid": False,
            "dtick": 1,
        },
    }
    if len(columns) <= SHOW_NUMBERS_UP_TO:
        height = 70 + 40 * len(rows)
    else:  # names of columns are turned upright
        height = 60 + 18 * len(rows) + 7 * max(len(name) for name in columns)
    return _figure(title, [trace], layout, height, caption)


def head_map(
    title: str, values_LH: np.ndarray, *, scale: str, limits: tuple[float, float], digits: int = 2
) -> Figure:
    """A heat map of a value per attention head: layers from 0 downwards, heads from 0 across."""
    layers, heads = values_LH.shape
    text = [[number(value, digits) for value in row] for row in values_LH]
    hover = [
        [f"layer {la}, head {h}<br>{number(values_LH[la, h], digits + 1)}" for h in range(heads)]
        for la in range(layers)
    ]
    return heatmap(
        title,
        values_LH,
        text,
        hover,
        [str(layer) for layer in range(layers)],
        [str(head) for head in range(heads)],
        scale=scale,
        limits=limits,
        axes=("head", "layer"),
    )


def bars(
    title: str,
    names: Sequence[str],
    series: Sequence[dict[str, Any]],
    *,
    marks: Sequence[float | None],
    axes: tuple[str, str],
    upper: float,
    caption: str = "",
) -> Figure:
    """Groups of bars with intervals, and a dashed mark across each group.

    Args:
        names: the groups.
        series: name, color, value, low, high (lists over the groups, None = no bar).
        marks: height of each group's dashed mark.
        axes: titles of x and y; values are percentages.
        upper: end of the y axis, so that figures beside each other compare.
    """
    labels = [html.escape(name) for name in names]
    traces = []
    for one in series:
        value = [np.nan if v is None else v for v in one["value"]]
        up = [np.nan if v is None else v for v in one["high"]]
        down = [np.nan if v is None else v for v in one["low"]]
        hover = [
            f"{label}, {one['name']}<br>{v:.1f}% ({lo:.1f} to {hi:.1f})"
            for label, v, lo, hi in zip(labels, value, down, up, strict=True)
        ]
        traces.append(
            go.Bar(
                name=one["name"],
                x=labels,
                y=_finite(value),
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": _finite(np.subtract(up, value)),
                    "arrayminus": _finite(np.subtract(value, down)),
                    "thickness": 1.2,
                    "width": 3,
                },
                hovertext=hover,
                hovertemplate="%{hovertext}<extra></extra>",
                meta={"color": one["color"]},
            )
        )
    shapes = [
        {"type": "line", "x0": i - 0.46, "x1": i + 0.46, "y0": m, "y1": m, "line": {"dash": "dash"}}
        for i, m in enumerate(marks)
        if m is not None
    ]
    layout = {
        "barmode": "group",
        "bargap": 0.22,
        "bargroupgap": 0.08,
        "shapes": shapes,
        "xaxis": {"title": {"text": axes[0]}, "type": "category", "showgrid": False},
        "yaxis": {"title": {"text": axes[1]}, "range": [0, upper], "ticksuffix": "%"},
        "showlegend": len(series) > 1,
    }
    return _figure(title, traces, layout, 360, caption)


def stacked_bars(
    title: str,
    names: Sequence[str],
    series: Sequence[dict[str, Any]],
    *,
    axes: tuple[str, str],
    caption: str = "",
) -> Figure:
    """Bars of parts upon each other, those below 0 downwards.

    Args:
        names: the bars.
        series: name, color, value (a list over the bars); values are percentages.
        axes: titles of x and y.
    """
    labels = [html.escape(name) for name in names]
    traces = [
        go.Bar(
            name=one["name"],
            x=labels,
            y=_finite(one["value"]),
            hovertemplate=f"%{{x}}, {html.escape(one['name'])}<br>%{{y:.1f}}%<extra></extra>",
            meta={"color": one["color"]},
        )
        for one in series
    ]
    layout = {
        "barmode": "relative",
        "bargap": 0.22,
        "xaxis": {"title": {"text": axes[0]}, "type": "category", "showgrid": False},
        "yaxis": {"title": {"text": axes[1]}, "ticksuffix": "%"},
        "showlegend": len(series) > 1,
    }
    return _figure(title, traces, layout, 360, caption)


def lines(
    title: str,
    series: Sequence[dict[str, Any]],
    *,
    axes: tuple[str, str],
    limits: tuple[float, float],
    mark: tuple[float, str] | None = None,
    caption: str = "",
    even: bool = False,
) -> Figure:
    """Percentages over a count (epochs, heads). `series`: name, color, x, y, optionally `bold`.

    `even`: the values of x stand at equal distances, whatever they are.
    """
    traces = []
    for place, one in enumerate(series):
        name = html.escape(one["name"])
        traces.append(
            go.Scatter(
                name=name,
                x=one["x"],
                y=_finite(one["y"]),
                mode="lines+markers",
                cliponaxis=False,
                line={"width": 3 if one.get("bold") else 1.8},
                marker={"size": 7, "symbol": place % 7},
                hovertemplate=f"{name}<br>{axes[0]} %{{x}}: %{{y:.1f}}%<extra></extra>",
                meta={"color": one["color"]},
            )
        )
    xaxis: dict[str, Any] = {"title": {"text": axes[0]}, "showgrid": False}
    if even:
        xaxis["type"] = "category"
    elif counts := sorted({count for one in series for count in one["x"]}):
        if len(counts) <= 12:
            xaxis["tickvals"] = counts
        else:
            xaxis["dtick"] = max(1, (counts[-1] - counts[0] + 1) // 12)
        xaxis["range"] = [counts[0] - 0.3, counts[-1] + 0.3]
    layout: dict[str, Any] = {
        "xaxis": xaxis,
        "yaxis": {"title": {"text": axes[1]}, "range": list(limits), "ticksuffix": "%"},
        "showlegend": True,
    }
    if mark is not None:
        layout["shapes"] = [
            {
                "type": "line",
                "xref": "paper",
                "x0": 0,
                "x1": 1,
                "y0": mark[0],
                "y1": mark[0],
                "line": {"dash": "dash"},
            }
        ]
        layout["annotations"] = [
            {
                "xref": "paper",
                "x": 1,
                "y": mark[0],
                "xanchor": "right",
                "yanchor": "bottom",
                "text": mark[1],
                "showarrow": False,
            }
        ]
    return _figure(title, traces, layout, 340, caption)


def interval_lines(
    title: str,
    series: Sequence[dict[str, Any]],
    *,
    axes: tuple[str, str],
    limits: tuple[float, float],
    numeric: bool,
) -> Figure:
    """Percentages with intervals over the points of a sweep, side by side at each point.

    Args:
        title: what is shown.
        series: name, color, x, y, and low and high, None where there is no interval; `dash` draws
            a thin broken line.
        axes: titles of x and y.
        limits: ends of the y axis.
        numeric: whether x are numbers; otherwise they are names, in the order given, and points are
            not joined.
    """
    traces = []
    for one in series:
        name, y = html.escape(one["name"]), np.array(_finite(one["y"]), dtype=float)
        low, high = (np.array(_finite(one[end]), dtype=float) for end in ("low", "high"))
        traces.append(
            go.Scatter(
                name=name,
                x=one["x"] if numeric else [html.escape(x) for x in one["x"]],
                y=_finite(y),
                mode="lines" if one.get("dash") else "lines+markers" if numeric else "markers",
                line={"width": 1.5, "dash": "dot"} if one.get("dash") else {"width": 1.8},
                marker={"size": 7},
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": _finite(high - y),
                    "arrayminus": _finite(y - low),
                    "thickness": 1.4,
                    "width": 3,
                },
                hovertemplate=f"{name}<br>%{{x}}: %{{y:.1f}}%<extra></extra>",
                offsetgroup=None if one.get("dash") else name,
                meta={"color": one["color"]},
            )
        )
    layout: dict[str, Any] = {
        "scattermode": "group",
        "scattergap": 0.8,
        "xaxis": {"title": {"text": axes[0]}, "showgrid": False},
        "yaxis": {"title": {"text": axes[1]}, "range": list(limits), "ticksuffix": "%"},
        "showlegend": True,
    }
    if numeric:  # the values that there are, as the points stand a little beside them
        layout["xaxis"]["tickvals"] = sorted({x for one in series for x in one["x"]})
    else:
        layout["xaxis"] |= {"type": "category", "dtick": 1}
    return _figure(title, traces, layout, 380, "")


def scatter(
    title: str,
    x: Sequence[float],
    y: Sequence[float],
    names: Sequence[str],
    *,
    axes: tuple[str, str],
    suffix: str = "",
    caption: str = "",
) -> Figure:
    """Points with a name; names that would cover others are left to the hover text."""
    labels, places = _place_labels(x, y, names)
    hover = [
        f"{html.escape(name)}<br>{html.escape(axes[0])}: {a:.3f}<br>"
        f"{html.escape(axes[1])}: {b:.3g}{suffix}"
        for name, a, b in zip(names, x, y, strict=True)
    ]
    trace = go.Scatter(
        x=list(x),
        y=list(y),
        mode="markers+text",
        text=labels,
        textposition=places,
        textfont={"size": 11},
        cliponaxis=False,
        marker={"size": 9},
        hovertext=hover,
        hovertemplate="%{hovertext}<extra></extra>",
        meta={"color": "full"},
    )
    layout = {
        "xaxis": {"title": {"text": axes[0]}, "range": _padded(x, 0.18)},
        "yaxis": {"title": {"text": axes[1]}, "range": _padded(y, 0.14), "ticksuffix": suffix},
    }
    return _figure(title, [trace], layout, 340, caption)


def _padded(values: Sequence[float], share: float) -> list[float]:
    """Range of an axis that leaves room for labels beside the outermost points."""
    margin = share * ((max(values) - min(values)) or abs(max(values)) or 1.0)
    return [min(values) - margin, max(values) + margin]


def _place_labels(
    x: Sequence[float], y: Sequence[float], names: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Greedily give each point's name the first free side, in a plot of about 220 x 200 pixels."""
    if len(names) > NAME_POINTS_UP_TO:
        return [""] * len(names), ["top center"] * len(names)
    points = [
        (
            220 * (a - min(x)) / ((max(x) - min(x)) or 1),
            200 * (b - min(y)) / ((max(y) - min(y)) or 1),
        )
        for a, b in zip(x, y, strict=True)
    ]
    taken = [(a - 6, b - 6, a + 6, b + 6) for a, b in points]
    labels, places = [], []
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
            if box[0] > -40 and box[2] < 260 and not any(_meet(box, other) for other in taken)
        ]
        labels.append(html.escape(name) if free else "")
        places.append(free[0] if free else "top center")
        if free:
            taken.append(sides[free[0]])
    return labels, places


def _meet(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _finite(values: Any) -> list[float | None]:
    return [float(v) if v is not None and np.isfinite(v) else None for v in values]


def _figure(
    title: str, traces: list[Any], layout: dict[str, Any], height: int, caption: str
) -> Figure:
    figure = go.Figure(traces, {"template": go.layout.Template(), **layout})
    return Figure(title, json.loads(figure.to_json()), height, caption)
