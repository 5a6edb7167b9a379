"""Draws figures for papers with matplotlib: colors as in the report, text of 7 points or more.

Shape legend: R rows, C columns of a heat map.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from functools import cache, wraps
from importlib import resources
from itertools import pairwise, product
from typing import Any, ParamSpec, TypeVar, get_args

import matplotlib as mpl
import matplotlib.figure
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator
from matplotlib.transforms import Bbox

from tracmod.choices import FigureFormat
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
from tracmod.report.wording.labels import MINUS, number

P = ParamSpec("P")
T = TypeVar("T")
Drawing = matplotlib.figure.Figure
FORMATS = get_args(FigureFormat)
WIDTHS = {"column": 3.3, "page": 6.9}  # inches
SMALL, NORMAL = 7.0, 8.0  # points
MOST_HEIGHT = 9.0  # inches of a page
_NAME_POINTS_UP_TO = 15
_DIGIT_WIDTH = 0.66  # relative to the font size
_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so figures are the same everywhere
    "font.size": NORMAL,
    "axes.titlesize": NORMAL,
    "axes.labelsize": NORMAL,
    "figure.labelsize": NORMAL,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.2,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "savefig.dpi": 300,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "tracmod",
}
_DATES = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {}}
# Seven markers and eight colors: a pair of them repeats only after 56 series.
_MARKERS = "os^Dv<>"


@cache
def palette() -> dict[str, str]:
    """Return the colors of the report's light theme, by their names in page.css."""
    css = resources.files("tracmod.report.html").joinpath("page.css").read_text(encoding="utf-8")
    colors: dict[str, str] = {}
    for name, color in re.findall(r"--([\w-]+):\s*(#[0-9a-f]{6})", css):
        colors.setdefault(name, color)
    return colors


def _styled(make: Callable[P, T]) -> Callable[P, T]:
    """Make and save figures in one style, whatever the user's matplotlibrc says."""

    @wraps(make)
    def inner(*args: P.args, **named: P.kwargs) -> T:
        ink = dict.fromkeys(("text.color", "xtick.color", "ytick.color", "axes.labelcolor"),
                            palette()["ink"])  # fmt: skip
        with mpl.rc_context():
            mpl.rcdefaults()
            chosen: Any = _STYLE | ink | {"axes.edgecolor": palette()["muted"]}
            mpl.rcParams.update(chosen)
            return make(*args, **named)

    return inner


@_styled
def draw(figure: Figure, width: float) -> Drawing:
    """Draw a figure, all panels on one scale, as many in a row as fit.

    Args:
        figure: what it shows.
        width: width in inches.
    """
    match figure:
        case HeatMaps():
            return _heat_maps(figure, width)
        case BarCharts():
            return _bars(figure, width)
        case LineCharts():
            return _lines(figure, width)
        case ScatterPlots():
            return _scatter(figure, width)


@_styled
def saved(drawing: Drawing, form: str) -> bytes:
    """Return the content of the file; the same bytes for the same figure."""
    file = io.BytesIO()
    drawing.savefig(file, format=form, metadata=_DATES[form])
    return file.getvalue()


# --- heat maps ------------------------------------------------------------------------------


def _heat_maps(figure: HeatMaps, width: float) -> Drawing:
    digits = list(figure.digits)
    above = 0.45 if figure.color_axis else 0.0
    drawing, panels = _heat_panels(figure, width, digits, above)
    if drawing.get_figheight() > MOST_HEIGHT:  # numbers need more room than a page has
        digits = []
        drawing, panels = _heat_panels(figure, width, digits, above)
    colors, mesh = _colors(figure.scale), None
    for matrix, (panel, leftmost) in zip(figure.panels, panels, strict=True):
        lowest, highest = figure.limits_of(matrix)
        mesh = panel.pcolormesh(
            matrix.values_RC, cmap=colors, vmin=lowest, vmax=highest,
            edgecolors=palette()["line" if figure.scale == "mask" else "paper"], linewidth=0.8,
        )  # fmt: skip
        panel.invert_yaxis()
        panel.tick_params(length=0, pad=2)
        panel.spines[:].set_visible(False)
        names = matrix.rows if leftmost else [""] * len(matrix.rows)
        panel.set_xticks(np.arange(len(matrix.columns)) + 0.5, matrix.columns)
        panel.set_yticks(np.arange(len(matrix.rows)) + 0.5, names)
    if figure.color_axis and figure.limits:
        _color_bar(figure, figure.limits, drawing, mesh, [panel for panel, _ in panels], digits)
    titles = [matrix.title for matrix in figure.panels]
    _lay_out(drawing, panels, figure.x_axis, figure.y_axis, titles, figure.panels[0].columns)
    for matrix, (panel, _) in zip(figure.panels, panels, strict=True):
        _write_numbers(figure, panel, matrix, colors, digits)
    return drawing


def _heat_panels(
    figure: HeatMaps, width: float, digits: Sequence[int], above: float
) -> tuple[Drawing, list[tuple[Axes, bool]]]:
    """Return panels wide enough for their numbers, if possible; cells about as high as wide."""
    matrices = figure.panels
    most = len(matrices[0].columns)
    least = min(width, max(1.25, 0.45 + 0.115 * most))
    if digits:
        longest = max((_longest(one, digits[-1], figure.signed) for one in matrices), default=0)
        needed = 0.45 + most * (_DIGIT_WIDTH * SMALL * longest + 3) / 72
        least = max(1.25, needed) if needed <= width else least
    longest_title = max(len(one.title) for one in matrices)
    of_title = 0.6 + 0.52 * NORMAL / 72 * longest_title / 1.8  # a title may take two lines
    least = min(width, max(least, of_title))
    columns = max(1, min(len(matrices), int(width / least)))
    cell = min(0.21, max(0.11, (width / columns - 0.4) / most))
    height = cell * len(matrices[0].rows) + 0.08
    return _panels(len(matrices), width, height, least, above)


def _longest(matrix: Matrix, decimals: int, signed: bool) -> int:
    """Return the number of characters of the longest number in the cells."""
    known = matrix.values_RC[np.isfinite(matrix.values_RC)]
    return max((len(number(float(value), decimals, signed)) for value in known), default=0)


def _colors(scale: str) -> LinearSegmentedColormap:
    if scale == "mask":
        steps = [palette()["paper"], palette()["full"]]
    else:
        steps = [palette()[f"{scale[:3]}-{step}"] for step in range(5)]
    return LinearSegmentedColormap.from_list(scale, steps, bad=palette()["panel"])


def _color_bar(
    figure: HeatMaps,
    limits: tuple[float, float],
    drawing: Drawing,
    mesh: Any,
    panels: Sequence[Axes],
    digits: Sequence[int],
) -> None:
    """Draw the scale above the panels, without ticks that the mark's label would cover."""
    length = min(0.6 * drawing.get_figwidth(), 2.6)
    bar = drawing.colorbar(mesh, ax=panels, location="top", shrink=length / drawing.get_figwidth(),
                           aspect=length / 0.08, pad=0.03)  # fmt: skip
    bar.outline.set_visible(False)
    title = with_unit(figure.color_axis, figure.unit)
    title += f"\nbold or dotted: {figure.bold}" if figure.bold else ""
    bar.ax.set_title(_wrapped(title, drawing.get_figwidth() - 0.4), fontsize=NORMAL, pad=3)
    bar.ax.xaxis.set_ticks_position("bottom")
    bar.ax.tick_params(length=2, pad=1.5)
    candidates = MaxNLocator(4, integer=list(digits[:1]) == [0]).tick_values(*limits)
    ticks = [float(tick) for tick in candidates if limits[0] <= tick <= limits[1]]
    labels = {tick: f"{tick:g}".replace("-", MINUS) for tick in ticks}
    if figure.mark is not None:
        value, near = figure.mark.value, 0.2 * (limits[1] - limits[0])
        labels = {tick: text for tick, text in labels.items() if abs(tick - value) > near}
        labels[value] = figure.mark.name
        bar.ax.axvline(value, color=palette()["ink"], linewidth=1)
    bar.set_ticks(list(labels), labels=list(labels.values()))


def _write_numbers(
    figure: HeatMaps,
    panel: Axes,
    matrix: Matrix,
    colors: LinearSegmentedColormap,
    digits: Sequence[int],
) -> None:
    """Write the values in the cells, with the first number of decimals that fits.

    If none fits, the bold cells have a dot instead.
    """
    across, down = _size(panel)
    cell_width, cell_height = across / len(matrix.columns), down / len(matrix.rows)
    fitting = [
        decimals
        for decimals in digits
        if _DIGIT_WIDTH * SMALL * _longest(matrix, decimals, figure.signed) <= cell_width - 1
    ]
    if not fitting or cell_height < 1.15 * SMALL:
        if matrix.bold_RC is not None:
            rows, columns = np.nonzero(matrix.bold_RC)
            panel.plot(columns + 0.5, rows + 0.5, "o", markersize=2.2, color=palette()["ink"])
        return
    lowest, highest = figure.limits_of(matrix)
    for i, j in product(range(len(matrix.rows)), range(len(matrix.columns))):
        value = float(matrix.values_RC[i, j])
        if np.isfinite(value):
            background = colors((value - lowest) / (highest - lowest))
            bold = matrix.bold_RC is not None and matrix.bold_RC[i, j]
            panel.text(
                j + 0.5, i + 0.52, number(value, fitting[0], figure.signed), ha="center",
                va="center", fontsize=SMALL, fontweight="bold" if bold else "normal",
                color="#10151b" if _luminance(background) > 0.18 else "#ffffff",
            )  # fmt: skip


def _luminance(color: Any) -> float:
    """Return the relative luminance (WCAG 2)."""
    parts = np.array(to_rgb(color))
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


# --- bars, lines and points -----------------------------------------------------------------


def _bars(figure: BarCharts, width: float) -> Drawing:
    legend_rows, legend_columns = _legend_grid(figure.panels, width, figure.mark_name)
    above = 0.1 + 0.17 * legend_rows
    drawing, panels = _panels(len(figure.panels), width, 1.45, 3.0, above, sharey=True)
    for chart, (panel, _) in zip(figure.panels, panels, strict=True):
        groups = np.arange(len(chart.series[0].x))
        up, down = np.zeros(len(groups)), np.zeros(len(groups))
        thickness = 0.8 if figure.stacked else 0.8 / len(chart.series)
        for position, one in enumerate(chart.series):
            y = np.array(one.y, dtype=float)
            shift = 0.0 if figure.stacked else (position - (len(chart.series) - 1) / 2) * thickness
            base = np.where(y >= 0, up, down) if figure.stacked else 0
            whiskers = {"ecolor": palette()["ink"], "elinewidth": 0.7, "capsize": 1.2,
                        "capthick": 0.7}  # fmt: skip
            panel.bar(groups + shift, y, 0.94 * thickness, bottom=base, label=one.name,
                      color=palette()[one.color], yerr=_errors(one), error_kw=whiskers)  # fmt: skip
            up, down = up + np.clip(y, 0, None), down + np.clip(y, None, 0)
        for position, mark in enumerate(np.array(chart.marks, dtype=float).tolist()):
            panel.plot([position - 0.46, position + 0.46], [mark, mark], **_dashed(),
                       label=figure.mark_name if position == 0 else None)  # fmt: skip
        panel.set_xticks(groups, [str(name) for name in chart.series[0].x])
        panel.tick_params(axis="x", length=0)
        panel.grid(axis="y", color=palette()["line"], linewidth=0.5)
        if any(down < 0):
            panel.axhline(0, color=palette()["muted"], linewidth=0.6)
    _legend(drawing, panels, legend_columns)
    y_axis, names = (
        with_unit(figure.y_axis, figure.unit),
        list(map(str, figure.panels[0].series[0].x)),
    )
    _lay_out(drawing, panels, figure.x_axis, y_axis, [one.title for one in figure.panels], names)
    return drawing


def _lines(figure: LineCharts, width: float) -> Drawing:
    mark_name = figure.mark.name if figure.mark else ""
    legend_rows, legend_columns = _legend_grid(figure.panels, width, mark_name)
    above = 0.1 + 0.17 * legend_rows
    drawing, panels = _panels(len(figure.panels), width, 1.45, 3.0, above, sharey=True)
    for chart, (panel, _) in zip(figure.panels, panels, strict=True):
        for position, one in enumerate(chart.series):
            x = [str(value) for value in one.x] if figure.evenly_spaced else one.x
            style: Any = ":" if one.dotted else "-" if figure.joined else "none"
            marker = "" if one.dotted else _MARKERS[position % len(_MARKERS)]
            panel.errorbar(
                x, np.array(one.y, dtype=float), _errors(one), label=one.name, linestyle=style,
                color=palette()[one.color], marker=marker, markersize=3.2, linewidth=1.1,
                elinewidth=0.7, capsize=1.5,
            )  # fmt: skip
        if figure.mark is not None:
            panel.axhline(figure.mark.value, **_dashed(), label=figure.mark.name)
        panel.set_ylim(*figure.limits)
        panel.grid(axis="y", color=palette()["line"], linewidth=0.5)
        if not figure.evenly_spaced:
            values = sorted({x for one in chart.series for x in one.x})
            few = len(values) <= 6
            panel.xaxis.set_major_locator(
                FixedLocator(values) if few else MaxNLocator(6, integer=True)
            )
    _legend(drawing, panels, legend_columns)
    y_axis = with_unit(figure.y_axis, figure.unit)
    _lay_out(drawing, panels, figure.x_axis, y_axis, [one.title for one in figure.panels])
    return drawing


def _scatter(figure: ScatterPlots, width: float) -> Drawing:
    """Draw points with their names, as far as the names cover nothing."""
    shared = {"sharey": True, "sharex": True}
    drawing, panels = _panels(len(figure.panels), width, 1.5, 2.1, 0.0, **shared)
    for points, (panel, _) in zip(figure.panels, panels, strict=True):
        panel.plot(points.x, points.y, "o", markersize=3.5, color=palette()["full"], clip_on=False)
        panel.margins(0.12, 0.1)
        panel.grid(color=palette()["line"], linewidth=0.5)
        panel.tick_params(labelbottom=True)
    titles = [f"{points.title}\n{points.caption}" for points in figure.panels]
    _lay_out(drawing, panels, figure.x_axis, with_unit(figure.y_axis, figure.unit), titles)
    for points, (panel, _) in zip(figure.panels, panels, strict=True):
        if len(points.names) <= _NAME_POINTS_UP_TO:
            _name_points(panel, points)
    return drawing


def _name_points(panel: Axes, points: Points) -> None:
    """Give each point's name the first side of it that is free."""
    canvas: Any = panel.figure.canvas  # Agg's, which has a renderer
    positions = panel.transData.transform(np.column_stack([points.x, points.y]))
    around = 0.03 * panel.figure.dpi
    taken = [Bbox([position - around, position + around]) for position in positions]
    frame = panel.get_window_extent()
    sides = [(0, 4, "center", "bottom"), (0, -4, "center", "top"), (4, 0, "left", "center"),
             (-4, 0, "right", "center")]  # fmt: skip
    for x, y, name in zip(points.x, points.y, points.names, strict=True):
        for dx, dy, horizontal, vertical in sides:
            label = panel.annotate(
                name, (x, y), (dx, dy), textcoords="offset points", ha=horizontal, va=vertical,
                fontsize=SMALL, color=palette()["muted"],
            )  # fmt: skip
            label.set_in_layout(False)
            box = label.get_window_extent(canvas.get_renderer())
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1
            inside = inside and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            label.remove()


def _errors(series: Series) -> np.ndarray | None:
    """Return how far the interval reaches below and above each value."""
    if series.low is None or series.high is None:
        return None
    y, low, high = (np.array(one, dtype=float) for one in (series.y, series.low, series.high))
    return np.maximum([y - low, high - y], 0)


def _dashed() -> dict[str, Any]:
    return {"color": palette()["ink"], "linewidth": 0.8, "linestyle": (0, (3, 2))}


# --- layout ---------------------------------------------------------------------------------


def _panels(
    count: int, width: float, height: float, least: float, above: float, **shared: Any
) -> tuple[Drawing, list[tuple[Axes, bool]]]:
    """Return a figure with panels in rows, and for each panel whether it is leftmost.

    Args:
        count: number of panels.
        width: width of the figure, in inches.
        height: height of a panel without its labels, in inches.
        least: smallest width of a panel, in inches.
        above: height for a legend or a color bar, in inches.
        **shared: see `matplotlib.figure.Figure.subplots`.
    """
    columns = max(1, min(count, int(width / least)))
    rows = -(-count // columns)
    columns = -(-count // rows)
    drawing = Drawing((width, rows * (height + 0.42) + 0.25 + above), layout="constrained")
    FigureCanvasAgg(drawing)
    grid = drawing.subplots(rows, columns, squeeze=False, **shared)
    for empty in grid.flat[count:]:
        empty.remove()
    return drawing, [(panel, i % columns == 0) for i, panel in enumerate(grid.flat[:count])]


def _lay_out(
    drawing: Drawing,
    panels: Sequence[tuple[Axes, bool]],
    x_axis: str,
    y_axis: str,
    titles: Sequence[str],
    names: Sequence[str] = (),
) -> None:
    """Write the titles and what x and y are, and compute the positions of everything.

    The figure becomes higher for titles of several lines, and for `names` along the x axis that
    have to stand upright. Then the positions stay, so that every file of the figure is the same and
    there is a known room for what is drawn later.
    """
    spec = panels[0][0].get_subplotspec()
    assert spec is not None
    rows, columns = spec.get_gridspec().get_geometry()
    width, height = drawing.get_size_inches()
    drawing.supxlabel(_wrapped(x_axis, width))
    drawing.supylabel(_wrapped(y_axis, 0.75 * height))
    wrapped = [_wrapped(title, width / columns - 0.6) for title in titles]
    for (panel, _), title in zip(panels, wrapped, strict=True):
        panel.set_title(title, pad=3, linespacing=1.25)
    more = 1.25 * NORMAL / 72 * max(title.count("\n") for title in wrapped)
    drawing.set_figheight(height + more * rows)
    engine = drawing.get_layout_engine()
    assert engine is not None
    engine.execute(drawing)
    upright = max(_turn_names(panel, names) for panel, _ in panels) if names else 0.0
    if upright:
        drawing.set_figheight(drawing.get_figheight() + upright * rows)
        engine.execute(drawing)
    drawing.set_layout_engine("none")


def _wrapped(text: str, inches: float) -> str:
    """Return a text in lines that fit."""
    most = max(8, int(72 * inches / (0.52 * NORMAL)))
    return "\n".join(line for part in text.split("\n") for line in textwrap.wrap(part, most))


def _turn_names(panel: Axes, names: Sequence[str]) -> float:
    """Turn names upright if they would meet; return how many more inches they then need."""
    lengths = [_DIGIT_WIDTH * SMALL * len(name) for name in names]
    widest = max(((a + b) / 2 for a, b in pairwise(lengths)), default=0.0)
    if widest + 2 <= _size(panel)[0] / len(names):
        return 0.0
    panel.tick_params(axis="x", labelrotation=90)
    return (max(lengths) - SMALL) / 72


def _size(panel: Axes) -> tuple[float, float]:
    """Return the width and height, in points, of a panel that has its position."""
    box = panel.get_window_extent()
    return 72 * box.width / panel.figure.dpi, 72 * box.height / panel.figure.dpi


def _legend_grid(charts: Sequence[Chart], width: float, mark_name: str) -> tuple[int, int]:
    """Return the rows and columns of a legend of every series and the mark."""
    names = {one.name for chart in charts for one in chart.series} | {mark_name}
    longest = max(map(len, names))
    columns = max(1, min(len(names), int(width * 72 / (SMALL * (0.58 * longest + 4)))))
    return -(-len(names) // columns), columns


def _legend(drawing: Drawing, panels: Iterable[tuple[Axes, bool]], columns: int) -> None:
    """Draw one legend for all panels, above them; each name once, dashed lines last."""
    handles: dict[str, Any] = {}
    for panel, _ in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if len(handles) > 1:
        names = sorted(handles, key=lambda name: isinstance(handles[name], Line2D))
        drawing.legend([handles[name] for name in names], names, loc="outside upper center",
                       ncols=columns)  # fmt: skip
