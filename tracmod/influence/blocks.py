"""Influence by parameter block: how much of it flows through each attention head and each layer.

The blocks divide the selected parameters: a head's rows of query, key and value (weight and bias)
with its columns of the attention output projection; the rest of each layer; what lies outside the
layers. With g^b the entries of a gradient in block b,

    <g(z), g(z')> = sum_b <g^b(z), g^b(z')>,

and an inner product is linear in each side, so its mean over pairs is one of mean gradients:

    mean_{z, z'} <u^b(z), u^b(z')> = <mean_z u^b(z), mean_z' u^b(z')>,    u = g or g / |g| (cosine).

One pass over each language's examples therefore gives the exact means of every pair of languages
and every block: no projection, no store, no matrix of scores.

Shapes: B examples of a batch, S tokens, I in, O out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tracmod.gradients.capture import Captured, Layer, capture, select_layers
from tracmod.gradients.lean_pass import lean
from tracmod.influence.exact import inverse_root, squared_norms
from tracmod.models.architecture import attention_layers
from tracmod.models.inputs import (
    as_examples,
    check_examples,
    collate,
    example_length,
    pad_token_id,
    plan_batches,
)
from tracmod.models.modes import frozen
from tracmod.subnetworks.head_mask import HeadMask, head_slices

# What a batch captures is held until its examples' norms are known: about 0.75 MB per token of
# XLM-R base.
BATCH_TOKENS = 2048

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
    """A part of the parameters: of a head; of a layer without its heads; outside the layers.

    Attributes:
        layer: from 0; None for what is in no layer.
        head: from 0; None for what belongs to no head.
    """

    layer: int | None
    head: int | None


def block_influence(
    model: PreTrainedModel,
    train: Mapping[str, Examples],
    test: Mapping[str, Examples],
    parameters: str = "encoder",
    head_mask: HeadMask | None = None,
    normalize: str | None = None,
    batch_tokens: int = BATCH_TOKENS,
    dtype: torch.dtype | None = None,
    advance: Callable[[int], Any] | None = None,
) -> pa.Table:
    """Mean influence between languages at one checkpoint, divided among blocks of parameters.

    `influence(l, m, b) = mean_{z in test[l], z' in train[m]} <u^b(z), u^b(z')>`, where u is the
    gradient, or with "cosine" the gradient over the norm of the whole of it. The blocks of a pair
    of languages therefore add up to the mean of `exact_influence` between them, which is the mean
    influence that projected features estimate.

    Memory: a gradient, 4 bytes per selected parameter, for each test language and one more.

    Args:
        model: BERT-family sequence classifier, on any device; left as it was.
        train, test: examples by language, each with `input_ids`, `labels` and maybe
            `attention_mask`.
        parameters: `encoder`, `all`, `attention` or `classifier`, as in `collect_features`.
        head_mask: applied in the forward pass; a masked head's block is exactly 0.
        normalize: None or "cosine".
        batch_tokens: bound on examples x longest length of a batch.
        dtype: torch.bfloat16 for an autocast pass; None or torch.float32 for none.
        advance: called with the number of examples done.

    Returns:
        Columns test_language, train_language, layer and head (int32; null: see `Block`) and
        influence (float64, the unit of the scores). Blocks without selected parameters are left
        out.

    Raises:
        ValueError: as in `collect_features`; a language without examples.

    Source: Pruthi et al. 2020 (TracIn), whose equation is divided here; the division into heads is
        that of Michel et al. 2019 (arXiv 1905.10650).
    """
    if normalize not in (None, "cosine"):
        raise ValueError(f"normalize: expected None or 'cosine', got {normalize!r}")
    if dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"dtype: expected None, torch.float32 or torch.bfloat16, got {dtype}")
    dtype = None if dtype is torch.float32 else dtype
    tests = {name: _checked(model, rows, f"test {name}") for name, rows in test.items()}
    trains = {name: _checked(model, rows, f"train {name}") for name, rows in train.items()}
    layers = select_layers(model, parameters)
    blocks = parameter_blocks(model, [name for layer in layers for name in layer.parameter_names])
    means = _Means(model, layers, head_mask, normalize, batch_tokens, dtype, advance)
    of_tests = {name: means.of(examples, f"test {name}") for name, examples in tests.items()}
    rows = []
    for train_language, examples in trains.items():
        of_train = means.of(examples, f"train {train_language}")
        for test_language, of_test in of_tests.items():
            for block, product in block_products(blocks, of_test, of_train).items():
                pair = {"test_language": test_language, "train_language": train_language}
                rows.append({**pair, **block._asdict(), "influence": product})
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def weighted_sum(tables: Sequence[pa.Table], weights: Sequence[float]) -> pa.Table:
    """`sum_c weights[c] * influence_c`: `block_influence` of several checkpoints as one table."""
    keys = tables[0].drop_columns("influence")
    total = torch.zeros(keys.num_rows, dtype=torch.float64)
    for table, weight in zip(tables, weights, strict=True):
        assert table.drop_columns("influence").equals(keys)
        total += weight * torch.tensor(table["influence"].to_pylist(), dtype=torch.float64)
    return keys.append_column(SCHEMA.field("influence"), pa.array(total.numpy()))


def parameter_blocks(
    model: nn.Module, names: Sequence[str]
) -> dict[Block, list[tuple[str, tuple[slice, ...]]]]:
    """Which entries of the named parameters each block holds, as (name, index).

    Every entry of every named parameter is in exactly one block; layer by layer, a layer's heads
    first, what is in no layer last.
    """
    blocks: dict[Block, list[tuple[str, tuple[slice, ...]]]] = {}
    slices = [one for one in head_slices(model) if one.name in set(names)]
    for one in slices:
        blocks.setdefault(Block(one.layer, one.head), []).append((one.name, one.index))
    divided, prefixes = {one.name for one in slices}, _layer_prefixes(model)
    for name in names:
        if name not in divided:
            layer = next((n for n, prefix in enumerate(prefixes) if name.startswith(prefix)), None)
            blocks.setdefault(Block(layer, None), []).append((name, ()))
    order = sorted(blocks, key=lambda block: [math.inf if n is None else n for n in block])
    return {block: blocks[block] for block in order}


def _layer_prefixes(model: nn.Module) -> list[str]:
    """What the names of each encoder layer's parameters begin with: `roberta.encoder.layer.0.`."""
    names = {module: name for name, module in model.named_modules()}
    found = [re.match(r".*?\.\d+\.", names[layer.query]) for layer in attention_layers(model)]
    return [match.group() for match in found if match is not None]


def block_products(
    blocks: Mapping[Block, Sequence[tuple[str, tuple[slice, ...]]]],
    first: Gradient,
    second: Gradient,
) -> dict[Block, float]:
    """Inner product of two gradients in every block, summed in float64."""
    return {
        block: sum(
            float((first[name][index] * second[name][index]).sum(dtype=torch.float64))
            for name, index in parts
        )
        for block, parts in blocks.items()
    }


def _checked(model: PreTrainedModel, examples: Examples, name: str) -> list[dict[str, Any]]:
    rows = as_examples(examples, name)
    if not rows:
        raise ValueError(f"{name}: expected at least one example, got none")
    check_examples(model, rows, name)
    return rows


@dataclass(frozen=True)
class _Means:
    """Takes the mean of examples' gradients, or of their unit vectors; float32, by parameter."""

    model: PreTrainedModel
    layers: list[Layer]
    head_mask: HeadMask | None
    normalize: str | None
    batch_tokens: int
    dtype: torch.dtype | None
    advance: Callable[[int], Any] | None

    def of(self, examples: Examples, name: str) -> Gradient:
        """The mean; `name` is what messages call the examples."""
        device = next(self.model.parameters()).device
        mean = {
            parameter: torch.zeros(self.model.get_parameter(parameter).shape, device=device)
            for layer in self.layers
            for parameter in layer.parameter_names
        }
        lengths = [example_length(example) for example in examples]
        with frozen(self.model), lean(self.model, self.head_mask, self.dtype) as kept:
            for rows in plan_batches(lengths, self.batch_tokens):
                batch = collate([examples[row] for row in rows], pad_token_id(self.model), device)
                seen: list[Captured] = []
                capture(self.model, self.layers, batch, seen.append, self.dtype, kept)
                squares_B = torch.stack([squared_norms(captured) for captured in seen]).sum(dim=0)
                _check_finite(name, rows, squares_B)
                ones_B = torch.ones_like(squares_B)
                weights_B = inverse_root(squares_B) if self.normalize == "cosine" else ones_B
                for captured in seen:
                    _add_gradients(captured, weights_B / len(examples), mean)
                if self.advance is not None:
                    self.advance(len(rows))
        return mean


def _check_finite(name: str, rows: Sequence[int], squares_B: Tensor) -> None:
    finite_B = squares_B.isfinite()
    if not bool(finite_B.all()):
        row = rows[int(finite_B.logical_not().nonzero()[0])]
        raise ValueError(f"{name}: row {row}: expected a finite gradient, got NaN or infinity")


def _add_gradients(captured: Captured, weights_B: Tensor, total: Gradient) -> None:
    """Add `sum_b weights[b] * G_b` of the captured layers, `G_b = sum_s g_s x_s^T`."""
    captured = captured.with_all_columns()
    x_BSI = captured.x if captured.layers[0].kind == "embedding" else captured.x.float()
    weights_BS = weights_B[:, None].expand(x_BSI.shape[:2])
    if captured.lengths is not None:
        position_S = torch.arange(x_BSI.shape[1], device=x_BSI.device)
        weights_BS = weights_BS * (position_S < captured.lengths[:, None])
    for layer, g_BSO in zip(captured.layers, captured.g, strict=True):
        g_TO = (g_BSO.float() * weights_BS[..., None]).flatten(0, 1)
        weight = total[f"{layer.name}.weight"]
        if layer.kind == "linear":
            weight.addmm_(g_TO.T, x_BSI.flatten(0, 1))
        elif layer.kind == "elementwise":
            weight += (g_TO * x_BSI.flatten(0, 1)).sum(dim=0)
        else:
            weight.index_add_(0, x_BSI.flatten(), g_TO)
        if layer.bias and layer.kind != "embedding":
            total[f"{layer.name}.bias"] += g_TO.sum(dim=0)
