"""Predict the time of every op on an H200, from bytes, operations and counted instructions.

    python bench/predict.py     writes predictions.json, which bench_kernels.py prints beside

A prediction is the time of the slower limit divided by the share of it that the kernel is expected
to reach. The shares come from counts of instructions in the machine code and from the waves of
blocks; nothing was measured. Replace a share when a measurement shows that it is wrong, and say why
in its reason.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tracmod.bench.cases import DotSize, ProjectSize, QuantizeSize, Spec, TopKSize, specs

FILE = Path(__file__).resolve().parent / "predictions.json"
# Rates of one H200 that plain torch was seen to reach, and those of exact float32 products of three
# in tf32, whose rate is half of that of bfloat16.
COPY_BYTES = 4.3e12
PRODUCTS = {torch.bfloat16: 790e12, torch.float32: 790e12 / 6}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TILE_QUERIES = 128  # rows of a tile of top_k_dot, which are computed whether they exist or not


class Share(NamedTuple):
    """Shares of the copy's and of the product's rate that a kernel is expected to reach."""

    copy: float
    product: float
    reason: str


def predicted_share(spec: Spec, dtype: torch.dtype) -> Share:
    """Return what is expected of the kernel of this op at this size."""
    size, half = spec.size, dtype is torch.bfloat16
    if isinstance(size, ProjectSize):
        if size.tokens == 1:
            return Share(0.04, 0.1, "one warp per block cannot hide the latency of memory")
        if size.tokens <= 24:
            return Share(0.45 if half else 0.4, 0.2, "2.04 waves of blocks")
        if half:
            return Share(0.68, 0.4, "128 of 345 instructions per slice expand signs")
        return Share(0.5, 0.3, "three products per value take as long as its read")
    if isinstance(size, TopKSize):
        return Share(0.8, 0.34, "mma.sync only; 395 of 571 instructions of a step precede it")
    if isinstance(size, DotSize):
        if size.tokens == 1:
            return Share(0.2, 0.1, "few pairs of tokens for each block")
        return Share(0.5, 0.3, "mma.sync, short chains, sums of rows between the products")
    return Share(0.8, 0.5, "two reads of a row, the second from the caches")


def predict(spec: Spec, dtype: torch.dtype) -> dict[str, Any]:
    """Return bytes, operations, the limit, the predicted seconds and share of the limit."""
    size = spec.size
    flops_share = 1.0
    if isinstance(size, ProjectSize):
        tokens = round(size.batch * size.tokens * (0.625 if size.ragged else 1))
        cost = size.cost(spec.op.split()[1], dtype, tokens)  # type: ignore[arg-type]
    elif isinstance(size, DotSize):
        ragged = 0.625 if size.ragged else 1
        cost = size.cost(
            dtype, *(round(b * size.tokens * ragged) for b in (size.batch1, size.batch2))
        )
    elif isinstance(size, TopKSize):
        cost = size.cost(dtype)
        padded = -(-size.queries // TILE_QUERIES) * TILE_QUERIES
        flops_share = padded / size.queries
    else:
        assert isinstance(size, QuantizeSize)
        cost = size.cost(dtype)
    share = predicted_share(spec, dtype)
    bytes_moved = cost.input_bytes + cost.output_bytes
    # Operations count for ops on tensor cores; quantize_rows is bound by memory alone.
    products = 0.0 if isinstance(size, QuantizeSize) else cost.flops / PRODUCTS[dtype]
    limits = {"bytes": bytes_moved / COPY_BYTES, "operations": products}
    seconds = max(limits["bytes"] / share.copy, products * flops_share / share.product)
    bound = max(limits, key=lambda name: limits[name])
    return {
        "bytes": bytes_moved, "operations": cost.flops, "bound_by": bound,
        "limit_seconds": limits[bound], "seconds": seconds,
        "share_of_limit": limits[bound] / seconds, "reason": share.reason,
    }  # fmt: skip


def all_predictions() -> dict[str, dict[str, Any]]:
    """Return the prediction of every case of a GPU, by dtype and by op and size."""
    return {
        name: {f"{spec.op}, {spec.size}": predict(spec, dtype) for spec in specs(True, dtype)}
        for name, dtype in DTYPES.items()
    }


def predictions(dtype_name: str) -> dict[str, Any]:
    """Read the predictions for a dtype."""
    loaded: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))[dtype_name]
    return loaded


if __name__ == "__main__":
    FILE.write_text(json.dumps(all_predictions(), indent=1) + "\n", encoding="utf-8")
