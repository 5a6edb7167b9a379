"""Exact influence: inner products of whole per-example gradients, without a projection.

    <grad L(z), grad L(z')> = sum over layers l of <G_l(z), G_l(z')>

The gradient of one example has as many numbers as the model, so it is never formed. A backward
pass shows the two factors of each layer's gradient instead (see `gradients.capture`), and products
are computed from the factors. For a linear layer G = sum_s g_s x_s^T, so that

    <G, G'> = sum_{s,t} <g_s, g'_t> (<x_s, x'_t> + bias)                    (`kernels.gradient_dot`)

which costs S S' (I + O) operations for a pair of examples instead of the I x O of a matrix.

The story of a call: the factors of all layers are held for a block of queries, as many as fit into
`QUERY_BLOCK_BYTES`. The training examples then pass through the model once per block. The backward
pass hands over one layer after the other, and each is multiplied with the same layer of all held
queries and freed. Few passes need large query blocks, and few held bytes need small ones; queries
are the side that is held because there are far fewer of them.

Why cosines are divided at the end. The norm of an example's gradient runs over all layers and is
known only after its backward pass, when the first layers have been multiplied and freed. So inner
products and squared norms are summed side by side, each squared norm once (for queries when their
block is captured, for training examples during the first block), and the division is one operation
on the finished matrix. Dividing each example's factors first would need a second pass.

Gradients of extreme magnitude. The gradient of an example that the model is certain of may be so
small that float32 cannot represent its square. The factors of such an example are divided by a
power of two when they are captured; inner products are multiplied by it at the end, and cosines do
not depend on it.

Shape suffixes: Q queries, N training examples, B examples of a batch, S tokens, I in, O out, b
examples whose gradients are formed at the same time, R x C the shape of a formed gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tracmod import kernels
from tracmod.choices import ParameterSelection, instance
from tracmod.features.rows import extreme_exponents
from tracmod.gradients.capture import (
    Captured,
    Layer,
    ModelPass,
    capture,
    select_layers,
    warn_of_frozen,
)
from tracmod.gradients.preconditioner import Preconditioner
from tracmod.gradients.verified_pass import verified_pass
from tracmod.models.inputs import (
    as_examples,
    check_examples,
    send,
    unwrapped,
)
from tracmod.models.loss import ExampleLoss, LossFunction, as_loss
from tracmod.models.modes import frozen, on_device
from tracmod.subnetworks.head_mask import HeadMask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Bytes of captured factors of queries that are held at the same time.
QUERY_BLOCK_BYTES = 2 << 30


def exact_influence(
    model: PreTrainedModel,
    train: Iterable[Mapping[str, Any]],
    query: Iterable[Mapping[str, Any]],
    parameters: ParameterSelection = "encoder",
    head_mask: HeadMask | None = None,
    normalize: str | None = None,
    batch_tokens: int = 4096,
    device: torch.device | str | None = None,
    advance: Callable[[int], Any] | None = None,
    dtype: torch.dtype | None = None,
    preconditioner: Preconditioner | None = None,
    *,
    include_frozen: bool = False,
    loss: ExampleLoss | LossFunction | None = None,
    query_loss: ExampleLoss | LossFunction | None = None,
) -> Tensor:
    """Compute inner products (or cosines) of whole gradients at one checkpoint.

    `score[q, n] = <grad L(query[q]), grad L(train[n])>` over the selected parameters. No weight
    gradient is stored. Scores of several checkpoints are added with their weights by the caller.

    Args:
        model: BERT-family sequence classifier; left unchanged.
        train: N examples, a `datasets.Dataset` or a sequence of dicts with `input_ids`,
            `attention_mask` and `labels`.
        query: Q examples, likewise.
        parameters: as in `collect_features`.
        head_mask: heads to leave out of the forward pass; None for none.
        normalize: None for inner products or "cosine". A zero gradient has cosine 0 with
            everything.
        batch_tokens: bound on the number of examples times the longest length of a batch.
        device: where to compute; None for the device of the model.
        advance: called with the number of training examples that just passed through the model;
            each counts once per block of queries.
        dtype: torch.bfloat16 for a pass under autocast; None or torch.float32 for float32.
        preconditioner: metric of the inner products, as in `collect_features`. The gradient of
            each layer is then formed, for a few examples at a time.
        include_frozen: whether parameters with `requires_grad=False` count, as in
            `collect_features`.
        loss: the loss that the model was trained with, as in `collect_features`.
        query_loss: the loss of the queries that is explained; None for `loss`.
            `ExampleLoss.measured` leaves out label smoothing and weights.

    Returns:
        (Q, N) float32, in the order of the data sets, on the device of the pass. Positive scores
        lower the loss of the query.

    Raises:
        ValueError: an argument or an example is invalid, as in `collect_features`, or a gradient
            is not finite (`NotFiniteError`).

    Source: Pruthi et al. 2020, arXiv 2002.08484, equation 1 (the term of one checkpoint).

    Examples:
        >>> import torch
        >>> import tracmod as tm
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(
        ...     vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        ...     intermediate_size=32, num_labels=2,
        ... )
        >>> model = BertForSequenceClassification(config)
        >>> ids = [[2, 7, 9], [2, 8, 8, 5], [2, 6]]
        >>> examples = [{"input_ids": row, "labels": n % 2} for n, row in enumerate(ids)]
        >>> scores = tm.exact_influence(model, examples, examples[:1], normalize="cosine")
        >>> scores.shape, round(scores[0, 0].item(), 4)
        (torch.Size([1, 3]), 1.0)
    """
    dtype, model = autocast_dtype(normalize, dtype), unwrapped(model)
    instance("preconditioner", preconditioner, Preconditioner, optional=True)
    trains = as_examples(train, "train", model)
    queries = as_examples(query, "query", model)
    loss = check_examples(model, trains, "train", as_loss(loss))
    query_loss = check_examples(model, queries, "query", as_loss(query_loss) or loss)
    warn_of_frozen(model, parameters, include_frozen)
    layers = select_layers(model, parameters, include_frozen)
    if preconditioner is not None:
        preconditioner.check(layers)
    with (
        frozen(model),
        on_device(model, device),
        verified_pass(model, trains + queries, layers, head_mask, dtype) as model_pass,
    ):
        if preconditioner is not None:
            preconditioner = preconditioner.to(model.device)
        products = _Products(
            model, layers, batch_tokens, dtype, model_pass, preconditioner, loss, query_loss
        )
        products_QN, squares_Q, squares_N = products.of_all(
            queries, trains, normalize == "cosine", advance
        )
    _check_finite(products_QN, squares_Q, squares_N)
    if normalize == "cosine":
        products_QN *= inverse_root(squares_Q)[:, None] * inverse_root(squares_N)[None]
    return products_QN


def autocast_dtype(normalize: str | None, dtype: torch.dtype | None) -> torch.dtype | None:
    """Check two options of a pass; return the dtype for autocast, None for a float32 pass.

    Raises:
        ValueError: normalize is neither None nor "cosine", or dtype is not supported.
    """
    if normalize not in (None, "cosine"):
        raise ValueError(f"normalize: expected None or 'cosine', got {normalize!r}")
    if dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"dtype: expected None, torch.float32 or torch.bfloat16, got {dtype}")
    return None if dtype is torch.float32 else dtype


class NotFiniteError(ValueError):
    """The gradient of an example is NaN or infinite.

    Attributes:
        split: name of the examples, such as "train" or "query".
        row: number of the example in its data set.
    """

    def __init__(self, split: str, row: int) -> None:
        super().__init__(f"{split}: row {row}: expected a finite gradient, got NaN or infinity")
        self.split = split
        self.row = row


def _check_finite(products_QN: Tensor, squares_Q: Tensor, squares_N: Tensor) -> None:
    """Check that all products and squared norms are finite.

    An example is to blame if its squared norm is not finite, or all of its products are not.

    Raises:
        NotFiniteError: for the first example to blame, queries first.
        ValueError: for the first product, if no example alone is to blame.
    """
    bad_QN = products_QN.isfinite().logical_not()
    bad_Q, bad_N = (squares.isfinite().logical_not() for squares in (squares_Q, squares_N))
    if not bool(bad_QN.any() | bad_Q.any() | bad_N.any()):
        return
    candidates = [("query", bad_Q), ("train", bad_N)]
    candidates += [("query", bad_QN.all(dim=1)), ("train", bad_QN.all(dim=0))]
    for split, bad in candidates:
        if bool(bad.any()):
            raise NotFiniteError(split, int(bad.nonzero()[0]))
    query, train = bad_QN.nonzero()[0].tolist()
    raise ValueError(
        f"query: row {query}, train: row {train}: expected a finite inner product of gradients, "
        f"got {float(products_QN[query, train])}"
    )


@dataclass(frozen=True)
class _CapturedBatch:
    """The gradients of one batch of queries, in their factors.

    Attributes:
        rows: (B,) numbers of the examples.
        exponents: (B,) binary exponents by which the factors are divided, or None.
        groups: name of the first layer -> factors of the layers that read the same input.
    """

    rows: Tensor
    exponents: Tensor | None
    groups: dict[str, Captured]

    @property
    def num_bytes(self) -> int:
        return sum(captured.num_bytes for captured in self.groups.values())

    @cached_property
    def layer_names(self) -> frozenset[str]:
        return frozenset(layer.name for own in self.groups.values() for layer in own.layers)


@dataclass(frozen=True)
class _Products:
    """Computes the inner products of a model's gradients.

    Attributes:
        model: the model, prepared by `frozen` and `verified_pass`.
        layers: the layers whose parameters are selected.
        batch_tokens, dtype, preconditioner, loss, query_loss: as in `exact_influence`.
        model_pass: what `verified_pass` has chosen.
    """

    model: PreTrainedModel
    layers: list[Layer]
    batch_tokens: int
    dtype: torch.dtype | None
    model_pass: ModelPass
    preconditioner: Preconditioner | None
    loss: ExampleLoss
    query_loss: ExampleLoss

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _zeros(self, *size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.float32, device=self.device)

    def of_all(
        self,
        queries: list[dict[str, Any]],
        trains: list[dict[str, Any]],
        with_norms: bool,
        advance: Callable[[int], Any] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return inner products (Q, N) and squared norms (Q,) and (N,), float32.

        Without `with_norms`, the squared norms are 0. With it, the products and squared norms of
        examples whose gradients have extreme magnitudes are those of scaled gradients.
        """
        products_QN = self._zeros(len(queries), len(trains))
        squares_Q, squares_N = self._zeros(len(queries)), self._zeros(len(trains))
        for number, block in enumerate(self._query_blocks(queries)):
            if with_norms:
                for query_batch in block:
                    for captured in query_batch.groups.values():
                        squares_Q.index_add_(0, query_batch.rows, self._squares(captured))
            new_squares_N = squares_N if with_norms and number == 0 else None
            for rows, batch in self._batches(trains):
                tiles, exponents_B = self._tiles(block, batch, rows, new_squares_N)
                for query_batch, tile in zip(block, tiles, strict=True):
                    if not with_norms:
                        _unscale(tile, query_batch.exponents, exponents_B)
                    products_QN[query_batch.rows[:, None], rows] = tile
                if advance is not None:
                    advance(len(rows))
        return products_QN, squares_Q, squares_N

    def _batches(
        self, examples: list[dict[str, Any]]
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Yield the row numbers and the padded inputs of batches of similar lengths."""
        for rows, batch in self.model_pass.batches(self.model, examples, self.batch_tokens):
            yield send(torch.tensor(rows), self.device), batch

    def _capture(
        self,
        batch: dict[str, Tensor],
        on_captured: Callable[[Captured], None],
        loss: ExampleLoss,
    ) -> Tensor | None:
        """Run a batch through the model; see `gradients.capture.capture`.

        Without a preconditioner, layers that share their input are joined before they are handed
        on. With one they stay apart, because each has a metric of its own.

        Returns:
            The binary exponents (B,) by which the gradients were divided, or None.
        """
        exponents: list[Tensor | None] = []

        def hand_on(captured: Captured) -> None:
            if not exponents:
                exponents.append(gradient_exponents(captured))
            captured = scaled_gradients(captured, exponents[0])
            on_captured(captured if self.preconditioner else _side_by_side(captured))

        capture(self.model, self.layers, batch, hand_on, self.dtype, self.model_pass, loss=loss)
        return exponents[0] if exponents else None

    def _query_blocks(self, queries: list[dict[str, Any]]) -> Iterator[list[_CapturedBatch]]:
        """Yield blocks of captured batches, each of at most `QUERY_BLOCK_BYTES` (or one batch)."""
        block, size = list[_CapturedBatch](), 0
        for rows, batch in self._batches(queries):
            captured: list[Captured] = []
            exponents_B = self._capture(batch, captured.append, self.query_loss)
            groups = {_name(group): group for group in captured}
            captured_batch = _CapturedBatch(rows, exponents_B, groups)
            if block and size + captured_batch.num_bytes > QUERY_BLOCK_BYTES:
                yield block
                block, size = [], 0
            block.append(captured_batch)
            size += captured_batch.num_bytes
        if block:
            yield block

    def _tiles(
        self,
        block: list[_CapturedBatch],
        batch: dict[str, Tensor],
        rows: Tensor,
        squares_N: Tensor | None,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Return the inner products of each batch of queries with one batch of training examples.

        Second, the binary exponents by which the gradients of the training examples were divided.
        The squared norms of the training examples `rows` are added to `squares_N` if it is given.
        """
        tiles = [self._zeros(len(query_batch.rows), len(rows)) for query_batch in block]

        def multiply(captured: Captured) -> None:
            for query_batch, tile in zip(block, tiles, strict=True):
                # A batch of another language has no gradients of this language's adapters.
                if not query_batch.layer_names.isdisjoint(layer.name for layer in captured.layers):
                    self._add_products(query_batch.groups[_name(captured)], captured, tile)
            if squares_N is not None:
                squares_N.index_add_(0, rows, self._squares(captured))

        exponents_B = self._capture(batch, multiply, self.loss)
        return tiles, exponents_B

    def _add_products(self, query: Captured, train: Captured, out: Tensor) -> None:
        """Add <G_i, G'_j> of a group of layers to out[i, j], in the metric if there is one."""
        if self.preconditioner is None:
            _add_gradient_dot(query, train, out)
            return
        for position, layer in enumerate(query.layers):
            query_layer, train_layer = query.of([position]), train.of([position])
            if layer.kind == "embedding":
                scaled = self.preconditioner.scaled
                _add_gradient_dot(scaled(query_layer), scaled(train_layer), out)
                continue
            for rows, query_bRC in self.preconditioner.gradients(query_layer):
                for columns, train_bRC in self.preconditioner.gradients(train_layer):
                    out[rows, columns] += query_bRC.flatten(1) @ train_bRC.flatten(1).T

    def _squares(self, captured: Captured) -> Tensor:
        """Return the (B,) squared norms of a group of layers, in the metric if there is one."""
        if self.preconditioner is None:
            return squared_norms(captured)
        squares_B = self._zeros(len(captured.x))
        for position, layer in enumerate(captured.layers):
            captured_layer = captured.of([position])
            if layer.kind == "embedding":
                squares_B += squared_norms(self.preconditioner.scaled(captured_layer))
                continue
            for rows, gradients_bRC in self.preconditioner.gradients(captured_layer):
                squares_B[rows] += gradients_bRC.square().sum(dim=(1, 2))
        return squares_B


def gradient_exponents(captured: Captured) -> Tensor | None:
    """Return `extreme_exponents` of a batch's gradients, judged by one group of layers.

    The gradients of other layers follow from those of the first group that the backward pass
    reaches, so their magnitudes are similar.
    """
    largest = [g_BSO.float().abs().amax(dim=(1, 2)) for g_BSO in captured.g]
    return extreme_exponents(torch.stack(largest).amax(dim=0))


def scaled_gradients(captured: Captured, exponents_B: Tensor | None) -> Captured:
    """Divide the gradients of each example by 2 to the power of its exponent."""
    if exponents_B is None:
        return captured
    factors_B11 = torch.exp2(-exponents_B)[:, None, None]
    return replace(captured, g=tuple((g.double() * factors_B11).to(g.dtype) for g in captured.g))


def _unscale(products_QB: Tensor, query: Tensor | None, train: Tensor | None) -> None:
    """Multiply products of scaled gradients by the powers of two of both sides, in place."""
    if query is None and train is None:
        return
    exponents_QB = torch.zeros_like(products_QB, dtype=torch.float64)
    if query is not None:
        exponents_QB += query[:, None]
    if train is not None:
        exponents_QB += train
    products_QB.copy_(products_QB.double() * torch.exp2(exponents_QB))


def _name(captured: Captured) -> str:
    return captured.layers[0].name


def _side_by_side(captured: Captured) -> Captured:
    """Join layers that share x into one layer with all of their outputs.

    `sum_l <g_l, g'_l> <x, x'> = <[g_1, g_2, ...], [g'_1, g'_2, ...]> <x, x'>`, so that the products
    of x, the wide side of query, key and value, are computed once instead of once per layer.
    """
    if len(captured.g) == 1:
        return captured
    return replace(captured, g=(torch.cat(captured.g, dim=-1),))


def _add_gradient_dot(query: Captured, train: Captured, out: Tensor) -> None:
    """Add <G_i, G'_j> of one layer, or of joined layers, to out[i, j]."""
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
    """Compute the squared norm of every example's gradient of a group of layers.

        linear:     |G|^2 = sum_{s,t} <g_s, g_t> (<x_s, x_t> + bias)
        embedding:  |G|^2 = sum of <g_s, g_t> over the pairs of tokens with the same id
        LayerNorm:  |G|^2 = |sum_s g_s * x_s|^2 + bias |sum_s g_s|^2, formed directly

    Layers that share x contribute the sum of their squared norms.

    Args:
        captured: the factors, with B examples.

    Returns:
        (B,) float32.
    """
    captured = _side_by_side(captured)
    layer, x, g_BSO = captured.layers[0], captured.x, captured.g[0].float()
    if captured.lengths is not None:
        # Behind the last attended token, g may be anything that the model has computed there.
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
    """Return 1 / sqrt(squares), and 0 where a square is 0, so that a zero gradient has cosine 0."""
    return torch.where(squares > 0, squares.clamp_min(1e-45).rsqrt(), 0)
