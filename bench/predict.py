"""Predict the time of every op on an H200, from bytes, operations and counted instructions.

    python bench/predict.py     writes predictions.json, which bench_kernels.py prints beside

A prediction is the time of the slower limit divided by the share of it that the kernel is expected
to reach. The shares come from counts of instructions in the machine code and from the waves of
blocks; nothing was measured. Replace a share when a measurement shows that it is wrong, and say why
in its reason.

The kernels of sketches, of LayerNorm, of embeddings and of gradients that are kept move few bytes
and spend little time on the tensor cores. Neither limit says much about them, so their time is that
of issuing the instructions of every launch, or of waiting for their results where a launch has few
warps.
"""

from __future__ import annotations

import json
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tracmod.bench.cases import (
    KINDS,
    DotSize,
    ElementSize,
    ProjectSize,
    QuantizeSize,
    Spec,
    TopKSize,
    specs,
)

FILE = Path(__file__).resolve().parent / "predictions.json"
# Rates of one H200 that plain torch was seen to reach, and those of exact float32 products of three
# in tf32, whose rate is half of that of bfloat16.
COPY_BYTES = 4.3e12
PRODUCTS = {torch.bfloat16: 790e12, torch.float32: 790e12 / 6}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TILE_QUERIES = 128  # rows of a tile of top_k_dot, which are computed whether they exist or not
TOKENS_SHARE = 0.625  # mean length over S of ragged examples

# Of one H200. The clock is a guess of what it keeps up under load.
MULTIPROCESSORS, SCHEDULERS, CLOCK = 132, 4 * 132, 1.75e9
SHARED_MEMORY, MOST_THREADS = 227 * 1024, 2048  # of a multiprocessor

# Instructions of one warp, counted in the machine code for sm_90a, in which both dtypes need the
# same within a few percent unless stated. Those of add_exact, which skips most of its loads and
# rows here, are estimated.
EXACT_STEP, EXACT_STORE = 570, 250  # add_exact, for one token of 16 and 3 rows of 64, and once
ELEMENTS_STEP = 8 * 5300  # sketch, the 8 warps of a block: 20 for each of 256 elements, and hashes
# formed_sketch.cuh. make_lists: a part of 256 runs, and every list of it.
LIST_PART, LIST_OWNER = 400, 2 * 222
# sketch_tiles, for 64 x 64 numbers: 16 tokens of the product of 16 x 32 numbers; loads of 16
# tokens; storing the product with signs, and barriers; 32 numbers that are added; and their lists.
TILE_STEP = {torch.bfloat16: 55, torch.float32: 172}
TILE_LOAD = {torch.bfloat16: 20, torch.float32: 64}
TILE_STORE, TILE_ADD, TILE_LIST = 100, 23, 90
# sketch_products, for 256 x 16 numbers of four examples: columns of x and lists; 128 numbers.
PRODUCT_PART, PRODUCT_ADD = 225, 29
# Guesses: the share of issue slots that these kernels use; the cycles that a warp waits for one run
# (its sum in shared memory is read, changed and written), for the barriers and copies of a tile,
# and for the columns and lists of a part; the share of the copy that loads of single numbers reach.
ISSUED_SHARE, RUN_LATENCY, TILE_LATENCY, PART_LATENCY = 0.6, 90, 1500, 900
ELEMENTWISE_COPY = 0.6


class Share(NamedTuple):
    """Shares of the copy's and of the product's rate that a kernel is expected to reach."""

    copy: float
    product: float
    reason: str


def launch_seconds(blocks: float, instructions: float, together: int = 1, wait: float = 0) -> float:
    """Return the time of a launch that issues instructions or waits for their results.

    Args:
        blocks: number of blocks, which the multiprocessors share evenly.
        instructions: of all warps of a block.
        together: blocks that a multiprocessor holds at a time.
        wait: cycles that a block takes if nothing delays it.
    """
    each = ceil(blocks / MULTIPROCESSORS)
    issuing = each * instructions / (SCHEDULERS / MULTIPROCESSORS * ISSUED_SHARE)
    return max(issuing, ceil(each / together) * wait) / CLOCK


def runs_of_a_warp(share: int, owners: int, numbers: int) -> float:
    """Return the runs that a warp adds of a part: the more of those of its two halves.

    Args:
        share: buckets of a half-warp.
        owners: half-warps that own the buckets of an example.
        numbers: runs of the part. Each is added by all owners that it reaches.
    """
    mean = numbers / owners * (1 + 15 / share)
    return mean + 0.56 * mean**0.5


def formed_seconds(spec: Spec, size: ProjectSize, dtype: torch.dtype) -> tuple[float, str]:
    """Return the time of a sketch or of gradients that are kept, and the reason.

    The decomposition is that of `take_sketch` in project_gradients.cu.
    """
    columns, k = size.size_in + 1, size.k[0] * size.k[1]
    tokens = size.tokens * (TOKENS_SHARE if size.ragged else 1)
    if spec.op.endswith("identity"):
        steps = ceil(tokens / 16)
        seconds = launch_seconds(
            size.batch * ceil(columns / 64), 8 * (EXACT_STEP * steps + EXACT_STORE)
        )
        return seconds, (
            f"add_exact multiplies tiles of 64 x 64 x 16, of which {size.outs[0]} x 64 x 1 exist; "
            f"guess: {ISSUED_SHARE:.0%} of issue slots"
        )
    height, products = size.rows or size.outs[0], size.tokens == 1 and not size.rows
    examples, most = (ceil(size.batch / 4), 3072) if products else (size.batch, 12288)
    ranges = max(1, ceil(k / most), min(132 // examples, k // 256))
    share = ceil(k / (16 * ranges))
    owners, blocks = 16 * ranges, examples * ranges
    if products:
        in_parts = ceil(height / 256) * ceil(columns / 16)
        runs = runs_of_a_warp(share, owners, min(256, height))
        issued, wait = PRODUCT_PART + PRODUCT_ADD * runs, PART_LATENCY + RUN_LATENCY * runs
        shared = 16 * (256 + 16 * share)
    else:
        in_parts = ceil(height / 64) * ceil(columns / 64)
        runs, steps = runs_of_a_warp(share, owners, 4 * min(64, height)), ceil(tokens / 16)
        issued = (TILE_STEP[dtype] + TILE_LOAD[dtype]) * steps
        issued += TILE_STORE + TILE_LIST + TILE_ADD * runs
        wait = TILE_LATENCY + RUN_LATENCY * runs
        operands = 2 * 64 * 72 if dtype is torch.float32 else (3 * 32 + 32) * 72
        shared = 4 * (64 * 72 + operands + 16 * share)
    # 80 registers allow three blocks of sketch_tiles.
    together = min(MOST_THREADS // 256 if products else 3, SHARED_MEMORY // (shared + 1024))
    warps = 8 * min(together, blocks / MULTIPROCESSORS)
    parts = {"make_lists": launch_seconds(in_parts, 8 * LIST_PART + owners * LIST_OWNER)}
    if size.rows:
        share_of = linear_share(size.tokens, dtype)
        moved = size.batch * tokens * (sum(size.outs) * dtype.itemsize + 4 * size.rows)
        flops = 2 * size.batch * tokens * sum(size.outs) * size.rows
        parts["reduce_outputs"] = max(
            moved / COPY_BYTES / share_of.copy, flops / PRODUCTS[dtype] / share_of.product
        )
    parts["sketch_products" if products else "sketch_tiles"] = launch_seconds(
        blocks, 8 * in_parts * issued, together, in_parts * wait
    )
    times = ", ".join(f"{name} {part * 1e3:.2g}" for name, part in parts.items())
    numbers = in_parts * (4 * 256 * 16 if products else 64 * 64) / 32
    return sum(parts.values()), (
        f"ms: {times}; {8 * ranges * in_parts * issued / numbers:.0f} instructions per 32 numbers, "
        f"{warps:.3g} warps per multiprocessor; guess: {ISSUED_SHARE:.0%} of issue slots"
    )


def element_seconds(spec: Spec, size: ElementSize, dtype: torch.dtype) -> tuple[float, str]:
    """Return the time of LayerNorm's or an embedding's sketch, and the reason."""
    tokens = size.tokens * (TOKENS_SHARE if size.ragged else 1)
    embedding = spec.op.endswith("embedding")
    elements = (tokens if embedding else 2) * size.width
    sketch = launch_seconds(size.batch, ELEMENTS_STEP * ceil(elements / 256))
    guess = f"guess: {ISSUED_SHARE:.0%} of issue slots"
    if embedding:
        return sketch, f"every thread looks at every element, 20 instructions each; {guess}"
    read = size.cost("elementwise", dtype, round(size.batch * tokens)).input_bytes
    sums = read / COPY_BYTES / ELEMENTWISE_COPY
    return sums + sketch, (
        f"ms: sketch {sketch * 1e3:.2g}, in which every thread looks at every element, "
        f"sum_elementwise {sums * 1e3:.2g}; {guess}, {ELEMENTWISE_COPY:.0%} of copy"
    )


def linear_share(tokens: int, dtype: torch.dtype) -> Share:
    """Return what is expected of the projections of linear layers by the tensor cores."""
    half = dtype is torch.bfloat16
    if tokens == 1:
        return Share(0.04, 0.1, "one warp per block cannot hide the latency of memory")
    if tokens <= 24:
        return Share(0.45 if half else 0.4, 0.2, "2.04 waves of blocks")
    if half:
        return Share(0.68, 0.4, "128 of 345 instructions per slice expand signs")
    return Share(0.5, 0.3, "three products per value take as long as its read")


def predicted_share(spec: Spec, dtype: torch.dtype) -> Share:
    """Return what is expected of the kernel of this op at this size."""
    size = spec.size
    if isinstance(size, ProjectSize):
        return linear_share(size.tokens, dtype)
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
    if isinstance(size, ProjectSize | ElementSize):
        tokens = round(size.batch * size.tokens * (TOKENS_SHARE if size.ragged else 1))
        cost = size.cost(spec.op.split()[1], dtype, tokens)  # type: ignore[arg-type]
    elif isinstance(size, DotSize):
        ragged = TOKENS_SHARE if size.ragged else 1
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
    bytes_moved = cost.input_bytes + cost.output_bytes
    # Operations count for ops on tensor cores; quantize_rows is bound by memory alone.
    products = 0.0 if isinstance(size, QuantizeSize) else cost.flops / PRODUCTS[dtype]
    limits = {"bytes": bytes_moved / COPY_BYTES, "operations": products}
    if isinstance(size, ElementSize):
        seconds, reason = element_seconds(spec, size, dtype)
    elif isinstance(size, ProjectSize) and spec.op.split()[1] not in KINDS:
        seconds, reason = formed_seconds(spec, size, dtype)
    else:
        share = predicted_share(spec, dtype)
        seconds = max(limits["bytes"] / share.copy, products * flops_share / share.product)
        reason = share.reason
    bound = max(limits, key=lambda name: limits[name])
    return {
        "bytes": bytes_moved, "operations": cost.flops, "bound_by": bound,
        "limit_seconds": limits[bound], "seconds": seconds,
        "share_of_limit": limits[bound] / seconds, "reason": reason,
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
