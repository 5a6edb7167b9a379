"""DeBERTa-v2 and -v3 (mDeBERTa-v3): attention with a table of relative positions.

Every layer projects the table of relative positions to keys and queries, once for the whole batch:
by its query and key projections themselves (v3) or by two further ones. So gradients at the table
and at these projections are sums over examples. `examples_apart` gives each example a copy of the
rows of the table that texts of this length can use; transformers' own code does the rest.

Shape suffixes: B examples, S tokens, R rows of the table, H heads, D width of a head, I inputs and
O outputs of a projection.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tracmod.models.architecture.family import (
    AttentionLayer,
    Family,
    Forward,
    attention_of,
    first_position,
)


class Deberta(Family):
    """DeBERTa-v2 and -v3; the classifier reads the first token through a pooler."""

    name = "DeBERTa-v2/v3"
    model_types = ("deberta-v2",)
    takes_ready_mask = False

    def attention(self, module: nn.Module) -> AttentionLayer | None:
        """Return the module's attention layer, or None if the module is not a self-attention."""
        projections: Any = getattr(module, "self", None)
        names = ("query_proj", "key_proj", "value_proj")
        linears = [getattr(projections, name, None) for name in names]
        linears.append(getattr(getattr(module, "output", None), "dense", None))
        positions = (getattr(projections, f"pos_{name}", None) for name in names[:2])
        of_positions = tuple(linear for linear in positions if linear is not None)
        return attention_of(projections, linears, "num_attention_heads", of_positions)

    def lean_forward(self, block: Any, layer: AttentionLayer) -> Forward:
        """Return the forward pass of a layer that attends from the first position only."""

        def forward(
            x_BSI: Tensor, mask: Tensor, *_: Any, relative_pos: Any, rel_embeddings: Any, **__: Any
        ) -> tuple[Tensor, None]:
            first_B1I = first_position(x_BSI)
            attended = _attend_from_first(
                layer, first_B1I, x_BSI, mask, relative_pos, rel_embeddings
            )
            hidden_B1I = block.attention.output(attended, first_B1I)
            return block.output(block.intermediate(hidden_B1I), hidden_B1I), None

        return forward

    @contextmanager
    def examples_apart(self, model: Any, count: int, tokens: int) -> Iterator[None]:
        """Give every example a copy of the table of relative positions."""
        encoder = model.base_model.encoder
        attentions = [layer.attention.self for layer in encoder.layer]
        if not encoder.relative_attention:
            yield
            return
        middle = encoder.rel_embeddings.num_embeddings // 2
        farthest = int(encoder.get_rel_pos(torch.empty(1, tokens, 1)).abs().max())
        reach = min(farthest + 1, middle)

        def rows_of_examples() -> Tensor:
            device = encoder.rel_embeddings.weight.device
            ids_R = torch.arange(middle - reach, middle + reach, device=device)
            rows_BR1I = encoder.rel_embeddings(ids_R.expand(count, -1)[..., None].contiguous())
            return (
                encoder.LayerNorm(rows_BR1I) if "layer_norm" in encoder.norm_rel_ebd else rows_BR1I
            )

        encoder.get_rel_embedding = rows_of_examples
        for attention in attentions:
            attention.disentangled_attention_bias = partial(_attention_bias, attention, reach)
        try:
            yield
        finally:
            del encoder.get_rel_embedding
            for attention in attentions:
                del attention.disentangled_attention_bias


def _attention_bias(
    attention: Any,
    reach: int,
    query: Tensor,
    key: Tensor,
    distances: Tensor,
    rows_BR1I: Tensor,
    scale_factor: int,
) -> Any:
    """Call transformers' `disentangled_attention_bias` with a table for each example."""
    apart = _HeadsOfAllExamples(attention, reach, len(query), rows_BR1I)
    whole = type(attention).disentangled_attention_bias
    return whole(apart, query, key, distances, rows_BR1I, scale_factor)


class _HeadsOfAllExamples:
    """An attention module whose heads are the B * H heads of all examples.

    transformers makes one row of heads from the table's projection and repeats it for every
    example. Here the projections of all examples lie side by side, as if they were heads of one
    example, in the order in which the heads of a batch are stacked; nothing is then repeated.

    Attributes:
        pos_ebd_size: number of the table's rows on each side of distance 0.
        num_attention_heads: B * H.
    """

    def __init__(self, attention: Any, reach: int, num_heads: int, rows_BR1I: Tensor) -> None:
        self.pos_ebd_size, self.num_attention_heads = reach, num_heads
        self._attention, self._rows_BR1I = attention, rows_BR1I

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._attention, name)
        return partial(self._projected, value) if isinstance(value, nn.Linear) else value

    def _projected(self, linear: nn.Linear, _: Tensor) -> Tensor:
        """Project the rows of every example, side by side: (1, R, B * O)."""
        return linear(self._rows_BR1I).squeeze(2).transpose(0, 1).flatten(1)[None]


def _attend_from_first(
    layer: AttentionLayer,
    first_B1I: Tensor,
    x_BSI: Tensor,
    mask: Tensor,
    relative_pos: Any,
    rel_embeddings: Any,
) -> Tensor:
    """Attend from the first position to all positions; the heads side by side, (B, 1, I)."""
    module: Any = layer.module
    kinds = module.pos_att_type
    query_B1HD, key_BSHD, value_BSHD = (
        linear(x).unflatten(-1, (-1, layer.head_dim))
        for linear, x in ((layer.query, first_B1I), (layer.key, x_BSI), (layer.value, x_BSI))
    )
    scores_BHS = torch.einsum("bqhd,bshd->bhs", query_B1HD, key_BSHD)
    if module.relative_attention:
        rows = _rows_of_first(rel_embeddings, relative_pos)
        # With `share_att_key`, the projections of hidden states are those of positions, too.
        if "c2p" in kinds:
            linear = getattr(module, "pos_key_proj", layer.key)
            of_rows = linear(rows[0]).flatten(2).unflatten(-1, (-1, layer.head_dim))
            scores_BHS = scores_BHS + torch.einsum(
                "bqhd,bshd->bhs", query_B1HD, of_rows.expand_as(key_BSHD)
            )
        if "p2c" in kinds:
            linear = getattr(module, "pos_query_proj", layer.query)
            of_rows = linear(rows[1]).flatten(2).unflatten(-1, (-1, layer.head_dim))
            scores_BHS = scores_BHS + (key_BSHD * of_rows).sum(dim=-1).transpose(1, 2)
    scale = math.sqrt(layer.head_dim * (1 + ("c2p" in kinds) + ("p2c" in kinds)))
    unread_B1S = mask[:, :, 0].logical_not()
    smallest = torch.finfo(scores_BHS.dtype).min
    weights_BHS = (scores_BHS / scale).masked_fill(unread_B1S, smallest).softmax(dim=-1)
    return torch.einsum("bhs,bshd->bhd", weights_BHS, value_BSHD).flatten(1)[:, None]


def _rows_of_first(table: Tensor, distances_1SS: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows that the first position's keys and queries of positions are made from.

    Args:
        table: (R, I), or (B, R, 1, I) within `examples_apart`.
        distances_1SS: bucketed distance of each query from each key.

    Returns:
        Twice (B, S, 1, I), or with B = 1 if all examples share the table.
    """
    if table.dim() == 2:
        table = table[None, :, None]
    middle = table.shape[1] // 2
    from_first, to_first = distances_1SS[0, 0], -distances_1SS[0, :, 0]

    def rows_of(distance: Tensor) -> Tensor:
        return table[:, (distance + middle).clamp(0, 2 * middle - 1).to(table.device)]

    return rows_of(from_first), rows_of(to_first)
