"""Separate projections and rotary positions: EuroBERT, Nomic BERT, Jina v3 and decoders.

Shape suffixes: B examples, S tokens, I inputs of a layer, H heads, D width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tracmod.models.architecture.family import (
    AttentionLayer,
    Family,
    Forward,
    first_position,
)


class Rotary(Family):
    """A family whose layers have `self_attn.{q,k,v,o}_proj` and no table of positions."""

    takes_ready_mask = False
    attention_in_layer = "self_attn"

    def attention(self, module: nn.Module) -> AttentionLayer | None:
        """Return the module's attention layer, or None if the module is not a self-attention."""
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        linears: list[Any] = [getattr(module, name, None) for name in names]
        head_dim: Any = getattr(module, "head_dim", None)
        if head_dim is None or not all(isinstance(linear, nn.Linear) for linear in linears):
            return None
        query, key, value, output = linears
        return AttentionLayer(
            query,
            key,
            value,
            output,
            query.out_features // head_dim,
            head_dim,
            module,
            groups=key.out_features // head_dim,
        )

    def embeddings(self, model: nn.Module) -> nn.Module | None:
        """Return the table of words; there is nothing else in the embeddings."""
        table = getattr(getattr(model, "base_model", model), "embed_tokens", None)
        return table if isinstance(table, nn.Embedding) else super().embeddings(model)

    def word_embeddings(self, embeddings: nn.Module) -> nn.Embedding:
        """Return the table of words in the embeddings."""
        if isinstance(embeddings, nn.Embedding):
            return embeddings
        return super().word_embeddings(embeddings)

    def lean_forward(self, block: Any, layer: AttentionLayer) -> Forward | None:
        """Return the lean forward pass of a layer whose norms come before attention and network."""

        def forward(x_BSI: Tensor, attention_mask: Any = None, **named: Any) -> Tensor:
            normed_BSI = block.input_layernorm(x_BSI)
            attended = rotary_attention(
                layer, projected(layer, normed_BSI), attention_mask, named["position_embeddings"]
            )
            hidden_B1I = first_position(x_BSI) + layer.output(attended)
            return hidden_B1I + block.mlp(block.post_attention_layernorm(hidden_B1I))

        return forward


class EuroBert(Rotary):
    """EuroBERT; the classifier reads the first token, or the mean of tokens or of their logits."""

    name = "EuroBERT"
    model_types = ("eurobert",)


class NomicBert(Rotary):
    """Nomic BERT and Jina embeddings v3; the classifier reads the first token."""

    name = "Nomic BERT and Jina v3"
    model_types = ("nomic_bert", "jina_embeddings_v3")

    def lean_forward(self, block: Any, layer: AttentionLayer) -> Forward:
        """Return the lean forward pass of a layer whose norms come after attention and network."""

        def forward(x_BSI: Tensor, attention_mask: Any = None, **named: Any) -> Tensor:
            attended = rotary_attention(
                layer, projected(layer, x_BSI), attention_mask, named["position_embeddings"]
            )
            hidden_B1I = first_position(x_BSI) + layer.output(attended)
            hidden_B1I = block.post_attention_layernorm(hidden_B1I)
            return block.post_mlp_layernorm(hidden_B1I + block.mlp(hidden_B1I))

        return forward


class Decoder(Rotary):
    """Decoders with a classifier that reads the last token."""

    name = "Llama, Mistral, Qwen2, Qwen3 and Gemma 3"
    model_types = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")

    def lean_forward(self, block: Any, layer: AttentionLayer) -> Forward | None:
        """Return None: the first position sees no other."""
        return None


Projected = tuple[Tensor, Tensor, Tensor]


def projected(layer: AttentionLayer, x_BSI: Tensor) -> Projected:
    """Project to the first position's queries and to all keys and values, each (B, S, H, D)."""
    inputs = ((layer.query, first_position(x_BSI)), (layer.key, x_BSI), (layer.value, x_BSI))
    query, key, value = (linear(x).unflatten(-1, (-1, layer.head_dim)) for linear, x in inputs)
    return query, key, value


def rotary_attention(
    layer: AttentionLayer, parts: Projected, mask: Tensor | None, rotations: tuple[Tensor, Tensor]
) -> Tensor:
    """Attend from the first position to all positions; the heads side by side, (B, 1, I).

    Args:
        layer: the attention layer.
        parts: query (B, 1, H, D), key and value (B, S, H, D).
        mask: (B, 1, S, S), or None.
        rotations: cosines and sines of the positions' angles, (1 or B, S, D).
    """
    cos, sin = (part[:, :, None] for part in rotations)
    query, key, value = parts
    query = _rotated(query, cos[:, :1], sin[:, :1]).transpose(1, 2)
    key, value = _rotated(key, cos, sin).transpose(1, 2), value.transpose(1, 2)
    attended = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if mask is None else mask[:, :, :1],
        enable_gqa=layer.is_grouped,
    )
    return attended.transpose(1, 2).flatten(2)


def _rotated(x_BSHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x_BSHD.chunk(2, dim=-1)
    return x_BSHD * cos + torch.cat([-second, first], dim=-1) * sin
