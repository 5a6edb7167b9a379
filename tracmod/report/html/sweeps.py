"""Writes sweep.html: a sweep's figures and table in one file, no network."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa

from tracmod.files.durable import write_file
from tracmod.report.html.page import framed
from tracmod.report.html.plotly_plots import Figure, interval_lines
from tracmod.report.wording import labels as words

Row = dict[str, Any]
_OWN_COLORS = ("full", "subnetwork", "random", "other")
_SHARE_NOTE = (
    "How many of a test example's strongest proponents are in its own language, with interval, "
    "over the test languages with training data. Dotted: by chance, the language's part of the "
    "training data."
)
_CHANGE_NOTE = "Paired: the same test example seen both ways. In percentage points, with interval."
# Column, heading, note.
_MEASURES = (
    ("in_language_share", "Reliance on the own language", _SHARE_NOTE),
    ("accuracy", "Accuracy", "Mean over the test languages, under the view's masks."),
    (
        "accuracy_zero_shot",
        "Accuracy without training data",
        "Mean over the test languages that the model was not fine-tuned on.",
    ),
    ("view_change", "Change of the share from all heads", _CHANGE_NOTE),
    ("sparse_change", "Change of the share from full to sparse fine-tuning", _CHANGE_NOTE),
)


def write_sweep_page(path: Path, name: str, settings: Sequence[str], table: pa.Table) -> None:
    """Write the page of a sweep.

    Args:
        path: the file.
        name: the sweep's.
        settings: the columns that hold what varies.
        table: columns point, the settings, and those of `analysis.sweeps.sweep_rows`.
    """
    rows = table.to_pylist()
    plots: list[dict[str, Any]] = []
    groups = []
    for column, heading, note in _MEASURES:
        placed = []
        for figure in _figures(rows, column, settings):
            placed.append((len(plots), figure))
            plots.append(figure.plot)
        if placed:
            groups.append((heading, note, placed))
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = resources.files("tracmod.report.html").joinpath("sweep.html.j2")
    body = environment.from_string(template.read_text(encoding="utf-8")).render(
        name=name,
        points=len({row["point"] for row in rows}),
        settings=settings,
        groups=groups,
        rows=rows,
        words=words,
    )
    write_file(path, framed(name, body, plots).encode())


def _figures(rows: list[Row], column: str, settings: Sequence[str]) -> list[Figure]:
    """One figure per model, all with the same y axis, of the rows that have the measure."""
    known = [row for row in rows if row[column] is not None]
    limits = _limits(known, column)
    values = [row[settings[0]] for row in rows]
    # One number varies, and no two points share it: it is the x axis. Otherwise the points are.
    numeric = len(settings) == 1 and all(_is_number(value) for value in values)
    numeric = numeric and len(set(values)) == len({row["point"] for row in rows})
    x_name = settings[0] if numeric else "point"
    figures = []
    for model in dict.fromkeys(row["model"] for row in known):
        own = [row for row in known if row["model"] == model]
        if numeric:
            own = sorted(own, key=lambda row: row[x_name])
        series = [
            _series([row for row in own if row["view"] == view], column, x_name, place)
            for place, view in enumerate(dict.fromkeys(row["view"] for row in own))
        ]
        if column == "in_language_share":
            series.append(_null_series(own, x_name))
        unit = "percentage points" if column.endswith("_change") else "percent"
        title, axes = words.MODEL_NAMES[model], (x_name, unit)
        figures.append(interval_lines(title, series, axes=axes, limits=limits, numeric=numeric))
    return figures


def _series(rows: list[Row], column: str, x_name: str, place: int) -> dict[str, Any]:
    view = rows[0]["view"]

    def percentages(name: str) -> list[float | None]:
        return [None if row.get(name) is None else 100 * row[name] for row in rows]

    return {
        "name": words.VIEW_NAMES.get(view, view),
        "color": view if view in _OWN_COLORS else f"series-{place % 8}",
        "x": [row[x_name] for row in rows],
        "y": percentages(column),
        "low": percentages(f"{column}_low"),
        "high": percentages(f"{column}_high"),
    }


def _null_series(rows: list[Row], x_name: str) -> dict[str, Any]:
    of_point = {row[x_name]: 100 * row["null_share"] for row in rows}
    nothing = [None] * len(of_point)
    x, y = list(of_point), list(of_point.values())
    shown = {"name": "by chance", "color": "muted", "dash": True}
    return {**shown, "x": x, "y": y, "low": nothing, "high": nothing}


def _limits(rows: list[Row], column: str) -> tuple[float, float]:
    """What there is and a margin, in percent; accuracy from 0, and 0 among the changes."""
    names = (column, f"{column}_low", f"{column}_high")
    values = [row[name] for row in rows for name in names if row.get(name) is not None]
    if column == "in_language_share":
        values += [row["null_share"] for row in rows]
    else:
        values.append(0.0)
    low, high = 100 * min(values, default=0.0), 100 * max(values, default=1.0)
    margin = 0.06 * (high - low) or 1.0
    return (low - margin if low else 0.0), high + margin


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
