"""Features and exact scores by tracmod's Python functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import tracmod as tm
from tracmod.bench.peers.shared import Examples


def features(
    model: Any, examples: Examples, size: int, numbers: int = 4096, dtype: str = "float32"
) -> Tensor:
    """Return the features of the examples, (N, K). tracmod makes its own batches."""
    projection = tm.Projection(dim=numbers)
    return tm.collect_features(model, examples, projection, dtype=getattr(torch, dtype))


def exact(model: Any, query: Examples, train: Examples, size: int) -> Tensor:
    """Return the exact scores of one checkpoint, (Q, N)."""
    return tm.exact_influence(model, train, query)
