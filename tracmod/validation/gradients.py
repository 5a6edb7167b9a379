"""The engine's per-example gradients against plain autograd, one example at a time."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tracmod import kernels
from tracmod.capture import Captured, capture, frozen, select_layers
from tracmod.features import masked
from tracmod.heads import HeadMask
from tracmod.model import class_names, collate, encode, load_model, pad_token_id, per_example_loss
from tracmod.tasks.files import read_model_examples


@dataclass(frozen=True)
class GradientError:
    """Error of one kind of parameter.

    Attributes:
        kind: such as `encoder linear weight`.
        num_parameters: parameter tensors of this kind.
        engine: `|engine - autograd64| / |autograd64|`, largest over the examples, the norm taken
            over all parameters of the kind.
        autograd: the same of plain float32 autograd: the error that float32 itself makes.
    """

    kind: str
    num_parameters: int
    engine: float
    autograd: float

    @property
    def passed(self) -> bool:
        """Within twice plain autograd's own error, with a floor of 1e-5."""
        return self.engine <= max(2 * self.autograd, 1e-5)


def check_model(
    source: str,
    data: Path,
    parameters: str = "all",
    head_mask: Path | None = None,
    num_examples: int = 8,
    max_length: int = 128,
) -> list[GradientError]:
    """`check_gradients` of a model folder on the first examples of a file."""
    model, tokenizer = load_model(source)
    mask = None if head_mask is None else HeadMask.load(head_mask)
    labels = class_names(model)
    table = read_model_examples(data, labels).slice(0, num_examples)
    max_length = min(max_length, tokenizer.model_max_length)
    examples = encode(tokenizer, table, max_length, num_labels=len(labels))
    return check_gradients(model, examples, parameters, mask)


def check_gradients(
    model: PreTrainedModel,
    examples: Sequence[Mapping[str, Any]],
    parameters: str = "all",
    head_mask: HeadMask | None = None,
) -> list[GradientError]:
    """Compare the gradients the engine captures with one-example autograd in float64.

    All examples go through the engine as one padded batch, and through autograd one by one without
    padding, so that padding, masks and the scale of the loss are part of the comparison.

    Args:
        model: float32, on the CPU.
        examples: as `model.encode` returns them.
        parameters: as in `collect_features`.
        head_mask: applied on both sides.

    Raises:
        ValueError: no examples.
    """
    if not examples:
        raise ValueError("check: expected examples, got none")
    double = copy.deepcopy(model).double()
    with frozen(model), masked(model, head_mask):
        engine = engine_gradients(model, examples, parameters)
    names = list(engine)
    with masked(model, head_mask), masked(double, head_mask):
        truth = [autograd_gradients(double, example, names) for example in examples]
        plain = [autograd_gradients(model, example, names) for example in examples]
    by_kind: dict[str, list[str]] = {}
    for name in names:
        by_kind.setdefault(_kind(model, name), []).append(name)
    return [
        GradientError(
            kind,
            len(members),
            _largest_error([{n: engine[n][i] for n in members} for i in range(len(truth))], truth),
            _largest_error([{n: one[n] for n in members} for one in plain], truth),
        )
        for kind, members in by_kind.items()
    ]


def engine_gradients(
    model: PreTrainedModel, examples: Sequence[Mapping[str, Any]], parameters: str = "all"
) -> dict[str, Tensor]:
    """Whole per-example gradients by parameter name, (B, *shape), of one padded batch.

    Used within `frozen(model)`; for checks only: it stores what the engine is there to avoid.
    """
    layers = select_layers(model, parameters)
    batch = collate(examples, pad_token_id(model), next(model.parameters()).device)
    gradients: dict[str, Tensor] = {}

    def keep(captured: Captured) -> None:
        for name, gradient in zip(
            captured.layer.parameter_names, _whole_gradients(captured), strict=True
        ):
            gradients[name] = gradient

    capture(model, layers, batch, keep)
    names = [name for layer in layers for name in layer.parameter_names]
    return {name: gradients[name] for name in names if name in gradients}


def _whole_gradients(captured: Captured) -> list[Tensor]:
    layer, g = captured.layer, captured.g
    rows = len(g)
    if layer.kind == "embedding":
        ids_BS = captured.x
        gradient = torch.zeros(rows, layer.in_features, layer.out_features, device=g.device)
        place = torch.arange(rows, device=g.device)[:, None].expand_as(ids_BS)
        return [gradient.index_put_((place, ids_BS), g, accumulate=True)]
    k_out, k_in = layer.out_features, layer.in_features + layer.bias
    if layer.kind == "elementwise":
        k_out, k_in = 1 + layer.bias, layer.in_features
    out = torch.zeros(rows, k_out * k_in, device=g.device)
    kernels.project_gradients(
        captured.x,
        g,
        out,
        lengths=captured.lengths,
        layer=layer.kind,
        kind="identity",
        k_out=k_out,
        k_in=k_in,
        seed=0,
        input_key=0,
        output_key=0,
        bias=layer.bias,
    )
    whole = out.view(rows, k_out, k_in)
    if layer.kind == "elementwise":
        return [whole[:, row] for row in range(k_out)]
    return [whole[..., : layer.in_features], *([whole[..., -1]] if layer.bias else [])]


def autograd_gradients(
    model: PreTrainedModel, example: Mapping[str, Any], names: Sequence[str]
) -> dict[str, Tensor]:
    """Plain autograd's gradient of one example's loss, dropout off; zeros where unused."""
    parameters = dict(model.named_parameters())
    was_training = model.training
    model.eval()
    try:
        batch = collate([example], pad_token_id(model), next(model.parameters()).device)
        labels = batch.pop("labels")
        loss = per_example_loss(model(**batch).logits, labels).sum()
        selected = [parameters[name] for name in names]
        found = torch.autograd.grad(loss, selected, allow_unused=True)
    finally:
        model.train(was_training)
    return {
        name: torch.zeros_like(parameters[name]) if gradient is None else gradient
        for name, gradient in zip(names, found, strict=True)
    }


def _kind(model: PreTrainedModel, name: str) -> str:
    module_name, _, parameter = name.rpartition(".")
    module = type(model.get_submodule(module_name)).__name__.lower()
    base = model.base_model_prefix + "."
    part = "classifier"
    if name.startswith(base):
        part = "embeddings" if name.startswith(base + "embeddings.") else "encoder"
    return f"{part} {module} {parameter}"


def _largest_error(found: list[dict[str, Tensor]], truth: list[dict[str, Tensor]]) -> float:
    errors = []
    for one, exact in zip(found, truth, strict=True):
        difference = sum(float((one[n].double() - exact[n]).square().sum()) for n in one)
        norm = sum(float(exact[n].square().sum()) for n in one)
        errors.append((difference / norm) ** 0.5 if norm > 0 else difference**0.5)
    return max(errors)
