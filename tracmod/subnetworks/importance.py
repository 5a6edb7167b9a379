"""How important each attention head is for a model on some examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from tracmod.models.architecture import AttentionLayer, attention_layers
from tracmod.models.inputs import (
    accuracy,
    collate,
    pad_token_id,
    per_example_loss,
    plan_batches,
    predict,
)
from tracmod.subnetworks.head_mask import HeadMask, matching_layers


def head_importance(
    model: PreTrainedModel,
    examples: Sequence[Mapping[str, Any]],
    mask: HeadMask | None = None,
    *,
    normalize: bool = True,
    batch_tokens: int = 8192,
) -> NDArray[np.float64]:
    """Mean absolute sensitivity of the loss to each head's output.

    `I_h = mean_x |dL(x) / d xi_h|`, where head h's output is multiplied by xi_h and the derivative
    is taken at xi = mask, one example x at a time, dropout off. Then, as in the authors' code,
    every layer is divided by its L2 norm, which masked heads are part of.

    Args:
        model: on any device; left in the mode it was in, its weights' gradients untouched.
        examples: as `encode` returns them, with labels.
        mask: where the derivative is taken; None: every head kept.
        normalize: divide each layer by its L2 norm (a layer of zeros stays zero).
        batch_tokens: largest batch, in tokens.

    Returns:
        (L, H), at masked heads too.

    Raises:
        ValueError: no examples, or a mask that does not fit the model.

    Source: Michel, Levy and Neubig 2019 (arXiv 1905.10650), sections 4.1 and 4.2.
    """
    if not examples:
        raise ValueError("head importance: expected examples, got none")
    layers = attention_layers(model)
    mask = mask or HeadMask.full(len(layers), layers[0].num_heads)
    matching_layers(model, mask)
    total_LH = torch.zeros(mask.array.shape, dtype=torch.float64)
    was_training = model.training
    model.eval()
    try:
        for batch in plan_batches([len(e["input_ids"]) for e in examples], batch_tokens):
            inputs = collate([examples[i] for i in batch], pad_token_id(model), model.device)
            total_LH += _sensitivity(model, layers, inputs, mask).abs().sum(0).double().cpu()
    finally:
        model.train(was_training)
    importance_LH = total_LH.numpy() / len(examples)
    if normalize:
        norm_L1 = np.linalg.norm(importance_LH, axis=1, keepdims=True)
        importance_LH = importance_LH / np.where(norm_L1 > 0, norm_L1, 1.0)
    return importance_LH


def _sensitivity(
    model: PreTrainedModel, layers: list[AttentionLayer], inputs: dict[str, Tensor], mask: HeadMask
) -> Tensor:
    """dL(x)/d xi of every example x of a batch, (B, L, H): each example has a xi of its own."""
    labels_B = inputs.pop("labels")
    xi_LH = torch.from_numpy(mask.array.copy()).to(model.device, model.dtype)
    xi_BLH = xi_LH.expand(len(labels_B), -1, -1).clone().requires_grad_()
    with ExitStack() as hooks, torch.enable_grad():
        for number, layer in enumerate(layers):
            hooks.callback(_gate_heads(layer, xi_BLH[:, number]))
        logits_BC = model(**inputs).logits
        loss = per_example_loss(logits_BC, labels_B).sum()
    return torch.autograd.grad(loss, xi_BLH)[0]


def _gate_heads(layer: AttentionLayer, xi_BH: Tensor) -> Callable[[], None]:
    def gate(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        gate_BI = xi_BH.repeat_interleave(layer.head_dim, dim=1)
        return (inputs[0] * gate_BI[:, None, :], *inputs[1:])

    return layer.output.register_forward_pre_hook(gate, prepend=True).remove


def without_least(mask: HeadMask, importance_LH: NDArray[np.float64], count: int) -> HeadMask:
    """Mask the `count` least important heads still kept; ties: lower layer, lower head first."""
    importance = np.where(mask.array == 1, importance_LH, np.inf).reshape(-1)
    flat = mask.array.reshape(-1).copy()
    flat[np.argsort(importance, kind="stable")[:count]] = 0
    return HeadMask(flat.reshape(mask.array.shape))


def masked_accuracy(
    model: PreTrainedModel,
    examples: Sequence[Mapping[str, Any]],
    mask: HeadMask | None,
    batch_tokens: int = 8192,
) -> float:
    """Share of examples that the model, under `mask` if there is one, classifies right."""
    with nullcontext() if mask is None else mask.apply(model):
        logits_NC = predict(model, examples, batch_tokens=batch_tokens)
    return accuracy(logits_NC, [example["labels"] for example in examples])
