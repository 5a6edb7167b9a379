"""Public ops of the native engine, for torch tensors on the CPU or on CUDA.

Each op is specified by a few lines of plain torch in `tracmod.kernels.reference`. The functions
here hand tensors to the native module `_C` as borrowed DLPack views; no data is copied. Outputs
and scratch memory are allocated here, with torch, so that its caching allocator and its memory
statistics cover them. `_C` checks shapes, dtypes, devices and layouts, and its errors name the
argument, what was expected and what was given.

NaN and infinity are propagated. Callers check whether results are finite, because they can name
the example that is not.

Shape suffixes: B examples, S tokens, I in, O out, D features of LayerNorm or embedding, K features
per row, N train, Q query, C checkpoints, G groups, T rows of a matrix product.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from tracmod import _C

LayerKind = Literal["linear", "elementwise", "embedding"]
Kind = Literal["rademacher", "sjlt", "identity", "sketch"]
_MASK_64 = (1 << 64) - 1  # seeds and keys are any Python integers, taken modulo 2^64


def project_gradients(
    x: Tensor,
    g: Tensor | Sequence[Tensor],
    out: Tensor,
    *,
    lengths: Tensor | None = None,
    offset: int = 0,
    layer: LayerKind = "linear",
    kind: Kind = "rademacher",
    k_out: int,
    k_in: int,
    rows: int = 0,
    seed: int,
    input_key: int,
    output_key: int | Sequence[int],
    bias: bool = False,
    input_columns: Tensor | None = None,
    output_columns: Tensor | Sequence[Tensor | None] | None = None,
) -> None:
    """Add each example's projected gradient of one layer to its row of features.

    The gradient of a `linear` layer is `G_b = sum_s g_bs [x_bs, 1]^T`, of shape (O, I + bias); the
    column of ones is there only with `bias`. It is projected from both sides, without forming it::

        out[b, offset : offset + k_out * k_in] += vec(R_out G_b R_in^T)      (row-major)

    so that the expectation of `<f, f'>` over seeds is `<G, G'>`. The projections R are

    - `rademacher`: every entry is +-1/sqrt(k_out) in R_out and +-1/sqrt(k_in) in R_in,
    - `sjlt`: one entry of +-1 in each column,
    - `identity`: none; G itself is added.

    With kind `sketch`, a linear layer's G is formed and added to the k_out * k_in columns by a
    count sketch, in which every element has a random column and sign. The variance of `<f, f'>`
    is then about `(|G|^2 |G'|^2 + <G, G'>^2) / (k_out k_in)`, and at most twice that. If G is a
    product of one token, that of a two-sided projection has `1 / k_out + 1 / k_in` in this place.
    Forming G takes O I operations per token, so this is for layers of few tokens. With `rows`, a
    rademacher R_out reduces G to so many rows first, which adds `1 / rows` there::

        out[b, offset : offset + k_out * k_in] += sketch(sum_j R_out_j G_bj)

    Signs and positions are a stateless function of (seed, key, row, column): they are the same on
    every device and for every batch.

    Layers that read the same x can be passed in one call, with sequences for `g` and `output_key`.
    They are added to the same columns, and x is projected only once::

        out[b, ...] += sum_j vec(R_out_j G_bj R_in^T) = vec((sum_j g_bj R_out_j^T)^T (x_b R_in^T))

    An `elementwise` layer (LayerNorm) has the weight gradient `v_d = sum_s g_sd x_sd`, where x is
    the normalised input, and with `bias` also `u_d = sum_s g_sd`. Both are added by a count sketch
    to columns `offset` to `offset + k_out * k_in`. In the gradient of an `embedding`, row `id` is
    the sum of the g_s with `x_s = id`; it is added by a count sketch, too.

    The result for an example depends on its own tokens only: not on the other examples of the
    batch, the padding or the number of threads.

    Args:
        x: Input of the layer, contiguous. linear: (B, S, I) float32 or bfloat16; elementwise: the
            normalised input (B, S, D); embedding: (B, S) int64 ids. A 2-d input means one token
            per example.
        g: Loss gradient at the output of the layer, (B, S, O), or (B, S, D) unless linear; dtype
            and device of a floating-point x, contiguous. For linear layers of kind rademacher or
            sjlt, or sketch with `rows`, also a sequence of 1 to 4 such tensors; O may differ.
        out: (B, K) float32 features, contiguous; added to in place.
        lengths: (B,) int64 numbers of tokens; later tokens are padding and are skipped. Lengths on
            the CPU are checked. Lengths on a GPU are not, since that would have to wait for the
            GPU; there, an invalid length turns its row of `out` into NaN.
        offset: First of the k_out * k_in columns of `out` that are added to (the layer's slot).
        layer: Type of the layer: `linear`, `elementwise` or `embedding`.
        kind: Type of the projection: `rademacher`, `sjlt`, `sketch` or `identity` (not for
            embeddings).
        k_out: Rows of the projected gradient. For identity O (elementwise: 1 + bias).
        k_in: Columns of the projected gradient. For identity I + bias (elementwise: D).
        rows: For kind sketch, the rows to which G is reduced before it is sketched, or 0.
        seed: Seed of the projection.
        input_key: Key of R_in, the same for all layers that read the same input. Used by linear
            layers only.
        output_key: Key of R_out or of the count sketch, different for every layer and different
            from `input_key`; a sequence if `g` is one.
        bias: Whether the layer has a bias (never for embeddings).
        input_columns: (I + bias,) int64 column numbers, for a layer from whose x columns were left
            out (those of masked heads): column i of [x, 1] is column `input_columns[i]` of the
            complete layer and gets its signs. None: no column was left out. Only for linear layers
            with a kind other than identity. Checked on the CPU, then moved to the device of x.
        output_columns: (O,) int64 column numbers of g in the complete layer; a sequence with
            one tensor or None per layer if `g` is a sequence.

    Raises:
        ValueError: An argument has an invalid dtype, shape, device, layout or value, or
            `offset + k_out * k_in` exceeds the K columns of `out`. The message names the argument.

    Examples:
        >>> import torch
        >>> from tracmod import kernels
        >>> x, g = torch.randn(8, 16, 32), torch.randn(8, 16, 64)
        >>> features = torch.zeros(8, 12 * 10)
        >>> kernels.project_gradients(
        ...     x, g, features, k_out=12, k_in=10, seed=0, input_key=0, output_key=1
        ... )
        >>> gram = features @ features.T  # estimates the inner products of the gradients
        >>> gram.shape
        torch.Size([8, 8])

    Source: Choe et al. 2024, arXiv 2405.13954 (projection from both sides); Charikar et al. 2002
        (count sketch); Kane and Nelson 2014 (sjlt).
    """
    op = "project_gradients"
    gs = [g] if isinstance(g, Tensor) else list(g)
    keys = output_key if isinstance(output_key, Sequence) else [output_key]
    columns: Sequence[Tensor | None] = [None] * len(gs)
    if output_columns is not None:
        columns = [output_columns] if isinstance(output_columns, Tensor) else output_columns
    _C.project_gradients(
        _capsule(x),
        [_capsule(part) for part in gs],
        _capsule(out),
        _lengths(lengths, x, gs[0] if gs else x, op, "lengths"),
        operator.index(offset),
        layer,
        kind,
        operator.index(k_out),
        operator.index(k_in),
        operator.index(rows),
        operator.index(seed) & _MASK_64,
        operator.index(input_key) & _MASK_64,
        [operator.index(key) & _MASK_64 for key in keys],
        bool(bias),
        _columns(input_columns, x, op, "input_columns"),
        [_columns(part, x, op, "output_columns") for part in columns],
        _allocator(x.device),
        torch.get_num_threads(),
        _stream(x.device),
    )


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, transposed: bool = False
) -> Tensor:
    """Multiply by the weight of a linear layer, on the CPU.

    `x W^T + bias`, the forward pass of the layer; with `transposed`, `x W + bias`, which turns the
    gradient at the layer's output into that at its input.

    Sums are float32 within blocks of 256 terms and float64 across blocks. A row of the result does
    not depend on the other rows or on the number of threads.

    Args:
        x: (T, I), or (T, O) if transposed; float32, contiguous.
        weight: (O, I) float32, contiguous.
        bias: (O,), or (I,) if transposed; float32.
        transposed: Multiply by W instead of W^T.

    Returns:
        (T, O) float32, or (T, I) if transposed.

    Raises:
        ValueError: An argument has an invalid dtype, shape, device or layout. The message names the
            argument.

    Examples:
        >>> import torch
        >>> from tracmod import kernels
        >>> layer = torch.nn.Linear(32, 64)
        >>> x = torch.randn(100, 32)
        >>> torch.allclose(kernels.linear(x, layer.weight, layer.bias), layer(x), atol=1e-5)
        True
    """
    size = weight.shape[1 if transposed else 0] if weight.dim() == 2 else 0
    out = torch.empty(len(x), size, dtype=torch.float32, device=x.device)
    _C.linear(
        _capsule(x),
        _capsule(weight),
        _capsule(out),
        None if bias is None else _capsule(bias),
        bool(transposed),
        _allocator(x.device),
        torch.get_num_threads(),
    )
    return out


def gradient_dot(
    x1: Tensor,
    g1: Tensor,
    x2: Tensor,
    g2: Tensor,
    out: Tensor,
    *,
    lengths1: Tensor | None = None,
    lengths2: Tensor | None = None,
    layer: LayerKind = "linear",
    bias: bool = False,
) -> None:
    """Add the exact inner products of two batches' per-example gradients of one layer.

    `out[i, j] += <G_i, G'_j>`, where G is the gradient defined in `project_gradients`. For a linear
    layer there are two ways, and the one with fewer operations for the whole call is taken::

        <G_i, G'_j> = sum_{s,t} <g_is, g'_jt> (<x_is, x'_jt> + bias)      (pairs of tokens)
        <G_i, G'_j> = sum_{o,i} G_oi G'_oi                                (gradients are formed)

    The choice depends on the sizes and lengths of all examples, so the result for a pair of
    examples may differ by rounding between batches. It does not depend on padding.

    Args:
        x1, g1: First batch; as `x` and `g` of `project_gradients`.
        x2, g2: Second batch; B and S may differ from the first, I and O (or D), dtype and device
            may not.
        out: (B1, B2) float32, contiguous; added to in place.
        lengths1, lengths2: (B1,) and (B2,) int64; as `lengths` of `project_gradients`.
        layer: Type of the layer: `linear`, `elementwise` or `embedding`.
        bias: Whether the layer has a bias (never for embeddings).

    Raises:
        ValueError: An argument has an invalid dtype, shape, device, layout or value. The message
            names the argument.

    Examples:
        >>> import torch
        >>> from tracmod import kernels
        >>> x, g = torch.randn(4, 16, 32), torch.randn(4, 16, 64)
        >>> products = torch.zeros(4, 4)
        >>> kernels.gradient_dot(x, g, x, g, products)
        >>> gradients = (g.mT @ x).flatten(1)
        >>> torch.allclose(products, gradients @ gradients.T, rtol=1e-4, atol=0.1)
        True

    Source: The sum over pairs of tokens is the "ghost" inner product (Li et al. 2022, arXiv
        2110.05679; Wang et al. 2024, arXiv 2406.11011).
    """
    op = "gradient_dot"
    _C.gradient_dot(
        _capsule(x1),
        _capsule(g1),
        _capsule(x2),
        _capsule(g2),
        _capsule(out),
        _lengths(lengths1, g1, g1, op, "lengths1"),
        _lengths(lengths2, g2, g2, op, "lengths2"),
        layer,
        bool(bias),
        _allocator(x1.device),
        torch.get_num_threads(),
        _stream(x1.device),
    )


class TopK(NamedTuple):
    """The training rows with the largest and the smallest scores of each query, best first.

    Of equal scores, the one with the lower index comes first. NaN scores come first in both
    rankings, so that they are noticed. If there are fewer than k training rows, the remaining
    entries have the index -1 and the score -inf (opponents: +inf).

    Attributes:
        scores: (Q, k) float32, descending.
        indices: (Q, k) int64, the training rows with these scores.
        opponent_scores: (Q, k) float32, ascending; (Q, opponents_k) where that is given.
        opponent_indices: (Q, k) int64, likewise.
        group_sums: (Q, G) float64 sums of the scores of all training rows of each group, or None.

    Examples:
        >>> import torch
        >>> from tracmod import kernels
        >>> top = kernels.top_k_dot([torch.eye(2)], [torch.tensor([[2.0, 5.0], [3.0, 1.0]])], k=1)
        >>> top.scores, top.indices
        (tensor([[3.],
                [5.]]), tensor([[1],
                [0]]))
    """

    scores: Tensor
    indices: Tensor
    opponent_scores: Tensor
    opponent_indices: Tensor
    group_sums: Tensor | None


def top_k_dot(
    queries: Sequence[Tensor],
    trains: Sequence[Tensor],
    *,
    k: int,
    weights: Sequence[float] | None = None,
    normalize: str | None = None,
    groups: Tensor | None = None,
    num_groups: int = 0,
    state: TopK | None = None,
    index_offset: int = 0,
    opponents_k: int | None = None,
) -> TopK:
    """Find the k largest and the k smallest scores of each query without storing all scores.

    `score[q, n] = sum_c weights[c] <q_c, n_c>`, where c runs over checkpoints. With
    `normalize="cosine"`, each term is divided by `|q_c| |n_c|` (and is 0 if a norm is 0).

    Training rows can be streamed: pass each block of rows together with the result of the previous
    call as `state` and the number of rows before the block as `index_offset`. The final result has
    the same bits as that of a single call.

    Args:
        queries: C tensors, one per checkpoint, (Q, K) float32 or bfloat16, contiguous.
        trains: C tensors (N, K), dtype and device of the queries, contiguous.
        k: Length of each ranking; may exceed N.
        weights: C weights; all 1 by default.
        normalize: None or "cosine".
        groups: (N,) int64 in [0, num_groups), the group of each training row, on the device of the
            rows. Groups on a GPU are not checked; there, an invalid one turns the sums into NaN.
        num_groups: G, the number of groups.
        state: Result of the previous call; not modified.
        index_offset: Added to the number of a training row to give its entry of `indices`.
        opponents_k: Length of the ranking of the smallest scores, from 1; k by default. A shorter
            one takes less time and memory where only proponents matter.

    Returns:
        `TopK`, on the device of the rows. Its `group_sums` is None without `groups`.

    Raises:
        ValueError: An argument has an invalid dtype, shape, device, layout or value. The message
            names the argument.

    Examples:
        >>> import torch
        >>> from tracmod import kernels
        >>> queries = torch.tensor([[1.0, 0.0]])
        >>> trains = torch.tensor([[2.0, 5.0], [-1.0, 0.0], [3.0, 1.0], [0.5, 0.5]])
        >>> groups = torch.tensor([0, 0, 1, 1])
        >>> top = kernels.top_k_dot([queries], [trains], k=2, groups=groups, num_groups=2)
        >>> top.indices, top.opponent_indices
        (tensor([[2, 0]]), tensor([[1, 3]]))
        >>> top.group_sums
        tensor([[1.0000, 3.5000]], dtype=torch.float64)

        The same, with the training rows in two blocks:

        >>> top = None
        >>> for start in (0, 2):
        ...     block = trains[start : start + 2]
        ...     top = kernels.top_k_dot([queries], [block], k=2, state=top, index_offset=start)
        >>> top.indices
        tensor([[2, 0]])

    Source: Pruthi et al. 2020, arXiv 2002.08484 (TracInCP); Hammoudeh and Lowd 2022, arXiv
        2201.10600 (cosine).
    """
    k = operator.index(k)
    if k < 1:
        raise ValueError(f"top_k_dot: k: expected at least 1, got {k}")
    opponents_k = k if opponents_k is None else operator.index(opponents_k)
    if opponents_k < 1:
        raise ValueError(f"top_k_dot: opponents_k: expected at least 1, got {opponents_k}")
    if normalize not in (None, "cosine"):
        raise ValueError(f"top_k_dot: normalize: expected None or 'cosine', got {normalize!r}")
    if groups is not None and num_groups < 1:
        raise ValueError(
            f"top_k_dot: num_groups: expected at least 1 with groups, got {num_groups}"
        )
    if not queries:
        raise ValueError("top_k_dot: queries: expected at least one tensor, got none")
    expected_groups = None if groups is None else num_groups
    if state is None:
        result = empty_ranking(len(queries[0]), k, expected_groups, queries[0].device, opponents_k)
    else:
        state_groups = None if state.group_sums is None else state.group_sums.shape[-1]
        if state_groups != expected_groups:
            raise ValueError(
                f"top_k_dot: state.group_sums: expected {expected_groups} groups as in this call, "
                f"got {state_groups}"
            )
        for name, length in (("scores", k), ("opponent_scores", opponents_k)):
            expected, shape = (len(queries[0]), length), tuple(getattr(state, name).shape)
            if shape != expected:
                raise ValueError(
                    f"top_k_dot: state.{name}: expected shape (Q, k) = {expected}, got {shape}"
                )
        result = TopK(*(None if part is None else part.clone() for part in state))  # type: ignore[arg-type]
    _C.top_k_dot(
        [_capsule(rows) for rows in queries],
        [_capsule(rows) for rows in trains],
        [1.0] * len(queries) if weights is None else [float(weight) for weight in weights],
        normalize == "cosine",
        operator.index(index_offset),
        None if groups is None else _capsule(groups),
        _capsule(result.scores),
        _capsule(result.indices),
        _capsule(result.opponent_scores),
        _capsule(result.opponent_indices),
        None if result.group_sums is None else _capsule(result.group_sums),
        _allocator(result.scores.device),
        torch.get_num_threads(),
        _stream(result.scores.device),
    )
    return result


def empty_ranking(
    num_queries: int, k: int, num_groups: int | None, device: torch.device, opponents_k: int
) -> TopK:
    """Return the ranking of no training rows, from which `top_k_dot` starts."""
    shape, opponents_shape, sums = (num_queries, k), (num_queries, opponents_k), None
    if num_groups is not None:
        sums = torch.zeros(num_queries, num_groups, dtype=torch.float64, device=device)
    return TopK(
        torch.full(shape, -torch.inf, dtype=torch.float32, device=device),
        torch.full(shape, -1, dtype=torch.int64, device=device),
        torch.full(opponents_shape, torch.inf, dtype=torch.float32, device=device),
        torch.full(opponents_shape, -1, dtype=torch.int64, device=device),
        sums,
    )


class QuantizedRows(NamedTuple):
    """Rows as 8-bit codes; `codes * scales[:, None]` in float32 restores them.

    Attributes:
        codes: (N, K) int8, from -127 to 127.
        scales: (N,) float32, the value of a code of 1 in each row.

    Examples:
        >>> import torch
        >>> from tracmod import kernels
        >>> rows = kernels.quantize_rows(torch.tensor([[127.0, -50.0], [0.0, 0.0]]))
        >>> rows.codes, rows.scales
        (tensor([[127, -50],
                [  0,   0]], dtype=torch.int8), tensor([1., 0.]))
    """

    codes: Tensor
    scales: Tensor


def quantize_rows(rows: Tensor) -> QuantizedRows:
    """Quantize rows to int8 with one scale per row: a quarter of the bytes of float32.

    `scale_n = max_k |x_nk| / 127` and `code_nk = x_nk * (127 / max_k |x_nk|)`, rounded to the
    nearest integer, ties to even. Each step is one correctly rounded float32 operation, so the bits
    are the same on every device, with any number of threads and in any batch. A restored number is
    off by at most `scale * (1/2 + 2^-15)`: half a step, plus the rounding of float32.

    A row whose largest magnitude is below 2^-118 (3e-36) is stored as zeros: scale 0, codes 0.
    Smaller magnitudes would need denormal numbers, which some processor modes flush to zero. A row
    that contains NaN has the scale NaN; otherwise, a row that contains an infinity has the scale
    infinity. The codes of such rows are 0.

    Args:
        rows: (N, K) float32, bfloat16 or float16, contiguous. float16 is copied to float32 first.

    Returns:
        `QuantizedRows` on the device of the rows.

    Raises:
        ValueError: `rows` has an invalid dtype, shape, device or layout.

    Examples:
        >>> import torch
        >>> from tracmod import kernels
        >>> codes, scales = kernels.quantize_rows(torch.tensor([[1.27, -0.5, 0.0]]))
        >>> codes
        tensor([[127, -50,   0]], dtype=torch.int8)
        >>> codes * scales[:, None]
        tensor([[ 1.2700, -0.5000,  0.0000]])

    Source: Dettmers et al. 2022, arXiv 2208.07339 (vector-wise absmax quantization).
    """
    if rows.dtype == torch.float16:
        rows = rows.float()
    result = QuantizedRows(
        torch.empty_like(rows, dtype=torch.int8),
        torch.empty(rows.shape[:1], dtype=torch.float32, device=rows.device),
    )
    _C.quantize_rows(
        _capsule(rows),
        _capsule(result.codes),
        _capsule(result.scales),
        torch.get_num_threads(),
        _stream(rows.device),
    )
    return result


def projection_matrix(kind: Kind, k: int, size: int, seed: int, key: int) -> Tensor:
    """Return the random matrix R that `project_gradients` multiplies by.

    Args:
        kind: `rademacher` or `sjlt`.
        k: Rows of R: `k_out` or `k_in`.
        size: Columns of R: O or I + bias.
        seed: Seed of the projection.
        key: `output_key` or `input_key`.

    Returns:
        (k, size) float32 on the CPU.

    Raises:
        ValueError: `kind` is neither `rademacher` nor `sjlt`.

    Examples:
        >>> from tracmod import kernels
        >>> kernels.projection_matrix("rademacher", k=4, size=100, seed=0, key=1).unique()
        tensor([-0.5000,  0.5000])
    """
    matrix = torch.empty(k, size, dtype=torch.float32)
    _C.projection_matrix(_capsule(matrix), kind, seed & _MASK_64, key & _MASK_64)
    return matrix / math.sqrt(k) if kind == "rademacher" else matrix


def build_info() -> dict[str, Any]:
    """Describe how the native engine was built and what it uses on this machine.

    Returns:
        A dictionary with `version`, `compiler`, `cuda` (version of the toolkit, or None),
        `cuda_architectures` (or None), `instructions` (the CPU instruction set in use: baseline,
        avx2, avx512 or avx512_bf16), `dense_signs` (how rademacher projections are multiplied: by
        `tables` of sums or as `products`) and `threads` (torch's number of threads).

    Examples:
        >>> from tracmod import kernels
        >>> kernels.build_info()["version"]
        '0.1.0'
    """
    return {**_C.build_info(), "threads": torch.get_num_threads()}


def _capsule(tensor: Tensor) -> Any:
    return to_dlpack(tensor.detach())  # a DLPack capsule keeps the tensor's memory alive


def _allocator(device: torch.device) -> Callable[[int], Any]:
    """Return the function by which a kernel gets scratch memory of a number of bytes."""
    return lambda size: _capsule(torch.empty(size, dtype=torch.uint8, device=device))


def _stream(device: torch.device) -> int:
    """Return the handle of the current CUDA stream, or 0 on the CPU, where it is not used."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _lengths(lengths: Tensor | None, like: Tensor, g: Tensor, op: str, argument: str) -> Any:
    """Return lengths as a capsule on the data's device; check them first if they are on the CPU."""
    if lengths is None:
        return None
    if lengths.device.type == "cpu" and like.device.type != "cpu":
        tokens = g.shape[1] if g.dim() == 3 else 1
        _C.check_lengths(_capsule(lengths), len(like), tokens, op, argument)
        lengths = lengths.to(like.device, non_blocking=True)
    return _capsule(lengths)


def _columns(columns: Tensor | None, like: Tensor, op: str, argument: str) -> Any:
    """Return columns as a capsule on the data's device; check them first if they are on the CPU."""
    if columns is None:
        return None
    if columns.device.type == "cpu" and like.device.type != "cpu":
        _C.check_columns(_capsule(columns), op, argument)
        columns = columns.to(like.device, non_blocking=True)
    return _capsule(columns)


__all__ = [
    "Kind",
    "LayerKind",
    "QuantizedRows",
    "TopK",
    "build_info",
    "gradient_dot",
    "linear",
    "project_gradients",
    "projection_matrix",
    "quantize_rows",
    "top_k_dot",
]
