"""Where each model family keeps its attention layers and its embeddings."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn


class AttentionLayer(NamedTuple):
    """The four linear layers of a self-attention and how its heads divide them.

    Head h owns rows `h * head_dim : (h + 1) * head_dim` of query, key and value (weight and
    bias) and the same columns of the output projection's weight.
    """

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    output: nn.Linear
    num_heads: int
    head_dim: int


def attention_layers(model: nn.Module) -> list[AttentionLayer]:
    """Find the self-attention layers of a BERT-family encoder, first layer first.

    Found are `attention.self.{query,key,value}` with `attention.output.dense` (BERT, RoBERTa,
    XLM-R, CamemBERT, ELECTRA, ...) and DistilBERT's `attention.{q_lin,k_lin,v_lin,out_lin}`.

    Raises:
        ValueError: there are none.
    """
    layers = []
    for _, module in model.named_modules():
        if all(isinstance(getattr(module, name, None), nn.Module) for name in ("self", "output")):
            layer = _bert_attention(module)
        else:
            layer = _distilbert_attention(module)
        if layer is not None:
            layers.append(layer)
    if not layers:
        raise ValueError(
            f"{type(model).__name__}: expected an encoder of the BERT family, "
            "found no attention layers with query, key, value and output projections"
        )
    return layers


def _bert_attention(module: nn.Module) -> AttentionLayer | None:
    inner, dense = module.self, getattr(module.output, "dense", None)
    linears = [getattr(inner, name, None) for name in ("query", "key", "value")]
    return _attention_layer([*linears, dense], getattr(inner, "num_attention_heads", None))


def _distilbert_attention(module: nn.Module) -> AttentionLayer | None:
    linears = [getattr(module, name, None) for name in ("q_lin", "k_lin", "v_lin", "out_lin")]
    return _attention_layer(linears, getattr(module, "n_heads", None))


def _attention_layer(linears: list[Any], num_heads: int | None) -> AttentionLayer | None:
    if num_heads is None or not all(isinstance(linear, nn.Linear) for linear in linears):
        return None
    query, key, value, output = linears
    return AttentionLayer(query, key, value, output, num_heads, output.in_features // num_heads)


def embeddings_module(model: nn.Module) -> nn.Module:
    """Return the module that turns token ids into the encoder's first hidden states.

    Raises:
        ValueError: the model has none with `word_embeddings` in it.
    """
    base = getattr(model, "base_model", model)
    embeddings = getattr(base, "embeddings", None)
    if embeddings is None or not hasattr(embeddings, "word_embeddings"):
        raise ValueError(
            f"{type(model).__name__}: expected an encoder of the BERT family, "
            "found no embeddings module with word_embeddings"
        )
    return embeddings
