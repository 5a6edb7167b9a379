"""ALBERT: a few layers that are called several times, and embeddings narrower than the encoder."""

from __future__ import annotations

from typing import Any

from torch import nn

from tracmod.models.architecture.family import AttentionLayer, Family, Forward, attention_of


class Albert(Family):
    """ALBERT; the classifier reads the first token through a pooler.

    A layer that is called several times has one set of heads: a masked head is masked in all calls.
    """

    name = "ALBERT"
    model_types = ("albert",)

    def attention(self, module: nn.Module) -> AttentionLayer | None:
        """Return the module's attention layer, or None if the module is not a self-attention."""
        linears = [getattr(module, name, None) for name in ("query", "key", "value", "dense")]
        return attention_of(module, linears, "num_attention_heads")

    def layers_of_tokens(self, model: nn.Module) -> tuple[nn.Module, ...]:
        """Return the projection of the embeddings to the width of the encoder."""
        base: Any = model.base_model
        return (base.encoder.embedding_hidden_mapping_in,)

    def lean_forward(self, block: Any, layer: AttentionLayer) -> Forward | None:
        """Return None: the last layer is also called before."""
        return None
