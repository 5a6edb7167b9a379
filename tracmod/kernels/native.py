"""The only importer of `_C`: tensors go over as borrowed DLPack capsules, scratch is torch's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from tracmod import _C

_MASK_64 = (1 << 64) - 1


def _capsule(tensor: Tensor) -> Any:
    return to_dlpack(tensor.detach())


def _scratch(device: torch.device) -> Callable[[int], Any]:
    return lambda size: _capsule(torch.empty(size, dtype=torch.uint8, device=device))


def _stream(device: torch.device) -> int:
    """The current CUDA stream's handle; 0 on the CPU, where it is not looked at."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _lengths(lengths: Tensor | None, like: Tensor, tokens: int, op: str, name: str) -> Any:
    """Lengths on the CPU are checked there, then brought to the device of the data."""
    if lengths is None:
        return None
    if lengths.device.type == "cpu" and like.device.type != "cpu":
        _C.check_lengths(_capsule(lengths), len(like), tokens, op, name)
        lengths = lengths.to(like.device, non_blocking=True)
    return _capsule(lengths)


def _tokens(g: Tensor) -> int:
    return g.shape[1] if g.dim() == 3 else 1


def _columns(columns: Tensor | None, like: Tensor, op: str, name: str) -> Any:
    """Column numbers on the CPU are checked there, then brought to the device of the data."""
    if columns is None:
        return None
    if columns.device.type == "cpu" and like.device.type != "cpu":
        _C.check_columns(_capsule(columns), op, name)
        columns = columns.to(like.device, non_blocking=True)
    return _capsule(columns)


def project_gradients(
    x: Tensor,
    g: Sequence[Tensor],
    out: Tensor,
    lengths: Tensor | None,
    offset: int,
    layer: str,
    kind: str,
    k_out: int,
    k_in: int,
    seed: int,
    input_key: int,
    output_keys: Sequence[int],
    bias: bool,
    input_columns: Tensor | None,
    output_columns: Sequence[Tensor | None],
) -> None:
    """See `tracmod.kernels.project_gradients`; what may be one or several is a sequence here."""
    op = "project_gradients"
    _C.project_gradients(
        _capsule(x),
        [_capsule(part) for part in g],
        _capsule(out),
        _lengths(lengths, x, _tokens(g[0]) if g else 0, op, "lengths"),
        offset,
        layer,
        kind,
        k_out,
        k_in,
        seed & _MASK_64,
        input_key & _MASK_64,
        [key & _MASK_64 for key in output_keys],
        bias,
        _columns(input_columns, x, op, "input_columns"),
        [_columns(columns, x, op, "output_columns") for columns in output_columns],
        _scratch(x.device),
        torch.get_num_threads(),
        _stream(x.device),
    )


def linear(x: Tensor, weight: Tensor, out: Tensor, bias: Tensor | None, transposed: bool) -> None:
    """See `tracmod.kernels.linear`."""
    _C.linear(
        _capsule(x),
        _capsule(weight),
        _capsule(out),
        None if bias is None else _capsule(bias),
        transposed,
        _scratch(x.device),
        torch.get_num_threads(),
    )


def gradient_dot(
    x1: Tensor,
    g1: Tensor,
    x2: Tensor,
    g2: Tensor,
    out: Tensor,
    lengths1: Tensor | None,
    lengths2: Tensor | None,
    layer: str,
    bias: bool,
) -> None:
    """See `tracmod.kernels.gradient_dot`."""
    _C.gradient_dot(
        _capsule(x1),
        _capsule(g1),
        _capsule(x2),
        _capsule(g2),
        _capsule(out),
        _lengths(lengths1, g1, _tokens(g1), "gradient_dot", "lengths1"),
        _lengths(lengths2, g2, _tokens(g2), "gradient_dot", "lengths2"),
        layer,
        bias,
        _scratch(x1.device),
        torch.get_num_threads(),
        _stream(x1.device),
    )


def top_k_dot(
    queries: Sequence[Tensor],
    trains: Sequence[Tensor],
    weights: Sequence[float],
    cosine: bool,
    k: int,
    index_offset: int,
    groups: Tensor | None,
    result: tuple[Tensor, Tensor, Tensor, Tensor],
    group_sums: Tensor | None,
) -> None:
    """Updates `result` (scores, indices, opponent scores and indices) and `group_sums` in place."""
    _C.top_k_dot(
        [_capsule(rows) for rows in queries],
        [_capsule(rows) for rows in trains],
        list(weights),
        cosine,
        k,
        index_offset,
        None if groups is None else _capsule(groups),
        _capsule(result[0]),
        _capsule(result[1]),
        _capsule(result[2]),
        _capsule(result[3]),
        None if group_sums is None else _capsule(group_sums),
        _scratch(result[0].device),
        torch.get_num_threads(),
        _stream(result[0].device),
    )


def quantize_rows(rows: Tensor, codes: Tensor, scales: Tensor) -> None:
    """Writes `codes` and `scales`; see `tracmod.kernels.quantize_rows`."""
    _C.quantize_rows(
        _capsule(rows),
        _capsule(codes),
        _capsule(scales),
        torch.get_num_threads(),
        _stream(rows.device),
    )


def projection_matrix(kind: str, out: Tensor, seed: int, key: int) -> None:
    """Fills out (k, size) with the signs of a projection, without its scale."""
    _C.projection_matrix(_capsule(out), kind, seed & _MASK_64, key & _MASK_64)


def build_info() -> dict[str, Any]:
    """See `tracmod.kernels.build_info`."""
    return dict(_C.build_info())
