"""The interface of a model family to the engine, with the answers of BERT.

A family is a class with a short file of its own beside this one. It says where the attention layers
are and which parameters belong to a head, where the embeddings are, and, if it can, how the last
layer computes the first position alone. `tracmod.models.architecture` lists the families.

Shape suffixes: B examples, S tokens, I inputs of a layer, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Forward = Callable[..., Any]


class AttentionLayer(NamedTuple):
    """The projections of one self-attention, and how its heads divide them.

    Head h owns rows `h * head_dim : (h + 1) * head_dim` of query, key and value (weight and bias)
    and the same columns of the output projection's weight. Two layouts differ:

    - *Fused*: query, key and value are one linear layer, whose rows are those of all queries, then
      of all keys, then of all values.
    - *Grouped*: several heads read the same keys and values. These rows belong to no head.

    Attributes:
        query, key, value: projections of the hidden states to all heads side by side.
        output: projection of the concatenated heads back to the hidden size.
        num_heads: number of heads, that is of queries.
        head_dim: width of one head.
        module: the module that splits the projections into heads.
        positions: further projections, of relative positions, that the heads divide like keys.
        groups: number of keys and values, if several heads share them; else `num_heads`.
    """

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    output: nn.Linear
    num_heads: int
    head_dim: int
    module: nn.Module
    positions: tuple[nn.Linear, ...] = ()
    groups: int | None = None

    @property
    def is_grouped(self) -> bool:
        """Whether several heads share keys and values."""
        return self.groups is not None and self.groups != self.num_heads

    @property
    def projections(self) -> list[nn.Linear]:
        """All projections but the output's, each once."""
        return list(dict.fromkeys((self.query, self.key, self.value, *self.positions)))

    @property
    def first_rows(self) -> dict[nn.Linear, list[int]]:
        """The projections with rows that belong to heads, and where those of the first head begin.

        Head h has `head_dim` rows from `h * head_dim` after each of these positions.
        """
        if self.query is self.key:
            width = self.num_heads * self.head_dim
            return {self.query: [0, width, 2 * width]}
        if self.is_grouped:
            return {self.query: [0]}
        return {linear: [0] for linear in self.projections}

    def head_counts(self, num_heads: int) -> dict[str, int]:
        """Return what the module's attributes that count heads would be for another number."""
        counts = {
            "num_attention_heads": num_heads,
            "n_heads": num_heads,
            "all_head_size": num_heads * self.head_dim,
        }
        return {name: count for name, count in counts.items() if hasattr(self.module, name)}


class Family:
    """A model family. The methods have the answers of BERT and its close kin.

    Attributes:
        name: name of the family in messages and in the documentation.
        model_types: the `model_type` of the configs of its models.
        takes_ready_mask: whether its encoder takes an attention mask of (B, 1, S, S) as it is.
        attention_in_layer: path from a layer to the module that `AttentionLayer.module` is.
    """

    name = "BERT"
    model_types: tuple[str, ...] = (
        "bert",
        "roberta",
        "xlm-roberta",
        "camembert",
        "electra",
        "xmod",
    )
    takes_ready_mask = True
    attention_in_layer = "attention.self"

    def attention(self, module: nn.Module) -> AttentionLayer | None:
        """Return the module's attention layer, or None if the module is not a self-attention."""
        projections: Any = getattr(module, "self", None)
        linears = [getattr(projections, name, None) for name in ("query", "key", "value")]
        linears.append(getattr(getattr(module, "output", None), "dense", None))
        return attention_of(projections, linears, "num_attention_heads")

    def embeddings(self, model: nn.Module) -> nn.Module | None:
        """Return the module that turns token ids into the encoder's first hidden states."""
        embeddings = getattr(getattr(model, "base_model", model), "embeddings", None)
        return embeddings if hasattr(embeddings, "word_embeddings") else None

    def word_embeddings(self, embeddings: nn.Module) -> nn.Embedding:
        """Return the table of words in the embeddings."""
        words: Any = embeddings.word_embeddings
        return words

    def max_positions(self, embeddings: nn.Module) -> float:
        """Return the length of the longest input that the position embeddings allow, in tokens.

        BERT counts positions from 0. RoBERTa and XLM-R count them from the padding id + 1 on, and
        so take that many tokens fewer than their table has rows; only their table has a
        `padding_idx`.

        Returns:
            An int, or infinity for a model without a table of positions.
        """
        positions: Any = getattr(embeddings, "position_embeddings", None)
        if positions is None:
            return math.inf
        unused = 0 if positions.padding_idx is None else positions.padding_idx + 1
        return positions.num_embeddings - unused

    def layers_of_tokens(self, model: nn.Module) -> tuple[nn.Module, ...]:
        """Return linear layers outside embeddings and layers that see every token, nevertheless."""
        return ()

    def lean_last_layer(
        self, model: nn.Module, last: AttentionLayer
    ) -> tuple[nn.Module, Forward] | None:
        """Return the last layer and a forward pass of it that computes the first position alone.

        Returns:
            A module and its new `forward`; None if the family or this model has no such form.
        """
        block = self.layer_around(model, last)
        forward = None if block is None else self.lean_forward(block, last)
        return None if block is None or forward is None else (block, forward)

    def layer_around(self, model: nn.Module, attention: AttentionLayer) -> nn.Module | None:
        """Return the layer of the model that has this attention; None if it is built otherwise."""
        for block in model.modules():
            module: Any = block
            for name in self.attention_in_layer.split("."):
                module = getattr(module, name, None)
            if module is attention.module:
                return block
        return None

    def lean_forward(self, block: Any, layer: AttentionLayer) -> Forward | None:
        """Return a forward pass of a layer whose hidden states have the first position alone.

        The form is tried before it is used (`gradients.lean_pass`), so it need not know whether the
        classifier reads the first position.

        Args:
            block: the layer.
            layer: its attention.

        Returns:
            The pass; None if there is none for this family.
        """

        def forward(x_BSI: Tensor, mask: Any = None, *_: Any, **named: Any) -> Tensor:
            first_B1I = first_position(x_BSI)
            attended = attend_from_first(layer, first_B1I, x_BSI, named.get("attention_mask", mask))
            return block.feed_forward_chunk(block.attention.output(attended, first_B1I))

        return forward

    def examples_apart(
        self, model: nn.Module, count: int, tokens: int
    ) -> AbstractContextManager[None]:
        """Change the model so that examples of a batch share no input of a layer.

        A gradient at a tensor that all examples of a batch share, such as a table of relative
        positions, is a sum over examples. Within the context, every example has a copy. Rows of it
        that are not tokens have a dimension more than tokens: (B, rows, 1, I).

        Args:
            model: the model.
            count: B of the batch.
            tokens: S of the batch, padding included.
        """
        return nullcontext()


def attention_of(
    module: Any, linears: list[Any], heads: str, positions: tuple[nn.Linear, ...] = ()
) -> AttentionLayer | None:
    """Return an attention layer with separate query, key and value, or None if one is missing.

    Args:
        module: the module that splits the projections into heads.
        linears: query, key, value and output projection.
        heads: name of the module's attribute with the number of heads.
        positions: as in `AttentionLayer`.
    """
    num_heads = getattr(module, heads, None)
    if num_heads is None or not all(isinstance(linear, nn.Linear) for linear in linears):
        return None
    query, key, value, output = linears
    head_dim = output.in_features // num_heads
    return AttentionLayer(query, key, value, output, num_heads, head_dim, module, positions)


def first_position(x_BSI: Tensor) -> Tensor:
    """Return a copy of the first position, (B, 1, I).

    `capture` groups layers by the memory of their input. A view would be grouped with the input of
    key and value where S is 1, so that rounding would depend on the batch.
    """
    return x_BSI[:, :1].clone()


def attend_from_first(
    layer: AttentionLayer, first_B1I: Tensor, x_BSI: Tensor, mask: Tensor | None
) -> Tensor:
    """Attend from the first position to all positions; the heads side by side, (B, 1, I)."""
    query, key, value = (
        linear(x).unflatten(-1, (-1, layer.head_dim)).transpose(1, 2)
        for linear, x in ((layer.query, first_B1I), (layer.key, x_BSI), (layer.value, x_BSI))
    )
    if mask is not None:
        mask = mask[:, :, :1]  # of (B, 1, S, S), or of (B, 1, 1, S) for all queries
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return attended.transpose(1, 2).flatten(2)


def is_rms_norm(module: nn.Module) -> bool:
    """Return whether a module divides by the root mean square: no mean, and no bias.

    transformers has such a class for each family, but all compute the same normalised input.
    """
    weight: Any = getattr(module, "weight", None)
    is_vector = isinstance(weight, Tensor) and weight.dim() == 1
    return type(module).__name__.endswith("RMSNorm") and is_vector


def normalized(module: Any, x: Tensor) -> Tensor:
    """Return the normalised input of a LayerNorm or RMSNorm, which the weight multiplies."""
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, eps=module.eps)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    wide = x if x.dtype is torch.float64 else x.float()
    eps = torch.finfo(x.dtype).eps if eps is None else eps  # the default of torch's own
    return wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
