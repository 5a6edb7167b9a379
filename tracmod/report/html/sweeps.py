"""Writes sweep.html: the figures and the table of a sweep in one file that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pandas as pd
import pyarrow as pa

from tracmod.files.durable import write_file
from tracmod.report.content.figures import Chart, LineCharts, Series, series_color
from tracmod.report.content.tables import Column, Row, Table, fixed
from tracmod.report.html.page import page
from tracmod.report.wording import labels as words

_VIEW_COLORS = ("full", "subnetwork", "random", "other")
_CHANGE_CAPTION = "Paired by test example, in percentage points, with intervals."
# Column, heading, caption.
_MEASURES = (
    (
        "in_language_share",
        "Reliance on the own language",
        "Own-language share among the strongest proponents, with intervals, over the test "
        "languages with training data. Dotted: the null share, the language's share of the "
        "training data.",
    ),
    ("accuracy", "Accuracy", "Mean over the test languages, under the masks of the view."),
    (
        "accuracy_zero_shot",
        "Accuracy without training data",
        "Mean over the test languages that the model was not fine-tuned on.",
    ),
    ("view_change", "Change in own-language share from all heads", _CHANGE_CAPTION),
    (
        "sparse_change",
        "Change in own-language share from full to sparse fine-tuning",
        _CHANGE_CAPTION,
    ),
)


def write_sweep_page(path: Path, name: str, settings: Sequence[str], table: pa.Table) -> None:
    """Write the page of a sweep.

    Args:
        path: the file.
        name: name of the sweep.
        settings: names of the columns that hold the settings that vary.
        table: columns point, the settings, and those of `analysis.sweeps.sweep_rows`.
    """
    rows = table.to_pylist()
    figures = [_figure(rows, column, heading, caption, settings)
               for column, heading, caption in _MEASURES
               if any(row[column] is not None for row in rows)]  # fmt: skip
    context = {
        "name": name,
        "points": len({row["point"] for row in rows}),
        "settings": settings,
        "figures": figures,
        "table": _points_table(rows, settings),
    }
    write_file(path, page("sweep.html.j2", name, context).encode())


def _figure(
    rows: list[Row], column: str, heading: str, caption: str, settings: Sequence[str]
) -> LineCharts:
    """Return a measure over the points of the sweep, a panel per model, a series per view."""
    known = [row for row in rows if row[column] is not None]
    values = [row[settings[0]] for row in rows]
    # If only one number varies, and each point has its own, it is the x axis; else the points are.
    is_number = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    is_number &= len(settings) == 1 and len(set(values)) == len({row["point"] for row in rows})
    x_axis = settings[0] if is_number else "point"
    if is_number:
        known.sort(key=lambda row: row[x_axis])
    panels = []
    for model in dict.fromkeys(row["model"] for row in known):
        own = [row for row in known if row["model"] == model]
        series = []
        for position, view in enumerate(dict.fromkeys(row["view"] for row in own)):
            of_view = [row for row in own if row["view"] == view]
            color = view if view in _VIEW_COLORS else series_color(position)
            y, low, high = (
                [None if row.get(name) is None else 100 * row[name] for row in of_view]
                for name in (column, f"{column}_low", f"{column}_high")
            )
            x = [row[x_axis] for row in of_view]
            series.append(Series(words.VIEW_NAMES.get(view, view), color, x, y, low, high))
        if column == "in_language_share":
            nulls = {row[x_axis]: 100 * row["null_share"] for row in own}
            x, y = list(nulls), list(nulls.values())
            series.append(Series("null share", "muted", x, y, dotted=True))
        panels.append(Chart(words.MODEL_NAMES[model], series))
    return LineCharts(
        name=column,
        tab=heading,
        caption=caption,
        x_axis=x_axis,
        y_axis="percentage points" if column.endswith("_change") else "percent",
        unit="%",
        panels=panels,
        evenly_spaced=not is_number,
        joined=is_number,
        from_zero=column != "in_language_share",
    )


def _points_table(rows: list[Row], settings: Sequence[str]) -> Table:
    """Return the main numbers of every point, model and view."""
    percent = fixed(100, 1)

    def p_value(key: str, row: Row) -> str:
        return "" if row.get(f"{key}_p") is None else words.p_value(row[f"{key}_p"])

    def heads(row: Row) -> str:
        return f"of {row['heads']:.0f}"

    shown = pd.DataFrame(rows, dtype=object)  # integers stay integers beside missing values
    shown["influence"] = [words.view_title(row["model"], row["view"]) for row in rows]
    columns = [Column("point", "point", is_number=False)]
    columns += [Column(name, name) for name in settings]
    columns += [
        Column("influence", "model and view", is_number=False),
        Column("accuracy", "accuracy", percent, "%"),
        Column("heads_kept", "heads kept", fixed(digits=1), note=heads),
    ]
    for key, header, write, unit in (
        ("in_language_share", "own-language share among proponents", percent, "%"),
        ("null_share", "null share", percent, "%"),
        ("view_change", "change from all heads", words.points, "points"),
        ("sparse_change", "change from full fine-tuning", words.points, "points"),
    ):
        ends = (f"{key}_low", f"{key}_high") if f"{key}_low" in shown else None
        note = partial(p_value, key)
        columns.append(Column(key, header, write, unit, ends, note=note))
    return Table("points", shown, columns)
