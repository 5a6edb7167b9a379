"""Sentences about the comparison of influence with actual retraining."""

from __future__ import annotations

import math
from typing import Any

from tracmod.report.wording.labels import number, p_value, percent
from tracmod.validation.retraining import HALF_OF_SEEDS, RANDOM, SIDES

Row = dict[str, Any]
METHOD_NAMES = {
    "tracin": "TracIn as in this run",
    "tracin-dot": "TracIn, inner product",
    "tracin-cosine": "TracIn, cosine",
    "adam": "TracIn, Adam preconditioner",
    "ekfac": "TracIn, EK-FAC preconditioner",
    "ekfac-last": "EK-FAC, last checkpoint",
    "metagradient": "Metagradient",
    "bm25": "BM25",
    "embedding": "Embedding similarity",
    "random": "Random",
    HALF_OF_SEEDS: "Half of the seeds",
}
# With a rank correlation below this, more than nine tenths of the ranks' variance is unexplained.
_LOW = 0.3


def method_name(method: str) -> str:
    """Return a method of scoring in words."""
    return METHOD_NAMES.get(method, method)


def sentences(summary: Row, lds: list[Row], removal: list[Row]) -> list[str]:
    """Return what was retrained and what it showed.

    Args:
        summary: content of retraining/summary.json.
        lds, removal: rows of these tables.
    """
    number_of_seeds = summary["settings"]["seeds"]
    seeds = "one seed" if number_of_seeds == 1 else f"{number_of_seeds} seeds"
    main = summary["methods"][0]
    same = summary["settings"].get("batches") == "same"
    steps = (
        "steps; examples that are left out have weight 0 in their batches"
        if same
        else "epochs, hence fewer steps"
    )
    texts = [
        f"The full model was trained again {summary['trainings']:,} times, on parts of its "
        f"{summary['num_train']:,} training examples. Each training started from the same initial "
        f"weights and had the same settings and {steps}. Each part was trained "
        f"with {seeds}, which set the order of the examples and dropout.",
        _lds(summary, lds, main),
        _by_language(lds, main),
        _removal(removal, main),
        _leave_one_out(summary, main),
    ]
    return [text for text in texts if text]


def _lds(summary: Row, lds: list[Row], main: str) -> str:
    settings = summary["settings"]
    by_method = {row["method"]: row for row in lds
                 if (row["level"], row["test_language"]) == ("example", None)}  # fmt: skip
    own, ceiling = by_method.pop(main), by_method.pop(HALF_OF_SEEDS, None)
    texts = [
        f"Linear datamodeling score: over {settings['subsets']} random subsets of "
        f"{percent(settings['fraction'], 0)} of the training examples, a test example's loss and "
        "the sum of the scores of the training examples in the subset "
        f"({method_name(main)}) agree with a rank correlation of {_interval(own)} on average. 1 "
        "would be perfect agreement, 0 none."
    ]
    others = list(by_method.values())
    if others:
        shown = [f"{method_name(row['method'])} {_interval(row)}" for row in others]
        texts.append(f"Other methods: {'; '.join(shown)}.")
    better = sorted((row for row in others if row["over_first_low"] > 0),
                    key=lambda row: -row["over_first"])  # fmt: skip
    if better:
        shown = [
            f"{method_name(row['method'])} (by {number(row['over_first'])}, "
            f"{number(row['over_first_low'])} to {number(row['over_first_high'])})"
            for row in better
        ]
        texts.append(f"Clearly better than {method_name(main)}: {', '.join(shown)}.")
    if ceiling is not None:
        texts.append(_ceiling(ceiling["value"]))
    if own["low"] <= 0:
        texts.append(f"The score of {method_name(main)} cannot be distinguished from 0.")
    plain = main.startswith("tracin") and summary.get("preconditioner", "none") == "none"
    if own["value"] < _LOW and plain:
        texts.append(
            "First-order scores have been low wherever they were measured, and are low here: they "
            "say little about the loss of a single example after retraining."
        )
    return " ".join(texts)


def _ceiling(agreement: float) -> str:
    """Return how well losses can be predicted at all.

    The Spearman-Brown formula gives the reliability of the mean over all seeds from the agreement
    of its halves; no prediction correlates better with it than the root of its reliability.
    """
    text = (
        "The losses of one half of the seeds predict those of the other half with a score of "
        f"{number(agreement)}"
    )
    if agreement <= 0:
        return (
            f"{text}: the losses are mostly chance, and with so few seeds no score can be judged."
        )
    reachable = math.sqrt(2 * agreement / (1 + agreement))
    return f"{text}, so a perfect prediction would reach about {number(reachable)}."


def _by_language(lds: list[Row], main: str) -> str:
    own = next(row for row in lds if (row["method"], row["level"], row["test_language"])
               == (main, "language", None))  # fmt: skip
    none = ", which cannot be distinguished from 0" if own["low"] <= 0 else ""
    others = "; ".join(
        f"{method_name(row['method'])} {_interval(row)}" for row in lds
        if (row["level"], row["test_language"]) == ("language", None)
        and row["method"] not in (main, HALF_OF_SEEDS)
    )  # fmt: skip
    return (
        "For the mean loss of a whole test language, on which the tables of influence between "
        f"languages rest, the same agreement is {_interval(own)}{none}."
        f"{f' Other methods: {others}.' if others else ''}"
    )


def _removal(removal: list[Row], main: str) -> str:
    by_side = {row["side"]: row for row in removal
               if row["test_language"] is None and row["method"] in (main, RANDOM)}  # fmt: skip
    if not by_side.keys() >= {*SIDES, RANDOM}:
        return ""
    proponents, opponents, random = (by_side[side] for side in (*SIDES, RANDOM))
    if proponents["loss_change_low"] is None:
        verdict = "One seed allows no verdict."
    elif proponents["loss_change_low"] > random["loss_change_high"]:
        verdict = "Removing proponents does more harm than removing random examples, as predicted."
    elif proponents["loss_change_high"] < random["loss_change_low"]:
        verdict = (
            "Removing proponents does less harm than removing random examples, contrary to the "
            "scores."
        )
    else:
        verdict = "Removing proponents is not clearly different from removing random examples."
    high, random_low = opponents["loss_change_high"], random["loss_change_low"]
    if high is not None and high < min(0.0, random_low):
        verdict += " Removing opponents lowers the loss, as predicted."
    return (
        f"Removal ({method_name(main)}): without the {proponents['removed']:,} strongest "
        f"proponents of a test language, its mean loss changes by {_change(proponents)}; without "
        f"as many opponents, by {_change(opponents)}; without as many random examples, by "
        f"{_change(random)}. {verdict}"
    )


def _leave_one_out(summary: Row, main: str) -> str:
    tests = {test["between_only"]: test for test in summary["leave_one_out"]
             if test["method"] == main}  # fmt: skip
    if not tests or tests[False]["correlation"] is None:
        return ""
    of_all, between = tests[False], tests[True]
    text = (
        "Without one training language: the predicted and the actual change in the mean loss of "
        f"each test language have a rank correlation of {number(of_all['correlation'])} "
        f"({p_value(of_all['p_value'])})"
    )
    if between["correlation"] is not None:
        text += (
            f", and of {number(between['correlation'])} ({p_value(between['p_value'])}) if the "
            "effect of a language on itself is left out"
        )
    orders = f"{of_all['permutations']:,}"
    orders = f"all {orders} orders" if of_all["exact"] else f"{orders} random orders"
    others = "; ".join(
        f"{method_name(test['method'])} {number(test['correlation'])}"
        for test in summary["leave_one_out"]
        if test["method"] != main and not test["between_only"] and test["correlation"] is not None
    )
    text += f". Other methods: {others}" if others else ""
    return f"{text}. p-values are from {orders} of the languages."


def _interval(row: Row) -> str:
    return f"{number(row['value'])} ({number(row['low'])} to {number(row['high'])})"


def _change(row: Row) -> str:
    value, low, high = (
        number(row[f"loss_change{end}"], 3, signed=True) for end in ("", "_low", "_high")
    )
    return value if row["loss_change_low"] is None else f"{value} ({low} to {high})"
