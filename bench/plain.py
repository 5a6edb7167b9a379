"""Baselines in plain transformers and torch: the floor of a pass, naive TracIn, and hooks.

Nothing here uses tracmod's pass, kernels or scores. The batches are the same as tracmod's, because
any good implementation sorts by length.

Shape suffixes: B examples, S tokens, I inputs and O outputs of a layer, P parameters, K features,
N training examples, Q query examples.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tracmod.bench.measure import synchronize
from tracmod.choices import Unit
from tracmod.models.architecture import embeddings_module
from tracmod.models.inputs import collate, pad_token_id, plan_batches

Examples = Sequence[Mapping[str, Any]]
NAIVE_BLOCK = 32  # number of training gradients that naive TracIn multiplies at a time


class Batch(NamedTuple):
    """A collated batch, with the positions of its examples."""

    rows: list[int]
    inputs: dict[str, Tensor]
    labels: Tensor


def ready_batches(
    model: Any, examples: Examples, batch_tokens: int, device: torch.device
) -> list[Batch]:
    """Build length-sorted batches of bounded size, already on the device."""
    batches = []
    for rows in plan_batches([len(e["input_ids"]) for e in examples], batch_tokens):
        inputs = collate([examples[row] for row in rows], pad_token_id(model), device)
        batches.append(Batch(rows, inputs, inputs.pop("labels")))
    return batches


def loss_of(
    model: Any, batch: Batch, dtype: torch.dtype | None = None, unit: Unit = "text"
) -> Tensor:
    """Compute the sum of the examples' losses, under autocast if a dtype is given.

    An example's loss is the cross entropy of its class, the mean over its labelled tokens, or the
    mean over the first and the last token of its answer.
    """
    device, labels = batch.labels.device.type, batch.labels
    with nullcontext() if dtype is None else torch.autocast(device, dtype=dtype):
        output = model(**batch.inputs)
    if unit == "span":
        padding = batch.inputs["attention_mask"].eq(0)
        ends = [output.start_logits, output.end_logits]
        logits = torch.stack([end.float().masked_fill(padding, -math.inf) for end in ends], dim=1)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / 2
    if unit == "token":
        losses = F.cross_entropy(output.logits.float().mT, labels, reduction="none")
        return (losses.sum(dim=1) / labels.ne(-100).sum(dim=1)).sum()
    return F.cross_entropy(output.logits.float(), labels, reduction="sum")


@contextmanager
def requiring_grad(model: Any, names: Sequence[str]) -> Iterator[list[Tensor]]:
    """Put the model into evaluation mode and let only these parameters require a gradient."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    model.eval().requires_grad_(False)
    chosen = [model.get_parameter(name).requires_grad_(True) for name in names]
    try:
        yield chosen
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


def encoder_names(model: Any) -> list[str]:
    """Return the names of all parameters outside the embeddings."""
    return [name for name, _ in model.named_parameters() if ".embeddings." not in name]


# --- the floor ------------------------------------------------------------------------------


def floor_pass(
    model: Any,
    batches: Sequence[Batch],
    dtype: torch.dtype | None = None,
    unit: Unit = "text",
) -> None:
    """Run forward, and backward to the embeddings' output, without gradients of parameters.

    This is the least work of any method that needs every layer's input and output gradient.
    """
    leaves: list[Tensor] = []

    def cut(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    hook = embeddings_module(model).register_forward_hook(cut)
    try:
        with requiring_grad(model, []):
            for batch in batches:
                torch.autograd.grad(loss_of(model, batch, dtype, unit), leaves.pop())
    finally:
        hook.remove()


# --- naive TracIn ---------------------------------------------------------------------------


def naive_gradient(
    model: Any, parameters: list[Tensor], batch: Batch, out_P: Tensor, dtype: Any = None
) -> None:
    """Write the whole gradient of one example into `out_P`."""
    gradients = torch.autograd.grad(loss_of(model, batch, dtype), parameters)
    torch.cat([gradient.flatten() for gradient in gradients], out=out_P)


def one_by_one(model: Any, examples: Examples, device: torch.device) -> Iterator[Batch]:
    """Yield batches of one example, in order."""
    for row, example in enumerate(examples):
        inputs = collate([example], pad_token_id(model), device)
        yield Batch([row], inputs, inputs.pop("labels"))


class NaiveScores(NamedTuple):
    """Cosines (Q, N), and the seconds that each part took."""

    scores_QN: Tensor
    query_seconds: float
    gradient_seconds: float
    product_seconds: float


def naive_scores(model: Any, train: Examples, query: Examples, device: torch.device) -> NaiveScores:
    """Compute TracIn in the obvious way, but without needless copies.

    Query gradients are kept as (Q, P) unit rows. Training gradients do not fit into memory: they
    are computed one at a time, and multiplied a block at a time.
    """
    with requiring_grad(model, encoder_names(model)) as parameters:
        size, dtype = sum(p.numel() for p in parameters), parameters[0].dtype
        start = _now(device)
        query_QP = torch.empty(len(query), size, dtype=dtype, device=device)
        for row, batch in zip(query_QP, one_by_one(model, query, device), strict=True):
            naive_gradient(model, parameters, batch, row)
            row.div_(torch.linalg.vector_norm(row))
        query_seconds = _now(device) - start
        scores_QN = torch.empty(len(query), len(train), dtype=dtype, device=device)
        block = torch.empty(min(NAIVE_BLOCK, len(train)), size, dtype=dtype, device=device)
        gradient_seconds = product_seconds = 0.0
        for first in range(0, len(train), NAIVE_BLOCK):
            some = train[first : first + NAIVE_BLOCK]
            start = _now(device)
            for row, batch in zip(block, one_by_one(model, some, device), strict=False):
                naive_gradient(model, parameters, batch, row)
            middle = _now(device)
            rows = block[: len(some)]
            products = query_QP @ rows.T
            products /= torch.linalg.vector_norm(rows, dim=1)
            scores_QN[:, first : first + len(some)] = products
            gradient_seconds += middle - start
            product_seconds += _now(device) - middle
    return NaiveScores(scores_QN, query_seconds, gradient_seconds, product_seconds)


def _now(device: torch.device) -> float:
    """Return the time, once the device has done all its work."""
    synchronize(device)
    return time.perf_counter()


def ranking(scores_QN: Tensor, groups_N: Tensor, num_groups: int, k: int) -> Tensor:
    """Rank both signs and sum by group with torch alone; return the indices (Q, k) of the best."""
    k = min(k, scores_QN.shape[1])
    scores_QN.topk(k, largest=False)
    sums = torch.zeros(len(scores_QN), num_groups, device=scores_QN.device)
    sums.index_add_(1, groups_N, scores_QN)
    return scores_QN.topk(k).indices


# --- batched, with hooks --------------------------------------------------------------------


@contextmanager
def hooked(model: Any, use: Callable[[str, nn.Module, Tensor, Tensor], None]) -> Iterator[None]:
    """Call `use` in a backward pass with the input and output gradient of Linears and LayerNorms.

    The embeddings are left out, and the backward pass stops at the lowest layer's outputs.
    """
    handles = []

    def attach(name: str, module: nn.Module) -> None:
        def forward_hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            x = args[0].detach()
            output.register_hook(lambda g: use(name, module, x, g))
            return output

        handles.append(module.register_forward_hook(forward_hook))

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.LayerNorm) and ".embeddings." not in name:
            attach(name, module)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class HookedFeatures:
    """Projected gradients with ready-made matrices: `vec(R_out G R_in^T)` of every layer.

    Args:
        model: the classifier.
        dim: K, if all layers are summed into one grid, with the exact gradient of the output layer
            beside it and sketches of LayerNorm in it. None for a grid for each linear layer,
            concatenated.
        grid: side of the grids of single layers.
        seed: seed of the matrices.
    """

    def __init__(
        self, model: Any, *, dim: int | None = None, grid: int = 16, seed: int = 0
    ) -> None:
        self.model, self.summed = model, dim is not None
        generator = torch.Generator().manual_seed(seed)
        modules = {n: m for n, m in model.named_modules() if ".embeddings." not in n}
        linears = {n: m for n, m in modules.items() if isinstance(m, nn.Linear)}
        self.exact = None
        self.start = 0
        if dim is not None:
            sizes = {n: m.out_features * (m.in_features + 1) for n, m in linears.items()}
            smallest = min(sizes, key=lambda name: sizes[name])  # the classifier's output
            if sizes[smallest] <= 0.6 * dim:
                self.exact, self.start = smallest, sizes[smallest]
            grid = math.isqrt(dim - self.start)
        self.side = grid
        self.offset = {
            name: self.start if self.summed else number * grid**2
            for number, name in enumerate(linears)
        }
        self.dim = dim or grid**2 * len(linears)
        self._make_matrices(linears, modules, generator)

    def _make_matrices(self, linears: Any, modules: Any, generator: torch.Generator) -> None:
        device, side = next(self.model.parameters()).device, self.side

        def signs(*shape: int) -> Tensor:
            return (torch.randint(0, 2, shape, generator=generator) * 2 - 1).float().to(device)

        self.r_in: dict[str, Tensor] = {}
        self.r_out: dict[str, Tensor] = {}
        self.sketch: dict[str, tuple[Tensor, Tensor]] = {}
        for name, module in modules.items():
            if name in linears:
                shared = self._input(name)
                if shared not in self.r_in:
                    self.r_in[shared] = signs(side, module.in_features + 1) / side**0.5
                self.r_out[name] = signs(side, module.out_features) / side**0.5
            elif isinstance(module, nn.LayerNorm) and self.summed:
                count = 2 * module.normalized_shape[0]
                positions = torch.randint(0, side**2, (count,), generator=generator)
                self.sketch[name] = self.start + positions.to(device), signs(count)

    @staticmethod
    def _input(name: str) -> str:
        """Return the key of a layer's input projection, which query, key and value share."""
        parent, _, own = name.rpartition(".")
        return parent if own in ("query", "key", "value") else name

    def features(self, batches: Sequence[Batch], dtype: torch.dtype | None = None) -> Tensor:
        """Compute the features of all examples of the batches: (N, K) float32."""
        device = batches[0].labels.device
        features = torch.zeros(sum(len(b.rows) for b in batches), self.dim, device=device)
        with requiring_grad(self.model, []):
            for batch in batches:
                out_BK = torch.zeros(len(batch.rows), self.dim, device=device)
                self._shared: tuple[int, Tensor] | None = None
                with hooked(self.model, lambda *seen: self._add(out_BK, *seen)):  # noqa: B023
                    loss_of(self.model, batch, dtype).backward()
                features[batch.rows] = out_BK
        return features

    def _add(self, out_BK: Tensor, name: str, module: nn.Module, x: Tensor, g: Tensor) -> None:
        if isinstance(module, nn.LayerNorm):
            if self.summed:
                x = F.layer_norm(x, module.normalized_shape, eps=module.eps)
                both = torch.cat([(g * x).sum(1), g.sum(1)], 1).float()
                positions, signs = self.sketch[name]
                out_BK.index_add_(1, positions, both * signs)
            return
        if g.dim() == 2:
            x, g = x[:, None], g[:, None]
        if name == self.exact:
            weight = torch.bmm(g.mT, x.to(g.dtype))
            both = torch.cat([weight, g.sum(1)[..., None]], 2)
            out_BK[:, : self.start] += both.flatten(1)
            return
        grid = torch.bmm((g @ self.r_out[name].T.to(g.dtype)).mT, self._projected(name, x, g))
        start = self.offset[name]
        out_BK[:, start : start + self.side**2] += grid.flatten(1)

    def _projected(self, name: str, x: Tensor, g: Tensor) -> Tensor:
        """Project a layer's input, once for query, key and value, which share it."""
        if self._shared is None or self._shared[0] != x.data_ptr():
            r_in = self.r_in[self._input(name)].to(g.dtype)
            p = F.linear(x.to(g.dtype), r_in[:, :-1], r_in[:, -1])
            self._shared = x.data_ptr(), p
        return self._shared[1]
