"""Choices and bounds that several settings share; imports nothing but the standard library.

The configuration, the command line and the functions that take a choice read it here, so that none
of them has to import torch or pydantic for it.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any, Literal

# Training and features.
Sampling = Literal["proportional", "uniform"]
SharedParameters = Literal["trained", "classifier", "frozen"]
ParameterSet = Literal["encoder", "all", "attention", "classifier"]
ProjectionKind = Literal["rademacher", "sjlt"]
ProjectionLayers = Literal["accumulate", "concatenate"]
MetricKind = Literal["none", "adam", "ekfac"]
PassDtype = Literal["float32", "bfloat16"]
LossKind = Literal["cross_entropy", "squared_error", "binary_cross_entropy", "function"]
StatedLossKind = Literal["cross_entropy", "squared_error", "binary_cross_entropy"]
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
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name}: expected a number above 0, got {value!r}")
    return float(value)
