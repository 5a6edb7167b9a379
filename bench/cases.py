"""Benchmark cases of the native ops: sizes, inputs, plain torch, float64 references, costs.

`bench_kernels.py` checks and times them. The tests check each of them at a few rows, so that
nothing is timed that is not tested.

Letters of sizes: B examples, S tokens, I inputs and O outputs of a layer, K features per row,
N training examples, Q query examples, C checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tracmod import kernels
from tracmod.kernels import reference

KINDS: tuple[kernels.Kind, ...] = ("rademacher", "sjlt")  # from both sides, on a grid
CHECKED_QUERIES = 64  # number of queries of `top_k_dot` that are checked, evenly spread


class Cost(NamedTuple):
    """Operations of the cheapest implementation, two per multiply-add, and bytes moved.

    Attributes:
        flops: operations.
        input_bytes: bytes of the inputs without padding, each read once.
        output_bytes: bytes written, and read if the op adds.
    """

    flops: int
    input_bytes: int
    output_bytes: int


class Case(NamedTuple):
    """One op at one size.

    Attributes:
        op, shape: names in the tables.
        native: runs the op.
        plain: implementations in plain torch by name, with everything prepared that can be.
        error: returns the largest difference of a function's result from float64, over the largest
            number of the float64 result.
        cost: operations and bytes.
        beside: other functions to time in the same turns, for comparison only.
        drift: error of sums on tensor cores, which is allowed beside that of plain torch.
    """

    op: str
    shape: str
    native: Callable[[], Any]
    plain: dict[str, Callable[[], Any]]
    error: Callable[[Callable[[], Any]], float]
    cost: Cost
    beside: dict[str, Callable[[], Any]] = {}  # noqa: RUF012  (never modified)
    drift: float = 0.0


# --- project_gradients ----------------------------------------------------------------------


class ProjectSize(NamedTuple):
    """Size of a `project_gradients` case of linear layers.

    Several `outs` are several layers that share an input, such as query, key and value. Layers of
    kinds sketch and identity have a bias, as those of a model have; `rows` is that of a sketch.
    """

    batch: int
    tokens: int
    size_in: int
    outs: tuple[int, ...]
    k: tuple[int, int] = (64, 64)
    ragged: bool = False
    rows: int = 0

    def __str__(self) -> str:
        outs = "+".join(map(str, self.outs))
        ragged = " ragged" if self.ragged else ""
        tokens = f"B {self.batch}, S {self.tokens}{ragged}"
        rows = f", rows {self.rows}" if self.rows else ""
        return f"{tokens}, {self.size_in} -> {outs}, k {self.k[0]}x{self.k[1]}{rows}"

    def cost(self, kind: kernels.Kind, dtype: torch.dtype, tokens: int) -> Cost:
        """Return the cost for `tokens` tokens in all examples together.

        A sketch multiplies each number by its sign and adds it.
        """
        (k_out, k_in), outs = self.k, sum(self.outs)
        widths, projecting = self.size_in + outs, 2 * (k_in * self.size_in + k_out * outs)
        if kind not in KINDS:
            formed = (self.rows or outs) * (self.size_in + 1)
            added = (2 if kind == "sketch" else 1) * self.batch * formed
            return Cost(
                2 * tokens * (formed + self.rows * outs) + added,
                tokens * widths * dtype.itemsize,
                2 * 4 * self.batch * k_out * k_in,
            )
        return Cost(
            tokens * ((widths if kind == "sjlt" else projecting) + 2 * k_out * k_in),
            tokens * widths * dtype.itemsize,
            2 * 4 * self.batch * k_out * k_in,
        )


# Tokens, I and O of the layers of the mini (256) and the base (768) model. 58x57 and 42x42 are the
# grids that K = 4096 leaves beside the exact gradients of their classifiers' output layers.
PROJECT = [
    ProjectSize(64, 24, 256, (256,)),
    ProjectSize(64, 24, 256, (1024,)),
    ProjectSize(64, 24, 1024, (256,)),
    ProjectSize(32, 64, 256, (256, 256, 256), (58, 57)),
    ProjectSize(16, 128, 256, (1024,), (58, 57), ragged=True),
    ProjectSize(64, 24, 768, (768,)),
    ProjectSize(32, 64, 768, (768,)),
    ProjectSize(32, 64, 768, (768, 768, 768), (42, 42)),
    ProjectSize(32, 64, 768, (3072,)),
    ProjectSize(32, 64, 3072, (768,)),
    ProjectSize(16, 128, 768, (3072,), (42, 42), ragged=True),
    ProjectSize(64, 1, 768, (768,)),
]
PROJECT_SHORT = [PROJECT[0], PROJECT[3], PROJECT[8], PROJECT[11]]


class ElementSize(NamedTuple):
    """Size of a `project_gradients` case of LayerNorm (elementwise) or of an embedding."""

    batch: int
    tokens: int
    width: int
    k: tuple[int, int]
    ragged: bool = False

    def __str__(self) -> str:
        ragged = " ragged" if self.ragged else ""
        tokens = f"B {self.batch}, S {self.tokens}{ragged}"
        return f"{tokens}, {self.width}, k {self.k[0]}x{self.k[1]}"

    def cost(self, layer: kernels.LayerKind, dtype: torch.dtype, tokens: int) -> Cost:
        """Return the cost for `tokens` tokens in all examples together."""
        numbers, output = tokens * self.width, 2 * 4 * self.batch * self.k[0] * self.k[1]
        if layer == "embedding":
            return Cost(2 * numbers, numbers * dtype.itemsize + 8 * tokens, output)
        sketched = 2 * self.batch * self.width
        return Cost(3 * numbers + 2 * sketched, 2 * numbers * dtype.itemsize, output)


# The slots that a default projection gives to the layers of a model (features/projection.py). With
# three labels, the classifier's output layer takes 3 (I + 1) of the K numbers (identity), 771 of
# the mini and 2307 of the base model. The other layers share the rest:
#
#                          mini, K = 4096   mini, K = 8192   base, K = 4096   base, K = 8192
#   linear layers              3325             7421             1789             5885
#   LayerNorm, embeddings      58x57            86x86            42x42            77x76
#
# A linear layer with one token per example (classifier.dense and, except key and value, the last
# encoder layer) is sketched as it is. The others are first reduced to 64 rows, because half the
# side of the grid is less. LayerNorm and embeddings (which parameters=all selects) go through a
# count sketch onto the grid. tests/bench compares these sizes with the slots.
SLOTS: list[tuple[kernels.Kind | kernels.LayerKind, ProjectSize | ElementSize]] = [
    ("sketch", ProjectSize(16, 1, 256, (1024,), (1, 3325))),
    ("sketch", ProjectSize(16, 1, 768, (768,), (1, 1789))),
    ("sketch", ProjectSize(8, 1, 768, (3072,), (1, 5885))),
    ("sketch", ProjectSize(64, 24, 256, (256,), (1, 3325), rows=64)),
    ("sketch", ProjectSize(32, 64, 256, (256, 256, 256), (1, 7421), rows=64)),
    ("sketch", ProjectSize(32, 64, 768, (768, 768, 768), (1, 1789), rows=64)),
    ("sketch", ProjectSize(32, 64, 768, (3072,), (1, 5885), rows=64)),
    ("sketch", ProjectSize(32, 64, 3072, (768,), (1, 5885), rows=64)),
    ("sketch", ProjectSize(16, 128, 768, (3072,), (1, 1789), ragged=True, rows=64)),
    ("identity", ProjectSize(64, 1, 256, (3,), (3, 257))),
    ("identity", ProjectSize(64, 1, 768, (3,), (3, 769))),
    ("elementwise", ElementSize(64, 24, 256, (58, 57))),
    ("elementwise", ElementSize(32, 64, 768, (77, 76))),
    ("elementwise", ElementSize(16, 128, 768, (42, 42), ragged=True)),
    ("embedding", ElementSize(64, 24, 256, (86, 86))),
    ("embedding", ElementSize(32, 64, 768, (77, 76))),
    ("embedding", ElementSize(16, 128, 768, (42, 42), ragged=True)),
]
SLOTS_SHORT = [SLOTS[0], SLOTS[5], SLOTS[10], SLOTS[12], SLOTS[15]]
IDS = 4000  # of an embedding, the vocabulary of the benchmarks' models
FORMED_NUMBERS = 1 << 26  # numbers of float64 gradients that are formed at a time


def project_case(
    size: ProjectSize, kind: kernels.Kind, device: torch.device, dtype: torch.dtype
) -> Case:
    batch, tokens, (k_out, k_in) = size.batch, size.tokens, size.k
    lengths = _lengths(batch, tokens, size.ragged, device)
    x = _rows((batch, tokens, size.size_in), lengths, dtype)
    gs = [_rows((batch, tokens, width), lengths, dtype) for width in size.outs]
    keys = [2 * number + 1 for number in range(len(gs))]
    out = torch.zeros(batch, k_out * k_in, device=device)
    formed = kind not in KINDS

    def native() -> Tensor:
        several: dict[str, Any] = {"g": gs, "output_key": keys}
        one: dict[str, Any] = {"g": gs[0], "output_key": keys[0]}
        kernels.project_gradients(
            x, out=out, lengths=lengths if size.ragged else None, kind=kind, k_out=k_out,
            k_in=k_in, rows=size.rows, bias=formed, seed=0, input_key=0,
            **(several if len(gs) > 1 else one),
        )  # fmt: skip
        return out

    if formed:
        forms, formed_truth = _formed(x, gs, keys, out, size, kind)
        return Case(
            f"project_gradients {kind}", str(size), native, forms, _added_error(out, formed_truth),
            size.cost(kind, dtype, int(lengths.sum())),
        )  # fmt: skip

    def truth() -> Tensor:
        p, *qs = (
            rows.double() @ reference.projection_matrix(kind, k, rows.shape[2], 0, key).to(device).T
            for rows, k, key in zip((x, *gs), (k_in, *[k_out] * len(gs)), (0, *keys), strict=True)
        )
        return torch.bmm(sum(qs[1:], qs[0]).mT, p).flatten(1)

    return Case(
        f"project_gradients {kind}",
        str(size),
        native,
        _plain_projections(x, gs, keys, out, size, kind),
        _added_error(out, truth),
        size.cost(kind, dtype, int(lengths.sum())),
    )


def _plain_projections(
    x: Tensor, gs: list[Tensor], keys: list[int], out: Tensor, size: ProjectSize, kind: kernels.Kind
) -> dict[str, Callable[[], Tensor]]:
    """Implement `project_gradients` with dense products and, for sjlt, also with index_add.

    A single token is an outer product. Layers that share an input are summed before the second
    product, which is then needed only once.
    """
    k_out, k_in = size.k
    r_in = _matrix(kind, k_in, 0, x)
    r_outs = [_matrix(kind, k_out, key, g) for key, g in zip(keys, gs, strict=True)]

    def add(p: Tensor, q: Tensor) -> Tensor:
        if size.tokens == 1:
            return out.add_((q.mT * p).flatten(1))
        if p.dtype == out.dtype:
            out.view(len(out), k_out, k_in).baddbmm_(q.mT, p)
            return out
        return out.add_(torch.bmm(q.mT, p).flatten(1))

    def dense() -> Tensor:
        q = gs[0] @ r_outs[0].T
        for g, r_out in zip(gs[1:], r_outs[1:], strict=True):
            q = q + g @ r_out.T
        return add(x @ r_in.T, q)

    if kind != "sjlt":
        return {"dense": dense}
    sketches = [(r.abs().argmax(0), r.sum(0)) for r in (r_in, *r_outs)]

    def sparse() -> Tensor:
        p = x.new_zeros(*x.shape[:2], k_in)
        q = x.new_zeros(*x.shape[:2], k_out)
        for rows, target, (position, sign) in zip(
            (x, *gs), (p, *[q] * len(gs)), sketches, strict=True
        ):
            target.index_add_(2, position, rows * sign)
        return add(p, q)

    return {"dense": dense, "index_add": sparse}


def _formed(
    x: Tensor, gs: list[Tensor], keys: list[int], out: Tensor, size: ProjectSize, kind: kernels.Kind
) -> tuple[dict[str, Callable[[], Tensor]], Callable[[], Tensor]]:
    """Return plain implementations and the float64 result of kinds that form the gradient.

    Gradients are formed by a batched product, of g or of g reduced to a few rows, and added as they
    are (identity) or at the positions of the sketch, which are ready-made.
    """
    ones = x.new_ones(*x.shape[:2], 1)
    x1 = torch.cat([x, ones], dim=2)
    r_outs = [
        reference.projection_matrix("rademacher", size.rows, g.shape[2], 0, key).to(x.device)
        for g, key in zip(gs, keys, strict=True)
        if size.rows
    ]
    r_ready = [r_out.to(x.dtype) for r_out in r_outs]
    k = out.shape[1]
    if kind == "sketch":
        # Rows that R_out has made belong to all layers, and have a key of their input (random.h).
        heights, key = torch.arange(size.rows or size.outs[0]), ~0 if size.rows else keys[0]
        entries = reference.formed_entries(heights, torch.arange(x1.shape[2]), k, 0, 0, key)
        positions, signs = (part.flatten().to(x.device) for part in entries)
        float_signs = signs.float()

    def reduced(parts: list[Tensor], matrices: list[Tensor]) -> Tensor:
        if not matrices:
            return parts[0]
        q = parts[0] @ matrices[0].T
        for g, r_out in zip(parts[1:], matrices[1:], strict=True):
            q = q + g @ r_out.T
        return q

    def gradients() -> Tensor:
        q = reduced(gs, r_ready)
        return q.mT * x1 if size.tokens == 1 else torch.bmm(q.mT, x1)

    def kept() -> Tensor:
        return out.add_(gradients().flatten(1))

    def by_index() -> Tensor:
        return out.index_add_(1, positions, gradients().flatten(1).float().mul_(float_signs))

    def by_scatter() -> Tensor:
        values = gradients().flatten(1).float().mul_(float_signs)
        return out.scatter_add_(1, positions.expand_as(values), values)

    def truth() -> Tensor:
        step = max(1, FORMED_NUMBERS // (x1.shape[2] * (size.rows or size.outs[0])))
        parts = []
        for first in range(0, len(x), step):
            some = slice(first, first + step)
            q = reduced([g[some].double() for g in gs], r_outs)
            formed = torch.bmm(q.mT, x1[some].double()).flatten(1)
            if kind == "sketch":
                sketch = formed.new_zeros(len(formed), k)
                formed = sketch.index_add_(1, positions, formed.mul_(signs))
            parts.append(formed)
        return torch.cat(parts)

    if kind == "identity":
        return {"formed": kept}, truth
    return {"formed + index_add": by_index, "formed + scatter_add": by_scatter}, truth


def element_case(
    size: ElementSize, layer: kernels.LayerKind, device: torch.device, dtype: torch.dtype
) -> Case:
    """Build a case of LayerNorm, with a bias, or of an embedding."""
    (batch, tokens, width, (k_out, k_in), ragged), k = size, size.k[0] * size.k[1]
    lengths = _lengths(batch, tokens, ragged, device)
    g = _rows((batch, tokens, width), lengths, dtype)
    embedding = layer == "embedding"
    if embedding:
        x = torch.randint(IDS, (batch, tokens), device=device)
    else:
        x = _rows((batch, tokens, width), lengths, dtype)
    out = torch.zeros(batch, k, device=device)
    entries = reference.element_entries(torch.arange(IDS if embedding else 2), width, k, 0, 1)
    positions, signs = (part.to(device) for part in entries)  # (ids, D), or (2, D)
    ready_signs = signs.to(dtype)

    def native() -> Tensor:
        kernels.project_gradients(
            x, g, out=out, lengths=lengths if ragged else None, layer=layer, k_out=k_out, k_in=k_in,
            bias=not embedding, seed=0, input_key=0, output_key=1,
        )  # fmt: skip
        return out

    def values(g: Tensor, x: Tensor, signs: Tensor) -> Tensor:
        if embedding:
            return (g * signs[x]).flatten(1)
        return (torch.stack([(g * x).sum(1), g.sum(1)], dim=1) * signs).flatten(1)

    def added(values: Tensor, to: Tensor) -> Tensor:
        if embedding:  # another position for each example
            return to.scatter_add_(1, positions[x].flatten(1), values)
        return to.index_add_(1, positions.flatten(), values)

    def plain() -> Tensor:
        return added(values(g, x, ready_signs).float(), out)

    def truth() -> Tensor:
        wide_x = x if embedding else x.double()
        return added(values(g.double(), wide_x, signs.double()), torch.zeros_like(out).double())

    return Case(
        f"project_gradients {layer}",
        str(size),
        native,
        {"scatter_add" if embedding else "sums + index_add": plain},
        _added_error(out, truth),
        size.cost(layer, dtype, int(lengths.sum())),
    )


# --- gradient_dot ---------------------------------------------------------------------------


class DotSize(NamedTuple):
    """Size of a `gradient_dot` case."""

    batch1: int
    batch2: int
    tokens: int
    size_in: int
    size_out: int
    ragged: bool = False

    def __str__(self) -> str:
        ragged = " ragged" if self.ragged else ""
        rows = f"{self.batch1} x {self.batch2}, S {self.tokens}{ragged}"
        return f"{rows}, {self.size_in} -> {self.size_out}"

    def cost(self, dtype: torch.dtype, t1: int, t2: int) -> Cost:
        """Return the cost for `t1` and `t2` tokens in all examples of the two batches."""
        weights, widths = self.size_in * self.size_out, self.size_in + self.size_out
        return Cost(
            2 * min(t1 * t2 * widths, (t1 + t2 + self.batch1 * self.batch2) * weights),
            (t1 + t2) * widths * dtype.itemsize,
            2 * 4 * self.batch1 * self.batch2,
        )


DOT = [
    DotSize(32, 32, 24, 256, 256),
    DotSize(32, 32, 24, 256, 1024),
    DotSize(32, 32, 24, 1024, 256),
    DotSize(16, 16, 64, 256, 1024, ragged=True),
    DotSize(16, 16, 64, 768, 768),
    DotSize(8, 8, 128, 768, 3072),
    DotSize(64, 64, 1, 768, 768),
]
DOT_SHORT = [DOT[0], DOT[4]]


def dot_case(size: DotSize, device: torch.device, dtype: torch.dtype) -> Case:
    tokens = size.tokens
    lengths = [_lengths(b, tokens, size.ragged, device) for b in (size.batch1, size.batch2)]
    batches = [
        (_rows((len(lengths_B), tokens, size.size_in), lengths_B, dtype),
         _rows((len(lengths_B), tokens, size.size_out), lengths_B, dtype))
        for lengths_B in lengths
    ]  # fmt: skip
    (x1, g1), (x2, g2) = batches
    out = torch.zeros(size.batch1, size.batch2, device=device)

    def native() -> Tensor:
        named: dict[str, Any] = (
            {"lengths1": lengths[0], "lengths2": lengths[1]} if size.ragged else {}
        )
        kernels.gradient_dot(x1, g1, x2, g2, out, **named)
        return out

    def formed() -> Tensor:
        return out.add_(torch.bmm(g1.mT, x1).flatten(1) @ torch.bmm(g2.mT, x2).flatten(1).T)

    def pairs() -> Tensor:
        products = (g1.flatten(0, 1) @ g2.flatten(0, 1).T).float()
        products *= (x1.flatten(0, 1) @ x2.flatten(0, 1).T).float()
        return out.add_(products.view(len(x1), tokens, len(x2), tokens).sum((1, 3)))

    def truth() -> Tensor:
        total = torch.zeros_like(out, dtype=torch.float64)
        for columns in torch.arange(size.size_out, device=device).split(256):
            first, second = (
                torch.bmm(g[..., columns].double().mT, x.double()).flatten(1) for x, g in batches
            )
            total += first @ second.T
        return total

    t1, t2 = (int(lengths_B.sum()) for lengths_B in lengths)
    return Case(
        "gradient_dot",
        str(size),
        native,
        {"formed": formed, "pairs": pairs},
        _added_error(out, truth),
        size.cost(dtype, t1, t2),
    )


# --- top_k_dot ------------------------------------------------------------------------------


class TopKSize(NamedTuple):
    """Size of a `top_k_dot` case."""

    queries: int
    trains: int
    width: int
    checkpoints: int = 1
    normalize: str | None = None
    k: int = 100
    block: int | None = None  # number of training rows that plain torch takes at a time

    def __str__(self) -> str:
        cosine = ", cosine" if self.normalize else ""
        sizes = f"Q {self.queries}, N {self.trains}, K {self.width}, C {self.checkpoints}"
        return f"{sizes}, k {self.k}{cosine}"

    def cost(self, dtype: torch.dtype) -> Cost:
        numbers = (self.queries + self.trains) * self.width * self.checkpoints
        return Cost(
            2 * self.queries * self.trains * self.width * self.checkpoints,
            numbers * dtype.itemsize,
            self.queries * (2 * self.k * 12 + GROUPS * 8),
        )


TOP_K = [
    TopKSize(100, 4000, 1024, 3),
    TopKSize(250, 2000, 4096),
    TopKSize(100, 4000, 4096, 1, "cosine"),
    TopKSize(8, 8000, 4096),
    TopKSize(1, 8000, 4096, 1, "cosine"),
]
TOP_K_GPU = [
    TopKSize(500, 100_000, 4096, 1),
    TopKSize(500, 50_000, 4096, 3, "cosine"),
    TopKSize(8, 200_000, 4096),
]
BIG_TOP_K = TopKSize(2500, 1_000_000, 4096, block=65_536)
TOP_K_SHORT = [TOP_K[0], TOP_K[3]]
GROUPS = 5


def top_k_case(size: TopKSize, device: torch.device, dtype: torch.dtype) -> Case:
    queries, trains = (
        [torch.randn(rows, size.width, device=device, dtype=dtype) for _ in range(size.checkpoints)]
        for rows in (size.queries, size.trains)
    )
    groups = torch.arange(size.trains, device=device) % GROUPS

    def native() -> Any:
        return kernels.top_k_dot(
            queries, trains, k=size.k, normalize=size.normalize, groups=groups, num_groups=GROUPS
        )

    beside: dict[str, Callable[[], Any]] = {}
    if size.block is not None:
        scores = torch.empty(size.queries, size.trains, dtype=dtype, device=device)
        beside = {"matmul": lambda: torch.mm(queries[0], trains[0].T, out=scores)}
    # On a GPU a bfloat16 score is one chain of additions that round towards zero, 16 products each,
    # off by up to 2^-23 (csrc/cuda/top_k_dot.cu).
    chain = size.checkpoints * size.width / 16 if device.type == "cuda" else 0
    return Case(
        "top_k_dot",
        str(size),
        native,
        _plain_top_k(queries, trains, groups, size),
        _ranking_error(queries, trains, groups, size),
        size.cost(dtype),
        beside,
        chain * 2**-23 if dtype is torch.bfloat16 else 0.0,
    )


def _plain_top_k(
    queries: list[Tensor], trains: list[Tensor], groups: Tensor, size: TopKSize
) -> dict[str, Callable[[], Any]]:
    """Implement `top_k_dot` with a matrix product, `topk` of both signs and sums by a product.

    Inputs of lower precision are also widened to float32 first.
    """
    one_hot = torch.nn.functional.one_hot(groups, GROUPS)
    k, step = min(size.k, size.trains), size.block or size.trains

    def scores_of(part: slice, dtype: torch.dtype) -> Tensor:
        total: Tensor | None = None
        for query, train in zip(queries, trains, strict=True):
            q, n = query.to(dtype), train[part].to(dtype)
            if size.normalize:
                q = torch.nn.functional.normalize(q, dim=1)
            scores = q @ n.T
            if size.normalize:
                scores /= torch.linalg.vector_norm(n, dim=1)
            total = scores if total is None else total.add_(scores)
        assert total is not None
        return total

    def ranked(dtype: torch.dtype) -> list[Tensor]:
        hot, parts = one_hot.to(dtype), list[list[Tensor]]()
        for start in range(0, size.trains, step):
            scores = scores_of(slice(start, start + step), dtype)
            count = min(k, scores.shape[1])
            best, worst = scores.topk(count), scores.topk(count, largest=False)
            parts.append([best.values, best.indices + start, worst.values, worst.indices + start,
                          scores @ hot[start : start + step]])  # fmt: skip
        return parts[0] if len(parts) == 1 else _merged(parts, k)

    own = queries[0].dtype
    forms: dict[str, Callable[[], Any]] = {"matmul + topk": lambda: ranked(own)}
    if own != torch.float32:
        forms["float32 matmul + topk"] = lambda: ranked(torch.float32)
    return forms


def _merged(parts: list[list[Tensor]], k: int) -> list[Tensor]:
    """Merge the rankings and sums of blocks of training rows into one."""
    merged = []
    for first, largest in ((0, True), (2, False)):
        values, indices = (torch.cat([p[first + i] for p in parts], 1) for i in (0, 1))
        best = values.topk(k, largest=largest)
        merged += [best.values, indices.gather(1, best.indices)]
    return [*merged, torch.stack([p[4].float() for p in parts]).sum(0)]


def _ranking_error(
    queries: list[Tensor], trains: list[Tensor], groups: Tensor, size: TopKSize
) -> Callable[[Callable[[], Any]], float]:
    """Return the error of a ranking: of its scores, and of the float64 scores of its rows.

    Rows may differ from float64's ranking if their scores are as close as rounding.
    """
    step = -(-size.queries // CHECKED_QUERIES)
    truths: list[Tensor] = []

    def truth() -> Tensor:
        if not truths:
            some = [query[::step].double() for query in queries]
            blocks = [
                reference.scores(some, [n.double() for n in block], normalize=size.normalize)
                for block in zip(*(train.split(65_536) for train in trains), strict=True)
            ]
            truths.append(torch.cat(blocks, dim=1))
        return truths[0]

    def error(function: Callable[[], Any]) -> float:
        result, true_QN = [part[::step] for part in function()], truth()
        k = min(size.k, size.trains)
        errors = []
        for scores, indices, largest in ((*result[:2], True), (*result[2:4], False)):
            best = true_QN.topk(k, largest=largest).values
            errors += [scores[:, :k] - best, scores[:, :k] - true_QN.gather(1, indices[:, :k])]
        sums = reference.group_sums(true_QN, groups, GROUPS)
        scale = true_QN.abs().max()
        worst = torch.stack([(error.double() / scale).abs().max() for error in errors])
        off = ((result[4].double() - sums) / sums.abs().max()).abs().max()
        return float(torch.maximum(worst.max(), off))

    return error


# --- linear ---------------------------------------------------------------------------------


class LinearSize(NamedTuple):
    """Size of a `linear` case, a product of the lean pass that is no wider than its input."""

    rows: int
    size_in: int
    size_out: int
    transposed: bool = False

    def __str__(self) -> str:
        transposed = " transposed" if self.transposed else ""
        return f"T {self.rows}, {self.size_in} -> {self.size_out}{transposed}"


LINEAR = [
    LinearSize(8192, 256, 256), LinearSize(8192, 1024, 256), LinearSize(8192, 256, 1024, True),
    LinearSize(4096, 768, 768), LinearSize(4096, 3072, 768), LinearSize(4096, 768, 3072, True),
]  # fmt: skip


def linear_case(size: LinearSize) -> Case:
    """Build a case of `linear`, which exists in float32 on the CPU only."""
    rows, size_in, size_out, transposed = size
    weight, bias = torch.randn(size_out, size_in), torch.randn(size_in if transposed else size_out)
    x = torch.randn(rows, size_out if transposed else size_in)
    matrix = weight if transposed else weight.T

    def error(function: Callable[[], Any]) -> float:
        truth = x.double() @ matrix.double() + bias.double()
        return float((function().double() - truth).abs().max() / truth.abs().max())

    return Case(
        "linear",
        str(size),
        lambda: kernels.linear(x, weight, bias, transposed=transposed),
        {"addmm": lambda: torch.addmm(bias, x, matrix)},
        error,
        Cost(2 * rows * size_in * size_out, 4 * (x.numel() + weight.numel()), 4 * rows * len(bias)),
    )


# --- quantize_rows --------------------------------------------------------------------------


class QuantizeSize(NamedTuple):
    """Size of a `quantize_rows` case."""

    rows: int
    width: int

    def __str__(self) -> str:
        return f"N {self.rows}, K {self.width}"

    def cost(self, dtype: torch.dtype) -> Cost:
        numbers = self.rows * self.width
        return Cost(4 * numbers, numbers * dtype.itemsize, numbers + 4 * self.rows)


# A batch of features, short rows, and whole shards.
QUANTIZE = [
    QuantizeSize(64, 4096), QuantizeSize(8000, 64), QuantizeSize(4000, 1024),
    QuantizeSize(4000, 4096), QuantizeSize(1000, 16384),
]  # fmt: skip
BLOCK_NUMBERS = 1 << 16  # size of a block of rows in plain torch that stays in the cache


def quantize_case(size: QuantizeSize, device: torch.device, dtype: torch.dtype) -> Case:
    x = torch.randn(*size, device=device).to(dtype)

    def error(function: Callable[[], Any]) -> float:
        codes, scales = (part.double() for part in function())
        largest = x.abs().amax(dim=1).double()
        off = (codes * scales[:, None] - x.double()).abs().amax(dim=1) - largest / 254
        return float(torch.maximum(off / largest, (127 * scales / largest - 1).abs()).max())

    return Case(
        "quantize_rows",
        str(size),
        lambda: kernels.quantize_rows(x),
        _plain_quantized(x),
        error,
        size.cost(dtype),
    )


def _plain_quantized(x: Tensor) -> dict[str, Callable[[], Any]]:
    """Implement `quantize_rows` with preallocated outputs, on all rows and in blocks of rows."""
    magnitudes, products = torch.empty_like(x), torch.empty_like(x, dtype=torch.float32)
    codes = torch.empty_like(x, dtype=torch.int8)

    def quantize(part: slice, largest: Tensor) -> Tensor:
        factors = (127 / largest.float())[:, None]
        codes[part].copy_(torch.mul(x[part], factors, out=products[part]).round_())
        return largest.float() / 127

    def by_abs(part: slice = slice(None)) -> Tensor:
        return quantize(part, torch.abs(x[part], out=magnitudes[part]).amax(1))

    def by_both(part: slice = slice(None)) -> Tensor:
        return quantize(part, torch.maximum(x[part].amax(1), -x[part].amin(1)))

    def in_blocks() -> Tensor:
        step = max(1, BLOCK_NUMBERS // x.shape[1])
        return torch.cat([by_abs(slice(n, n + step)) for n in range(0, len(x), step)])

    return {
        "abs, amax": lambda: (codes, by_abs()),
        "amax, amin": lambda: (codes, by_both()),
        "abs, amax in blocks": lambda: (codes, in_blocks()),
    }


# --- all cases ------------------------------------------------------------------------------


Size = ProjectSize | ElementSize | DotSize | TopKSize | LinearSize | QuantizeSize


class Spec(NamedTuple):
    """A case without its inputs: its op and its size.

    A projection's op has the kind behind it or, unless the layer is linear, the type of the layer.
    """

    op: str
    size: Size

    def case(self, device: torch.device, dtype: torch.dtype) -> Case:
        """Create the inputs on the device."""
        if isinstance(self.size, ProjectSize):
            return project_case(self.size, self.op.split()[1], device, dtype)  # type: ignore[arg-type]
        if isinstance(self.size, ElementSize):
            return element_case(self.size, self.op.split()[1], device, dtype)  # type: ignore[arg-type]
        if isinstance(self.size, DotSize):
            return dot_case(self.size, device, dtype)
        if isinstance(self.size, TopKSize):
            return top_k_case(self.size, device, dtype)
        if isinstance(self.size, LinearSize):
            return linear_case(self.size)
        return quantize_case(self.size, device, dtype)


def specs(
    gpu: bool, dtype: torch.dtype, *, short: bool = False, rows: int | None = None
) -> list[Spec]:
    """List what is measured on a CPU or on a GPU (see `cases`), the most valuable cases first."""
    projections = [
        Spec(f"project_gradients {kind}", _on_device(size, gpu, rows))
        for kind, size in (SLOTS_SHORT if short else SLOTS)
    ]
    projections += [
        Spec(f"project_gradients {kind}", _on_device(size, gpu, rows))
        for size in (PROJECT_SHORT if short else PROJECT)
        for kind in KINDS
    ]
    others: list[Spec] = []
    if not gpu and dtype is torch.float32:
        others += [
            Spec("linear", size._replace(rows=_few(size.rows, rows)))
            for size in (LINEAR[:1] if short else LINEAR)
        ]
    fuller = 4 if gpu else 1
    for dot in DOT_SHORT if short else DOT:
        batch1, batch2 = (_few(batch * fuller, rows) for batch in (dot.batch1, dot.batch2))
        others.append(Spec("gradient_dot", dot._replace(batch1=batch1, batch2=batch2)))
    for count, width in QUANTIZE[-2:-1] if short else QUANTIZE:
        size = QuantizeSize(_few(count * (32 if gpu else 1), rows), width)
        others.append(Spec("quantize_rows", size))
    ranking = TOP_K_GPU if gpu else TOP_K
    if short:
        ranking = ranking[-1:] if gpu else TOP_K_SHORT
    others += [Spec("top_k_dot", _few_rows(size, rows)) for size in ranking]
    if not gpu or short:
        return projections + others
    headline = headline_specs(dtype, rows=rows)
    return headline + [spec for spec in projections + others if spec not in headline]


def headline_specs(dtype: torch.dtype, *, rows: int | None = None) -> list[Spec]:
    """List the cases that a GPU is asked for first.

    Its goals are stated for the ranking and the two-sided projections; a default projection spends
    its time on the other ones.
    """
    projections = [
        Spec("project_gradients rademacher", _on_device(PROJECT[at], True, rows))
        for at in (8, 5, 10, 11)
    ]
    projections += [
        Spec(f"project_gradients {SLOTS[at][0]}", _on_device(SLOTS[at][1], True, rows))
        for at in (5, 7, 1, 12)
    ]
    large = [Spec("top_k_dot", _few_rows(BIG_TOP_K, rows))] if dtype is torch.bfloat16 else []
    return large + projections


def cases(
    device: torch.device, dtype: torch.dtype, *, short: bool = False, rows: int | None = None
) -> Iterator[Case]:
    """Yield every case; its inputs are created when it is reached.

    Args:
        device: device of the inputs. On a GPU, the sizes of the CPU get more rows, so that they
            fill the device, and bfloat16 has a large `top_k_dot`.
        dtype: dtype of the inputs.
        short: yield only some cases.
        rows: largest number of examples and queries, and 1/64 of that of training rows; for tests.
    """
    for spec in specs(device.type == "cuda", dtype, short=short, rows=rows):
        yield spec.case(device, dtype)


def _on_device(
    size: ProjectSize | ElementSize, gpu: bool, rows: int | None
) -> ProjectSize | ElementSize:
    fuller = 4096 // 64 if size.tokens == 1 else 65_536 // (size.batch * size.tokens)
    return size._replace(batch=_few(size.batch * (fuller if gpu else 1), rows))


def _few_rows(size: TopKSize, rows: int | None) -> TopKSize:
    trains = _few(size.trains, None if rows is None else 64 * rows)
    return size._replace(queries=_few(size.queries, rows), trains=trains)


def _few(count: int, rows: int | None) -> int:
    return count if rows is None else min(count, rows)


def _lengths(batch: int, tokens: int, ragged: bool, device: torch.device) -> Tensor:
    """Return lengths of S tokens or, if ragged, of a quarter of S to S tokens."""
    shortest = max(1, tokens // 4) if ragged else tokens
    return torch.randint(shortest, tokens + 1, (batch,)).to(device)


def _rows(shape: tuple[int, int, int], lengths: Tensor, dtype: torch.dtype) -> Tensor:
    """Return random rows that are zero beyond their length, as plain torch needs for padding."""
    rows = torch.randn(shape, device=lengths.device)
    padding = torch.arange(shape[1], device=lengths.device) >= lengths[:, None]
    return rows.masked_fill_(padding[..., None], 0).to(dtype)


def _matrix(kind: kernels.Kind, k: int, key: int, like: Tensor) -> Tensor:
    return kernels.projection_matrix(kind, k, like.shape[-1], 0, key).to(like.device, like.dtype)


def _added_error(out: Tensor, truth: Callable[[], Tensor]) -> Callable[[Callable[[], Any]], float]:
    """Return the error of functions that add to `out`."""
    truths: list[Tensor] = []

    def error(function: Callable[[], Any]) -> float:
        if not truths:
            truths.append(truth())
        out.zero_()
        function()
        return float((out.double() - truths[0]).abs().max() / truths[0].abs().max())

    return error
