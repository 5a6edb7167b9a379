"""Exact influence: inner products of whole per-example gradients, without projection."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tracmod import kernels
from tracmod.gradients.capture import Captured, Layer, capture, select_layers
from tracmod.gradients.lean_pass import LeanColumns, lean
from tracmod.gradients.preconditioner import Preconditioner
from tracmod.models.inputs import (
    as_examples,
    check_examples,
    collate,
    example_length,
    pad_token_id,
    plan_batches,
    send,
)
from tracmod.models.modes import frozen, on_device
from tracmod.subnetworks.head_mask import HeadMask

# Captured query gradients held at a time by `exact_influence`; the training set is passed over once
# per such block of queries.
QUERY_BLOCK_BYTES = 2 << 30


def exact_influence(
    model: PreTrainedModel,
    train: Iterable[Mapping[str, Any]],
    query: Iterable[Mapping[str, Any]],
    parameters: str = "encoder",
    head_mask: HeadMask | None = None,
    normalize: str | None = None,
    batch_tokens: int = 4096,
    device: torch.device | str | None = None,
    advance: Callable[[int], Any] | None = None,
    dtype: torch.dtype | None = None,
    preconditioner: Preconditioner | None = None,
) -> Tensor:
    """Inner products (or cosines) of whole gradients, without a projection.

    `<grad L(z), grad L(z')> = sum_l <G_l(z), G_l(z')>` from layer inputs and output gradients: no
    weight gradient is stored.

    Args:
        model, parameters, head_mask, device: as in `collect_features`; one checkpoint.
        train, query: `datasets.Dataset` or sequences of dicts.
        normalize: None or "cosine".
        batch_tokens: bound on examples x longest length of a batch.
        advance: called with the number of training examples done (each counts once per block of
            queries).
        dtype: torch.bfloat16 for an autocast pass; None or torch.float32 for none.
        preconditioner: the metric of the inner products, as in `collect_features`; every layer's
            gradient is then formed, a few examples at a time.

    Returns:
        (Q, N) float32, rows and columns in dataset order, on the device of the pass.

    Raises:
        ValueError: as in `collect_features`.
    """
    if normalize not in (None, "cosine"):
        raise ValueError(f"normalize: expected None or 'cosine', got {normalize!r}")
    if dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"dtype: expected None, torch.float32 or torch.bfloat16, got {dtype}")
    dtype = None if dtype is torch.float32 else dtype
    trains, queries = as_examples(train, "train"), as_examples(query, "query")
    check_examples(model, trains, "train")
    check_examples(model, queries, "query")
    with frozen(model), on_device(model, device), lean(model, head_mask, dtype) as kept:
        layers = select_layers(model, parameters)
        if preconditioner is not None:
            preconditioner.check(layers)
            preconditioner = preconditioner.to(model.device)
        one_pass = _Pass(model, layers, batch_tokens, dtype, kept, preconditioner)
        products_QN, squares_Q, squares_N = _exact_products(
            one_pass, queries, trains, normalize == "cosine", advance
        )
    _check_finite(products_QN, squares_Q, squares_N)
    if normalize == "cosine":
        products_QN *= inverse_root(squares_Q)[:, None] * inverse_root(squares_N)[None]
    return products_QN


class NotFiniteError(ValueError):
    """The gradient of a row of `split` ("train" or "query") is NaN or infinite."""

    def __init__(self, split: str, row: int) -> None:
        super().__init__(f"{split}: row {row}: expected a finite gradient, got NaN or infinity")
        self.split = split
        self.row = row


def _check_finite(products_QN: Tensor, squares_Q: Tensor, squares_N: Tensor) -> None:
    """Name the first example whose squared norm, or every product, is NaN or infinite."""
    bad_QN = products_QN.isfinite().logical_not()
    bad_Q, bad_N = (squares.isfinite().logical_not() for squares in (squares_Q, squares_N))
    if not bool(bad_QN.any() | bad_Q.any() | bad_N.any()):
        return
    by_name = [("query", bad_Q), ("train", bad_N)]
    by_name += [("query", bad_QN.all(dim=1)), ("train", bad_QN.all(dim=0))]
    for name, bad in by_name:
        for row in bad.nonzero().flatten()[:1].tolist():
            raise NotFiniteError(name, row)
    query, train = bad_QN.nonzero()[0].tolist()
    raise ValueError(
        f"query: row {query}, train: row {train}: expected a finite inner product of gradients, "
        f"got {float(products_QN[query, train])}"
    )


@dataclass(frozen=True)
class _Pass:
    """How examples are passed through a model."""

    model: PreTrainedModel
    layers: list[Layer]
    batch_tokens: int
    dtype: torch.dtype | None
    kept: LeanColumns
    preconditioner: Preconditioner | None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def batches(self, examples: list[dict[str, Any]]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Rows and padded batches, of like lengths."""
        lengths = [example_length(example) for example in examples]
        for rows in plan_batches(lengths, self.batch_tokens):
            batch = collate([examples[row] for row in rows], pad_token_id(self.model), self.device)
            yield send(torch.tensor(rows), self.device), batch

    def capture(self, batch: dict[str, Tensor], on_captured: Callable[[Captured], None]) -> None:
        """See `capture.capture`."""
        capture(self.model, self.layers, batch, on_captured, self.dtype, self.kept)

    def joined(self, captured: Captured) -> Captured:
        """As it is kept: layers that share x side by side, unless each has a metric of its own."""
        return captured if self.preconditioner else _side_by_side(captured)

    def add_products(self, query: Captured, train: Captured, out: Tensor) -> None:
        """out[i, j] += <G_i, G'_j> of a group of layers, in the metric if there is one."""
        if self.preconditioner is None:
            _add_products(query, train, out)
            return
        for place, layer in enumerate(query.layers):
            one, other = query.of([place]), train.of([place])
            if layer.kind == "embedding":
                scaled = self.preconditioner.scaled
                _add_products(scaled(one), scaled(other), out)
                continue
            for rows, query_bRC in self.preconditioner.gradients(one):
                for columns, train_bRC in self.preconditioner.gradients(other):
                    out[rows, columns] += query_bRC.flatten(1) @ train_bRC.flatten(1).T

    def squares(self, captured: Captured) -> Tensor:
        """(B,) squared norms of a group of layers, in the metric if there is one."""
        if self.preconditioner is None:
            return squared_norms(captured)
        squares_B = torch.zeros(len(captured.x), device=self.device)
        for place, layer in enumerate(captured.layers):
            one = captured.of([place])
            if layer.kind == "embedding":
                squares_B += squared_norms(self.preconditioner.scaled(one))
                continue
            for rows, gradients_bRC in self.preconditioner.gradients(one):
                squares_B[rows] += gradients_bRC.square().sum(dim=(1, 2))
        return squares_B


@dataclass(frozen=True)
class _CapturedBatch:
    """Everything `capture` shows of one batch: whole gradients, in their factors."""

    rows: Tensor
    groups: dict[str, Captured]

    @property
    def num_bytes(self) -> int:
        return sum(captured.num_bytes for captured in self.groups.values())


def _exact_products(
    one_pass: _Pass,
    queries: list[dict[str, Any]],
    trains: list[dict[str, Any]],
    norms: bool,
    advance: Callable[[int], Any] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Inner products (Q, N) and, with `norms`, squared norms (Q,) and (N,), float32."""
    device = one_pass.device
    products_QN = torch.zeros(len(queries), len(trains), device=device)
    squares_Q = torch.zeros(len(queries), device=device)
    squares_N = torch.zeros(len(trains), device=device)
    for first, block in _query_blocks(one_pass, queries):
        if norms:
            for query_batch in block:
                for captured in query_batch.groups.values():
                    squares_Q.index_add_(0, query_batch.rows, one_pass.squares(captured))
        for rows, batch in one_pass.batches(trains):
            tiles = [torch.zeros(len(b.rows), len(rows), device=device) for b in block]

            def multiply(captured: Captured, rows: Tensor = rows, tiles: Any = tiles) -> None:
                captured = one_pass.joined(captured)
                for query_batch, tile in zip(block, tiles, strict=True):  # noqa: B023
                    one_pass.add_products(query_batch.groups[_name(captured)], captured, tile)
                if norms and first:  # noqa: B023
                    squares_N.index_add_(0, rows, one_pass.squares(captured))

            one_pass.capture(batch, multiply)
            for query_batch, tile in zip(block, tiles, strict=True):
                products_QN[query_batch.rows[:, None], rows] = tile
            if advance is not None:
                advance(len(rows))
    return products_QN, squares_Q, squares_N


def _query_blocks(
    one_pass: _Pass, queries: list[dict[str, Any]]
) -> Iterator[tuple[bool, list[_CapturedBatch]]]:
    """Captured batches of queries, as many at a time as fit; the flag marks the first block."""
    first, block, size = True, list[_CapturedBatch](), 0
    for rows, batch in one_pass.batches(queries):
        captured_batch = _CapturedBatch(rows, {})

        def keep(captured: Captured, groups: dict[str, Captured] = captured_batch.groups) -> None:
            groups[_name(captured)] = one_pass.joined(captured)

        one_pass.capture(batch, keep)
        if block and size + captured_batch.num_bytes > QUERY_BLOCK_BYTES:
            yield first, block
            first, block, size = False, [], 0
        block.append(captured_batch)
        size += captured_batch.num_bytes
    if block:
        yield first, block


def _name(captured: Captured) -> str:
    return captured.layers[0].name


def _side_by_side(captured: Captured) -> Captured:
    """Layers that share x as one layer of all their outputs: x is multiplied once.

    `sum_l <g_l, g'_l> <x, x'> = <[g_1, g_2, ...], [g'_1, g'_2, ...]> <x, x'>`
    """
    if len(captured.g) == 1:
        return captured
    return replace(captured, g=(torch.cat(captured.g, dim=-1),))


def _add_products(query: Captured, train: Captured, out: Tensor) -> None:
    layer = query.layers[0]
    kernels.gradient_dot(
        query.x,
        query.g[0],
        train.x,
        train.g[0],
        out,
        lengths1=query.lengths,
        lengths2=train.lengths,
        layer=layer.kind,
        bias=layer.bias and layer.kind != "embedding",
    )


def squared_norms(captured: Captured) -> Tensor:
    """`|G_b|^2` of every example, (B,) float32: of LayerNorm as it is, else over pairs of tokens.

    linear: `sum_{s,t} <g_s, g_t> (<x_s, x_t> + bias)`; embedding: of pairs with the same id. Of
    layers that share x, the sum over them.
    """
    captured = _side_by_side(captured)
    layer, x, g_BSO = captured.layers[0], captured.x, captured.g[0].float()
    if captured.lengths is not None:
        position_S = torch.arange(g_BSO.shape[1], device=g_BSO.device)
        padding_BS = position_S >= captured.lengths[:, None]
        g_BSO = g_BSO.masked_fill(padding_BS[..., None], 0)
    if layer.kind == "elementwise":
        squares_B = (g_BSO * x).sum(dim=1).square().sum(dim=1)
        return squares_B + layer.bias * g_BSO.sum(dim=1).square().sum(dim=1)
    if layer.kind == "embedding":
        pairs_BSS = (x[:, :, None] == x[:, None, :]).float()
    else:
        pairs_BSS = x.float() @ x.float().mT + float(layer.bias)
    return (g_BSO @ g_BSO.mT * pairs_BSS).sum(dim=(1, 2))


def inverse_root(squares: Tensor) -> Tensor:
    return torch.where(squares > 0, squares.clamp_min(1e-45).rsqrt(), 0)
