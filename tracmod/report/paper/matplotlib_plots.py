"""Kinds of plots for papers with matplotlib: the page's colours, text of 7 points and more.

Shapes: R rows, C columns.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from importlib import resources
from itertools import pairwise, product
from typing import Any, ParamSpec, TypeVar, get_args

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator
from matplotlib.transforms import Bbox

from tracmod.choices import FigureFormat

P = ParamSpec("P")
T = TypeVar("T")
FORMATS = get_args(FigureFormat)
WIDTHS = {"column": 3.3, "page": 6.9}  # inches
SMALL, NORMAL = 7.0, 8.0  # points
MOST_HEIGHT = 9.0  # inches of a page
MOST_NAMED_POINTS = 15
_WIDE = 0.66  # of a digit, in parts of the font size
_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same everywhere
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
_MARKERS = "os^Dv<>"  # one less than colours, so that both come back together only after 56


@dataclass(frozen=True)
class Matrix:
    """One heat map: values (R, C) with the names of rows and columns; `bold` cells stand out."""

    title: str
    values_RC: np.ndarray
    rows: Sequence[str]
    columns: Sequence[str]
    bold_RC: np.ndarray | None = None


@dataclass(frozen=True)
class Series:
    """One line, or one bar of every group; NaN where there is none. `color`: of the page."""

    name: str
    color: str
    x: Sequence[Any]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True)
class Plot:
    """One panel of series; `marks`: the height of a dashed mark across each group of bars."""

    title: str
    series: Sequence[Series]
    marks: Sequence[float] = ()


@dataclass(frozen=True)
class Cloud:
    """One panel of named points, and a note in its corner."""

    title: str
    x: Sequence[float]
    y: Sequence[float]
    names: Sequence[str]
    note: str = ""


@cache
def palette() -> dict[str, str]:
    """The light colours of the report's page, by the names they have in page.css."""
    css = resources.files("tracmod.report.html").joinpath("page.css").read_text(encoding="utf-8")
    found: dict[str, str] = {}
    for name, color in re.findall(r"--([\w-]+):\s*(#[0-9a-f]{6})", css):
        found.setdefault(name, color)
    return found


def _styled(make: Callable[P, T]) -> Callable[P, T]:
    """Figures are made and saved in the one style, whatever the user's matplotlibrc says."""

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
def saved(figure: Figure, form: str) -> bytes:
    """The file; the same bytes for the same figure."""
    file = io.BytesIO()
    figure.savefig(file, format=form, metadata=_DATES[form])
    return file.getvalue()


# --- heat maps ------------------------------------------------------------------------------


@_styled
def heatmaps(
    matrices: Sequence[Matrix],
    width: float,
    *,
    scale: str,
    limits: tuple[float, float],
    axes: tuple[str, str],
    unit: str,
    signed: bool = False,
    digits: Sequence[int] = (1, 0),
    mark: tuple[float, str] | None = None,
) -> Figure:
    """Heat maps on one colour scale, beside and below each other.

    Args:
        matrices: one per panel, all with the same rows and columns.
        width: of the figure, inches.
        scale: `sequential` or `diverging`, or `mask` for 0 and 1.
        limits: of the colours.
        axes: what columns and rows are.
        unit: what is shown, with unit, above the colour bar; "": no colour bar.
        signed: numbers with + and minus.
        digits: decimals of the numbers in the cells: the first for which there is room. None, or a
            figure that is higher than a page with them: no numbers.
        mark: a place on the colour bar, and its name.
    """
    figure, panels = _heat_panels(matrices, width, digits, signed, above=0.45 if unit else 0.0)
    if figure.get_figheight() > MOST_HEIGHT:
        digits = digits[:0]
        figure, panels = _heat_panels(matrices, width, (), signed, above=0.45 if unit else 0.0)
    colors, mesh = _colors(scale), None
    for matrix, (panel, leftmost) in zip(matrices, panels, strict=True):
        mesh = panel.pcolormesh(
            matrix.values_RC, cmap=colors, vmin=limits[0], vmax=limits[1],
            edgecolors=palette()["line" if scale == "mask" else "paper"], linewidth=0.8,
        )  # fmt: skip
        panel.invert_yaxis()
        panel.tick_params(length=0, pad=2)
        panel.spines[:].set_visible(False)
        names = matrix.rows if leftmost else [""] * len(matrix.rows)
        panel.set_xticks(np.arange(len(matrix.columns)) + 0.5, matrix.columns)
        panel.set_yticks(np.arange(len(matrix.rows)) + 0.5, names)
    _name_axes(figure, axes)
    _titles(panels, [one.title for one in matrices])
    if unit:
        _colorbar(figure, mesh, [panel for panel, _ in panels], unit, limits, mark, digits[:1])
    _place(figure)
    _make_room(figure, panels, matrices[0].columns)
    _freeze(figure)
    for matrix, (panel, _) in zip(matrices, panels, strict=True):
        _write_numbers(panel, matrix, colors, limits, signed, digits)
    return figure


def _heat_panels(
    matrices: Sequence[Matrix], width: float, digits: Sequence[int], signed: bool, above: float
) -> tuple[Figure, list[tuple[Axes, bool]]]:
    """Panels wide enough for their numbers, if the figure is; cells about as high as wide."""
    most = len(matrices[0].columns)
    least = min(width, max(1.25, 0.45 + 0.115 * most))
    if digits:
        longest = max((_longest(one, digits[-1], signed) for one in matrices), default=0)
        needed = 0.45 + most * (_WIDE * SMALL * longest + 3) / 72
        least = max(1.25, needed) if needed <= width else least
    of_title = 0.6 + 0.52 * NORMAL / 72 * max(len(one.title) for one in matrices) / 1.8  # two lines
    least = min(width, max(least, of_title))
    columns = max(1, min(len(matrices), int(width / least)))
    cell = min(0.21, max(0.11, (width / columns - 0.4) / most))
    height = cell * len(matrices[0].rows) + 0.08
    return _panels(len(matrices), width, height, least, above)


def _longest(matrix: Matrix, decimals: int, signed: bool) -> int:
    """Characters of the longest number in the cells."""
    known = matrix.values_RC[np.isfinite(matrix.values_RC)]
    return max((len(_number(value, decimals, signed)) for value in known), default=0)


def _colors(scale: str) -> LinearSegmentedColormap:
    if scale == "mask":
        steps = [palette()["paper"], palette()["full"]]
    else:
        steps = [palette()[f"{scale[:3]}-{step}"] for step in range(5)]
    return LinearSegmentedColormap.from_list(scale, steps, bad=palette()["panel"])


def _colorbar(
    figure: Figure,
    mesh: Any,
    panels: Sequence[Axes],
    unit: str,
    limits: tuple[float, float],
    mark: tuple[float, str] | None,
    digits: Sequence[int],
) -> None:
    """Above the panels; of the ticks, those that stand free of the mark's."""
    length = min(0.6 * figure.get_figwidth(), 2.6)
    bar = figure.colorbar(mesh, ax=panels, location="top", shrink=length / figure.get_figwidth(),
                          aspect=length / 0.08, pad=0.03)  # fmt: skip
    bar.outline.set_visible(False)
    bar.ax.set_title(_wrapped(unit, figure.get_figwidth() - 0.4), fontsize=NORMAL, pad=3)
    bar.ax.xaxis.set_ticks_position("bottom")
    bar.ax.tick_params(length=2, pad=1.5)
    found = MaxNLocator(4, integer=tuple(digits) == (0,)).tick_values(*limits)
    ticks = [float(tick) for tick in found if limits[0] <= tick <= limits[1]]
    labels = [f"{tick:g}".replace("-", "\N{MINUS SIGN}") for tick in ticks]
    if mark is not None:
        near = 0.2 * (limits[1] - limits[0])
        kept = [place for place, tick in enumerate(ticks) if abs(tick - mark[0]) > near]
        ticks, labels = [ticks[i] for i in kept] + [mark[0]], [labels[i] for i in kept] + [mark[1]]
        bar.ax.axvline(mark[0], color=palette()["ink"], linewidth=1)
    bar.set_ticks(ticks, labels=labels)


def _write_numbers(
    panel: Axes,
    matrix: Matrix,
    colors: LinearSegmentedColormap,
    limits: tuple[float, float],
    signed: bool,
    digits: Sequence[int],
) -> None:
    """The values in the cells, with the first number of decimals for which there is room.

    Where there is none, a dot in the cells that stand out.
    """
    across, down = _points(panel)
    room = across / len(matrix.columns), down / len(matrix.rows)
    fitting = [
        decimals
        for decimals in digits
        if _WIDE * SMALL * _longest(matrix, decimals, signed) <= room[0] - 1
    ]
    if not fitting or room[1] < 1.15 * SMALL:
        if matrix.bold_RC is not None:
            down_R, across_R = np.nonzero(matrix.bold_RC)
            panel.plot(across_R + 0.5, down_R + 0.5, "o", markersize=2.2, color=palette()["ink"])
        return
    for i, j in product(range(len(matrix.rows)), range(len(matrix.columns))):
        value = matrix.values_RC[i, j]
        if np.isfinite(value):
            place = (value - limits[0]) / (limits[1] - limits[0])
            bold = matrix.bold_RC is not None and matrix.bold_RC[i, j]
            panel.text(
                j + 0.5, i + 0.52, _number(value, fitting[0], signed), ha="center", va="center",
                fontsize=SMALL, fontweight="bold" if bold else "normal",
                color="#10151b" if _luminance(colors(place)) > 0.18 else "#ffffff",
            )  # fmt: skip


def _number(value: float, digits: int, signed: bool) -> str:
    rounded = round(float(value), digits) + 0.0
    sign = "+" if signed and rounded else ""
    return f"{rounded:{sign}.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _luminance(color: Any) -> float:
    """Relative luminance (WCAG 2)."""
    parts = np.array(to_rgb(color))
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


# --- series ---------------------------------------------------------------------------------


@_styled
def bars(
    plots: Sequence[Plot],
    width: float,
    *,
    axes: tuple[str, str],
    mark_name: str = "",
    stacked: bool = False,
) -> Figure:
    """Groups of bars with intervals from 0, or parts upon each other; one scale for all panels.

    Args:
        plots: one per panel, all with the same groups in `x`.
        width: of the figure, inches.
        axes: what x and y are, with unit.
        mark_name: what the dashed marks are, for the legend.
        stacked: bars of a group upon each other, those below 0 downwards.
    """
    in_legend = _legend_rows(plots, width, mark_name)
    above = 0.1 + 0.17 * in_legend[0]
    figure, panels = _panels(len(plots), width, 1.45, 3.0, above, sharey=True)
    for plot, (panel, _) in zip(plots, panels, strict=True):
        groups = np.arange(len(plot.series[0].x))
        up, down = np.zeros(len(groups)), np.zeros(len(groups))
        thick = 0.8 if stacked else 0.8 / len(plot.series)
        for place, one in enumerate(plot.series):
            y = np.array(one.y, dtype=float)
            shift = 0.0 if stacked else (place - (len(plot.series) - 1) / 2) * thick
            base = np.where(y >= 0, up, down) if stacked else 0
            panel.bar(groups + shift, y, 0.94 * thick, bottom=base, color=palette()[one.color],
                      label=one.name, yerr=_errors(one), error_kw=_whiskers("ink"))  # fmt: skip
            up, down = up + np.clip(y, 0, None), down + np.clip(y, None, 0)
        for place, mark in zip(groups.tolist(), plot.marks, strict=bool(plot.marks)):
            panel.plot([place - 0.46, place + 0.46], [mark, mark], **_dashed(),
                       label=mark_name if place == 0 else None)  # fmt: skip
        panel.set_xticks(groups, [str(name) for name in plot.series[0].x])
        panel.tick_params(axis="x", length=0)
        panel.grid(axis="y", color=palette()["line"], linewidth=0.5)
        if any(down < 0):
            panel.axhline(0, color=palette()["muted"], linewidth=0.6)
    _name_axes(figure, axes)
    _titles(panels, [plot.title for plot in plots])
    _legend(figure, panels, in_legend[1])
    _place(figure)
    _make_room(figure, panels, list(map(str, plots[0].series[0].x)))
    _freeze(figure)
    return figure


@_styled
def lines(
    plots: Sequence[Plot],
    width: float,
    *,
    axes: tuple[str, str],
    limits: tuple[float, float],
    mark: tuple[float, str] | None = None,
    even: bool = False,
) -> Figure:
    """Lines with a marker at every value; one scale for all panels.

    Args:
        plots: one per panel.
        width: of the figure, inches.
        axes: what x and y are, with unit.
        limits: of the y axis.
        mark: height of a dashed line, and its name.
        even: the values of x stand at equal distances, whatever they are.
    """
    in_legend = _legend_rows(plots, width, mark[1] if mark else "")
    above = 0.1 + 0.17 * in_legend[0]
    figure, panels = _panels(len(plots), width, 1.45, 3.0, above, sharey=True)
    for plot, (panel, _) in zip(plots, panels, strict=True):
        for place, one in enumerate(plot.series):
            panel.errorbar(
                [str(x) for x in one.x] if even else one.x, one.y, _errors(one), label=one.name,
                color=palette()[one.color], marker=_MARKERS[place % len(_MARKERS)], markersize=3.2,
                linewidth=1.1, elinewidth=0.7, capsize=1.5,
            )  # fmt: skip
        if mark is not None:
            panel.axhline(mark[0], **_dashed(), label=mark[1])
        panel.set_ylim(*limits)
        panel.grid(axis="y", color=palette()["line"], linewidth=0.5)
        if not even:
            counts = sorted({x for one in plot.series for x in one.x})
            few = FixedLocator(counts) if len(counts) <= 6 else MaxNLocator(6, integer=True)
            panel.xaxis.set_major_locator(few)
    _name_axes(figure, axes)
    _titles(panels, [plot.title for plot in plots])
    _legend(figure, panels, in_legend[1])
    _place(figure)
    _freeze(figure)
    return figure


@_styled
def clouds(plots: Sequence[Cloud], width: float, *, axes: tuple[str, str]) -> Figure:
    """Points with their names, as far as these cover nothing; one scale for all panels."""
    figure, panels = _panels(len(plots), width, 1.5, 2.1, 0.0, sharey=True, sharex=True)
    for plot, (panel, _) in zip(plots, panels, strict=True):
        panel.plot(plot.x, plot.y, "o", markersize=3.5, color=palette()["full"], clip_on=False)
        panel.margins(0.12, 0.1)
        panel.grid(color=palette()["line"], linewidth=0.5)
        panel.tick_params(labelbottom=True)
    _name_axes(figure, axes)
    _titles(panels, [f"{plot.title}\n{plot.note}" for plot in plots])
    _place(figure)
    _freeze(figure)
    for plot, (panel, _) in zip(plots, panels, strict=True):
        if len(plot.names) <= MOST_NAMED_POINTS:
            _name_points(panel, plot)
    return figure


def _name_points(panel: Axes, plot: Cloud) -> None:
    """Greedily give each point's name the first side of it that is free."""
    canvas: Any = panel.figure.canvas  # Agg's, which has a renderer
    places = panel.transData.transform(np.column_stack([plot.x, plot.y]))
    around = 0.03 * panel.figure.dpi
    taken = [Bbox([place - around, place + around]) for place in places]
    frame = panel.get_window_extent()
    sides = [(0, 4, "center", "bottom"), (0, -4, "center", "top"), (4, 0, "left", "center"),
             (-4, 0, "right", "center")]  # fmt: skip
    for x, y, name in zip(plot.x, plot.y, plot.names, strict=True):
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


# --- what they share ------------------------------------------------------------------------


def _panels(
    count: int, width: float, height: float, least: float, above: float, **shared: Any
) -> tuple[Figure, list[tuple[Axes, bool]]]:
    """A figure of so many panels, as many in a row as fit; each panel and whether it is leftmost.

    Args:
        count: of panels.
        width: of the figure, inches.
        height: of a panel's own drawing, inches.
        least: width of a panel, inches.
        above: height for a legend or a colour bar, inches.
        **shared: see `Figure.subplots`.
    """
    columns = max(1, min(count, int(width / least)))
    rows = -(-count // columns)
    columns = -(-count // rows)
    figure = Figure((width, rows * (height + 0.42) + 0.25 + above), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, **shared)
    for empty in grid.flat[count:]:
        empty.remove()
    return figure, [(panel, i % columns == 0) for i, panel in enumerate(grid.flat[:count])]


def _titles(panels: Sequence[tuple[Axes, bool]], titles: Sequence[str]) -> None:
    """In as many lines as a panel's width asks for, for which the figure becomes higher."""
    figure, (rows, columns) = panels[0][0].get_figure(root=True), _grid_size(panels[0][0])
    assert figure is not None
    wrapped = [_wrapped(title, figure.get_figwidth() / columns - 0.6) for title in titles]
    for (panel, _), title in zip(panels, wrapped, strict=True):
        panel.set_title(title, pad=3, linespacing=1.25)
    more = max(title.count("\n") for title in wrapped)
    figure.set_figheight(figure.get_figheight() + 1.25 * NORMAL / 72 * more * rows)


def _name_axes(figure: Figure, axes: tuple[str, str]) -> None:
    """What x and y are, once for all panels."""
    width, height = figure.get_size_inches()
    figure.supxlabel(_wrapped(axes[0], width))
    figure.supylabel(_wrapped(axes[1], height))


def _wrapped(text: str, inches: float) -> str:
    """A text in lines that fit."""
    most = max(8, int(72 * inches / (0.52 * NORMAL)))
    return "\n".join(line for part in text.split("\n") for line in textwrap.wrap(part, most))


def _place(figure: Figure) -> None:
    """Give everything its place, to see what room there is."""
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.execute(figure)


def _freeze(figure: Figure) -> None:
    """Let everything stay in its place, so that every file of the figure is the same."""
    figure.set_layout_engine("none")


def _turn_names(panel: Axes, names: Sequence[str]) -> float:
    """Names along the x axis upright where they would meet; the inches that they then take more."""
    lengths = [_WIDE * SMALL * len(name) for name in names]
    meeting = max(((a + b) / 2 for a, b in pairwise(lengths)), default=0.0)
    if meeting + 2 <= _points(panel)[0] / len(names):
        return 0.0
    panel.tick_params(axis="x", labelrotation=90)
    return (max(lengths) - SMALL) / 72


def _make_room(figure: Figure, panels: Sequence[tuple[Axes, bool]], names: Sequence[str]) -> None:
    """Turn names along the x axis where they would meet, and make the figure higher for them."""
    more = max(_turn_names(panel, names) for panel, _ in panels)
    if more:
        figure.set_figheight(figure.get_figheight() + more * _grid_size(panels[0][0])[0])
        _place(figure)


def _grid_size(panel: Axes) -> tuple[int, int]:
    """Rows and columns of the panels that this is one of."""
    place = panel.get_subplotspec()
    assert place is not None
    return place.get_gridspec().get_geometry()


def _points(panel: Axes) -> tuple[float, float]:
    """Width and height of a panel that has its place."""
    box = panel.get_window_extent()
    return 72 * box.width / panel.figure.dpi, 72 * box.height / panel.figure.dpi


def _errors(one: Series) -> np.ndarray | None:
    if one.low is None or one.high is None:
        return None
    y = np.array(one.y, dtype=float)
    errors = np.array([y - np.array(one.low, dtype=float), np.array(one.high, dtype=float) - y])
    return np.maximum(errors, 0)


def _whiskers(color: str) -> dict[str, Any]:
    return {"ecolor": palette()[color], "elinewidth": 0.7, "capsize": 1.2, "capthick": 0.7}


def _dashed() -> dict[str, Any]:
    return {"color": palette()["ink"], "linewidth": 0.8, "linestyle": (0, (3, 2))}


def _legend_rows(plots: Sequence[Plot], width: float, more: str) -> tuple[int, int]:
    """Rows and columns of a legend of every series and one thing more."""
    names = {one.name for plot in plots for one in plot.series} | {more}
    longest = max(map(len, names))
    columns = max(1, min(len(names), int(width * 72 / (SMALL * (0.58 * longest + 4)))))
    return -(-len(names) // columns), columns


def _legend(figure: Figure, panels: Iterable[tuple[Axes, bool]], columns: int) -> None:
    """One for all panels, above them; each name once, dashed lines last."""
    found: dict[str, Any] = {}
    for panel, _ in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if len(found) > 1:
        names = sorted(found, key=lambda name: isinstance(found[name], Line2D))
        figure.legend([found[name] for name in names], names, loc="outside upper center",
                      ncols=columns)  # fmt: skip
