"""How important each attention head is for a model on given examples.

Shape suffixes: B examples of a batch, I inputs of a layer, N examples, C classes, L layers,
H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tracmod.models.architecture import AttentionLayer, answers_questions, attention_layers
from tracmod.models.inputs import TokenLabels, accuracy
from tracmod.models.loading import class_names
from tracmod.models.loss import UNLABELLED, per_example_loss
from tracmod.models.modes import evaluating
from tracmod.models.plain_pass import (
    batches,
    depends_on_padding,
    model_logits,
    predict,
    predict_tokens,
)
from tracmod.models.questions import best_span, span_f1
from tracmod.subnetworks.head_mask import HeadMask, masked, matching_layers
from tracmod.tasks.tag_scores import count_tags, total_counts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def head_importance(
    model: PreTrainedModel,
    examples: Sequence[Mapping[str, Any]],
    mask: HeadMask | None = None,
    *,
    normalize: bool = True,
    batch_tokens: int = 8192,
) -> NDArray[np.float64]:
    """Compute the mean absolute sensitivity of the loss to each head's output.

    `I_h = mean_x |dL(x) / d xi_h|`, where head h's output is multiplied by xi_h and the derivative
    is taken at xi = mask, for each example x by itself and without dropout. The absolute value is
    taken before the mean: an example that a head helps must not cancel one that it harms. Then, as
    in the authors' code, every layer is divided by its L2 norm over all heads, masked heads
    included, because the layers' gradients differ in scale.

    Args:
        model: classifier on any device. Its training mode is restored, and the gradients of its
            weights are not touched.
        examples: examples from `encode`, with labels.
        mask: where the derivative is taken; None keeps every head.
        normalize: whether to divide each layer by its L2 norm (a layer of zeros stays zero).
        batch_tokens: largest batch, in tokens.

    Returns:
        (L, H), also at masked heads: the derivative there says what switching the head on would do.

    Raises:
        ValueError: there are no examples, or the mask does not fit the model.

    Source: Michel, Levy and Neubig 2019 (arXiv 1905.10650), sections 4.1 and 4.2.
    """
    if not examples:
        raise ValueError("head importance: expected examples, got none")
    layers = attention_layers(model)
    mask = mask or HeadMask.full(len(layers), layers[0].num_heads)
    matching_layers(model, mask)
    total_LH = torch.zeros(mask.array.shape, dtype=torch.float64)
    with evaluating(model) as state:
        alone = depends_on_padding(model, examples, state)
        for _, inputs in batches(model, examples, batch_tokens, alone):
            total_LH += _sensitivity(model, layers, inputs, mask).abs().sum(0).double().cpu()
            state.restore()
    importance_LH = total_LH.numpy() / len(examples)
    if normalize:
        norm_L1 = np.linalg.norm(importance_LH, axis=1, keepdims=True)
        importance_LH = importance_LH / np.where(norm_L1 > 0, norm_L1, 1.0)
    return importance_LH


def _sensitivity(
    model: PreTrainedModel, layers: list[AttentionLayer], inputs: dict[str, Tensor], mask: HeadMask
) -> Tensor:
    """Compute dL(x)/d xi for every example x of a batch, (B, L, H).

    Each example gets a xi of its own, all with the same values. The sum of the losses then has the
    per-example derivatives as its gradient, so that one backward pass gives all of them.
    """
    labels_B = inputs.pop("labels")
    xi_LH = torch.from_numpy(mask.array.copy()).to(model.device, model.dtype)
    xi_BLH = xi_LH.expand(len(labels_B), -1, -1).clone().requires_grad_()
    with ExitStack() as hooks, torch.enable_grad():
        for layer_index, layer in enumerate(layers):
            hooks.callback(_multiply_heads(layer, xi_BLH[:, layer_index]))
        loss = per_example_loss(model_logits(model, inputs), labels_B).sum()
    return torch.autograd.grad(loss, xi_BLH)[0]


def _multiply_heads(layer: AttentionLayer, xi_BH: Tensor) -> Callable[[], None]:
    """Multiply the heads' outputs by xi, so that autograd records it; return what undoes it."""

    def multiply(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        xi_BI = xi_BH.repeat_interleave(layer.head_dim, dim=1)
        return (inputs[0] * xi_BI[:, None, :], *inputs[1:])

    return layer.output.register_forward_pre_hook(multiply, prepend=True).remove


def mask_least_important(
    mask: HeadMask, importance_LH: NDArray[np.float64], count: int
) -> HeadMask:
    """Mask `count` more heads: the least important of those that the mask keeps.

    Of equally important heads, the one in the lower layer goes first, then the lower head.
    """
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
    """Compute the share of examples that the model classifies correctly under the mask, if any.

    Of a token classifier, the F1 of its entities, or the accuracy of other tags; of question
    answering, the mean F1 of the answers' tokens.
    """
    if answers_questions(model):
        with masked(model, mask):
            logits = predict_tokens(model, examples, batch_tokens=batch_tokens)
        pairs = zip(logits, examples, strict=True)
        scores = [span_f1(best_span(own), tuple(example["labels"])) for own, example in pairs]
        return float(np.mean(scores))
    if examples and isinstance(examples[0]["labels"], TokenLabels):
        with masked(model, mask):
            logits = predict_tokens(model, examples, batch_tokens=batch_tokens)
        return _tag_score(class_names(model), logits, examples)
    with masked(model, mask):
        logits_NC = predict(model, examples, batch_tokens=batch_tokens)
    return accuracy(logits_NC, [example["labels"] for example in examples])


def _tag_score(
    names: Sequence[str], logits: Sequence[Tensor], examples: Sequence[Mapping[str, Any]]
) -> float:
    """Return the score of predicted tags.

    Args:
        names: the names of the tags.
        logits: for each example (T, C) logits of its labelled tokens.
        examples: the encoded examples.
    """
    counts = []
    for logits_TC, example in zip(logits, examples, strict=True):
        true = [label for label in example["labels"] if label != UNLABELLED]
        counts.append(count_tags(logits_TC.argmax(dim=1).tolist(), true, names))
    return total_counts(counts).f1
