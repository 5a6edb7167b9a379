"""The lean pass: forward and backward without computations on which the loss does not depend.

`lean` modifies a model for as long as its context lasts. The loss and its gradients stay the same
up to rounding, but two things are not computed:

- *Masked heads.* Their rows of the query, key and value weights and their columns of the attention
  output projection are taken out of the matrices, instead of multiplying their result by zero.
- *Unread positions of the last layer.* Most classifiers read the first position only ([CLS] or
  <s>). The last layer then needs keys and values of every position, but the query, the attention
  output and the feed-forward network of the first position only.

Passes under autocast cast weights once instead of in every batch.
On the CPU, float32 products that are no wider than their input are computed by `kernels.linear`,
and passes under autocast use attention that is not fused; both are faster there.

Whether a model permits this is decided by what it computes, not by its class: a probe batch of
a few tokens is passed through both forms, and where they disagree, the model is left as it is (and
masked in the ordinary way). `verified_pass` then compares gradients on examples of the data. A
model that only looks like BERT thus gets slower passes, never wrong ones.

Shape suffixes: B examples, S tokens, T rows of a product, I in, O out, H heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tracmod import kernels
from tracmod.models.architecture import AttentionLayer, attention_layers, family_of
from tracmod.models.architecture.family import Forward
from tracmod.models.probe import logits_agree, probe_inputs, probe_logits
from tracmod.subnetworks.head_mask import HeadMask, kept_columns, matching_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Columns(NamedTuple):
    """The columns of a linear layer's input and output that remain, int64, or None for all."""

    input: Tensor | None
    output: Tensor | None


LeanColumns = Mapping[nn.Module, Columns]  # of the layers that have lost columns


@contextmanager
def lean(
    model: PreTrainedModel, head_mask: HeadMask | None = None, dtype: torch.dtype | None = None
) -> Iterator[LeanColumns]:
    """Make every pass of a model a lean one; the model is restored when the context ends.

    Not for training: narrowed weights are copies, so updates of them would be lost.

    Args:
        model: The model, in evaluation mode.
        head_mask: A head mask to apply, or None.
        dtype: dtype of passes under autocast, or None.

    Yields:
        The layers from which columns were taken out, with the columns that remain.

    Raises:
        ValueError: The mask's shape does not match the model.
    """
    probe = probe_inputs(model)
    with ExitStack() as stack:
        if probe["input_ids"].device.type == "cpu":
            if dtype is not None:
                stack.enter_context(_plain_attention(model))
            elif model.dtype is torch.float32:
                _use_native_products(stack, model)
        lean_columns: dict[nn.Module, Columns] = {}
        if head_mask is not None:
            lean_columns = _remove_masked_heads(stack, model, head_mask, probe)
        if dtype is not None:
            _cast_weights_once(stack, model, dtype)
        last = _last_block(model)
        if last is not None and _reads_first_alone(model, *last, probe):
            _replace_forward(stack, *last)
        yield lean_columns


# --- Masked heads ---------------------------------------------------------------------------


def _remove_masked_heads(
    stack: ExitStack, model: PreTrainedModel, mask: HeadMask, probe: Mapping[str, Tensor]
) -> dict[nn.Module, Columns]:
    """Take masked heads out of the matrices, or only mask them if the model needs its heads."""
    with mask.apply(model):
        expected = probe_logits(model, probe)
    lean_columns: dict[nn.Module, Columns] = {}
    layers = matching_layers(model, mask)
    if any(layer.is_grouped for layer in layers):  # the heads left need the keys and values
        stack.enter_context(mask.apply(model))
        return {}
    with ExitStack() as attempt:  # restores the weights unless `stack` takes over
        for layer, kept_H in zip(layers, mask.array, strict=True):
            if not kept_H.all():
                lean_columns |= _narrow(attempt, layer, torch.from_numpy(kept_H.copy()))
        with suppress(RuntimeError, ValueError):  # from a model that relies on its number of heads
            if logits_agree(probe_logits(model, probe), expected):
                stack.push(attempt.pop_all())
                return lean_columns
    stack.enter_context(mask.apply(model))
    return {}


def _narrow(stack: ExitStack, layer: AttentionLayer, kept_H: Tensor) -> dict[nn.Module, Columns]:
    """Replace the weights of an attention layer by those of its remaining heads."""
    if not kept_H.any():
        # Attention needs a head, so `kept_columns` keeps the first; its output is multiplied by 0.
        stack.callback(layer.output.register_forward_pre_hook(_times_zero, prepend=True).remove)
    lean_columns: dict[nn.Module, Columns] = {}
    for linear, starts in layer.first_rows.items():
        rows = kept_columns(layer, kept_H, starts)
        for name, parameter in list(linear.named_parameters(recurse=False)):
            _swap(stack, linear, name, parameter[rows])
        lean_columns[linear] = Columns(None, rows)
    columns = kept_columns(layer, kept_H)
    _swap(stack, layer.output, "weight", layer.output.weight[:, columns].contiguous())
    for name, count in layer.head_counts(len(columns) // layer.head_dim).items():
        stack.callback(setattr, layer.module, name, getattr(layer.module, name))
        setattr(layer.module, name, count)
    ones = torch.tensor([layer.output.in_features], device=columns.device)
    # The bias is a column of ones behind the others; its number stays the same.
    return lean_columns | {layer.output: Columns(torch.cat([columns, ones]), None)}


def _times_zero(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0] * 0, *inputs[1:])


def _swap(stack: ExitStack, module: nn.Module, name: str, tensor: Tensor) -> None:
    stack.callback(setattr, module, name, getattr(module, name))
    setattr(module, name, nn.Parameter(tensor.detach(), requires_grad=False))


# --- Unread positions of the last layer -----------------------------------------------------


def _last_block(model: PreTrainedModel) -> tuple[nn.Module, Forward] | None:
    """Return the last layer and its lean forward pass, if the family has one."""
    return family_of(model).lean_last_layer(model, attention_layers(model)[-1])


@torch.no_grad()
def _reads_first_alone(
    model: PreTrainedModel, block: nn.Module, forward: Forward, probe: Mapping[str, Tensor]
) -> bool:
    """Return whether the lean last layer may replace the last layer.

    Both conditions are tested in a single probe pass, by a hook on the last layer:

    1. The lean form computes the same output at the first position.
    2. The logits depend on no other position. All others are set to NaN, which spreads to anything
       computed from them; so the logits are finite only if nothing is. This is stricter than
       comparing logits, which might agree by chance or up to the tolerance.

    A model with NaN or infinity in its weights does not pass, so it keeps its full pass, and the
    gradients show them.
    """
    same = False

    def compare(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
        nonlocal same
        hidden, *rest = output if isinstance(output, tuple) else (output,)
        if not isinstance(hidden, Tensor) or any(part is not None for part in rest):
            return None  # a layer that also returns attention weights, say
        with suppress(RuntimeError, TypeError, ValueError, IndexError):
            lean_output = forward(*inputs, **named)
            lean_hidden = lean_output[0] if isinstance(output, tuple) else lean_output
            same = logits_agree(lean_hidden, hidden[:, :1])
        first_only = torch.full_like(hidden, torch.nan)
        first_only[:, 0] = hidden[:, 0]
        return (first_only, *rest) if isinstance(output, tuple) else first_only

    hook = block.register_forward_hook(compare, with_kwargs=True)
    try:
        logits = probe_logits(model, probe)
    finally:
        hook.remove()
    return same and bool(logits.isfinite().all())


def _replace_forward(stack: ExitStack, block: nn.Module, forward: Forward) -> None:
    """Give a module another forward pass, which hides the method of its class.

    A forward pass that was given to the instance before, such as accelerate's, comes back later.
    """
    if "forward" in vars(block):
        stack.callback(setattr, block, "forward", block.forward)
    else:
        stack.callback(delattr, block, "forward")
    block.forward = forward


# --- float32 products on the CPU ------------------------------------------------------------

# Products of fewer rows are left to torch: `kernels.linear` rearranges the weight for each product,
# which takes time that only many rows make up for.
FEWEST_ROWS = 512


class _Linear(torch.autograd.Function):
    """`x W^T + bias` of a frozen layer, computed by the faster of torch and `kernels.linear`.

    `kernels.linear` is faster if the result is no wider than the input (measured by
    `tracmod bench --full`); the time of wider ones is that of writing the result.
    """

    @staticmethod
    def forward(ctx: Any, x_BSI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.weight_OI = weight_OI
        if _torch_is_faster(x_BSI, len(weight_OI)):
            return F.linear(x_BSI, weight_OI, bias_O)
        x_TI = x_BSI.reshape(-1, x_BSI.shape[-1]).contiguous()
        return kernels.linear(x_TI, weight_OI, bias_O).unflatten(0, x_BSI.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> Any:
        weight_OI, (g_BSO,) = ctx.weight_OI, gs
        if _torch_is_faster(g_BSO, weight_OI.shape[1]):
            return g_BSO @ weight_OI, None, None
        g_TO = g_BSO.reshape(-1, g_BSO.shape[-1]).contiguous()
        product_TI = kernels.linear(g_TO, weight_OI, transposed=True)
        return product_TI.unflatten(0, g_BSO.shape[:-1]), None, None


def _torch_is_faster(x: Tensor, columns: int) -> bool:
    """Whether torch computes the product of x with a result of so many columns faster."""
    width = x.shape[-1]
    return x.numel() < FEWEST_ROWS * width or columns > width


def _use_native_products(stack: ExitStack, model: nn.Module) -> None:
    for module in model.modules():
        if "forward" in vars(module):
            continue
        if type(module) is nn.Linear and module.weight.is_contiguous():
            _replace_forward(stack, module, partial(_native_forward, module))


def _native_forward(linear: nn.Linear, x_BSI: Tensor) -> Tensor:
    return _Linear.apply(x_BSI, linear.weight, linear.bias)


# --- Products under autocast ----------------------------------------------------------------


def _cast_weights_once(stack: ExitStack, model: nn.Module, dtype: torch.dtype) -> None:
    """Keep a copy of each linear layer's weight and bias in the dtype of the passes.

    Autocast makes the same copy in every pass: it keeps copies only of weights that require a
    gradient. It takes no more memory, because a pass holds the copies until its backward pass.
    """
    for module in model.modules():
        if type(module) is nn.Linear and "forward" not in vars(module):
            bias = None if module.bias is None else module.bias.detach().to(dtype)
            copies = module.weight.detach().to(dtype), bias
            _replace_forward(stack, module, partial(_cast_forward, module, *copies))


def _cast_forward(
    linear: nn.Linear, weight_OI: Tensor, bias_O: Tensor | None, x_BSI: Tensor
) -> Tensor:
    if torch.is_autocast_enabled(x_BSI.device.type):
        return F.linear(x_BSI, weight_OI, bias_O)
    return F.linear(x_BSI, linear.weight, linear.bias)


# --- Attention under autocast on the CPU ----------------------------------------------------


@contextmanager
def _plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Use attention as matrix products and a softmax, which transformers computes in float32.

    On the CPU, the backward pass of torch's fused attention is slower in bfloat16 than in float32.
    """
    before = model.config._attn_implementation
    model.config._attn_implementation = "eager"
    try:
        yield
    finally:
        model.config._attn_implementation = before
