"""The tables of a run's analysis and retraining, and how their numbers are written."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from tracmod.analysis.languages import MEASURES
from tracmod.report.content.analysis_tables import AnalysisTables
from tracmod.report.content.tables import Column, Table, fixed, significant, spread
from tracmod.report.wording import labels as words
from tracmod.report.wording.retraining import METHOD_NAMES

_HEADERS = {
    "share_positive": "share among proponents",
    "share_negative": "share among opponents",
    "mean_influence": "mean influence",
    "predicted": "predicted change in mean loss, in the method's own unit",
    "actual": "actual change in mean loss",
    "foretold": "foretold change in mean loss without the language",
    "expected_jaccard": "Jaccard by chance",
    "corrected_jaccard": "Jaccard beyond chance",
}
_RETRAINING_NOTES = {
    "lds": "value: Spearman correlation of the losses after retraining with the method's "
    "predictions; over first: difference from the value of the first method; test language -: all",
    "fractions": "fraction: share of the training examples in a subset; otherwise as in lds",
    "removal": "changes: without the removed training examples; test language -: all",
    "leave_one_out": "changes: without the training language",
}
# Column -> words for its values.
_NAMES: dict[str, Mapping[str, str]] = {
    "model": words.MODEL_NAMES,
    "base_model": words.MODEL_NAMES,
    "measure": words.MEASURE_NAMES,
    "method": METHOD_NAMES,
    "question": words.QUESTIONS,
    "kind": {"in_language": "a language and itself", "cross_language": "two languages"},
}
# Names that columns of one kind start or end with.
_SHARES = ("share", "null_share", "accuracy", "score", "full_score", "threshold", "same_label",
           "same_group")  # fmt: skip
_INFLUENCES = ("mean_influence", "in_language", "cross_language")
_DIFFERENCES = ("loss_change", "accuracy_change", "over_first", "predicted", "actual", "foretold")
_PROBABILITIES = ("p_value", "p_adjusted", "probability")


def result_tables(tables: AnalysisTables) -> Iterator[Table]:
    """Yield each table of a run's results, and each language x language matrix."""
    for path in sorted(tables.folder.glob("*.parquet")):
        if len(rows := pd.read_parquet(path)):
            yield table_of(tables, path.stem, rows)
    for name, entries in tables.summary.items():
        if isinstance(entries, list) and entries and isinstance(entries[0], dict):
            yield summary_table(tables, name)
    for table in (accuracy(tables), subnetworks(tables), fidelity(tables)):
        if len(table.rows):
            yield table
    yield from _influence_matrices(tables)
    yield from _metagradient(tables)
    yield from _retraining(tables)


def summary_table(tables: AnalysisTables, name: str) -> Table:
    """Return the table of a list of entries in summary.json."""
    # changes.parquet has the changes of every cell, summary.json those of the own-language share.
    file_name = "in_language_changes" if name == "changes" else name
    return table_of(tables, file_name, flat(tables.summary[name]))


def accuracy(tables: AnalysisTables) -> Table:
    """Return the accuracy, or the score of tags, under each view's masks, by language."""
    entries = [
        {"model": view["model"], "view": view["view"], "language": language, "accuracy": share}
        for view in tables.summary["accuracy"]["views"]
        for language, share in view["languages"].items()
    ]
    table = table_of(tables, "accuracy", flat(entries))
    score = tables.summary["accuracy"].get("score", "accuracy")
    columns = [
        replace(column, header=column.header.replace("accuracy", score)) for column in table.columns
    ]
    return replace(table, columns=columns)


def subnetworks(tables: AnalysisTables) -> Table:
    """Return the sizes and scores of the subnetworks."""
    entries = tables.summary["subnetworks"].items()
    return table_of(tables, "subnetworks", flat([{"language": name} | e for name, e in entries]))


def fidelity(tables: AnalysisTables) -> Table:
    """Return the fidelity certificates of the models."""
    entries = [{"model": name} | entry for name, entry in tables.certificates.items()]
    return table_of(tables, "fidelity", flat(entries))


def _influence_matrices(tables: AnalysisTables) -> Iterator[Table]:
    """Yield a matrix per measure, model and view, and per comparison of these."""
    for source, keys, kind in (
        ("matrices", ["model", "view"], "influence"),
        ("changes", ["model", "view", "base_model", "base_view"], "change"),
    ):
        table = tables.table(source)
        for measure in MEASURES if len(table) else ():
            for key, rows in table.groupby(keys, sort=False):
                views = ["-".join(key[start : start + 2]) for start in range(0, len(key), 2)]
                name = f"{kind}-{words.measure_id(measure)}-{'-minus-'.join(views)}"
                yield _matrix(tables, name, rows, measure, is_change=kind == "change")


def _metagradient(tables: AnalysisTables) -> Iterator[Table]:
    """Yield the checks by retraining, and a matrix of languages for each model."""
    checks, languages = tables.metagradient_table("checks"), tables.metagradient_languages
    if len(checks):
        note = "predicted: by the metagradient; share: of random examples; removed: of their weight"
        yield table_of(tables, "metagradient_checks", checks, note)
    if not len(languages):
        return
    for model, own in languages.groupby("model", sort=False):
        yield _matrix(tables, f"metagradient-{model}", own, "foretold", note="first order")
    paths = tables.metagradient_paths
    for model, own in paths.groupby("model", sort=False) if len(paths) else ():
        note = "mean over a path of weights from 1 to 0"
        yield _matrix(tables, f"metagradient-path-{model}", own, "foretold", note=note)


def _retraining(tables: AnalysisTables) -> Iterator[Table]:
    for name in _RETRAINING_NOTES:
        if len(tables.retraining_table(name)):
            yield retraining_table(tables, name)
    cells = tables.retraining_table("leave_one_out")
    if not len(cells):
        return
    yield retraining_table(tables, "leave_one_out_tests")
    methods = dict(list(cells.groupby("method", sort=False)))
    note = _RETRAINING_NOTES["leave_one_out"]
    first = next(iter(methods.values()))  # the actual changes are the same beside every method
    yield _matrix(tables, "leave-one-out-actual", first, "actual", note=note)
    for method, rows in methods.items():
        yield _matrix(tables, f"leave-one-out-predicted-{method}", rows, "predicted", note=note)


def retraining_table(tables: AnalysisTables, name: str) -> Table:
    """Return a table of `retraining/`, or the tests of its summary."""
    if name == "leave_one_out_tests":
        tests = (tables.retraining_summary or {}).get("leave_one_out", [])
        note = "correlation: Spearman of the predicted with the actual changes in mean loss"
        return table_of(tables, name, flat(tests), note)
    return table_of(tables, name, tables.retraining_table(name), _RETRAINING_NOTES[name])


def flat(entries: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return nested dicts as rows: `share: {value, low, high}` is share, share_low, share_high."""
    table = pd.json_normalize(list(entries), sep=".")
    table.columns = [str(name).removesuffix(".value").replace(".", "_") for name in table.columns]
    for name in table.columns:
        if table[name].map(lambda value: isinstance(value, list)).any():
            table[name] = [" ".join(map(str, value)) for value in table[name]]
    return table


# --- how columns are read -------------------------------------------------------------------


def table_of(tables: AnalysisTables, name: str, rows: pd.DataFrame, note: str = "") -> Table:
    """Return the table with all columns; the ends of an interval are part of its value's column."""
    unit = tables.unit
    if name == "course":  # of one checkpoint alone: neither a sum nor weighted
        influence = tables.run.section("influence") | {"weights": "uniform"}
        unit = words.influence_unit(influence).partition(",")[0]
    is_change = name in ("changes", "in_language_changes")
    ends = {column: (f"{column}_low", f"{column}_high") for column in rows.columns}
    ends["value"] = ("low", "high")
    ends = {column: pair for column, pair in ends.items() if {column, *pair} <= {*rows.columns}}
    columns = [
        _column(column, rows[[column, *ends.get(column, ())]], is_change, unit)
        for column in rows.columns
        if column not in {end for pair in ends.values() for end in pair}
    ]
    notes = (
        [f"in brackets: {tables.summary['settings']['confidence']:.0%} interval"] if ends else []
    )
    return Table(name, rows, columns, "; ".join([*notes, *([note] if note else [])]))


def _matrix(
    tables: AnalysisTables,
    name: str,
    rows: pd.DataFrame,
    measure: str,
    is_change: bool = False,
    note: str = "",
) -> Table:
    """Return a matrix of test languages x training languages, in one unit and format."""
    ends = (f"{measure}_low", f"{measure}_high") if f"{measure}_low" in rows else None
    column = Column(measure, measure, ends=ends)
    wide, spread_columns = spread(rows, "test_language", ["train_language"], column)
    write, unit = _format(measure, wide.iloc[:, 1:], is_change, tables.unit)
    columns = [Column("test_language", "test language", is_number=False)]
    columns += [replace(one, write=write) for one in spread_columns.values()]
    what = f"{'change in ' if is_change else ''}{_HEADERS[measure]}"
    notes = [f"{what} ({unit})" if unit else what, "rows: language of the test examples",
             "columns: language of the training examples"]  # fmt: skip
    if ends:
        notes.append(f"in brackets: {tables.summary['settings']['confidence']:.0%} interval")
    return Table(name, wide, columns, "; ".join([*notes, *([note] if note else [])]))


def _column(name: str, values: pd.DataFrame, is_change: bool, unit: str) -> Column:
    """Return a column, from its name and its values (with the ends of their intervals)."""
    header = name
    for key, text in _HEADERS.items():
        header = header.replace(key, text)
    header = header.replace("_", " ")
    first = values[name]
    if pd.api.types.is_bool_dtype(first):
        return Column(name, header, lambda value: "yes" if value else "no", is_number=False)
    if not pd.api.types.is_numeric_dtype(first):
        names = _NAMES.get(name, {})
        write = words.view_name if name.endswith("view") else lambda x: names.get(x, str(x))
        return Column(name, header, write, is_number=False)
    ends = (values.columns[1], values.columns[2]) if len(values.columns) > 1 else None
    if name.endswith(_PROBABILITIES):
        return Column(name, header, lambda p: re.sub("^p (= )?", "", words.p_value(p)), ends=ends)
    if name == "predicted":  # each method has its own unit, hence its own size
        return Column(name, header, significant(signed=True))
    write_number, unit = _format(name, values, is_change, unit)
    return Column(name, header, write_number, unit, ends)


def _format(
    name: str, values: pd.DataFrame, is_change: bool, unit: str
) -> tuple[Callable[[float], str], str]:
    """Return how numbers are written, and their unit.

    The name says what a column is; the digits of unknown columns follow from the largest number.
    """
    numbers = values.to_numpy(float)
    first = numbers[:, 0]  # without the ends of intervals
    largest = float(np.max(np.abs(numbers[np.isfinite(numbers)]), initial=0.0))
    exponent = words.power_of_ten(largest)
    power = f"10{words.superscript(exponent)}"
    if pd.api.types.is_integer_dtype(values.iloc[:, 0]):
        return fixed(digits=0), ""
    if name.endswith("effect_size"):
        return fixed(digits=2, signed=True), ""
    if name.startswith(_INFLUENCES):
        return fixed(10.0**-exponent, 2, signed=True), f"{power} {unit}"
    signed = name.startswith(_DIFFERENCES)
    if name.startswith(_SHARES):
        signed = signed or (is_change and name != "null_share")
        return fixed(100.0, 1, signed), "percentage points" if signed else "%"
    sizes = np.abs(first[np.isfinite(first) & (first != 0)])
    if largest < 0.01 and sizes.size and sizes.max() > 100 * sizes.min():  # one power: some 0.00
        return significant(signed), ""
    if 0 < largest < 0.01:
        return fixed(10.0**-exponent, 2, signed), power
    return fixed(digits=1 if largest >= 10 else 3, signed=signed), ""
