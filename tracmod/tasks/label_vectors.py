"""Labels that are lists: several labels of one text, or several targets."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from tracmod.choices import LossKind

NO_LABEL = "none"  # shown where none of several labels holds
LARGEST_TARGET = 3.4028234e38  # of float32, in which losses are computed


def label_list_text(label: Any, class_names: Sequence[str] | None) -> str | None:
    """Return a label of a file as JSON text if it is a list, else None.

    Args:
        label: the label.
        class_names: the names of the numbers in lists, if the schema of the file states them; the
            text then has the names.
    """
    if not isinstance(label, (list, tuple)):
        return None
    values = list(label)
    if class_names is not None and all(type(value) is int for value in values):
        values = [
            class_names[value] if 0 <= value < len(class_names) else value for value in values
        ]
    try:
        return json.dumps(values, ensure_ascii=False)
    except (TypeError, ValueError):
        return None


def label_vector(text: str, kind: LossKind, label_names: Sequence[str]) -> list[float] | None:
    """Return a label of `label_list_text` as a number per output, or None if it is none.

    Args:
        text: JSON text of a list. For `binary_cross_entropy` it has the names of the labels that
            hold, or a number from 0 to 1 for each label; for `squared_error` the targets.
        kind: the kind of the loss.
        label_names: the names of the C outputs.

    Returns:
        (C,) numbers.
    """
    values = json.loads(text)
    if kind == "binary_cross_entropy" and all(isinstance(value, str) for value in values):
        if len(set(values)) != len(values) or not set(values) <= set(label_names):
            return None
        return [float(name in values) for name in label_names]
    low, high = (0, 1) if kind == "binary_cross_entropy" else (-LARGEST_TARGET, LARGEST_TARGET)
    valid = len(values) == len(label_names) and all(
        isinstance(value, (bool, int, float)) and math.isfinite(value) and low <= value <= high
        for value in values
    )
    return [float(value) for value in values] if valid else None


def expected_label_list(kind: LossKind, label_names: Sequence[str]) -> str:
    """Return what a label has to be, to follow "expected" in a message."""
    if kind == "binary_cross_entropy":
        return (
            f"a list of names among {', '.join(label_names)}, or {len(label_names)} numbers from 0 "
            f"to 1, in JSON lines or Parquet, because the model has several labels per text "
            f"(multi_label_classification)"
        )
    return (
        f"a list of {len(label_names)} finite numbers, in JSON lines or Parquet, because the model "
        f"has {len(label_names)} targets"
    )


def label_vector_text(values: Sequence[float], kind: LossKind, label_names: Sequence[str]) -> str:
    """Return a label vector as it is shown: the names of its labels, or its targets."""
    if kind != "binary_cross_entropy":
        return ", ".join(repr(float(value)).removesuffix(".0") for value in values)
    shown = [
        name if value == 1 else f"{name}={value:g}"
        for name, value in zip(label_names, values, strict=True)
        if value
    ]
    return ", ".join(shown) or NO_LABEL
