"""Writes the tables of a run's analysis and retraining as CSV, LaTeX and Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from tracmod.files.durable import write_file
from tracmod.report.content.analysis_tables import AnalysisTables
from tracmod.report.content.result_tables import result_tables
from tracmod.report.content.tables import Cell, Table
from tracmod.report.wording import labels as words

# Characters that neither LaTeX's standard fonts nor pandas' escaping cover.
_LATEX = {
    "\N{MINUS SIGN}": "$-$",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
}
_SUPERSCRIPTS = str.maketrans(words.superscript(-1)[0] + "".join(map(words.superscript, range(10))),
                              "-0123456789")  # fmt: skip


def write_tables(run_dir: str | Path, out: str | Path, form: str = "csv") -> list[Path]:
    """Write each table of `analysis/` and `retraining/`, and each language x language matrix.

    CSV has all digits, under the column names of these folders. LaTeX (a `tabular` that needs only
    the package booktabs) and Markdown are for reading: with rounded numbers, units in the headers,
    and intervals in brackets after their values.

    Args:
        run_dir: a run folder that has been analyzed.
        out: folder for the files; created if it does not exist.
        form: `csv`, `latex` or `markdown`.

    Returns:
        The files: the tables of `analysis/`, of its summary.json, and of `retraining/` under their
        names there; and `influence-<measure>-<model>-<view>`, `change-...`, `leave-one-out-actual`
        and `leave-one-out-predicted-<method>`, whose rows are test languages and whose columns are
        training languages.

    Raises:
        ValueError: `run_dir` has not been analyzed, or `form` is unknown.
    """
    if form not in _WRITERS:
        raise ValueError(f"tables: expected a format of {', '.join(_WRITERS)}, got {form}")
    ending, write = _WRITERS[form]
    tables = AnalysisTables(run_dir)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for table in result_tables(tables):
        files.append(out / f"{table.name}.{ending}")
        write_file(files[-1], write(table).encode())
    return files


def csv(table: Table) -> str:
    """Return the rows with all their digits."""
    return table.rows.to_csv(index=False, lineterminator="\n")


def latex(table: Table) -> str:
    """Return a tabular of booktabs, in ASCII except for letters of the texts themselves."""
    shown = pd.DataFrame(map(_texts, table.cells), columns=[one.title for one in table.columns])
    style = shown.style.hide(axis="index").format(escape="latex")
    style = style.format_index(escape="latex", axis="columns")
    alignment = "".join("r" if column.is_number else "l" for column in table.columns)
    text = style.to_latex(hrules=True, column_format=alignment)
    # LaTeX would take `[` or `*` at the start of a row for an option of the preceding command.
    text = re.sub(r"(\\\\\n|rule\n)(?=[\[*])", r"\1{}", text)
    for character, command in _LATEX.items():
        text = text.replace(character, command)
    superscripts = "[" + "".join(map(chr, _SUPERSCRIPTS)) + "]+"
    text = re.sub(superscripts, lambda found: f"$^{{{found[0].translate(_SUPERSCRIPTS)}}}$", text)
    comment = f"% {table.caption}\n" if table.caption else ""
    return f"% \\usepackage{{booktabs}}\n{comment}{text}"


def markdown(table: Table) -> str:
    """Return a table of Markdown, with its caption below."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    def escaped(cells: Sequence[str]) -> list[str]:
        return [re.sub(r"([\\|*<`])", r"\\\1", " ".join(cell.split())) for cell in cells]

    lines = [line(escaped([column.title for column in table.columns]))]
    lines.append(line(["---:" if column.is_number else "---" for column in table.columns]))
    lines += [line(escaped(_texts(cells))) for cells in table.cells]
    if table.caption:
        lines += ["", f"{table.caption[0].upper()}{table.caption[1:]}."]
    return "\n".join([*lines, ""])


def _texts(cells: Sequence[Cell]) -> list[str]:
    """Return cells as text, intervals in brackets: `0.53 [0.40, 0.61]`."""
    return [
        f"{cell.text} [{', '.join(cell.interval)}]" if cell.interval else cell.text
        for cell in cells
    ]


_WRITERS: dict[str, tuple[str, Callable[[Table], str]]] = {
    "csv": ("csv", csv),
    "latex": ("tex", latex),
    "markdown": ("md", markdown),
}
