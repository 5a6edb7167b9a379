"""Predict the time of every op on an H200, from bytes, operations and counted instructions.

    python bench/predict.py     writes predictions.json, which bench_kernels.py prints beside

A prediction is the time of the slower limit divided by the share of it that the kernel is expected
to reach. The shares come from counts of instructions in the machine code and from the waves of
blocks; nothing was measured. Replace a share when a measurement shows that it is wrong, and say why
in its reason.

The kernels of sketches, of LayerNorm, of embeddings and of gradients that are kept move few bytes
and use no tensor cores. Neither limit says much about them, so their time is that of issuing the
instructions of every launch, or of waiting for their results where a launch has few warps.
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
# Instructions of one warp in project_gradients.cu, counted in the machine code for sm_90a, in which
# both dtypes need the same within a few percent. Those of add_exact, which skips most of its loads
# and rows here, are estimated.
REDUCE_STEP = 930  # reduce_outputs, per 16 columns of g: 354 make signs, 396 multiply and add
FORM_STEP, FORM_STORE = 780, 250  # form, per 16 tokens, and once
EXACT_STEP, EXACT_STORE = 570, 250  # add_exact, for one token of 16 and 3 rows of 64, and once
SKETCH_REDUCED, SKETCH_FORMED = 160, 230  # sketch_formed, per 32 numbers: ready, or of one token
ELEMENTS_STEP = 8 * 5300  # sketch, the 8 warps of a block: 20 for each of 256 elements, and hashes
# Guesses: the share of issue slots that these kernels use, the cycles that a warp of sketch_formed
# takes for 32 numbers if it does not wait for other warps (its sums are taken to stay in the
# caches), and the share of the copy that loads of single numbers reach.
ISSUED_SHARE, SKETCH_LATENCY, ELEMENTWISE_COPY = 0.6, 800, 0.6


class Share(NamedTuple):
    """Shares of the copy's and of the product's rate that a kernel is expected to reach."""

    copy: float
    product: float
    reason: str


def launch_seconds(blocks: float, instructions: float) -> float:
    """Return the time of a launch that is limited by the rate at which instructions are issued.

    Args:
        blocks: number of blocks, which the multiprocessors share evenly.
        instructions: of all warps of a block.
    """
    busiest = ceil(blocks / MULTIPROCESSORS) * instructions
    return busiest / (SCHEDULERS / MULTIPROCESSORS * CLOCK * ISSUED_SHARE)


def formed_seconds(spec: Spec, size: ProjectSize) -> tuple[float, str]:
    """Return the time of a sketch or of gradients that are kept, and the reason.

    The sizes of slices and of scratch are those of `sketch_sizes` in project_gradients.cu.
    """
    columns, k = size.size_in + 1, size.k[0] * size.k[1]
    tokens = size.tokens * (TOKENS_SHARE if size.ragged else 1)
    across, steps = ceil(columns / 64), ceil(tokens / 16)
    if spec.op.endswith("identity"):
        seconds = launch_seconds(size.batch * across, 8 * (EXACT_STEP * steps + EXACT_STORE))
        return seconds, (
            f"add_exact multiplies tiles of 64 x 64 x 16, of which {size.outs[0]} x 64 x 1 exist; "
            f"guess: {ISSUED_SHARE:.0%} of issue slots"
        )
    height = size.rows or size.outs[0]
    slice_rows = max(32, ceil(height / 32))
    slices = ceil(height / slice_rows)
    scratch = slices * k + size.rows * (size.tokens + columns)
    together = min(size.batch, max(1, 2**24 // scratch))
    parts = dict.fromkeys(["reduce_outputs", "form", "sketch_formed", "add_slices"], 0.0)
    for first in range(0, size.batch, together):
        count = min(together, size.batch - first)
        if size.rows:
            steps_of_g = sum(ceil(width / 16) for width in size.outs)
            parts["reduce_outputs"] += launch_seconds(
                ceil(count * size.tokens / 64), 8 * REDUCE_STEP * steps_of_g
            )
            parts["form"] += launch_seconds(count * across, 8 * (FORM_STEP * steps + FORM_STORE))
        # A block is one warp, and a multiprocessor takes at most 32 blocks.
        warps = count * slices
        waiting = SKETCH_LATENCY * ceil(warps / (32 * MULTIPROCESSORS))
        issuing = (SKETCH_REDUCED if size.rows else SKETCH_FORMED) * warps / SCHEDULERS
        cycles = max(waiting, issuing / ISSUED_SHARE)
        parts["sketch_formed"] += slice_rows * ceil(columns / 32) * cycles / CLOCK
        # The sums of all slices are set to 0 and read again.
        parts["add_slices"] += 2 * 4 * warps * k / COPY_BYTES
    times = ", ".join(f"{name} {part * 1e3:.2g}" for name, part in parts.items() if part)
    return sum(parts.values()), (
        f"ms: {times}; {together * slices / MULTIPROCESSORS:.3g} warps of sketch_formed per "
        f"multiprocessor; guesses: {SKETCH_LATENCY} cycles per 32 numbers, {ISSUED_SHARE:.0%} of "
        f"issue slots"
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
        seconds, reason = formed_seconds(spec, size)
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
