"""Tables as data: rows with all their digits, and columns that say how people read them.

`html/` and `paper/tables.py` write the same tables as HTML, LaTeX, Markdown and CSV.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import pandas as pd

from tracmod.report.content.figures import with_unit
from tracmod.report.wording import labels as words

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """A value as text; the ends of its interval, if it has one; and notes on it."""

    text: str
    interval: tuple[str, str] | None = None
    note: str = ""


@dataclass(frozen=True)
class Column:
    """A column that people read.

    Attributes:
        key: name of the values in the rows.
        header: name of the column, without unit.
        write: returns the text of a value; missing values are written as "-".
        unit: unit of the values as they are written.
        ends: names of the ends of the values' intervals in the rows, if they have intervals.
        group: header above this column and its neighbours of the same group.
        is_number: numbers are aligned to the right.
        note: returns further text about a row's value, for the report only.
    """

    key: str
    header: str
    write: Callable[[Any], str] = str
    unit: str = ""
    ends: tuple[str, str] | None = None
    group: str = ""
    is_number: bool = True
    note: Callable[[Row], str] = lambda row: ""

    @property
    def title(self) -> str:
        """Header with unit."""
        return with_unit(self.header, self.unit)

    def cell(self, row: Row) -> Cell:
        """Return what is written for a row."""
        if _is_missing(row[self.key]):
            return Cell("-")
        interval = None
        if self.ends and not _is_missing(row[self.ends[0]]):
            interval = self.write(row[self.ends[0]]), self.write(row[self.ends[1]])
        return Cell(self.write(row[self.key]), interval, self.note(row))


@dataclass(frozen=True)
class Table:
    """A table; `rows` hold all digits of more columns than people read, for CSV."""

    name: str
    rows: pd.DataFrame
    columns: Sequence[Column]
    caption: str = ""

    @property
    def cells(self) -> Iterator[list[Cell]]:
        """The cells of the table, row by row."""
        for row in self.rows.to_dict("records"):
            yield [column.cell(row) for column in self.columns]

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Headers above the columns and how many columns each spans; [] if there are none."""
        if not any(column.group for column in self.columns):
            return []
        groups = groupby(self.columns, lambda column: column.group)
        return [(name, len(list(columns))) for name, columns in groups]

    def column(self, key: str) -> Column:
        """Return the column of a key."""
        return next(column for column in self.columns if column.key == key)


def _is_missing(value: Any) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))


def fixed(factor: float = 1.0, digits: int = 3, signed: bool = False) -> Callable[[float], str]:
    """Return how a column writes numbers: times a factor, with so many decimals, maybe with `+`."""
    return lambda value: words.number(factor * value, digits, signed)


def significant(signed: bool = False) -> Callable[[float], str]:
    """Return how a column writes numbers of very different sizes: with three significant digits."""
    return lambda value: f"{value:{'+' if signed and value else ''}.3g}".replace("-", words.MINUS)


def spread(
    rows: pd.DataFrame, index: str, across: Sequence[str], column: Column, more: Sequence[str] = ()
) -> tuple[pd.DataFrame, dict[tuple[Any, ...], Column]]:
    """Spread a column of long rows over several columns, in the order of the rows.

    Args:
        rows: at most one row for each value of `index` and combination of `across`.
        index: column whose values become the rows.
        across: columns whose combinations become columns.
        column: the column that is spread, with the ends of its intervals.
        more: further columns that are spread, for notes.

    Returns:
        The new rows, with columns `index` and, for each combination, `<name>`, `<name>_low` and
        `<name>_high` if there are intervals, and `<name>_<more>`; and the column of each
        combination. A name is the combination joined by spaces.
    """
    parts = {"": column.key} | {f"_{name}": name for name in more}
    if column.ends:
        parts |= {"_low": column.ends[0], "_high": column.ends[1]}
    wide, columns = {index: pd.Series(rows[index].unique())}, {}
    for combination, own in rows.groupby(list(across), sort=False):
        name, own = " ".join(map(str, combination)), own.set_index(index)
        for suffix, key in parts.items():
            wide[name + suffix] = wide[index].map(own[key])
        ends = (f"{name}_low", f"{name}_high") if column.ends else None
        columns[combination] = replace(column, key=name, header=name, unit="", ends=ends)
    return pd.DataFrame(wide), columns
