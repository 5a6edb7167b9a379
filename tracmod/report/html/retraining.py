"""The report's section on retraining, from the run folder's retraining/."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from tracmod.analysis.results import RunResults
from tracmod.files.durable import read_json
from tracmod.report.html.plotly_plots import Figure, Legend, Panel, heatmap
from tracmod.report.wording.labels import number, p_value, percent, power_of_ten, superscript
from tracmod.validation.retraining import HALF_OF_SEEDS, RANDOM, SIDES

Row = dict[str, Any]
METHOD_NAMES = {
    "tracin": "Influence, as in this report",
    "tracin-dot": "TracIn, inner products",
    "tracin-cosine": "TracIn, cosines",
    "adam": "TracIn in Adam's metric",
    "ekfac": "TracIn in EK-FAC's metric",
    "ekfac-last": "EK-FAC, last checkpoint",
    "bm25": "BM25",
    "embedding": "Embedding similarity",
    "random": "Random",
    HALF_OF_SEEDS: "Half of the seeds",
}
# A rank correlation below this leaves more than nine tenths of the ranks' variance unexplained.
LOW = 0.3


def retraining_section(run: RunResults) -> Row | None:
    """What the page shows; None where nothing was to be trained again.

    `sentences`; `rows` of the table of methods; `languages` and `by_language`, rows of the LDS of
    each test language; `panels`; `summary` as in retraining/summary.json.
    """
    folder = run.path / "retraining"
    # A config that no longer asks for it leaves the results of an earlier one where they are.
    if run.settings.get("config", {}).get("retrain") is None:
        return None
    summary = read_json(folder / "summary.json")
    lds, removal, cells = (_rows(folder, name) for name in ("lds", "removal", "leave_one_out"))
    methods = list(dict.fromkeys(row["method"] for row in lds))
    languages = [row["test_language"] for row in lds[1:] if row["test_language"] is not None]
    return {
        "summary": summary,
        "half_of_seeds": METHOD_NAMES[HALF_OF_SEEDS],
        "sentences": sentences(summary, lds, removal),
        "rows": [_method_row(method, summary, lds, removal) for method in methods],
        "languages": list(dict.fromkeys(languages)),
        "by_language": [
            {
                "name": METHOD_NAMES.get(method, method),
                "level": level,
                "cells": {
                    row["test_language"]: row
                    for row in lds
                    if (row["method"], row["level"]) == (method, level)
                },
            }
            for level in ("example", "language")
            for method in methods
        ],
        "panels": [*_leave_one_out_panels(cells), *_removal_panels(removal)],
    }


def _rows(folder: Path, name: str) -> list[Row]:
    file = folder / f"{name}.parquet"
    return pq.read_table(file).to_pylist() if file.is_file() else []


def _method_row(method: str, summary: Row, lds: list[Row], removal: list[Row]) -> Row:
    """A method's numbers, each None where it has none."""
    tests = {
        test["between_only"]: test for test in summary["leave_one_out"] if test["method"] == method
    }
    sides = (RANDOM,) if method == RANDOM else SIDES
    return {
        "name": METHOD_NAMES.get(method, method),
        "example": _find(lds, method=method, level="example", test_language=None),
        "language": _find(lds, method=method, level="language", test_language=None),
        "removals": {
            side: _find(removal, method=method, side=side, test_language=None) for side in sides
        },
        "cells": tests.get(False),
        "between": tests.get(True),
    }


def _find(rows: Sequence[Row], **wanted: Any) -> Row | None:
    return next((row for row in rows if wanted.items() <= row.items()), None)


# --- words ----------------------------------------------------------------------------------


def sentences(summary: Row, lds: list[Row], removal: list[Row]) -> list[str]:
    """What was done and what came out, from the numbers."""
    number_of_seeds = summary["settings"]["seeds"]
    seeds = "one seed" if number_of_seeds == 1 else f"{number_of_seeds} seeds"
    texts = [
        f"The full model was trained again {summary['trainings']:,} times, on parts of its "
        f"{summary['num_train']:,} training examples: from the same initial weights, with the same "
        f"settings and epochs, hence with fewer steps, and with {seeds} of order and dropout for "
        f"each part."
    ]
    main = summary["methods"][0]
    texts += [_lds(summary, lds, main), _by_language(lds, main)]
    texts += [_removal(removal, main), _leave_one_out(summary, main)]
    return [text for text in texts if text]


def _lds(summary: Row, lds: list[Row], main: str) -> str:
    asked = summary["settings"]
    example = {"level": "example", "test_language": None}
    own, ceiling = (_find(lds, method=one, **example) for one in (main, HALF_OF_SEEDS))
    assert own is not None
    text = (
        f"Linear datamodelling score: over {asked['subsets']} random subsets of "
        f"{percent(asked['fraction'], 0)} of the training examples, the sum of the scores of those "
        f"in it ({_name(main)}) and the test example's loss agree in rank to {_interval(own)} on "
        f"average; 1 would be a perfect order, 0 none."
    )
    others = [row for row in lds if example.items() <= row.items() and row not in (own, ceiling)]
    if others:
        listed = [f"{_name(row['method'])} {_interval(row)}" for row in others]
        text += f" Beside it: {'; '.join(listed)}."
        better = [row for row in others if row["over_first_low"] > 0]
        if better:
            by = [
                f"{_name(row['method'])} (by {number(row['over_first'])}, "
                f"{number(row['over_first_low'])} to {number(row['over_first_high'])})"
                for row in sorted(better, key=lambda row: -row["over_first"])
            ]
            text += f" Clearly better than {_name(main)}: {', '.join(by)}."
    if ceiling is not None:
        text += f" {_ceiling(ceiling['value'])}"
    if own["low"] <= 0:
        text += f" That of {_name(main)} cannot be told from 0."
    plain = main.startswith("tracin") and summary.get("preconditioner", "none") == "none"
    if own["value"] < LOW and plain:
        text += (
            " First-order scores have had low values everywhere they were measured, and have one "
            "here: they tell little of what one example's loss will be after retraining."
        )
    return text


def _ceiling(agreement: float) -> str:
    """How far losses can be predicted at all: Spearman-Brown, and the root of the reliability."""
    text = f"The losses of one half of the seeds predict those of the other to {number(agreement)}"
    if agreement <= 0:
        return (
            f"{text}: the losses are mostly chance, and with so few seeds no score can be judged."
        )
    reachable = math.sqrt(2 * agreement / (1 + agreement))
    return f"{text}, so that a perfect prediction would reach about {number(reachable)}."


def _by_language(lds: list[Row], main: str) -> str:
    own = _find(lds, method=main, level="language", test_language=None)
    assert own is not None
    return (
        f"Of the mean loss of a whole test language, which the tables of influence between "
        f"languages rest on, the same agreement is {_interval(own)}"
        f"{', which cannot be told from 0' if own['low'] <= 0 else ''}."
    )


def _removal(removal: list[Row], main: str) -> str:
    found = {
        row["side"]: row
        for row in removal
        if row["test_language"] is None and row["method"] in (main, RANDOM)
    }
    if not found.keys() >= {*SIDES, RANDOM}:
        return ""
    texts = [
        f"{name} {_change(found[side], 'loss')}"
        for side, name in (
            (SIDES[0], f"without the {found[SIDES[0]]['removed']:,} strongest proponents of a test "
             "language its mean loss changes by"),
            (SIDES[1], "without as many opponents by"),
            (RANDOM, "without as many drawn at random by"),
        )
    ]  # fmt: skip
    proponents, opponents, random = (found[side] for side in (*SIDES, RANDOM))
    if proponents["loss_change_low"] is None:
        verdict = "One seed: no verdict."
    elif proponents["loss_change_low"] > random["loss_change_high"]:
        verdict = "Removing proponents does more harm than removing others, as influence says."
    elif proponents["loss_change_high"] < random["loss_change_low"]:
        verdict = "Removing proponents does less harm than removing others, against the scores."
    else:
        verdict = "Removing proponents is not clearly different from removing others."
    high, random_low = opponents["loss_change_high"], random["loss_change_low"]
    if high is not None and high < min(0.0, random_low):
        verdict += " Removing opponents lowers the loss, as influence says."
    return f"Removal ({_name(main)}): {', '.join(texts)}. {verdict}"


def _leave_one_out(summary: Row, main: str) -> str:
    tests = summary["leave_one_out"]
    found = {t["between_only"]: t for t in tests if t["method"] == main}
    if not found or found[False]["correlation"] is None:
        return ""
    text = (
        f"Without one training language: the predicted and the actual change of every test "
        f"language's mean loss agree in rank to {number(found[False]['correlation'])} "
        f"({p_value(found[False]['p_value'])})"
    )
    if found[True]["correlation"] is not None:
        text += (
            f", and without the effect of a language on itself to "
            f"{number(found[True]['correlation'])} ({p_value(found[True]['p_value'])})"
        )
    tried = f"{found[False]['permutations']:,}"
    orders = f"all {tried} orders" if found[False]["exact"] else f"{tried} random orders"
    return f"{text}. p is from {orders} of the languages."


def _name(method: str) -> str:
    return METHOD_NAMES.get(method, method)


def _interval(row: Row) -> str:
    return f"{number(row['value'])} ({number(row['low'])} to {number(row['high'])})"


def _change(row: Row, name: str) -> str:
    value, low, high = (row[f"{name}_change{end}"] for end in ("", "_low", "_high"))
    return signed(value) + ("" if low is None else f" ({signed(low)} to {signed(high)})")


def signed(value: float) -> str:
    """`+0.013`, with a true minus sign."""
    return f"{round(value, 3) + 0.0:+.3f}".replace("-", "\N{MINUS SIGN}")


# --- figures --------------------------------------------------------------------------------


def _leave_one_out_panels(rows: list[Row]) -> list[Panel]:
    """What leaving a language out did, beside what each method predicts."""
    if not rows:
        return []
    of_method: dict[str, list[Row]] = {}
    for row in rows:
        of_method.setdefault(row["method"], []).append(row)
    first = next(iter(of_method.values()))
    figures = [_matrix("What happened: change of mean loss", first, "actual")]
    figures += [
        _matrix(f"Predicted: {_name(method)}", own, "predicted")
        for method, own in of_method.items()
    ]
    note = (
        "Rows: test language; columns: the training language left out. Predicted: the sum of the "
        "scores of its training examples, in the method's own unit; each matrix has its own scale."
    )
    legend = Legend("diverging", "loss falls", "loss rises", (0.5, "0"))
    in_rows = [("", figures[start : start + 3]) for start in range(0, len(figures), 3)]
    return [Panel("Languages left out", in_rows, legend, note)]


def _matrix(title: str, rows: list[Row], value: str) -> Figure:
    tested, trained = (
        list(dict.fromkeys(row[f"{side}_language"] for row in rows)) for side in ("test", "train")
    )
    values = np.array([row[value] for row in rows]).reshape(len(tested), len(trained))
    return _diverging(title, values, tested, trained, ("language left out", "test language"))


def _diverging(
    title: str,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    axes: tuple[str, str],
) -> Figure:
    """A matrix around 0, divided by a power of ten where its numbers are hard to read."""
    top = float(np.abs(values).max())
    exponent = power_of_ten(top) if top > 0 and not 0.1 <= top < 10 else 0
    scaled = values * 10.0**-exponent
    hover = [
        [f"{axes[1]} {row}<br>{axes[0]} {column}<br>{value:.3g}"
         for column, value in zip(columns, line, strict=True)]
        for row, line in zip(rows, values, strict=True)
    ]  # fmt: skip
    limit = top * 10.0**-exponent or 1.0
    return heatmap(
        f"{title} (× 10{superscript(exponent)})" if exponent else title,
        scaled,
        [[number(value) for value in line] for line in scaled],
        hover,
        rows,
        columns,
        scale="diverging",
        limits=(-limit, limit),
        axes=axes,
    )


def _removal_panels(rows: list[Row]) -> list[Panel]:
    """Change of loss and accuracy of each test language, without each method's strongest."""
    own = [row for row in rows if row["test_language"] is not None]
    if not own:
        return []
    languages = list(dict.fromkeys(row["test_language"] for row in own))
    names = [
        "drawn at random" if side == RANDOM else f"{side}, {_name(method)}"
        for method, side in dict.fromkeys((row["method"], row["side"]) for row in own)
    ]
    figures = []
    for title, key in (
        ("Change of mean loss", "loss_change"),
        ("Change of accuracy, points", "accuracy_change"),
    ):
        factor = 100.0 if key == "accuracy_change" else 1.0
        changes = np.array([row[key] for row in own]).reshape(len(names), len(languages))
        values = np.round(factor * changes, 9)  # what rounding leaves of equal numbers is none
        figures.append(_diverging(title, values, names, languages, ("test language", "without")))
    note = (
        f"Without the {own[0]['removed']:,} training examples of the highest (proponents) or "
        "lowest (opponents) mean score on a test language's examples; against the model trained on "
        "all."
    )
    return [Panel("Strongest examples left out", [("", figures)], note=note)]
