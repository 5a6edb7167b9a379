"""ModernBERT and mmBERT: one fused projection, gated networks, rotary positions, sliding windows.

Shape suffixes: B examples, S tokens, I inputs of a layer.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tracmod.models.architecture.family import AttentionLayer, Family, Forward, first_position
from tracmod.models.architecture.rotary import rotary_attention


class ModernBert(Family):
    """ModernBERT; the classifier reads the first token or the mean of all tokens."""

    name = "ModernBERT"
    model_types = ("modernbert",)
    takes_ready_mask = False
    attention_in_layer = "attn"

    def attention(self, module: nn.Module) -> AttentionLayer | None:
        """Return the module's attention layer, or None if the module is not a self-attention."""
        fused, output = getattr(module, "Wqkv", None), getattr(module, "Wo", None)
        if not isinstance(fused, nn.Linear) or not isinstance(output, nn.Linear):
            return None
        head_dim: Any = module.head_dim
        num_heads = output.in_features // head_dim
        return AttentionLayer(fused, fused, fused, output, num_heads, head_dim, module)

    def embeddings(self, model: nn.Module) -> nn.Module | None:
        """Return the module that turns token ids into the encoder's first hidden states."""
        embeddings = getattr(getattr(model, "base_model", model), "embeddings", None)
        return embeddings if hasattr(embeddings, "tok_embeddings") else None

    def word_embeddings(self, embeddings: nn.Module) -> nn.Embedding:
        """Return the table of words in the embeddings."""
        words: Any = embeddings.tok_embeddings
        return words

    def lean_forward(self, block: Any, layer: AttentionLayer) -> Forward:
        """Return the forward pass of a layer that attends from the first position only."""

        def forward(x_BSI: Tensor, attention_mask: Any = None, **named: Any) -> Tensor:
            parts = layer.query(block.attn_norm(x_BSI)).unflatten(-1, (3, -1, layer.head_dim))
            query, key, value = parts.unbind(dim=2)
            attended = rotary_attention(
                layer, (query[:, :1], key, value), attention_mask, named["position_embeddings"]
            )
            hidden_B1I = first_position(x_BSI) + layer.output(attended)
            return hidden_B1I + block.mlp(block.mlp_norm(hidden_B1I))

        return forward
