"""Every op in plain torch: the specification that the native engine is tested against.

The functions take any floating-point dtype. Tests compare with the result in float64, and use the
error of the result in float32 as the tolerance. Each function follows its formula literally, at the
expense of time and memory. Arguments are those of the functions in `tracmod.kernels`.

Shape suffixes: B examples, S tokens, I in, O out, D features of LayerNorm or embedding, K features
per row, N train, Q query, C checkpoints, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_MASK_64 = (1 << 64) - 1


def _signed(value: int) -> int:
    """Return the int64 that has the same 64 bits."""
    value &= _MASK_64
    return value - (1 << 64) if value >> 63 else value


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Shift int64 right logically (torch's own shift copies the sign bit)."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    """Apply the finalizer of SplitMix64, which every random number here is made with."""
    z = (z ^ _shift_right(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift_right(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift_right(z, 31)


def _step(state: Tensor, n: Tensor) -> Tensor:
    """Return the n-th output of the SplitMix64 generator that starts at `state`."""
    return _mix(state + _signed(0x9E3779B97F4A7C15) * (n + 1))


def _stream(seed: int, key: int) -> Tensor:
    return _step(_mix(torch.tensor(_signed(seed))), torch.tensor(_signed(key)))


def _sign(hashes: Tensor) -> Tensor:
    return 1 - 2 * (hashes & 1)


def _position(hashes: Tensor, size: int) -> Tensor:
    return (_shift_right(hashes, 32) * size) >> 32


def projection_matrix(
    kind: str,
    k: int,
    size: int,
    seed: int,
    key: int,
    dtype: torch.dtype = torch.float64,
    columns: Tensor | None = None,
) -> Tensor:
    """Return R (k, size): +-1/sqrt(k) everywhere (rademacher), or one +-1 per column (sjlt).

    The integers from which entries are made are those of csrc/random.h. A word of 64 random bits
    gives the signs of 64 rows of a rademacher column. An sjlt hash serves 16 columns, which get
    different rows if there are at least 16 rows.

    Args:
        columns: (size,) numbers of the columns; 0, 1, ... by default.
    """
    stream = _stream(seed, key)
    columns = torch.arange(size) if columns is None else columns.cpu()
    if kind == "rademacher":
        rows = torch.arange(k)[:, None]
        words = _step(_step(stream, columns), rows // 64)
        return (1 - 2 * ((words >> (rows % 64)) & 1)).to(dtype) / k**0.5
    lanes = columns % 16 if k >= 16 else 0 * columns
    hashes = _step(stream, columns // 16 if k >= 16 else columns)
    matrix = torch.zeros(k, size, dtype=dtype)
    matrix[(_position(hashes, k) + lanes) % k, torch.arange(size)] = _sign(hashes >> lanes).to(
        dtype
    )
    return matrix


def element_entries(
    rows_n: Tensor, width: int, size: int, seed: int, key: int
) -> tuple[Tensor, Tensor]:
    """Return (n, width) positions below `size` and signs of the elements of rows `rows_n`."""
    columns = torch.arange(width)
    hashes_nD = _step(_step(_stream(seed, key), rows_n.cpu()[:, None]), columns)
    return _position(hashes_nD, size), _sign(hashes_nD)


def count_sketch(values_nD: Tensor, rows_n: Tensor, size: int, seed: int, key: int) -> Tensor:
    """Return (size,): every element (row, d) is added, with its sign, at its position."""
    positions, signs = element_entries(rows_n, values_nD.shape[1], size, seed, key)
    signed = signs.to(values_nD) * values_nD
    return values_nD.new_zeros(size).index_add(
        0, positions.flatten().to(signed.device), signed.flatten()
    )


def formed_entries(
    rows: Tensor, columns: Tensor, size: int, seed: int, input_key: int, key: int
) -> tuple[Tensor, Tensor]:
    """Return (O, I) positions below `size` and signs of the elements of a formed gradient.

    16 neighbouring elements of a row share a hash, which gives the position of the first and a
    sign; the others follow it. Every column has another sign.

    Args:
        rows: (O,) numbers of the rows.
        columns: (I,) numbers of the columns.
    """
    rows, columns = rows.cpu(), columns.cpu()
    lanes = columns % 16 if size >= 16 else 0 * columns
    groups = columns // 16 if size >= 16 else columns
    hashes_OI = _step(_step(_stream(seed, key), rows[:, None]), groups)
    positions_OI = (_position(hashes_OI, size) + lanes) % size
    return positions_OI, _sign(hashes_OI) * _sign(_step(_stream(seed, input_key), columns))


def formed_sketch(
    gradient_OI: Tensor,
    size: int,
    seed: int,
    input_key: int,
    key: int,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
) -> Tensor:
    """Return (size,), the count sketch of a formed gradient (see `formed_entries`).

    Args:
        rows: (O,) numbers of the rows; 0, 1, ... by default.
        columns: (I,) numbers of the columns; 0, 1, ... by default.
    """
    num_rows, num_columns = gradient_OI.shape
    rows = torch.arange(num_rows) if rows is None else rows
    columns = torch.arange(num_columns) if columns is None else columns
    positions_OI, signs_OI = formed_entries(rows, columns, size, seed, input_key, key)
    signed_OI = signs_OI.to(gradient_OI) * gradient_OI
    return gradient_OI.new_zeros(size).index_add(
        0, positions_OI.flatten().to(gradient_OI.device), signed_OI.flatten()
    )


def gradient(x: Tensor, g: Tensor, *, layer: str, bias: bool) -> Tensor:
    """Return the gradient of one example.

    Args:
        x: (S, I), elementwise (S, D), embedding (S,) ids.
        g: (S, O), or (S, D) unless linear.
        layer: linear, elementwise or embedding.
        bias: append the gradient of the bias.

    Returns:
        linear (O, I + bias); elementwise (1 + bias, D); embedding (largest id + 1, D).
    """
    if layer == "linear":
        ones = x.new_ones(len(x), 1 if bias else 0)
        return g.T @ torch.cat([x, ones], dim=1)
    if layer == "elementwise":
        weight = (g * x).sum(0)
        return torch.stack([weight, g.sum(0)]) if bias else weight[None]
    rows = int(x.max()) + 1 if len(x) else 0
    return g.new_zeros(rows, g.shape[1]).index_add(0, x, g)


def _examples(x: Tensor, g: Tensor, lengths: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """Return (x, g) of each example without its padding; without S, one token each."""
    if g.dim() == 2:
        x, g = x.unsqueeze(1), g.unsqueeze(1)
    counts = [g.shape[1]] * len(g) if lengths is None else lengths.tolist()
    return [(x[b, :count], g[b, :count]) for b, count in enumerate(counts)]


def project_gradients(
    x: Tensor,
    g: Tensor | Sequence[Tensor],
    out_BK: Tensor,
    *,
    lengths: Tensor | None = None,
    offset: int = 0,
    layer: str = "linear",
    kind: str = "rademacher",
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
    """out[b, offset : offset + k_out k_in] += vec(R_out G_b R_in^T), or a count sketch of G_b."""
    if not isinstance(g, Tensor):  # several layers: one after the other
        assert isinstance(output_key, Sequence)
        columns_of_g = [None] * len(g) if output_columns is None else output_columns
        for g_j, key, columns in zip(g, output_key, columns_of_g, strict=True):
            project_gradients(
                x, g_j, out_BK, lengths=lengths, offset=offset, layer=layer, kind=kind,
                k_out=k_out, k_in=k_in, rows=rows, seed=seed, input_key=input_key,
                output_key=key, bias=bias, input_columns=input_columns, output_columns=columns,
            )  # fmt: skip
        return
    assert isinstance(output_key, int)
    assert not isinstance(output_columns, Sequence)
    size = k_out * k_in
    for row, (x_b, g_b) in zip(out_BK, _examples(x, g, lengths), strict=True):
        if layer == "embedding":
            feature = count_sketch(g_b, x_b, size, seed, output_key)
        else:
            feature = gradient(x_b, g_b, layer=layer, bias=bias)
            if kind != "identity" and layer == "elementwise":
                feature = count_sketch(feature, torch.arange(len(feature)), size, seed, output_key)
            elif kind == "sketch":
                row_key, row_numbers = output_key, output_columns
                if rows > 0:
                    r_out = projection_matrix(
                        "rademacher", rows, len(feature), seed, row_key, feature.dtype, row_numbers
                    )
                    feature = r_out.to(feature.device) @ feature
                    row_key, row_numbers = ~input_key, None
                feature = formed_sketch(
                    feature, size, seed, input_key, row_key, row_numbers, input_columns
                )
            elif kind != "identity":
                n_out, n_in = feature.shape
                dtype = feature.dtype
                r_out = projection_matrix(
                    kind, k_out, n_out, seed, output_key, dtype, output_columns
                )
                r_in = projection_matrix(kind, k_in, n_in, seed, input_key, dtype, input_columns)
                feature = r_out.to(feature.device) @ feature @ r_in.to(feature.device).T
        row[offset : offset + size] += feature.flatten()


def gradient_dot(
    x1: Tensor,
    g1: Tensor,
    x2: Tensor,
    g2: Tensor,
    out: Tensor,
    *,
    lengths1: Tensor | None = None,
    lengths2: Tensor | None = None,
    layer: str = "linear",
    bias: bool = False,
) -> None:
    """out[i, j] += <G_i, G'_j>, with both gradients formed."""
    for i, (x_i, g_i) in enumerate(_examples(x1, g1, lengths1)):
        first = gradient(x_i, g_i, layer=layer, bias=bias)
        for j, (x_j, g_j) in enumerate(_examples(x2, g2, lengths2)):
            second = gradient(x_j, g_j, layer=layer, bias=bias)
            rows = min(len(first), len(second))  # other rows of an embedding are 0 in one of them
            out[i, j] += (first[:rows] * second[:rows]).sum()


def scores(
    queries: Sequence[Tensor],
    trains: Sequence[Tensor],
    weights: Sequence[float] | None = None,
    normalize: str | None = None,
) -> Tensor:
    """Return (Q, N): sum_c weights[c] <q_c, n_c>, for cosine divided by |q_c| |n_c| (or 0)."""
    total = torch.zeros(len(queries[0]), len(trains[0]), dtype=queries[0].dtype)
    total = total.to(queries[0].device)
    for c, (q_QK, n_NK) in enumerate(zip(queries, trains, strict=True)):
        dots = q_QK @ n_NK.T
        if normalize == "cosine":
            norms = q_QK.norm(dim=1)[:, None] * n_NK.norm(dim=1)
            dots = torch.where(norms == 0, 0.0, dots / norms)
        total += (1.0 if weights is None else weights[c]) * dots
    return total


def top_k(scores_QN: Tensor, k: int, *, largest: bool = True) -> tuple[Tensor, Tensor]:
    """Return (scores, indices), (Q, k) each, as in `tracmod.kernels.TopK`; ties by index."""
    order = torch.sort(scores_QN + 0.0, dim=1, descending=largest, stable=True)
    missing = max(0, k - scores_QN.shape[1])
    worst = -torch.inf if largest else torch.inf
    pad = torch.nn.functional.pad
    return (
        pad(order.values[:, :k], (0, missing), value=worst),
        pad(order.indices[:, :k], (0, missing), value=-1),
    )


def group_sums(scores_QN: Tensor, groups_N: Tensor, num_groups: int) -> Tensor:
    """Return (Q, G) float64, the sums of scores over the training examples of each group."""
    sums = torch.zeros(len(scores_QN), num_groups, dtype=torch.float64, device=scores_QN.device)
    return sums.index_add(1, groups_N, scores_QN.double())


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, transposed: bool = False
) -> Tensor:
    """Return x W^T + bias, or x W + bias if transposed."""
    product = x @ weight if transposed else x @ weight.T
    return product if bias is None else product + bias


def quantize_rows(rows_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Return (codes (N, K) int8, scales (N,) float32), each step rounded correctly to float32.

    scale = max_k |x_k| / 127; code = x * (127 / max), rounded, ties to even. The scale is 0 where
    the maximum is below 2^-118, and NaN or infinite where the maximum is; the codes are then 0.
    """
    rows_NK = rows_NK.float()
    zeros_N = rows_NK.new_zeros(len(rows_NK))
    largest_N = rows_NK.abs().amax(dim=1) if rows_NK.shape[1] else zeros_N
    largest_N = torch.where(largest_N < 2.0**-118, 0.0, largest_N)
    # Not the number 127.0: torch would divide by it by multiplying with its rounded inverse.
    levels_N = torch.full_like(largest_N, 127.0)
    coded_N = largest_N.isfinite() & (largest_N > 0)
    codes_NK = (rows_NK * (levels_N / largest_N)[:, None]).round()
    return torch.where(coded_N[:, None], codes_NK, 0.0).to(torch.int8), largest_N / levels_N
