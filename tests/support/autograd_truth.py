"""Influence by one-example autograd, the truth that the engine is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import tracmod as tm
from tracmod.gradients.capture import select_layers


def flat_gradients(
    model: Any,
    examples: Sequence[Mapping[str, Any]],
    loss_of: Callable[[Any, Mapping[str, Any]], Tensor],
    parameters: str = "all",
) -> Tensor:
    """Return the gradients (N, P) of a loss of one example, one example at a time.

    Args:
        model: the model.
        examples: the examples.
        loss_of: the loss of the model on one example.
        parameters: which parameters, as for `select_layers`.
    """
    names = [name for layer in select_layers(model, parameters) for name in layer.parameter_names]
    selected = [model.get_parameter(name) for name in names]
    rows = []
    for example in examples:
        gradients = torch.autograd.grad(loss_of(model, example), selected, allow_unused=True)
        rows.append(
            torch.cat(
                [
                    torch.zeros_like(parameter).flatten() if g is None else g.flatten()
                    for g, parameter in zip(gradients, selected, strict=True)
                ]
            )
        )
    return torch.stack(rows)


def exact_error(
    model: Any,
    trains: Sequence[Mapping[str, Any]],
    queries: Sequence[Mapping[str, Any]],
    loss_of: Callable[[Any, Mapping[str, Any]], Tensor],
    parameters: str = "all",
    counts: Sequence[int] = (),
) -> float:
    """Return the largest `influence_error` of `exact_influence`, on the first `counts` examples.

    Args:
        model, loss_of, parameters: as for `flat_gradients`.
        trains, queries: the examples.
        counts: numbers of training examples that are scored together; none for all.
    """
    train, query = (flat_gradients(model, part, loss_of, parameters) for part in (trains, queries))
    return max(
        influence_error(
            tm.exact_influence(model, trains[:count], queries, parameters), train[:count], query
        )
        for count in counts or [len(trains)]
    )


def influence_error(actual: Tensor, train: Tensor, query: Tensor) -> float:
    """Return the largest error of scores (Q, N) over the largest product of the gradients."""
    truth = query @ train.T
    return float((actual.double() - truth).abs().max() / truth.abs().max())
