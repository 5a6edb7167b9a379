"""Choices that several settings share, each written down once; imports nothing but `typing`.

The configuration, the command line and the functions that take a choice read it here, so that none
of them has to import torch or pydantic for it.
"""

from __future__ import annotations

from typing import Literal

# Training and features.
Sampling = Literal["proportional", "uniform"]
SharedParameters = Literal["trained", "classifier", "frozen"]
ParameterSet = Literal["encoder", "all", "attention", "classifier"]
ProjectionKind = Literal["rademacher", "sjlt"]
ProjectionLayers = Literal["accumulate", "concatenate"]
MetricKind = Literal["none", "adam", "ekfac"]
PassDtype = Literal["float32", "bfloat16"]
Denominator = Literal["fixed", "weighted"]
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
