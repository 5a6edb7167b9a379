"""The tables of the report: selections and arrangements of a run's tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from tracmod.files.durable import read_json
from tracmod.report.content.analysis_tables import AnalysisTables
from tracmod.report.content.result_tables import (
    accuracy,
    fidelity,
    flat,
    retraining_table,
    summary_table,
    table_of,
)
from tracmod.report.content.tables import Column, Row, Table, fixed, spread
from tracmod.report.wording import labels as words
from tracmod.report.wording.retraining import method_name
from tracmod.validation.retraining import RANDOM, SIDES

# Views under which test examples are masked as under another view, and so predicted alike.
_SAME_TEST_MASK = ("subnetwork-own", "subnetwork-test", "random-own")
_percent = fixed(100, 1)


def selected(table: Table, headers: Mapping[str, str]) -> Table:
    """Return some columns of a table, under other headers; "" leaves the header as it is."""
    columns = [(table.column(key), header) for key, header in headers.items()]
    return replace(table, columns=[replace(one, header=header or one.header)
                                   for one, header in columns])  # fmt: skip


def accuracy_table(tables: AnalysisTables) -> Table:
    """Return the accuracy per test language under each view, with the numbers of examples."""
    summary, table = tables.summary, accuracy(tables)
    rows = table.rows[~table.rows["view"].isin(_SAME_TEST_MASK)] if len(table.rows) else table.rows
    languages = summary["languages"]["test"]
    wide, columns = pd.DataFrame({"language": languages}), []
    if len(rows):
        spread_table = _by_model_and_view(table, rows, "language", "accuracy")
        wide = spread_table.rows.set_index("language").reindex(languages).reset_index()
        columns = list(spread_table.columns)[1:]
    wide["majority"] = [summary["accuracy"]["majority"][language] for language in languages]
    wide["train"] = [summary["num_train"].get(language, 0) for language in languages]
    wide["test"] = [summary["num_test"][language] for language in languages]
    columns = [
        Column("language", "language", is_number=False),
        *columns,
        Column("majority", "most frequent label", _percent),
        Column("train", "training", "{:,}".format, group="Examples"),
        Column("test", "test", "{:,}".format, group="Examples"),
    ]
    return Table("accuracy", wide, columns)


def _by_model_and_view(
    table: Table, rows: pd.DataFrame, index: str, key: str, more: Sequence[str] = ()
) -> Table:
    """Return a table with a column of `key` per model and view, below the name of the model."""
    wide, spread_columns = spread(rows, index, ["model", "view"], table.column(key), more)
    columns = [table.column(index)]
    for (model, view), column in spread_columns.items():
        group, header = words.MODEL_NAMES[model], words.view_name(view)
        columns.append(replace(column, header=header, group=group))
    return replace(table, rows=wide, columns=columns)


def planted_table(tables: AnalysisTables) -> Table | None:
    """Return the answers to the questions whose right answers are known, per model and view."""
    rows = tables.table("planted")
    if not len(rows):
        return None
    table = table_of(tables, "planted", rows)
    table = _by_model_and_view(table, rows, "question", "value", ["right", "chance"])
    expected = rows.groupby("question")["expected"].first()
    question, *columns = table.columns
    question = replace(question, note=lambda row: f"expected: {expected[row['question']]}")

    def verdict(key: str, row: Row) -> str:
        right = "right" if row[f"{key}_right"] else "wrong"
        return f"{right}; by chance {words.number(row[f'{key}_chance'], 3)}"

    columns = [replace(column, note=partial(verdict, column.key)) for column in columns]
    ordered = table.rows.set_index("question").reindex(words.QUESTIONS).dropna(how="all")
    caption = f"{rows['right'].sum()} of {len(rows)} answers are right."
    return Table("planted", ordered.reset_index(), [question, *columns], caption)


def fidelity_table(tables: AnalysisTables) -> Table | None:
    """Return the agreement of projected with exact scores, per model."""
    if not tables.certificates:
        return None
    table = selected(
        fidelity(tables),
        {"model": "", "spearman": "Spearman", "pearson": "Pearson",
         "top_k_overlap": "same strongest", "share_error_mean": "mean share error",
         "share_error_largest": "largest share error", "rmse": "RMSE of a score"},
    )  # fmt: skip

    def passed(row: Row) -> str:
        verdict = "passed" if row["passed"] else "not passed"
        return f"{verdict}: Spearman of {row['least_spearman']} required"

    model, *columns = table.columns
    return replace(table, columns=[replace(model, note=passed), *columns])


def changes_table(tables: AnalysisTables) -> Table | None:
    """Return the changes in own-language share between views and models."""
    if not tables.summary["changes"]:
        return None
    table = summary_table(tables, "changes")
    records = table.rows.to_dict("records")
    rows = table.rows.assign(
        models=[words.change_heading(row) for row in records],
        views=[words.change_title(row) for row in records],
    )

    def tested(measure: str, row: Row) -> str:
        return words.tested(words.of_measure(row, measure))

    columns = [Column("models", "model", is_number=False), Column("views", "view", is_number=False)]
    for measure, header in (("share_positive", "proponents"), ("share_negative", "opponents")):
        column = replace(table.column(measure), header=f"among {header}", unit="")
        group = "Change in own-language share (percentage points)"
        columns.append(replace(column, group=group, note=partial(tested, measure)))
    return replace(table, rows=rows, columns=columns)


def translations_table(tables: AnalysisTables) -> Table | None:
    """Return the strength of the test examples' translations, and the shares without them."""
    translations = tables.summary.get("same_group")
    if not translations:
        return None
    rows = flat(translations["views"])
    titles = [words.view_title(view["model"], view["view"]) for view in translations["views"]]
    table = table_of(tables, "translations", rows.assign(influence=titles))

    def null(kind: str, row: Row) -> str:
        return f"null share {words.percent(row[f'{kind}_null_share'])}"

    def tested(row: Row) -> str:
        return words.tested(words.of_measure(row, "change_share_positive"))

    columns = [table.column("influence")]
    group = "Own translation, if there is one, is"
    for key, header in (("strongest", "strongest proponent"),
                        ("within_k", f"among the {tables.summary['k']} strongest")):  # fmt: skip
        columns.append(Column(key, header, _percent, "%", group=group))
    if "change_share_positive" in table.rows:
        shared: dict[str, Any] = {"group": "Own-language share among proponents", "unit": "%"}
        for kind, header in (("with", "with translations"), ("without", "without")):
            column = replace(table.column(f"{kind}_share_positive"), header=header, write=_percent)
            columns.append(replace(column, **shared, note=partial(null, kind)))
        change = replace(table.column("change_share_positive"), header="change", note=tested)
        columns.append(replace(change, **shared | {"unit": "points"}, write=words.points))
    return replace(table, columns=columns)


def thresholds_table(tables: AnalysisTables) -> Table | None:
    """Return the heads kept at each of a run's thresholds; None if there is only one."""
    kept: list[dict[str, Any]] = []
    for language, entry in tables.run.subnetworks.items():
        files = (tables.run.path / "subnetworks" / "thresholds").glob(f"*/{language}.json")
        masks = {one["threshold"]: one["mask"] for one in (entry, *map(read_json, files))}
        kept.append({"language": language} | {str(t): np.sum(masks[t]) for t in sorted(masks)})
    thresholds = sorted({key for row in kept for key in row} - {"language"}, key=float)
    if len(thresholds) < 2:
        return None
    columns = [Column("language", "language", is_number=False)]
    columns += [
        Column(
            threshold, f"{float(threshold):.0%}", fixed(digits=0), group="Heads kept at threshold"
        )
        for threshold in thresholds
    ]
    return Table("thresholds", pd.DataFrame(kept), columns)


def heads_table(tables: AnalysisTables) -> Table | None:
    """Return the number of heads that all, one or none of the languages keep."""
    heads = tables.summary["heads"]
    if not heads:
        return None
    names = {"used_by_all": "kept by every language", "used_by_one": "kept by exactly one",
             "used_by_none": "kept by none"}  # fmt: skip
    rows = [
        {"name": name, "heads": heads[key], "expected": heads[f"expected_{key}"]}
        for key, name in names.items()
    ]
    columns = [
        Column("name", f"of {heads['heads']} heads", is_number=False),
        Column("heads", "number", fixed(digits=0)),
        Column("expected", "by chance", fixed(digits=1)),
    ]
    return Table("heads", pd.DataFrame(rows), columns)


def similarity_table(tables: AnalysisTables) -> Table | None:
    """Return the similarity of the subnetworks of each pair of languages; None without pairs."""
    rows = tables.table("similarity")
    if not len(rows):
        return None
    table = selected(
        table_of(tables, "similarity", rows),
        {"shared_heads": "", "jaccard": "Jaccard", "expected_jaccard": "", "corrected_jaccard": "",
         "chance_probability": "probability of as many by chance"},
    )  # fmt: skip
    rows = rows.assign(
        pair=rows["language_a"] + "\N{EN DASH}" + rows["language_b"],
        heads=rows["heads_a"].astype(str) + ", " + rows["heads_b"].astype(str),
    )
    columns = [Column("pair", "pair", is_number=False), Column("heads", "heads"), *table.columns]
    return replace(table, rows=rows, columns=columns)


def tests_table(tables: AnalysisTables, name: str) -> Table | None:
    """Return the Mantel tests of summary.json; None if there are none."""
    if not tables.summary[name]:
        return None
    headers = {"model": "", "view": "", "measure": ""}
    headers |= {"metric": "distance"} if name == "distance_influence" else {}
    headers |= {"correlation": "Spearman", "p_value": "p", "p_adjusted": "adjusted p"}
    return selected(summary_table(tables, name), headers)


def blocks_table(tables: AnalysisTables) -> Table | None:
    """Return the shares of influence through heads, rest of the layers, and outside of them."""
    if not tables.summary["blocks"]:
        return None
    table = selected(
        summary_table(tables, "blocks"),
        {"model": "", "view": "", "kind": "between", "heads": "through the heads",
         "layers": "through the rest of the layers", "outside": "outside the layers"},
    )  # fmt: skip
    group = "Share of mean influence that flows"
    columns = [replace(one, group=group) if one.is_number else one for one in table.columns]
    return replace(table, columns=columns)


# --- retraining -----------------------------------------------------------------------------


def retraining_overview(tables: AnalysisTables) -> Table:
    """Return per method its score, the effect of removals, and its predictions of languages."""
    lds, removal = (tables.retraining_table(name) for name in ("lds", "removal"))
    tests = retraining_table(tables, "leave_one_out_tests").rows
    sides = {side: side for side in SIDES} | {RANDOM: "random examples"}
    parts = [_over_all(lds, "Linear datamodeling score", "level", "value",
                       {"example": "test examples", "language": "test languages"})]  # fmt: skip
    if len(removal):
        group = "Change in mean loss without the strongest"
        parts.append(_over_all(removal, group, "side", "loss_change", sides))
    if len(tests):
        parts.append(_over_all(tests, "Language left out, Spearman", "between_only", "correlation",
                               {False: "all cells", True: "two languages"}))  # fmt: skip
    rows = pd.concat(parts).reindex(columns=[*parts[0].columns, "p_value"])
    value = Column("value", "value", ends=("low", "high"))
    wide, spread_columns = spread(rows, "method", ["group", "header"], value, ["p_value"])

    def p_value(key: str, row: Row) -> str:
        return "" if pd.isna(row[f"{key}_p_value"]) else words.p_value(row[f"{key}_p_value"])

    columns = [Column("method", "scores", method_name, is_number=False)]
    for (group, header), column in spread_columns.items():
        write, note = fixed(signed=group.startswith("Change")), partial(p_value, column.key)
        columns.append(replace(column, header=header, group=group, write=write, note=note))
    return Table("retraining", wide, columns)


def _over_all(
    rows: pd.DataFrame, group: str, across: str, key: str, headers: Mapping[Any, str]
) -> pd.DataFrame:
    """Return the rows over all test languages as `value`, `low` and `high` under headers."""
    rows = rows[rows["test_language"].isna()] if "test_language" in rows else rows
    rows = rows.rename(columns={key: "value", f"{key}_low": "low", f"{key}_high": "high"})
    return rows.assign(group=group, header=rows[across].map(headers))


def lds_by_language(tables: AnalysisTables, level: str) -> Table:
    """Return the linear datamodeling score of each method by test language."""
    lds = retraining_table(tables, "lds")
    rows = lds.rows[(lds.rows["level"] == level) & lds.rows["test_language"].notna()]
    wide, columns = spread(rows, "method", ["test_language"], lds.column("value"))
    method = Column("method", "scores", method_name, is_number=False)
    return Table("lds_by_language", wide, [method, *columns.values()])
