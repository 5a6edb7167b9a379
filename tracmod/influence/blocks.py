"""Influence by block of parameters: how much of it flows through each attention head and layer.

The blocks divide the selected parameters: a head's rows of query, key and value (weight and bias)
with its columns of the attention output projection; the rest of each layer; and everything outside
the layers. With g^b the entries of a gradient in block b,

    <g(z), g(z')> = sum_b <g^b(z), g^b(z')>.

An inner product is linear in each side, so its mean over pairs is one product of mean gradients:

    mean over z, z' of <u^b(z), u^b(z')> = <mean_z u^b(z), mean_z' u^b(z')>,   u = g or g / |g|

One pass over the examples of each language therefore gives the exact mean of every pair of
languages and every block, with no projection, no store and no matrix of scores. A mean gradient has
as many numbers as the model, which is why there is one per language and not one per example.

With u = g / |g| (cosine) the weight of an example is known only when its backward pass has visited
all layers. The captured factors of a batch are therefore held until then, and added to the mean
afterwards; `BATCH_TOKENS` bounds how many.

Shape suffixes: B examples of a batch, S tokens, I in, O out, T = B S tokens of a batch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import torch
from torch import Tensor, nn

from tracmod.choices import ParameterSelection
from tracmod.gradients.capture import (
    Captured,
    Layer,
    add_gradients,
    capture,
    select_layers,
    warn_of_frozen,
)
from tracmod.gradients.verified_pass import verified_pass
from tracmod.influence.exact import (
    NotFiniteError,
    autocast_dtype,
    gradient_exponents,
    inverse_root,
    scaled_gradients,
    squared_norms,
)
from tracmod.models.architecture import attention_layers
from tracmod.models.inputs import as_examples, check_examples, unwrapped
from tracmod.models.loss import ExampleLoss, LossFunction, as_loss
from tracmod.models.modes import frozen
from tracmod.subnetworks.head_mask import HeadMask, head_slices

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_TOKENS = 2048  # factors of a batch are held: about 0.75 MB per token of XLM-R base

SCHEMA = pa.schema(
    [
        ("test_language", pa.string()),
        ("train_language", pa.string()),
        ("layer", pa.int32()),
        ("head", pa.int32()),
        ("influence", pa.float64()),
    ]
)

Gradient = dict[str, Tensor]
Examples = Sequence[Mapping[str, Any]]


class Block(NamedTuple):
    """A block of parameters: those of a head, of a layer without its heads, or outside the layers.

    Attributes:
        layer: number of the layer from 0; None outside the layers.
        head: number of the head from 0; None for what belongs to no head.
    """

    layer: int | None
    head: int | None


# Block -> the parts of parameters that it consists of, as (name of the parameter, index).
BlockParts = Mapping[Block, Sequence[tuple[str, tuple[slice, ...]]]]


def block_influence(
    model: PreTrainedModel,
    train: Mapping[str, Examples],
    test: Mapping[str, Examples],
    parameters: ParameterSelection = "encoder",
    head_mask: HeadMask | None = None,
    normalize: str | None = None,
    batch_tokens: int = BATCH_TOKENS,
    dtype: torch.dtype | None = None,
    advance: Callable[[int], Any] | None = None,
    *,
    include_frozen: bool = False,
    loss: ExampleLoss | LossFunction | None = None,
) -> pa.Table:
    """Compute the mean influence between languages at one checkpoint, divided among blocks.

    `influence(l, m, b) = mean of <u^b(z), u^b(z')> over z in test[l], z' in train[m]`, where u is
    the gradient or, with "cosine", the gradient divided by the norm of all of its blocks. The
    blocks of a pair of languages therefore add up to the mean of `exact_influence` between them,
    which is the mean influence that projected features estimate.

    Memory: one gradient, 4 bytes per selected parameter, for each test language and one more.

    Args:
        model: BERT-family sequence classifier, on any device; left unchanged.
        train: language -> its training examples, dicts with `input_ids`, `labels` and optionally
            `attention_mask`.
        test: language -> its test examples, likewise.
        parameters: as in `collect_features`.
        head_mask: heads to leave out of the forward pass; their blocks are exactly 0.
        normalize: None for inner products or "cosine".
        batch_tokens: bound on the number of examples times the longest length of a batch.
        dtype: torch.bfloat16 for a pass under autocast; None or torch.float32 for float32.
        advance: called with the number of examples that just passed through the model.
        include_frozen: whether parameters with `requires_grad=False` count, as in
            `collect_features`.
        loss: the loss that the model was trained with, as in `collect_features`.

    Returns:
        A table with the columns test_language, train_language, layer and head (int32, null as in
        `Block`) and influence (float64, in the unit of the scores). Blocks without selected
        parameters have no rows.

    Raises:
        ValueError: an argument or an example is invalid, as in `collect_features`; a language has
            no examples, or a gradient is not finite.

    Source: Pruthi et al. 2020, arXiv 2002.08484 (TracIn), whose sum over parameters is divided
        here; Michel et al. 2019, arXiv 1905.10650 (the parameters of a head).

    Examples:
        >>> import tracmod as tm
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(
        ...     vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        ...     intermediate_size=32, num_labels=2,
        ... )
        >>> model = BertForSequenceClassification(config)
        >>> english = [{"input_ids": [2, 7, 9], "labels": 0}, {"input_ids": [2, 8], "labels": 1}]
        >>> german = [{"input_ids": [2, 30, 31], "labels": 1}]
        >>> table = tm.block_influence(model, {"en": english, "de": german}, {"en": english})
        >>> [(row["layer"], row["head"]) for row in table.slice(0, 4).to_pylist()]
        [(0, 0), (0, 1), (0, None), (None, None)]
    """
    dtype, model = autocast_dtype(normalize, dtype), unwrapped(model)
    given = as_loss(loss)
    for name, datasets in (("train", train), ("test", test)):
        if not isinstance(datasets, Mapping):
            raise ValueError(
                f"{name}: expected a dict from languages to datasets, got {type(datasets).__name__}"
            )
    tests = {name: _checked(model, rows, f"test {name}", given) for name, rows in test.items()}
    trains = {name: _checked(model, rows, f"train {name}", given) for name, rows in train.items()}
    warn_of_frozen(model, parameters, include_frozen)
    layers = select_layers(model, parameters, include_frozen)
    blocks = parameter_blocks(model, [name for layer in layers for name in layer.parameter_names])
    means = _Means(model, layers, head_mask, normalize, batch_tokens, dtype, advance, given)
    test_means = {name: means.of(examples, f"test {name}") for name, examples in tests.items()}
    rows = []
    for train_language, examples in trains.items():
        train_mean = means.of(examples, f"train {train_language}")
        for test_language, test_mean in test_means.items():
            pair = {"test_language": test_language, "train_language": train_language}
            for block, product in block_products(blocks, test_mean, train_mean).items():
                rows.append({**pair, **block._asdict(), "influence": product})
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def weighted_sum(tables: Sequence[pa.Table], weights: Sequence[float]) -> pa.Table:
    """Add the tables of several checkpoints, `sum_c weights[c] influence_c`.

    Args:
        tables: C results of `block_influence` with the same rows.
        weights: C weights.

    Returns:
        A table like each of them.
    """
    keys = tables[0].drop_columns("influence")
    total = torch.zeros(keys.num_rows, dtype=torch.float64)
    for table, weight in zip(tables, weights, strict=True):
        assert table.drop_columns("influence").equals(keys)
        total += weight * torch.tensor(table["influence"].to_pylist(), dtype=torch.float64)
    return keys.append_column(SCHEMA.field("influence"), pa.array(total.numpy()))


def parameter_blocks(model: nn.Module, names: Sequence[str]) -> BlockParts:
    """Divide parameters into blocks.

    Args:
        model: a BERT-family sequence classifier.
        names: full names of the parameters.

    Returns:
        The parts of every block. Each entry of each parameter is in exactly one block. Blocks are
        ordered by layer, a layer's heads before its rest; the block outside the layers is last.
    """
    blocks: dict[Block, list[tuple[str, tuple[slice, ...]]]] = {}
    slices = [part for part in head_slices(model) if part.name in set(names)]
    for part in slices:
        blocks.setdefault(Block(part.layer, part.head), []).append((part.name, part.index))
    divided = {part.name for part in slices}
    # What the names of each layer's parameters begin with, such as `roberta.encoder.layer.0.`
    name_of = {module: name for name, module in model.named_modules()}
    matches = [re.match(r".*?\.\d+\.", name_of[layer.query]) for layer in attention_layers(model)]
    prefixes = [match.group() for match in matches if match is not None]
    for name in names:
        if name not in divided:
            layer = next((n for n, prefix in enumerate(prefixes) if name.startswith(prefix)), None)
            blocks.setdefault(Block(layer, None), []).append((name, ()))
    order = sorted(blocks, key=lambda block: [math.inf if n is None else n for n in block])
    return {block: blocks[block] for block in order}


def block_products(blocks: BlockParts, first: Gradient, second: Gradient) -> dict[Block, float]:
    """Return the inner product of two gradients in every block, summed in float64."""
    return {
        block: sum(
            float((first[name][index] * second[name][index]).sum(dtype=torch.float64))
            for name, index in parts
        )
        for block, parts in blocks.items()
    }


def _checked(
    model: PreTrainedModel, examples: Examples, name: str, loss: ExampleLoss | None
) -> list[dict[str, Any]]:
    """Return the examples of one language as a list.

    Raises:
        ValueError: there are none, or the model cannot take one of them.
    """
    rows = as_examples(examples, name, model)
    if not rows:
        raise ValueError(f"{name}: expected at least 1 example, got none")
    check_examples(model, rows, name, loss)
    return rows


@dataclass(frozen=True)
class _Means:
    """Computes mean gradients of examples, or means of their unit vectors.

    The attributes are the arguments of `block_influence`, and the selected layers.
    """

    model: PreTrainedModel
    layers: list[Layer]
    head_mask: HeadMask | None
    normalize: str | None
    batch_tokens: int
    dtype: torch.dtype | None
    advance: Callable[[int], Any] | None
    loss: ExampleLoss | None

    def of(self, examples: Examples, name: str) -> Gradient:
        """Return the mean over the examples, float32, by name of the parameter.

        Args:
            examples: the examples.
            name: their name in error messages.
        """
        device = next(self.model.parameters()).device
        mean = {
            parameter: torch.zeros(
                self.model.get_parameter(parameter).shape, dtype=torch.float32, device=device
            )
            for layer in self.layers
            for parameter in layer.parameter_names
        }
        with (
            frozen(self.model),
            verified_pass(
                self.model, examples, self.layers, self.head_mask, self.dtype
            ) as model_pass,
        ):
            for rows, batch in model_pass.batches(self.model, examples, self.batch_tokens):
                groups: list[Captured] = []
                capture(
                    self.model, self.layers, batch, groups.append, self.dtype, model_pass,
                    loss=self.loss,
                )  # fmt: skip
                exponents_B = gradient_exponents(groups[0])
                groups = [scaled_gradients(captured, exponents_B) for captured in groups]
                # The norm of a gradient needs all of its layers, so they are added only now.
                squares_B = torch.stack([squared_norms(captured) for captured in groups]).sum(dim=0)
                not_finite = squares_B.isfinite().logical_not().nonzero()
                if len(not_finite):
                    raise NotFiniteError(name, rows[int(not_finite[0])])
                ones_B = torch.ones_like(squares_B)
                if exponents_B is not None:
                    ones_B = torch.exp2(exponents_B).float()  # undoes the division
                weights_B = inverse_root(squares_B) if self.normalize == "cosine" else ones_B
                for captured in groups:
                    add_gradients(captured, weights_B / len(examples), mean)
                if self.advance is not None:
                    self.advance(len(rows))
        return mean
