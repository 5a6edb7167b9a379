"""Names and number formats of the report: models, views, measures, percentages, units."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tracmod.analysis.results import view_kind

MINUS = "\N{MINUS SIGN}"
# A change is clear if its adjusted p is at most this and its interval excludes 0.
LEVEL = 0.05
MODEL_NAMES = {
    "full": "Full fine-tuning",
    "sparse": "Sparse fine-tuning",
    "untrained": "Before fine-tuning",
}
VIEW_NAMES = {
    "full": "all heads",
    "subnetwork": "own subnetwork",
    "subnetwork-own": "each example's own subnetwork",
    "subnetwork-test": "subnetwork on the test side",
    "random": "random masks",
    "random-own": "each language's own random mask",
    "other": "other subnetworks",
    "union": "union of two subnetworks",
    "intersection": "intersection of two subnetworks",
}
# What the score of a task that is not one of classes of texts is about -> what it counts.
SCORES = {
    "entities": "F1 of the entities, both borders and the type of which have to be right",
    "words": "Accuracy of the tags of words",
    "answers": "Mean F1 of the tokens of the answers",
}
MEASURE_NAMES = {
    "share_positive": "Proponents",
    "share_negative": "Opponents",
    "mean_influence": "Mean influence",
}
# Questions of the task `planted`, whose answers are known.
QUESTIONS = {
    "duplicates": "Share of duplicated test examples whose duplicate is the strongest proponent",
    "flipped_by_self_influence": "Mislabeled training examples found by self-influence (AUC)",
    "flipped_by_opponents": "Mislabeled training examples found as opponents (AUC)",
    "relatedness": "Agreement of the shares between languages with their relatedness (Spearman)",
    "loan": "Rise of the share of the one language that teaches a word, in examples that need it",
    "isolated": "Own-language share among the proponents of the isolated language",
    "cipher": "Share of base among the proponents of cipher, which is base in other letters",
}
_PRECONDITIONERS = {"adam": "Adam", "ekfac": "EK-FAC"}


def view_name(view: str) -> str:
    """Return a view in words; draws such as `random-3` by their kind and number."""
    kind = view_kind(view)
    draw = view.removeprefix(kind).removeprefix("-")
    return f"{VIEW_NAMES.get(kind, kind)} {draw}".rstrip()


def view_title(model: str, view: str) -> str:
    """Return a model and a view in words: `Full fine-tuning, own subnetwork`."""
    return f"{MODEL_NAMES.get(model, model)}, {view_name(view)}"


def measure_id(measure: str) -> str:
    """Return a measure as file names have it: `proponents`, `opponents` or `mean-influence`."""
    return MEASURE_NAMES[measure].lower().replace(" ", "-")


def influence_method(preconditioner: str) -> str:
    """Return how influence is computed: `TracIn` or `TracIn, EK-FAC preconditioner`."""
    name = _PRECONDITIONERS.get(preconditioner)
    return f"TracIn, {name} preconditioner" if name else "TracIn"


def change_heading(row: Mapping[str, Any]) -> str:
    """Return the models compared: `Full fine-tuning`, `Sparse - full fine-tuning`."""
    if row["model"] == row["base_model"]:
        return MODEL_NAMES[row["model"]]
    first = MODEL_NAMES[row["model"]].split()[0]
    return f"{first} \N{MINUS SIGN} {MODEL_NAMES[row['base_model']].lower()}"


def change_title(row: Mapping[str, Any]) -> str:
    """Return the views compared: `own subnetwork - all heads`, or the view of both models."""
    view, base_view = VIEW_NAMES[row["view"]], VIEW_NAMES[row["base_view"]]
    if view == base_view:
        return view
    if row["model"] != row["base_model"]:
        view, base_view = f"{view} ({row['model']})", f"{base_view} ({row['base_model']})"
    return f"{view} \N{MINUS SIGN} {base_view}"


def verdict(text: str) -> tuple[str, str]:
    """Return the first sentence of a finding, and the rest."""
    first, stop, rest = text.partition(". ")
    return first + stop.strip(), rest


def percent(share: float | None, digits: int = 1) -> str:
    """Return a share in percent: 0.2034 is 20.3%, None is `-`."""
    return "-" if share is None else f"{number(100 * share, digits)}%"


def points(difference: float, digits: int = 1) -> str:
    """Return a difference of shares in percentage points: 0.031 is +3.1."""
    rounded = round(100 * difference, digits) + 0.0
    return f"{rounded:+.{digits}f}".replace("-", MINUS)


def percent_interval(entry: dict[str, float]) -> str:
    """Return a share and its interval: `37.9% (35.0 to 40.8)`."""
    return f"{percent(entry['value'])} ({100 * entry['low']:.1f} to {100 * entry['high']:.1f})"


def of_measure(change: Mapping[str, Any], measure: str) -> dict[str, Any]:
    """Return one measure's columns of changes.parquet, under their names in summary.json."""
    names = ("low", "high", "p_adjusted", "effect_size")
    values = {name: change[f"{measure}_{name}"] for name in names}
    # Missing results of a test are None in summary.json and NaN in tables.
    return values | {key: None for key in names[2:] if values[key] != values[key]}


def is_clear(entry: Mapping[str, Any]) -> bool:
    """Return whether a change is clear: by its adjusted p and by its interval."""
    p_adjusted = entry["p_adjusted"]
    outside = entry["low"] > 0 or entry["high"] < 0
    return bool(outside and p_adjusted is not None and p_adjusted <= LEVEL)


def tested(entry: Mapping[str, Any]) -> str:
    """Return adjusted p and effect size of a change: `p = 0.004, d = 0.31`."""
    p_adjusted = entry["p_adjusted"]
    p_text = "p: no test" if p_adjusted is None else p_value(p_adjusted)
    return f"{p_text}, d = {number(entry['effect_size'])}"


def number(value: float | None, digits: int = 2, signed: bool = False) -> str:
    """Return a number with a true minus sign, and `+` if wanted; `-` for None."""
    if value is None:
        return "-"
    rounded = round(value, digits) + 0.0
    return f"{rounded:{'+' if signed and rounded else ''}.{digits}f}".replace("-", MINUS)


def p_value(p: float) -> str:
    """Return a p-value: `p = 0.033` or `p < 0.001`."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def power_of_ten(largest: float) -> int:
    """Return the exponent of ten by which numbers up to `largest` become numbers up to 10."""
    return math.floor(math.log10(largest)) if largest > 0 else 0


def superscript(exponent: int) -> str:
    """Return an exponent in superscript characters."""
    return str(exponent).translate(str.maketrans("-0123456789", "\N{SUPERSCRIPT MINUS}⁰¹²³⁴⁵⁶⁷⁸⁹"))


def seconds(value: float) -> str:
    """Return a duration: `12.3 s`, `4 min 05 s` or `2 h 10 min`."""
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def influence_unit(influence: dict[str, Any]) -> str:
    """Return the unit of a score, from the configuration's section `influence`."""
    weight = "learning rate" if influence.get("weights") != "uniform" else ""
    if influence.get("normalize", "cosine") == "cosine":
        return f"cosine × {weight}" if weight else "cosine, summed over checkpoints"
    return "loss" if weight else "loss / learning rate"
