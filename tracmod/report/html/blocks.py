"""The report's figures of influence by head and layer, from `analysis/blocks.parquet`.

Shapes: L layers, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tracmod.report.html.plotly_plots import Figure, Legend, Panel, head_map, stacked_bars
from tracmod.report.wording.labels import MODEL_NAMES, VIEW_NAMES, number, power_of_ten, superscript

Row = dict[str, Any]
PART_NAMES = {"heads": "heads", "layers": "rest of the layer", "outside": "outside the layers"}
PART_COLORS = {"heads": "series-0", "layers": "series-4", "outside": "series-6"}


def block_panels(rows: list[Row], unit: str) -> list[Panel]:
    """Heatmaps of layers x heads, and bars by layer; one figure per model and view."""
    heads = [row for row in rows if row["head"] is not None]
    panels = []
    if any(row["cross_language"] is not None for row in heads):
        note = "In-language minus cross-language mean influence through each head: {}."
        known = [r for r in heads if None not in (r["in_language"], r["cross_language"])]
        difference = [r["in_language"] - r["cross_language"] for r in known]
        panels.append(_head_panel("In-language more than cross", known, difference, unit, note))
    own = [row for row in heads if row["in_language"] is not None]
    if own:
        note = "Mean influence of a language on itself, as far as it flows through each head: {}."
        values = [row["in_language"] for row in own]
        panels.append(_head_panel("In-language", own, values, unit, note))
    groups = _by_model(rows, _layer_bars)
    groups = [(model, [figure for figure in figures if figure]) for model, figures in groups]
    note = (
        "Share of the in-language mean influence, in percent: the sizes of a figure's parts add up "
        "to 100, and those that raise the loss of their own language are below 0."
    )
    panels.append(Panel("By layer", groups, note=note))
    return [panel for panel in panels if any(figures for _, figures in panel.groups)]


def _head_panel(
    label: str, rows: list[Row], values: Sequence[float], unit: str, note: str
) -> Panel:
    exponent = power_of_ten(max(map(abs, values), default=0.0))
    scaled = [{**row, "value": v * 10.0**-exponent} for row, v in zip(rows, values, strict=True)]
    top = max((abs(row["value"]) for row in scaled), default=0.0) or 1.0
    groups = _by_model(scaled, lambda title, of_view: _head_map(title, of_view, top))
    legend = Legend("diverging", number(-top, 1), f"+{number(top, 1)}", (0.5, "0"))
    return Panel(label, groups, legend, note.format(f"in 10{superscript(exponent)} ({unit})"))


def _by_model(
    rows: list[Row], draw: Callable[[str, list[Row]], Any]
) -> list[tuple[str, list[Any]]]:
    """One drawing per view, grouped by model, in the order of the table."""
    groups = []
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == model]
        views = dict.fromkeys(row["view"] for row in of_model)
        figures = [
            draw(VIEW_NAMES.get(view, view), [row for row in of_model if row["view"] == view])
            for view in views
        ]
        groups.append((MODEL_NAMES[model], figures))
    return groups


def _head_map(title: str, rows: list[Row], top: float) -> Figure:
    layers, heads = (1 + max(row[axis] for row in rows) for axis in ("layer", "head"))
    values_LH = np.full((layers, heads), np.nan)
    for row in rows:
        values_LH[row["layer"], row["head"]] = row["value"]
    return head_map(title, values_LH, scale="diverging", limits=(-top, top), digits=1)


def layer_shares(rows: Sequence[Row]) -> tuple[list[str], dict[str, list[float]]]:
    """The parts of a view's in-language influence by layer, in percent of all parts' sizes.

    They keep their signs, also where their sum is negative: below 0 is what raises the loss of
    its own language.

    Args:
        rows: of `analysis/blocks.parquet`, of one model and view.

    Returns:
        Names of the layers and "outside", and for each of `PART_NAMES` its share in each of these;
        {} where there is no influence at all.
    """
    known = [row for row in rows if row["in_language"] is not None]
    layers = sorted({row["layer"] for row in known if row["layer"] is not None})
    parts = {part: [0.0] * (len(layers) + 1) for part in PART_NAMES}
    for row in known:
        place = -1 if row["layer"] is None else layers.index(row["layer"])
        part = "outside" if row["layer"] is None else "layers" if row["head"] is None else "heads"
        parts[part][place] += row["in_language"]
    total = sum(abs(value) for values in parts.values() for value in values)
    shares = {
        part: [100 * value / total for value in values]
        for part, values in parts.items()
        if any(values)
    }
    return [*(str(int(layer)) for layer in layers), "outside"], shares


def _layer_bars(title: str, rows: list[Row]) -> Figure | None:
    """Heads and rest of each layer, stacked, as shares of the view's in-language influence."""
    names, shares = layer_shares(rows)
    series = [
        {"name": PART_NAMES[part], "color": PART_COLORS[part], "value": values}
        for part, values in shares.items()
    ]
    if not series:
        return None
    return stacked_bars(title, names, series, axes=("layer", "share of in-language influence"))
