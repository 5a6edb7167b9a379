"""Figures of influence by head and layer, from `analysis/blocks.parquet`.

Shape legend: L layers, H heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from tracmod.analysis.results import view_kind
from tracmod.report.content.analysis_tables import AnalysisTables
from tracmod.report.content.figures import BarCharts, Chart, HeatMaps, Series
from tracmod.report.content.subnetworks import head_matrix
from tracmod.report.wording import labels as words

# Part of a layer -> its name and color.
_PARTS = {
    "heads": ("heads", "series-0"),
    "layers": ("rest of the layer", "series-4"),
    "outside": ("outside the layers", "series-6"),
}


def blocks(tables: AnalysisTables) -> Iterator[HeatMaps | BarCharts]:
    """Yield in-language influence through each head and by layer, with a panel per view."""
    table = tables.table("blocks")
    known = table[table["in_language"].notna()] if len(table) else table
    if not len(known):
        return
    heads = known[known["head"].notna()]
    yield from _head_maps(
        tables, heads, heads["in_language"], "blocks-heads", "In-language", "in-language influence",
        "Mean influence of a language on itself that flows through each head.",
    )  # fmt: skip
    for model, of_model in known.groupby("model", sort=False):
        panels = []
        for view, rows in of_model.groupby("view", sort=False):
            layers, shares = layer_shares(rows.to_dict("records"))
            series = [Series(*_PARTS[part], layers, values) for part, values in shares.items()]
            if series:
                panels.append(Chart(_view_name(view), series))
        if panels:
            yield BarCharts(
                name=f"blocks-layers-{model}",
                tab="By layer",
                heading=words.MODEL_NAMES[str(model)],
                caption="In-language influence of each part, as a percentage of the sum of the "
                "absolute values of all parts. Parts below 0 raise the loss of their own language.",
                x_axis="layer",
                y_axis="share of absolute in-language influence",
                unit="%",
                panels=panels,
                stacked=True,
            )


def block_differences(tables: AnalysisTables) -> Iterator[HeatMaps]:
    """Yield in-language minus cross-language influence through each head, with a panel per view."""
    table = tables.table("blocks")
    if len(table):
        heads = table.dropna(subset=["head", "in_language", "cross_language"])
        yield from _head_maps(
            tables, heads, heads["in_language"] - heads["cross_language"], "blocks-difference",
            "In-language minus cross-language", "difference in influence",
            "In-language minus cross-language mean influence through each head.",
        )  # fmt: skip


def _head_maps(
    tables: AnalysisTables,
    heads: pd.DataFrame,
    values: pd.Series,
    name: str,
    tab: str,
    color_axis: str,
    caption: str,
) -> Iterator[HeatMaps]:
    """Yield a figure per model with a map of layers and heads per view, on one scale."""
    factor, unit = tables.scaling(values)
    top = float(values.abs().max() * factor) or 1.0
    heads = heads.assign(value=factor * values)
    for model, of_model in heads.groupby("model", sort=False):
        panels = []
        for view, rows in of_model.groupby("view", sort=False):
            layers, indices = rows["layer"].astype(int), rows["head"].astype(int)
            values_LH = np.full((layers.max() + 1, indices.max() + 1), np.nan)
            values_LH[layers, indices] = rows["value"]
            panels.append(head_matrix(_view_name(view), values_LH))
        yield HeatMaps(
            name=f"{name}-{model}",
            tab=tab,
            heading=words.MODEL_NAMES[str(model)],
            caption=caption,
            x_axis="head",
            y_axis="layer",
            panels=panels,
            color_axis=color_axis,
            unit=unit,
            scale="diverging",
            limits=(-top, top),
            signed=True,
        )


def _view_name(view: Any) -> str:
    return words.VIEW_NAMES.get(view_kind(view), view)


def layer_shares(rows: list[dict[str, Any]]) -> tuple[list[str], dict[str, list[float]]]:
    """Return the parts of in-language influence by layer, in percent of all parts' sizes.

    They keep their signs even if their sum is negative: a part below 0 raises the loss of its own
    language.

    Args:
        rows: rows of `analysis/blocks.parquet` of one model and view, with in-language influence.

    Returns:
        Names of the layers and "outside"; and the shares in these of each part that has influence:
        `heads`, `layers` (the rest of a layer) and `outside`.
    """
    layers = sorted({row["layer"] for row in rows if pd.notna(row["layer"])})
    parts = {part: [0.0] * (len(layers) + 1) for part in _PARTS}
    for row in rows:
        if pd.isna(row["layer"]):
            part, position = "outside", -1
        else:
            part = "layers" if pd.isna(row["head"]) else "heads"
            position = layers.index(row["layer"])
        parts[part][position] += row["in_language"]
    total = sum(abs(value) for values in parts.values() for value in values)
    shares = {
        part: [100 * value / total for value in values]
        for part, values in parts.items()
        if any(values)
    }
    return [*(str(int(layer)) for layer in layers), "outside"], shares
