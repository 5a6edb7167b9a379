"""The floors: the least work of a method that needs every layer's input and output gradient.

A forward pass, and a backward pass to the embeddings' output without a gradient of a parameter.
The plain floor calls the model; the lean floor computes only the first position of the last layer,
the only one that the classifier reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tracmod.bench import plain
from tracmod.bench.peers.shared import Batch


def plain_logits(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the logits, and the output of the embeddings as a leaf of the graph."""
    leaves: list[Tensor] = []

    def cut(module: Any, args: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    hook = model.base_model.embeddings.register_forward_hook(cut)
    try:
        return model(batch.input_ids, batch.attention_mask).logits, leaves[0]
    finally:
        hook.remove()


def lean_logits(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the same as `plain_logits`, without the last layer's other positions."""
    encoder = model.base_model
    states = leaf = encoder.embeddings(batch.input_ids).detach().requires_grad_()
    padded = not bool(batch.attention_mask.all())
    mask = batch.attention_mask.bool()[:, None, None, :] if padded else None
    *layers, last = encoder.encoder.layer
    for layer in layers:
        states = layer(states, mask)
    attention, heads = last.attention.self, model.config.num_attention_heads
    query, key, value = (
        part.unflatten(-1, (heads, -1)).transpose(1, 2)
        for part in (attention.query(states[:, :1]), attention.key(states), attention.value(states))
    )
    context = F.scaled_dot_product_attention(query, key, value, mask)
    context = context.transpose(1, 2).flatten(2)
    first = last.feed_forward_chunk(last.attention.output(context, states[:, :1]))
    return model.classifier(first), leaf


FORMS: dict[str, Callable[[Any, Batch], tuple[Tensor, Tensor]]] = {
    "plain": plain_logits,
    "lean": lean_logits,
}


def floor_pass(model: Any, ready: Sequence[Batch], form: str) -> None:
    """Run forward and backward over the batches."""
    with plain.requiring_grad(model, []):
        for batch in ready:
            logits, leaf = FORMS[form](model, batch)
            loss = F.cross_entropy(logits, batch.labels, reduction="sum")
            torch.autograd.grad(loss, leaf)


def largest_difference(model: Any, ready: Sequence[Batch]) -> float:
    """Return the largest difference of the two forms' gradients, over the largest gradient."""
    differences = []
    for batch in ready:
        grads = []
        for form in FORMS.values():
            with plain.requiring_grad(model, []):
                logits, leaf = form(model, batch)
                loss = F.cross_entropy(logits, batch.labels, reduction="sum")
                grads.append(torch.autograd.grad(loss, leaf)[0])
        differences.append(float((grads[0] - grads[1]).abs().max() / grads[0].abs().max()))
    return max(differences)
