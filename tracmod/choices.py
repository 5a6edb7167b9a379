"""Choices and bounds that several settings share; imports nothing but the standard library.

The configuration, the command line and the functions that take a choice read it here, so that none
of them has to import torch or pydantic for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, Literal, get_args

# Training and features.
Sampling = Literal["proportional", "uniform"]
SharedParameters = Literal["trained", "classifier", "frozen"]
ParameterSet = Literal["encoder", "all", "attention", "classifier", "adapter"]
# A set, patterns of names, or a function of the full name of a parameter. See
# `tracmod.gradients.selection`.
ParameterSelection = str | Sequence[str] | Callable[[str], bool]
ProjectionKind = Literal["rademacher", "sjlt"]
ProjectionLayers = Literal["accumulate", "concatenate"]
MetricKind = Literal["none", "adam", "ekfac"]
PassDtype = Literal["float32", "bfloat16"]
Pooling = Literal["mean"]
Unit = Literal["text", "token", "span"]  # what a model classifies; a span is an answer
LossKind = Literal[
    "cross_entropy",
    "squared_error",
    "binary_cross_entropy",
    "token_cross_entropy",
    "span_cross_entropy",
    "function",
]
StatedLossKind = Literal[
    "cross_entropy",
    "squared_error",
    "binary_cross_entropy",
    "token_cross_entropy",
    "span_cross_entropy",
]
Denominator = Literal["fixed", "weighted"]
Batches = Literal["new", "same"]
StoreDtype = Literal["float32", "bfloat16", "float16", "int8"]

# Subnetworks.
Combine = Literal["first", "union", "majority", "intersection"]

# Scores.
Normalization = Literal["cosine", "none"]
IndexKind = Literal["flat", "sq8", "ivf", "ivfpq", "hnsw"]
Method = Literal[
    "tracin",
    "tracin-dot",
    "tracin-cosine",
    "adam",
    "ekfac",
    "ekfac-last",
    "metagradient",
    "bm25",
    "embedding",
    "random",
]
DEFAULT_MEMORY = 4 * 10**9  # bytes
ADAM_EPSILON = 1e-8  # the default of torch.optim.AdamW and of transformers' Trainer

# The study and its outputs.
ModelName = Literal["full", "sparse"]
EngineName = Literal["local", "ray"]
ExportForm = Literal["masked", "pruned"]
FigureFormat = Literal["pdf", "svg", "png"]
FigureWidth = Literal["column", "page"]
TableFormat = Literal["csv", "latex", "markdown"]

LARGEST_INT = 2**63 - 1  # of tensors and tables


def whole_number(name: str, value: Any, least: int = 1, most: int = LARGEST_INT) -> int:
    """Return an argument that is a whole number within bounds, as an int.

    Numbers of NumPy are numbers; booleans are not.

    Args:
        name: the name of the argument.
        value: its value.
        least, most: the bounds.

    Raises:
        ValueError: it is another kind of value, or out of bounds.
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise ValueError(f"{name}: expected a whole number, got {value!r}")
    number = int(value)
    if number < least:
        raise ValueError(f"{name}: expected at least {least}, got {number}")
    if number > most:
        raise ValueError(f"{name}: expected at most {most}, got {number}")
    return number


def positive_number(name: str, value: Any) -> float:
    """Return an argument that is a finite number above 0, as a float.

    Raises:
        ValueError: it is another kind of value, NaN, infinite, or not above 0.
    """
    if not is_real(value) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name}: expected a number above 0, got {value!r}")
    return float(value)


def is_real(value: Any) -> bool:
    """Return whether a value is a real number, NaN and infinity included; booleans are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def switch(name: str, value: Any) -> bool:
    """Return an argument that is True or False; the text "no" would count as true.

    Raises:
        ValueError: it is another kind of value.
    """
    if type(value).__name__ not in ("bool", "bool_"):  # NumPy's, too
        raise ValueError(f"{name}: expected True or False, got {value!r}")
    return bool(value)


def instance(name: str, value: Any, kind: type, *, optional: bool = False) -> None:
    """Check that an argument is of a class.

    Args:
        name: the name of the argument.
        value: its value.
        kind: the class.
        optional: whether it may be None.

    Raises:
        ValueError: it is of another class.
    """
    if not isinstance(value, kind) and not (optional and value is None):
        raise ValueError(
            f"{name}: expected {kind.__name__}{' or None' if optional else ''}, got {value!r}"
        )


def check_selection(name: str, value: Any) -> None:
    """Check an argument that selects parameters, as far as this needs no model.

    Args:
        name: the name of the argument.
        value: its value; see `ParameterSelection`.

    Raises:
        ValueError: it is neither a set of parameters, nor patterns of names, nor a function.
    """
    if callable(value) or (isinstance(value, str) and value in get_args(ParameterSet)):
        return
    is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    if not is_list or not value or not all(isinstance(item, str) and item for item in value):
        raise ValueError(
            f"{name}: expected one of {', '.join(get_args(ParameterSet))}, or a list of patterns "
            f"of names, got {value!r}"
        )


def selection_record(selection: ParameterSelection) -> str | list[str]:
    """Return a selection of parameters as identities and records have it.

    The order of patterns does not matter, so they are sorted. A function has no record; where
    something is saved, the names that it chooses stand for it.
    """
    assert not callable(selection)
    return selection if isinstance(selection, str) else sorted(set(selection))
