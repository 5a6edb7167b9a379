"""Every table of a run's analysis and retraining as CSV, LaTeX and Markdown: `tracmod tables`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tracmod.analysis.languages import MEASURES
from tracmod.files.durable import read_json, write_file
from tracmod.report.paper.figures import AnalysisTables
from tracmod.report.wording import labels as words

ENDINGS = {"csv": "csv", "latex": "tex", "markdown": "md"}
MEASURE_WORDS = {
    "share_positive": "share among proponents",
    "share_negative": "share among opponents",
    "mean_influence": "mean influence",
    "predicted": "predicted change of mean loss, in the method's own unit",
    "actual": "actual change of mean loss",
}
RETRAINING = {
    "lds": "value: Spearman of the losses after retraining with what the method says; over first: "
    "what that is above the first method's; test language -: all",
    "removal": "changes: without the removed training examples; test language -: all",
    "leave_one_out": "changes: without the training language",
}
_SHARES = ("share", "null_share", "accuracy", "score", "full_score", "threshold", "same_label",
           "same_group")  # fmt: skip
_INFLUENCES = ("mean_influence", "in_language", "cross_language")
_DIFFERENCES = ("loss_change", "accuracy_change", "over_first", "predicted", "actual")
_PROBABILITIES = ("p_value", "p_adjusted", "probability")
# What neither LaTeX's own fonts nor pandas' escaping know.
_LATEX = {
    "\N{MINUS SIGN}": "$-$",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
}
_RAISED = str.maketrans(words.superscript(-1)[0] + "".join(map(words.superscript, range(10))),
                        "-0123456789")  # fmt: skip


@dataclass(frozen=True)
class Table:
    """One table; `measure`: what all its numbers are, of a language x language matrix.

    `note`: how it is read, beside what its headers say.
    """

    name: str
    rows: pd.DataFrame
    measure: str | None = None
    is_change: bool = False
    note: str = ""


def write_tables(run_dir: str | Path, out: str | Path, form: str = "csv") -> list[Path]:
    """Write each table of `analysis/` and `retraining/`, and each language x language matrix.

    CSV holds all digits under the names that the tables have in these folders. LaTeX (a `tabular`,
    which needs the package booktabs alone) and Markdown are for reading: digits that matter, units
    in the headers, intervals in brackets behind their values.

    Args:
        run_dir: a run folder that `analyze` has been through.
        out: folder for the files, made if it is not there.
        form: `csv`, `latex` or `markdown`.

    Returns:
        The files: the tables of `analysis/`, of its summary.json, and of `retraining/` by their
        names there, and `influence-<measure>-<model>-<view>`, `change-...`, `leave-one-out-actual`
        and `leave-one-out-predicted-<method>`, whose rows are test languages and whose columns are
        training languages.

    Raises:
        ValueError: no analysis in the folder, or an unknown form.
    """
    if form not in ENDINGS:
        raise ValueError(f"tables: expected a format of {', '.join(ENDINGS)}, got {form}")
    tables = AnalysisTables(run_dir)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for table in [*_long(tables), *_matrices(tables), *_retraining(tables)]:
        if form == "csv":
            text = table.rows.to_csv(index=False, lineterminator="\n")
        else:
            text = (_latex if form == "latex" else _markdown)(*_readable(table, tables))
        files.append(out / f"{table.name}.{ENDINGS[form]}")
        write_file(files[-1], text.encode())
    return files


# --- what tables there are ------------------------------------------------------------------


def _long(tables: AnalysisTables) -> Iterator[Table]:
    """Those of the Parquet files, and those that lie in summary.json and fidelity.json."""
    for path in sorted(tables.folder.glob("*.parquet")):
        if len(rows := pd.read_parquet(path)):
            yield Table(path.stem, rows, is_change=path.stem == "changes")
    for name, entries in tables.summary.items():
        if isinstance(entries, list) and entries and isinstance(entries[0], dict):
            # pairs of one name: the changes of single cells are in changes.parquet
            shown = "in_language_changes" if name == "changes" else name
            yield Table(shown, _flat(entries), is_change=name == "changes")
    accuracy = [
        {"model": one["model"], "view": one["view"], "language": language, "accuracy": share}
        for one in tables.summary["accuracy"]["views"]
        for language, share in one["languages"].items()
    ]
    if accuracy:
        yield Table("accuracy", _flat(accuracy))
    if kept := tables.summary["subnetworks"]:
        yield Table("subnetworks", _flat([{"language": name} | one for name, one in kept.items()]))
    certificates = tables.folder / "fidelity.json"
    if certificates.is_file():
        found = read_json(certificates)
        yield Table("fidelity", _flat([{"model": name} | one for name, one in found.items()]))


def _flat(entries: list[dict[str, Any]]) -> pd.DataFrame:
    """Rows of nested dicts: `share: {value, low, high}` becomes share, share_low, share_high."""
    table = pd.json_normalize(entries, sep=".")
    table.columns = [
        name.removesuffix(".value").replace(".", "_") for name in table.columns
    ]  # fmt: skip
    for name in table.columns:
        if table[name].map(lambda value: isinstance(value, list)).any():
            table[name] = [" ".join(map(str, value)) for value in table[name]]
    return table


def _matrices(tables: AnalysisTables) -> Iterator[Table]:
    """A table per measure, model and view, or difference of these; a row per test language."""
    for source, keys, kind in (
        ("matrices", ["model", "view"], "influence"),
        ("changes", ["model", "view", "base_model", "base_view"], "change"),
    ):
        table = tables.table(source)
        for measure in MEASURES if len(table) else ():
            for key, rows in table.groupby(keys, sort=False):
                views = ["-".join(key[place : place + 2]) for place in range(0, len(key), 2)]
                name = f"{kind}-{_short(measure)}-{'-minus-'.join(views)}"
                yield Table(name, _matrix(rows, measure), measure, kind == "change")


def _retraining(tables: AnalysisTables) -> Iterator[Table]:
    """What training again told of the scores; leaving out languages also as matrices."""
    for name, note in RETRAINING.items():
        if len(rows := tables.retrained(name)):
            yield Table(name, rows, note=note)
    cells = tables.retrained("leave_one_out")
    if tables.retraining is None or not len(cells):
        return
    tests = read_json(tables.retraining / "summary.json")["leave_one_out"]
    note = "correlation: Spearman of the predicted with the actual changes of mean loss"
    yield Table("leave_one_out_tests", _flat(tests), note=note)
    methods = dict(list(cells.groupby("method", sort=False)))
    note = RETRAINING["leave_one_out"]
    first = next(iter(methods.values()))  # what happened is the same beside every method
    yield Table("leave-one-out-actual", _matrix(first, "actual"), "actual", note=note)
    for method, rows in methods.items():
        matrix = _matrix(rows, "predicted")
        yield Table(f"leave-one-out-predicted-{method}", matrix, "predicted", note=note)


def _short(measure: str) -> str:
    return words.MEASURE_NAMES[measure].lower().replace(" ", "-")


def _matrix(rows: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Columns: test_language, and of each training language its value, and interval if known."""
    ends = [name for end in ("", "_low", "_high") if (name := f"{measure}{end}") in rows.columns]
    wide = rows.pivot(index="test_language", columns="train_language", values=ends)
    columns = [(end, language) for language in rows["train_language"].unique() for end in ends]
    wide = wide[columns].reindex(rows["test_language"].unique())
    wide.columns = [f"{language}{end.removeprefix(measure)}" for end, language in columns]
    return wide.reset_index()


# --- for reading ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Form:
    """How numbers are written: times `factor`, so many digits, with + or not; and their unit."""

    factor: float = 1.0
    digits: int = 3
    signed: bool = False
    unit: str = ""


def _readable(table: Table, tables: AnalysisTables) -> tuple[pd.DataFrame, list[bool], str]:
    """Cells as text, which columns are numbers, and how to read them."""
    unit = tables.unit
    if table.name == "course":  # of one checkpoint alone: no sum, no weight
        weightless = tables.run.section("influence") | {"weights": "uniform"}
        unit = words.influence_unit(weightless).partition(",")[0]
    shown, numeric, notes = {}, [], []
    columns = _columns(list(table.rows.columns))
    if table.measure:
        form = _form(table.measure, table.rows.iloc[:, 1:], table.is_change, unit)
        what = f"{'change of ' if table.is_change else ''}{MEASURE_WORDS[table.measure]}"
        what += f" ({form.unit})" if form.unit else ""
        notes = [what, "rows: language of the test examples",
                 "columns: language of the training examples"]  # fmt: skip
    for name, *ends in columns:
        values, header = table.rows[[name, *ends]], _words(name)
        numeric.append(_is_number(values[name]))
        if not numeric[-1]:
            cells = ["-" if pd.isna(value) else str(value) for value in values[name]]
        elif name.endswith(_PROBABILITIES):
            cells = ["-" if pd.isna(p) else re.sub("^p (= )?", "", words.p_value(p))
                     for p in values[name]]  # fmt: skip
        elif name == "predicted" and not table.measure:  # a unit, hence a size, for each method
            cells = [f"{one:{'+' if one else ''}.3g}".replace("-", "\N{MINUS SIGN}")
                     for one in values[name]]  # fmt: skip
        else:
            if not table.measure:
                form = _form(name, values, table.is_change, unit)
                header += f" ({form.unit})" if form.unit else ""
            cells = _cells(values, form)
        shown[header] = cells
    if any(len(one) > 1 for one in columns):
        confidence = tables.summary["settings"]["confidence"]
        notes.append(f"in brackets: {confidence:.0%} interval")
    notes += [table.note] if table.note else []
    return pd.DataFrame(shown), numeric, "; ".join(notes)


def _columns(names: list[str]) -> list[list[str]]:
    """Each column, with the two of its interval behind it if it has one."""
    ends = {name: [f"{name}_low", f"{name}_high"] for name in names} | {"value": ["low", "high"]}
    groups = [[name, *ends[name]] if {*ends[name]} <= {*names} else [name] for name in names]
    of_intervals = {end for group in groups for end in group[1:]}
    return [group for group in groups if group[0] not in of_intervals]


def _is_number(values: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)


def _words(name: str) -> str:
    for measure, text in MEASURE_WORDS.items():
        name = name.replace(measure, text)
    return name.replace("_", " ")


def _form(name: str, values: pd.DataFrame, is_change: bool, unit: str) -> _Form:
    """By what a column is; of what is not known, by how large its numbers are."""
    numbers = values.to_numpy(float)
    largest = float(np.max(np.abs(numbers[np.isfinite(numbers)]), initial=0.0))
    exponent = words.power_of_ten(largest)
    power = f"10{words.superscript(exponent)}"
    if pd.api.types.is_integer_dtype(values.iloc[:, 0]):
        return _Form(digits=0)
    if name.endswith("effect_size"):
        return _Form(digits=2, signed=True)
    if name.startswith(_INFLUENCES):
        return _Form(10.0**-exponent, 2, True, f"{power} {unit}")
    if name.startswith(_SHARES):
        signed = name.startswith(_DIFFERENCES) or (is_change and name != "null_share")
        return _Form(100.0, 1, signed, "percentage points" if signed else "%")
    signed = name.startswith(_DIFFERENCES)
    if 0 < largest < 0.01:
        return _Form(10.0**-exponent, 2, signed, power)
    return _Form(digits=1 if largest >= 10 else 3, signed=signed)


def _cells(values: pd.DataFrame, form: _Form) -> list[str]:
    """Values, with their intervals in brackets if there are columns of these."""
    texts = []
    for row in (form.factor * values.astype(float)).itertuples(index=False):
        value, *ends = [_number(one, form) for one in row]
        texts.append(f"{value} [{', '.join(ends)}]" if ends and value != "-" else value)
    return texts


def _number(value: float, form: _Form) -> str:
    if pd.isna(value):
        return "-"
    text = words.number(value, form.digits)
    return f"+{text}" if form.signed and round(value, form.digits) > 0 else text


def _latex(shown: pd.DataFrame, numeric: list[bool], note: str) -> str:
    """A tabular of booktabs; in ASCII, but for letters of the texts themselves."""
    style = shown.style.hide(axis="index").format(escape="latex")
    style = style.format_index(escape="latex", axis="columns")
    text = style.to_latex(
        hrules=True, column_format="".join("r" if one else "l" for one in numeric)
    )
    # A row that begins with one of these would be taken for an option of what is before it.
    text = re.sub(r"(\\\\\n|rule\n)(?=[\[*])", r"\1{}", text)
    for character, command in _LATEX.items():
        text = text.replace(character, command)
    raised = "[" + "".join(map(chr, _RAISED)) + "]+"
    text = re.sub(raised, lambda found: f"$^{{{found[0].translate(_RAISED)}}}$", text)
    return "% \\usepackage{booktabs}\n" + (f"% {note}\n" if note else "") + text


def _markdown(shown: pd.DataFrame, numeric: list[bool], note: str) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    def plain(cells: Sequence[str]) -> list[str]:
        return [re.sub(r"([\\|*<`])", r"\\\1", " ".join(cell.split())) for cell in cells]

    rule = ["---:" if one else "---" for one in numeric]
    lines = [line(plain(list(shown.columns))), line(rule)]
    lines += [line(plain(row)) for row in shown.itertuples(index=False)]
    return "\n".join([*lines, *(["", note[0].upper() + note[1:] + "."] if note else []), ""])
