"""Where each model family keeps its attention layers, embeddings and positions."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import nn


class AttentionLayer(NamedTuple):
    """The four linear layers of one self-attention, and how its heads divide them.

    Head h owns rows `h * head_dim : (h + 1) * head_dim` of query, key and value (weight and
    bias) and the same columns of the output projection's weight.

    Attributes:
        query, key, value: projections of the hidden states to all heads side by side.
        output: projection of the concatenated heads back to the hidden size.
        num_heads: number of heads.
        head_dim: width of one head.
    """

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    output: nn.Linear
    num_heads: int
    head_dim: int


def attention_layers(model: nn.Module) -> list[AttentionLayer]:
    """Return the self-attention layers of a BERT-family encoder, first layer first.

    Two naming schemes are known: `attention.self.{query,key,value}` with `attention.output.dense`
    (BERT, RoBERTa, XLM-R, CamemBERT, ELECTRA, ...), and DistilBERT's
    `attention.{q_lin,k_lin,v_lin,out_lin}`.

    Raises:
        ValueError: the model has no such layer.
    """
    layers = [layer for module in model.modules() if (layer := _attention_layer(module))]
    if not layers:
        raise ValueError(
            f"{type(model).__name__}: expected an encoder of the BERT family, "
            "found no attention layers with query, key, value and output projections"
        )
    return layers


def _attention_layer(module: nn.Module) -> AttentionLayer | None:
    """Return the module's attention layer, or None if the module is not a self-attention."""
    linears: list[Any]
    projections: Any = getattr(module, "self", None)
    if projections is not None:  # BERT
        linears = [getattr(projections, name, None) for name in ("query", "key", "value")]
        linears.append(getattr(getattr(module, "output", None), "dense", None))
        num_heads = getattr(projections, "num_attention_heads", None)
    else:  # DistilBERT
        linears = [getattr(module, name, None) for name in ("q_lin", "k_lin", "v_lin", "out_lin")]
        num_heads = getattr(module, "n_heads", None)
    if num_heads is None or not all(isinstance(linear, nn.Linear) for linear in linears):
        return None
    query, key, value, output = linears
    return AttentionLayer(query, key, value, output, num_heads, output.in_features // num_heads)


def embeddings_module(model: nn.Module) -> nn.Module:
    """Return the module that turns token ids into the encoder's first hidden states.

    Raises:
        ValueError: the model has no embeddings module with `word_embeddings` in it.
    """
    base = getattr(model, "base_model", model)
    embeddings = getattr(base, "embeddings", None)
    if embeddings is None or not hasattr(embeddings, "word_embeddings"):
        raise ValueError(
            f"{type(model).__name__}: expected an encoder of the BERT family, "
            "found no embeddings module with word_embeddings"
        )
    return embeddings


def max_positions(model: nn.Module) -> float:
    """Return the length of the longest input that the position embeddings allow, in tokens.

    BERT counts positions from 0. RoBERTa and XLM-R count them from the padding id + 1 on, and so
    take that many tokens fewer than their table has rows; only their table has a `padding_idx`.

    Returns:
        An int, or infinity for a model without a table of positions.
    """
    positions: Any = getattr(embeddings_module(model), "position_embeddings", None)
    if positions is None:
        return math.inf
    unused = 0 if positions.padding_idx is None else positions.padding_idx + 1
    return positions.num_embeddings - unused
