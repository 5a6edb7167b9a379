"""MPNet: a bias of relative positions, looked up once for the whole batch and added in every layer.

Shape suffixes: B examples, S tokens, I inputs of a layer, H heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tracmod.models.architecture.family import (
    AttentionLayer,
    Family,
    Forward,
    attend_from_first,
    attention_of,
    first_position,
)


class MPNet(Family):
    """MPNet; the classifier reads the first token.

    All layers share the table of the bias, so its columns belong to no head.
    """

    name = "MPNet"
    model_types = ("mpnet",)
    takes_ready_mask = False
    attention_in_layer = "attention.attn"

    def attention(self, module: nn.Module) -> AttentionLayer | None:
        """Return the module's attention layer, or None if the module is not a self-attention."""
        linears = [getattr(module, name, None) for name in ("q", "k", "v", "o")]
        return attention_of(module, linears, "num_attention_heads")

    def lean_forward(self, block: Any, layer: AttentionLayer) -> Forward:
        """Return the forward pass of a layer that attends from the first position only."""

        def forward(x_BSI: Tensor, mask: Any, bias_BHSS: Tensor, **_: Any) -> tuple[Tensor]:
            first_B1I = first_position(x_BSI)
            mask = bias_BHSS if mask is None else bias_BHSS + mask
            attended = layer.output(attend_from_first(layer, first_B1I, x_BSI, mask))
            hidden_B1I = block.attention.LayerNorm(attended + first_B1I)
            return (block.output(block.intermediate(hidden_B1I), hidden_B1I),)

        return forward

    @contextmanager
    def examples_apart(self, model: Any, count: int, tokens: int) -> Iterator[None]:
        """Look the bias up for every example by itself."""
        encoder = model.base_model.encoder

        def bias_of_examples(x_BSI: Tensor, position_ids: None = None, **named: int) -> Tensor:
            position_S = torch.arange(tokens, device=x_BSI.device)
            distances_SS = position_S[None, :] - position_S[:, None]
            buckets_SS = encoder.relative_position_bucket(distances_SS, num_buckets=32)
            buckets_BSS = buckets_SS.expand(count, -1, -1).contiguous()
            return encoder.relative_attention_bias(buckets_BSS).permute(0, 3, 1, 2)

        encoder.compute_position_bias = bias_of_examples
        try:
            yield
        finally:
            del encoder.compute_position_bias
