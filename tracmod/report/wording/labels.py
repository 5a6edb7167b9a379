"""The words and number formats of the report: models, views, measures, percentages, units."""

from __future__ import annotations

import math
from typing import Any

from tracmod.analysis.results import view_kind

# A change is called one where its adjusted p is at most this, and its interval leaves out 0.
LEVEL = 0.05
MODEL_NAMES = {"full": "Full fine-tuning", "sparse": "Sparse fine-tuning"}
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
MEASURE_NAMES = {
    "share_positive": "Proponents",
    "share_negative": "Opponents",
    "mean_influence": "Mean influence",
}


def view_title(model: str, view: str) -> str:
    """`Full fine-tuning, own subnetwork`; `random-3` and the like by their kind and number."""
    kind = view_kind(view)
    rest = view.removeprefix(kind).removeprefix("-")
    detail = f" {rest}" if rest else ""
    return f"{MODEL_NAMES.get(model, model)}, {VIEW_NAMES.get(kind, kind)}{detail}"


def change_heading(row: dict[str, Any]) -> str:
    """The models compared: `Full fine-tuning`, `Sparse - full fine-tuning`."""
    if row["model"] == row["base_model"]:
        return MODEL_NAMES[row["model"]]
    first = MODEL_NAMES[row["model"]].split()[0]
    return f"{first} \N{MINUS SIGN} {MODEL_NAMES[row['base_model']].lower()}"


def change_title(row: dict[str, Any]) -> str:
    """The views compared: `own subnetwork - all heads`, or the one view of both models."""
    view, base_view = VIEW_NAMES[row["view"]], VIEW_NAMES[row["base_view"]]
    if view == base_view:
        return view
    if row["model"] != row["base_model"]:
        view, base_view = f"{view} ({row['model']})", f"{base_view} ({row['base_model']})"
    return f"{view} \N{MINUS SIGN} {base_view}"


def verdict(text: str) -> tuple[str, str]:
    """A finding's first sentence, and the rest."""
    first, stop, rest = text.partition(". ")
    return first + stop.strip(), rest


def percent(share: float | None, digits: int = 1) -> str:
    """0.2034 -> 20.3%."""
    return "-" if share is None else f"{100 * share:.{digits}f}%"


def points(difference: float, digits: int = 1) -> str:
    """0.031 -> +3.1, with a true minus sign; percentage points."""
    rounded = round(100 * difference, digits) + 0.0
    return f"{rounded:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def percent_interval(entry: dict[str, float]) -> str:
    """`37.9% (35.0 to 40.8)`."""
    return f"{percent(entry['value'])} ({100 * entry['low']:.1f} to {100 * entry['high']:.1f})"


def points_interval(entry: dict[str, Any]) -> str:
    """`+3.1 points (+1.0 to +5.2; adjusted p = 0.004, d = 0.31)`: a change and its test."""
    interval = f"{points(entry['low'])} to {points(entry['high'])}"
    return f"{points(entry['value'])} points ({interval}; adjusted {tested(entry)})"


def is_clear(entry: dict[str, Any]) -> bool:
    """Whether a change can be told from none: by its adjusted p and by its interval."""
    p_adjusted = entry["p_adjusted"]
    outside = entry["low"] > 0 or entry["high"] < 0
    return outside and p_adjusted is not None and p_adjusted <= LEVEL


def tested(entry: dict[str, Any]) -> str:
    """`p = 0.004, d = 0.31`: adjusted p and effect size of a change."""
    p_adjusted = entry["p_adjusted"]
    p_text = "p: no test" if p_adjusted is None else p_value(p_adjusted)
    return f"{p_text}, d = {number(entry['effect_size'])}"


def number(value: float | None, digits: int = 2) -> str:
    """A plain number with a true minus sign; `-` for none."""
    if value is None:
        return "-"
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def p_value(p: float) -> str:
    """`p = 0.033`, `p < 0.001`."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def power_of_ten(largest: float) -> int:
    """Exponent by which numbers up to `largest` are divided to be read as 1 to 10."""
    return math.floor(math.log10(largest)) if largest > 0 else 0


def superscript(exponent: int) -> str:
    """-5 -> superscript characters."""
    return str(exponent).translate(str.maketrans("-0123456789", "\N{SUPERSCRIPT MINUS}⁰¹²³⁴⁵⁶⁷⁸⁹"))


def seconds(value: float) -> str:
    """`12.3 s`, `4 min 05 s`, `2 h 10 min`."""
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def metric(preconditioner: str) -> str:
    """What gradients are compared in, to come after "TracIn"; nothing where they are plain."""
    names = {"adam": " in the metric of Adam's steps", "ekfac": " in the metric of EK-FAC"}
    return names.get(preconditioner, "")


def influence_unit(influence: dict[str, Any]) -> str:
    """Unit of a score, from the run's `influence` section."""
    weight = "learning rate" if influence.get("weights") != "uniform" else ""
    if influence.get("normalize", "cosine") == "cosine":
        return f"cosine × {weight}" if weight else "cosine, summed over checkpoints"
    return "loss" if weight else "loss / learning rate"
