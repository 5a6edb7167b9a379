"""The native engine's ops on torch tensors, CPU or CUDA: what they compute, and what they ask for.

Each op is stated in plain torch in `tracmod.kernels.reference`. NaN and infinity go through: whether
a result is finite is for the caller to check, who knows the examples' names.

Shape suffixes: B examples, S tokens, I in, O out, D features of LayerNorm or embedding, K features
per row, N train, Q query, C checkpoints, G groups.
"""

from __future__ import annotations

import math
import operator
from typing import Any, Literal

import torch
from torch import Tensor

from tracmod.kernels import native

Layer = Literal["linear", "elementwise", "embedding"]
Kind = Literal["rademacher", "sjlt", "identity"]


def project_gradients(
    x: Tensor,
    g: Tensor,
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
    output_key: int,
    bias: bool = False,
) -> None:
    """Adds each example's projected gradient of one layer into its feature row.

    linear: `G_b = sum_s g_bs [x_bs, 1]^T` (O, I + bias; the 1 only with `bias`), and::

        out[b, offset : offset + k_out * k_in] += vec(R_out G_b R_in^T)      (row-major)

    so that the expectation of `<f, f'>` over seeds is `<G, G'>`. `rademacher`: entries +-1/sqrt(k_out)
    and +-1/sqrt(k_in); `sjlt`: one +-1 in each column; `identity`: G itself. Signs are a stateless
    function of (seed, key, row, column), the same on every device, whatever the batch.

    elementwise (LayerNorm): weight gradient `v_d = sum_s g_sd x_sd`, x the normalised input, and with
    `bias` also `u_d = sum_s g_sd`: a count sketch into the grid of k_out * k_in (identity: as they
    are). embedding: the gradient's row `id` is the sum of g_s where `x_s = id`: a count sketch.

    An example's result depends on its own tokens alone: not on the batch, padding or threads.

    Args:
        x: linear (B, S, I) or (B, I), which means S = 1; elementwise (B, S, D) or (B, D): float32 or
            bfloat16, contiguous. embedding (B, S) or (B,): int64 ids.
        g: gradient at the layer's output, (B, S, O) or (B, O) or as x with D; float32 or bfloat16,
            x's dtype and device, contiguous.
        out: (B, K) float32, contiguous, added to.
        lengths: (B,) int64; tokens at and after the length are skipped. On the CPU they are checked;
            on a GPU that would mean waiting for it, and a wrong one turns its row into NaN.
        offset: first column of `out` that is used.
        layer, kind: see above.
        k_out: rows of the projected gradient.
        k_in: its columns. identity: k_out = O, k_in = I + bias (elementwise 1 + bias, D).
        seed: of the projection.
        input_key: R_in's key; layers that share an input share it. Only linear reads it.
        output_key: R_out's key, or the sketch's: another for every layer, and not `input_key`.
        bias: whether the layer has one (never for embedding).

    Raises:
        ValueError: wrong dtype, shape, device, layout, length, kind, or sizes beyond K; the message
            names argument, expected and got.

    Source: Choe et al. 2024, arXiv 2405.13954 (two-sided projection); Charikar et al. 2002 (count
        sketch); Kane and Nelson 2014 (sjlt).
    """
    native.project_gradients(
        x, g, out, lengths, operator.index(offset), layer, kind, operator.index(k_out),
        operator.index(k_in), operator.index(seed), operator.index(input_key),
        operator.index(output_key), bool(bias),
    )  # fmt: skip


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
        CPU's set in use: baseline, avx2 or avx512), threads.
    """
    return {**native.build_info(), "threads": torch.get_num_threads()}


__all__ = ["Kind", "Layer", "build_info", "project_gradients", "projection_matrix"]
