"""The native engine's ops on torch tensors, CPU or CUDA: what they compute, and what they ask for.

Each op is stated in plain torch in `tracmod.kernels.reference`. NaN and infinity go through:
whether a result is finite is for the caller to check, who knows the examples' names.

Shape suffixes: B examples, S tokens, I in, O out, D features of LayerNorm or embedding, K features
per row, N train, Q query, C checkpoints, G groups.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tracmod.kernels import native

Layer = Literal["linear", "elementwise", "embedding"]
Kind = Literal["rademacher", "sjlt", "identity"]


def project_gradients(
    x: Tensor,
    g: Tensor | Sequence[Tensor],
    out: Tensor,
    *,
    lengths: Tensor | None = None,
    offset: int = 0,
    layer: Layer = "linear",
    kind: Kind = "rademacher",
    k_out: int,
    k_in: int,
    seed: int,
    input_key: int,
    output_key: int | Sequence[int],
    bias: bool = False,
    input_columns: Tensor | None = None,
    output_columns: Tensor | Sequence[Tensor | None] | None = None,
) -> None:
    """Adds each example's projected gradient of one layer into its feature row.

    linear: `G_b = sum_s g_bs [x_bs, 1]^T` (O, I + bias; the 1 only with `bias`), and::

        out[b, offset : offset + k_out * k_in] += vec(R_out G_b R_in^T)      (row-major)

    so that the expectation of `<f, f'>` over seeds is `<G, G'>`. Layers that read the same x go in
    one call, `g` and `output_key` a sequence each; they add into the same places, which costs less
    than a call for each::

        out[b, ...] += sum_j vec(R_out_j G_bj R_in^T) = vec((sum_j g_bj R_out_j^T)^T (x_b R_in^T))

    A layer of which columns of x or g were left out (heads that are switched off) has the features
    of the whole layer with zeros there if `input_columns` and `output_columns` tell the numbers of
    those that are left.

    `rademacher`: entries
    +-1/sqrt(k_out) and +-1/sqrt(k_in); `sjlt`: one +-1 in each column; `identity`: G itself. Signs
    are a stateless function of (seed, key, row, column), the same on every device and in every
    batch.

    elementwise (LayerNorm): weight gradient `v_d = sum_s g_sd x_sd`, x the normalised input, and
    with `bias` also `u_d = sum_s g_sd`: a count sketch into the grid of k_out * k_in (identity: as
    they are). embedding: the gradient's row `id` is the sum of g_s where `x_s = id`: a count
    sketch.

    An example's result depends on its own tokens alone: not on the batch, padding or threads.

    Args:
        x: linear (B, S, I) or (B, I), which means S = 1; elementwise (B, S, D) or (B, D): float32
            or bfloat16, contiguous. embedding (B, S) or (B,): int64 ids.
        g: gradient at the layer's output, (B, S, O) or (B, O) or as x with D; float32 or bfloat16,
            x's dtype and device, contiguous. linear, not identity: or 1 to 4 of them, of layers
            that read the same x, each with an O of its own.
        out: (B, K) float32, contiguous, added to.
        lengths: (B,) int64; tokens at and after the length are skipped. On the CPU they are
            checked; on a GPU that would mean waiting for it, and a wrong one turns its row into
            NaN.
        offset: first column of `out` that is used.
        layer, kind: see above.
        k_out: rows of the projected gradient.
        k_in: its columns. identity: k_out = O, k_in = I + bias (elementwise 1 + bias, D).
        seed: of the projection.
        input_key: R_in's key; layers that share an input share it. Only linear reads it.
        output_key: R_out's key, or the sketch's: another for every layer, and not `input_key`. As
            many as `g` has tensors.
        bias: whether the layer has one (never for embedding).
        input_columns: (I + bias,) int64, 0 or more: column i of [x, 1] has the signs of column
            `input_columns[i]`. None: of i. Only for linear, not identity. On the CPU they are
            checked; CPU ones are brought to x's device.
        output_columns: (O,) int64, the same for g; a sequence of (O_j,) or None where `g` is one.

    Raises:
        ValueError: wrong dtype, shape, device, layout, length, kind, key, column number, number of
            tensors, or sizes beyond K; the message names argument, expected and got.

    Source: Choe et al. 2024, arXiv 2405.13954 (two-sided projection); Charikar et al. 2002 (count
        sketch); Kane and Nelson 2014 (sjlt).
    """
    parts = [g] if isinstance(g, Tensor) else list(g)
    keys = output_key if isinstance(output_key, Sequence) else [output_key]
    columns: Sequence[Tensor | None] = [None] * len(parts)
    if output_columns is not None:
        columns = [output_columns] if isinstance(output_columns, Tensor) else output_columns
    native.project_gradients(
        x, parts, out, lengths, operator.index(offset), layer, kind, operator.index(k_out),
        operator.index(k_in), operator.index(seed), operator.index(input_key),
        [operator.index(key) for key in keys], bool(bias), input_columns, columns,
    )  # fmt: skip


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, transposed: bool = False
) -> Tensor:
    """A linear layer's product on the CPU: `x W^T + bias`; transposed `x W + bias`.

    Args:
        x: (T, I), or (T, O) if transposed; float32, contiguous.
        weight: (O, I) float32, contiguous.
        bias: (O,), or (I,) if transposed.
        transposed: the gradient at the layer's input, of that at its output.

    Returns:
        (T, O), or (T, I) if transposed. Sums are float32 in blocks of 256, float64 across.

    Raises:
        ValueError: wrong dtype, shape, device or layout; the message names argument, expected and
            got.
    """
    columns = weight.shape[1 if transposed else 0] if weight.dim() == 2 else 0
    out = torch.empty(len(x), columns, device=x.device)
    native.linear(x, weight, out, bias, bool(transposed))
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
    layer: Layer = "linear",
    bias: bool = False,
) -> None:
    """Adds the exact inner products of two batches' per-example gradients of one layer.

    `out[i, j] += <G_i, G'_j>`, with the gradients of `project_gradients`. linear: as
    `sum_{s,t} <g_s, g'_t> (<x_s, x'_t> + bias)` or by forming the gradients, whichever takes fewer
    operations; the choice looks at sizes and lengths of the whole call, so another batch around a
    pair of examples may change its result by rounding. Padding changes nothing.

    Args:
        x1, g1: first batch, as `x` and `g` of `project_gradients`.
        x2, g2: second batch; another B and S, the same I, O (or D), dtype and device.
        out: (B1, B2) float32, contiguous, added to.
        lengths1, lengths2: (B1,) and (B2,) int64, as `lengths` of `project_gradients`.
        layer: linear, elementwise or embedding.
        bias: whether the layer has one (never for embedding).

    Raises:
        ValueError: wrong dtype, shape, device, layout or length; the message names argument,
            expected and got.

    Source: the token-pair form is the "ghost" inner product (Li et al. 2022, arXiv 2110.05679;
        Wang et al. 2024, arXiv 2406.11011).
    """
    native.gradient_dot(x1, g1, x2, g2, out, lengths1, lengths2, layer, bool(bias))


class TopK(NamedTuple):
    """The strongest training rows of each query, best first.

    Ties: the lower index first. A place for which there was no training row: index -1 and score
    -inf (opponents +inf). NaN scores come first in both rankings, so that they are seen.
    """

    scores: Tensor  # (Q, k) float32, descending
    indices: Tensor  # (Q, k) int64
    opponent_scores: Tensor  # (Q, k) float32, ascending
    opponent_indices: Tensor  # (Q, k) int64
    group_sums: Tensor | None  # (Q, G) float64: every training row's score, summed by group


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
) -> TopK:
    """The k largest and k smallest scores of each query, without storing the scores.

    `score[q, n] = sum_c weights[c] <q_c, n_c>`; with `normalize="cosine"` each term is divided by
    `|q_c| |n_c|` (0 if a norm is 0).

    Training rows can be streamed: pass each block with the state that the last call returned and
    the number of rows before it as `index_offset`; the result is that of one call.

    Args:
        queries: over C checkpoints, (Q, K) float32 or bfloat16, contiguous.
        trains: over C checkpoints, (N, K), dtype and device of the queries.
        k: places of each ranking; may exceed N.
        weights: C numbers; absent: 1.
        normalize: None or "cosine".
        groups: (N,) int64 in [0, num_groups), on the rows' device: the group of each training row.
            On a GPU they are not checked beforehand; a wrong one turns the sums into NaN.
        num_groups: G.
        state: result of the calls before; left as it is.
        index_offset: added to a training row's number in `indices`.

    Returns:
        `TopK`; `group_sums` is None without `groups`.

    Raises:
        ValueError: wrong dtype, shape, device, layout, group or k; the message names argument,
            expected and got.

    Source: Pruthi et al. 2020, arXiv 2002.08484 (TracInCP); Hammoudeh and Lowd 2022, arXiv
        2201.10600 (cosine).
    """
    k = operator.index(k)
    if k < 1:
        raise ValueError(f"top_k_dot: k: expected 1 or more, got {k}")
    if normalize not in (None, "cosine"):
        raise ValueError(f"top_k_dot: normalize: expected None or 'cosine', got {normalize!r}")
    if groups is not None and num_groups < 1:
        raise ValueError(f"top_k_dot: num_groups: expected 1 or more with groups, got {num_groups}")
    if not queries:
        raise ValueError("top_k_dot: queries: expected one tensor or more, got none")
    if state is None:
        result = _empty_ranking(queries[0], k, num_groups if groups is not None else None)
    else:
        _check_state(state, groups, num_groups)
        result = TopK(*(None if part is None else part.clone() for part in state))  # type: ignore[arg-type]
    native.top_k_dot(
        queries,
        trains,
        [1.0] * len(queries) if weights is None else [float(weight) for weight in weights],
        normalize == "cosine",
        k,
        operator.index(index_offset),
        groups,
        result[:4],
        result.group_sums,
    )
    return result


def _empty_ranking(like: Tensor, k: int, num_groups: int | None) -> TopK:
    device, queries = like.device, len(like)
    return TopK(
        torch.full((queries, k), -torch.inf, device=device),
        torch.full((queries, k), -1, dtype=torch.int64, device=device),
        torch.full((queries, k), torch.inf, device=device),
        torch.full((queries, k), -1, dtype=torch.int64, device=device),
        None
        if num_groups is None
        else torch.zeros(queries, num_groups, dtype=torch.float64, device=device),
    )


def _check_state(state: TopK, groups: Tensor | None, num_groups: int) -> None:
    expected = None if groups is None else num_groups
    got = None if state.group_sums is None else state.group_sums.shape[-1]
    if got != expected:
        raise ValueError(
            f"top_k_dot: state.group_sums: expected {expected} groups as in this call, got {got}"
        )


class QuantizedRows(NamedTuple):
    """Rows as 8-bit codes; `codes * scales[:, None]` in float32 gives them back."""

    codes: Tensor  # (N, K) int8, from -127 to 127
    scales: Tensor  # (N,) float32: what a code of 1 stands for


def quantize_rows(rows: Tensor) -> QuantizedRows:
    """Features as int8 with a scale per row: a quarter of float32's bytes.

    `scale_n = max_k |x_nk| / 127` and `code_nk = x_nk * (127 / max_k |x_nk|)`, rounded, ties to
    even; each step is one correctly rounded float32 operation, so that the bits are the same on
    every device, with any threads and in any batch. Given back, a number is off by at most
    `scale * (1/2 + 2^-15)`: half a step, and float32's rounding.

    A row whose largest number is below 2^-118 (3e-36) counts as zeros: scale 0, codes 0. Smaller
    ones would need denormal numbers, of which processors may or may not make zeros. A row with NaN
    has the scale NaN, else one with an infinite number an infinite scale; its codes are 0.

    Args:
        rows: (N, K) float32, bfloat16 or float16, contiguous. float16 is widened first, which
            takes a copy.

    Returns:
        `QuantizedRows` on the device of the rows.

    Raises:
        ValueError: wrong dtype, shape, device or layout; the message names argument, expected and
            got.

    Source: Dettmers et al. 2022, arXiv 2208.07339 (vector-wise absmax quantization).
    """
    if rows.dtype == torch.float16:
        rows = rows.float()
    result = QuantizedRows(
        torch.empty_like(rows, dtype=torch.int8),
        torch.empty(rows.shape[:1], dtype=torch.float32, device=rows.device),
    )
    native.quantize_rows(rows, *result)
    return result


def projection_matrix(kind: Kind, k: int, size: int, seed: int, key: int) -> Tensor:
    """R (k, size) float32 of `project_gradients`, kind rademacher or sjlt.

    Raises:
        ValueError: another kind.
    """
    matrix = torch.empty(k, size)
    native.projection_matrix(kind, matrix, seed, key)
    return matrix / math.sqrt(k) if kind == "rademacher" else matrix


def build_info() -> dict[str, Any]:
    """What was built and what is used.

    Returns:
        version, compiler, cuda (toolkit or None), cuda_architectures (or None), instructions (the
        CPU's set in use: baseline, avx2, avx512 or avx512_bf16), dense_signs (how rademacher
        projections are multiplied: by tables of sums, or as products), threads.
    """
    return {**native.build_info(), "threads": torch.get_num_threads()}


__all__ = [
    "Kind",
    "Layer",
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
