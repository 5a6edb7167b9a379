"""A model's pass without what its loss does not depend on, for as long as a context lasts.

Two things are left out, both exactly, and in float32 on a CPU the narrow products are our own:

- heads that a mask removes: their rows of query, key and value and their columns of the attention
  output projection are taken out of the matrix products, not multiplied by zero;
- in the last layer, all positions but the first, where the classifier reads only that one: keys and
  values are made of every position, query, attention output and feed-forward of the first.

Whether a model allows it is found out by a pass over eight tokens, not by its class: where the lean
pass does not give what the full pass gives, the model is left as it is and only masked.

Shapes: B examples, S tokens, I in, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from tracmod import kernels
from tracmod.models.architecture import AttentionLayer, attention_layers
from tracmod.models.probe import logits_agree, probe_inputs, probe_logits
from tracmod.subnetworks.head_mask import HeadMask, kept_columns, matching_layers


class Columns(NamedTuple):
    """Which columns of a linear layer's input and output are left, int64; None: all of them."""

    input: Tensor | None
    output: Tensor | None


Kept = Mapping[nn.Module, Columns]


@contextmanager
def lean(
    model: PreTrainedModel, head_mask: HeadMask | None = None, dtype: torch.dtype | None = None
) -> Iterator[Kept]:
    """Make every pass of the model a lean one; the model is put back afterwards.

    The loss and its gradients are those of the full pass under the mask, up to rounding. Not for
    training: weights that are taken out are copies.

    Args:
        model: in evaluation mode.
        head_mask: heads to leave out; None for none.
        dtype: of an autocast pass; None for the model's own.

    Yields:
        The layers that have lost columns, and which are left.

    Raises:
        ValueError: a mask of another shape than the model's.
    """
    probe = probe_inputs(model)
    with ExitStack() as stack:
        if probe["input_ids"].device.type == "cpu":
            if dtype is not None:
                stack.enter_context(_plain_attention(model))
            elif model.dtype is torch.float32:
                _use_native_products(stack, model)
        kept: dict[nn.Module, Columns] = {}
        if head_mask is not None:
            kept = _leave_heads_out(stack, model, head_mask, probe)
        last = _last_block(model)
        if last is not None and _reads_first_alone(model, *last, probe):
            _replace_forward(stack, *last)
        yield kept


# --- heads ----------------------------------------------------------------------------------


def _leave_heads_out(
    stack: ExitStack, model: PreTrainedModel, mask: HeadMask, probe: Mapping[str, Tensor]
) -> dict[nn.Module, Columns]:
    """Take masked heads out, or only mask them where the model cannot go without them."""
    with mask.apply(model):
        expected = probe_logits(model, probe)
    attempt = ExitStack()
    kept: dict[nn.Module, Columns] = {}
    for layer, kept_H in zip(matching_layers(model, mask), mask.array, strict=True):
        if not kept_H.all():
            kept |= _narrow(attempt, layer, torch.from_numpy(kept_H.copy()))
    with suppress(RuntimeError, ValueError):  # a model that counts on its number of heads
        if logits_agree(probe_logits(model, probe), expected):
            stack.push(attempt)
            return kept
    attempt.close()
    stack.enter_context(mask.apply(model))
    return {}


def _narrow(stack: ExitStack, layer: AttentionLayer, kept_H: Tensor) -> dict[nn.Module, Columns]:
    """Swap the layer's weights for those of the heads that are kept."""
    if not kept_H.any():
        stack.callback(layer.output.register_forward_pre_hook(_times_zero, prepend=True).remove)
    columns = kept_columns(layer, kept_H)
    for linear in (layer.query, layer.key, layer.value):
        for name, parameter in list(linear.named_parameters(recurse=False)):
            _swap(stack, linear, name, parameter[columns])
    _swap(stack, layer.output, "weight", layer.output.weight[:, columns].contiguous())
    ones = torch.tensor([layer.output.in_features], device=columns.device)
    return {
        layer.query: Columns(None, columns),
        layer.key: Columns(None, columns),
        layer.value: Columns(None, columns),
        # The bias's column of ones comes last: it keeps its number.
        layer.output: Columns(torch.cat([columns, ones]), None),
    }


def _times_zero(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0] * 0, *inputs[1:])


def _swap(stack: ExitStack, module: nn.Module, name: str, tensor: Tensor) -> None:
    stack.callback(setattr, module, name, getattr(module, name))
    setattr(module, name, nn.Parameter(tensor.detach(), requires_grad=False))


# --- the last layer -------------------------------------------------------------------------

Forward = Callable[..., Tensor]


def _last_block(model: PreTrainedModel) -> tuple[nn.Module, Forward] | None:
    """The last layer, of the models whose layers we know, with its lean forward pass."""
    last = attention_layers(model)[-1]
    for block in model.modules():
        attention = getattr(block, "attention", None)
        if not isinstance(attention, nn.Module):
            continue
        if last.query is getattr(getattr(attention, "self", None), "query", None):
            return block, _bert_forward(block, last)
        if last.query is getattr(attention, "q_lin", None):
            return block, _distilbert_forward(block, last)
    return None


def _bert_forward(block: Any, layer: AttentionLayer) -> Forward:
    def forward(x_BSI: Tensor, mask: Any = None, *_: Any, **named: Any) -> Tensor:
        first_B1I = _first(x_BSI)
        attended = _attend(layer, first_B1I, x_BSI, named.get("attention_mask", mask))
        return block.feed_forward_chunk(block.attention.output(attended, first_B1I))

    return forward


def _distilbert_forward(block: Any, layer: AttentionLayer) -> Forward:
    def forward(x_BSI: Tensor, mask: Any = None, *_: Any, **named: Any) -> Tensor:
        first_B1I = _first(x_BSI)
        attended = _attend(layer, first_B1I, x_BSI, named.get("attention_mask", mask))
        attended = block.sa_layer_norm(layer.output(attended) + first_B1I)
        return block.output_layer_norm(block.ffn(attended) + attended)

    return forward


def _first(x_BSI: Tensor) -> Tensor:
    """The first position in memory of its own: never taken for the input of key and value."""
    return x_BSI[:, :1].clone()


def _attend(layer: AttentionLayer, first_B1I: Tensor, x_BSI: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of the first position to all of them, heads side by side: (B, 1, I)."""
    query, key, value = (
        linear(x).unflatten(-1, (-1, layer.head_dim)).transpose(1, 2)
        for linear, x in ((layer.query, first_B1I), (layer.key, x_BSI), (layer.value, x_BSI))
    )
    if mask is not None:
        mask = mask[:, :, :1]  # (B, 1, S, S), or one row for all queries
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return attended.transpose(1, 2).flatten(2)


@torch.no_grad()
def _reads_first_alone(
    model: PreTrainedModel, block: nn.Module, forward: Forward, probe: Mapping[str, Tensor]
) -> bool:
    """Whether the lean last layer gives the first position, and the logits need no other one."""
    same = False

    def compare(
        _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any
    ) -> Tensor | None:
        nonlocal same
        if not isinstance(output, Tensor):
            return None
        with suppress(RuntimeError, TypeError, ValueError, IndexError):
            same = logits_agree(forward(*inputs, **named), output[:, :1])
        unread = torch.full_like(output, torch.nan)
        unread[:, 0] = output[:, 0]
        return unread

    hook = block.register_forward_hook(compare, with_kwargs=True)
    try:
        logits = probe_logits(model, probe)
    finally:
        hook.remove()
    return same and bool(logits.isfinite().all())


def _replace_forward(stack: ExitStack, block: nn.Module, forward: Forward) -> None:
    block.forward = forward
    stack.callback(delattr, block, "forward")


# --- float32 products on the CPU ------------------------------------------------------------

# Fewer rows than this are left to torch: the weight is laid out anew for each product.
FEWEST_ROWS = 512


class _Linear(torch.autograd.Function):
    """`x W^T + bias` of a frozen layer, by whichever of torch and `kernels.linear` is faster.

    Ours wins where the result is no wider than the input (`tracmod bench --full`); a wide one is
    bound by writing it.
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
    """Of a product of x's rows with as many columns in its result."""
    width = x.shape[-1]
    return x.numel() < FEWEST_ROWS * width or columns > width


def _use_native_products(stack: ExitStack, model: nn.Module) -> None:
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.is_contiguous():
            _replace_forward(stack, module, partial(_native_forward, module))


def _native_forward(linear: nn.Linear, x_BSI: Tensor) -> Tensor:
    return _Linear.apply(x_BSI, linear.weight, linear.bias)


# --- attention in bfloat16 ------------------------------------------------------------------


@contextmanager
def _plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Attention as matrix products and a softmax, which transformers takes in float32.

    The backward pass of torch's fused attention on a CPU is slower in bfloat16 than in float32.
    """
    before = model.config._attn_implementation
    model.config._attn_implementation = "eager"
    try:
        yield
    finally:
        model.config._attn_implementation = before
