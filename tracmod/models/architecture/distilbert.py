"""DistilBERT: separate projections with names of their own, one module for a whole attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tracmod.models.architecture.family import (
    AttentionLayer,
    Family,
    Forward,
    attend_from_first,
    attention_of,
    first_position,
)


class DistilBert(Family):
    """DistilBERT; the classifier reads the first token through a layer of its own."""

    name = "DistilBERT"
    model_types = ("distilbert",)
    attention_in_layer = "attention"

    def attention(self, module: nn.Module) -> AttentionLayer | None:
        """Return the module's attention layer, or None if the module is not a self-attention."""
        linears = [getattr(module, name, None) for name in ("q_lin", "k_lin", "v_lin", "out_lin")]
        return attention_of(module, linears, "n_heads")

    def lean_forward(self, block: Any, layer: AttentionLayer) -> Forward:
        """Return the forward pass of a layer that attends from the first position only."""

        def forward(x_BSI: Tensor, mask: Any = None, *_: Any, **named: Any) -> Tensor:
            first_B1I = first_position(x_BSI)
            attended = attend_from_first(layer, first_B1I, x_BSI, named.get("attention_mask", mask))
            attended = block.sa_layer_norm(layer.output(attended) + first_B1I)
            return block.output_layer_norm(block.ffn(attended) + attended)

        return forward
