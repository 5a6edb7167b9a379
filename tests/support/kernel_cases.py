"""The sizes at which every op is tested, random batches, and the tolerance of the comparison.

A new op is added to `SIZES` and gets a test file that takes its sizes from there;
`test_kernels_everywhere.py` then says where else it is still missing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LAYERS = ["linear", "elementwise", "embedding"]
DTYPES = [torch.float32, torch.bfloat16]
FLOOR = 4 * torch.finfo(torch.float32).eps

# Sizes around the widths of vectors, tiles and blocks: 1, 3, and a power of two less and more one.
SIZES: dict[str, list[tuple[int, ...]]] = {
    # batch, tokens, in, out, k_out, k_in
    "project_gradients": [
        (1, 1, 1, 1, 1, 1),
        (3, 3, 3, 1, 1, 3),
        (2, 31, 33, 3, 3, 31),
        (3, 33, 127, 31, 31, 33),
        (2, 127, 31, 127, 33, 1),
        (4, 1, 127, 33, 127, 70),
        (2, 9, 257, 600, 130, 65),
        (1, 3, 5000, 1, 17, 16),
    ],
    # rows, in, out
    "linear": [(1, 1, 1), (3, 31, 33), (97, 33, 65), (127, 300, 64), (200, 513, 130)],
    # batch 1, tokens 1, batch 2, tokens 2, in, out: pairs of tokens take fewer operations where
    # there are few tokens, formed gradients where there are many
    "gradient_dot": [
        (1, 1, 1, 1, 1, 1),
        (3, 3, 1, 1, 3, 1),
        (2, 1, 3, 3, 33, 127),
        (3, 33, 2, 31, 31, 3),
        (5, 127, 4, 33, 3, 33),
        (2, 31, 3, 127, 127, 31),
        (35, 3, 67, 2, 65, 600),
        (7, 301, 3, 127, 33, 17),
        (25, 9, 66, 33, 33, 66),
    ],
    # checkpoints, queries, training rows, width, k
    "top_k_dot": [
        (1, 1, 1, 1, 1),
        (2, 3, 31, 33, 3),
        (3, 33, 127, 31, 127),
        (1, 257, 700, 127, 5),
        (2, 5, 65, 1031, 65),
        (1, 40, 300, 513, 20),
        (1, 8, 70, 4099, 20),
        (1, 9, 70, 4099, 20),
    ],
    # width
    "quantize_rows": [(width,) for width in (1, 3, 7, 8, 15, 16, 17, 31, 33, 64, 127, 1000, 4097)],
}


class Batch(NamedTuple):
    """Inputs and output gradients of one layer, and the number of tokens of each example."""

    x: Tensor
    g: Tensor
    lengths: Tensor | None

    def to(self, device: torch.device) -> Batch:
        return Batch(*(None if part is None else part.to(device) for part in self))  # type: ignore[arg-type]

    def cast(self, dtype: torch.dtype) -> Batch:
        """Convert x and g to another float dtype; ids stay int64."""
        x = self.x.to(dtype) if self.x.is_floating_point() else self.x
        return Batch(x, self.g.to(dtype), self.lengths)

    def rows(self, rows: list[int]) -> Batch:
        lengths = None if self.lengths is None else self.lengths[rows]
        return Batch(self.x[rows], self.g[rows], lengths)


def make_batch(
    layer: str,
    batch: int,
    tokens: int,
    size_in: int,
    size_out: int,
    dtype: torch.dtype = torch.float32,
    *,
    ragged: bool = True,
    seed: int = 0,
) -> Batch:
    """Make random x and g.

    Ragged batches have lengths from 0 to S, both included, and NaN in the padding, so that a result
    is finite only if the padding is not read.
    """
    generator = torch.Generator().manual_seed(seed)
    if layer == "elementwise":
        size_out = size_in
    g = torch.randn(batch, tokens, size_out, generator=generator).to(dtype)
    if layer == "embedding":
        x = torch.randint(0, 7, (batch, tokens), generator=generator)
    else:
        x = torch.randn(batch, tokens, size_in, generator=generator).to(dtype)
    if not ragged:
        return Batch(x, g, None)
    lengths = torch.randint(0, tokens + 1, (batch,), generator=generator)
    lengths[-1:] = tokens
    lengths[:1] = 0 if batch > 1 else tokens
    for b, length in enumerate(lengths.tolist()):
        g[b, length:] = torch.nan
        if layer != "embedding":
            x[b, length:] = torch.nan
    return Batch(x, g, lengths)


def assert_close(actual: Tensor, truth: Tensor, plain: Tensor, extra: float = 0.0) -> None:
    """Check a result against the float64 reference.

    Args:
        actual: the result of the native op.
        truth: the reference in float64.
        plain: the reference in float32. Its own error, doubled, is the tolerance, plus 4 roundings
            of the largest number.
        extra: added to the tolerance, relative to the largest number.
    """
    truth, actual, plain = truth.cpu(), actual.cpu(), plain.cpu()
    assert actual.shape == truth.shape
    if not truth.numel():
        return
    error = (actual.double() - truth).abs().max().item()
    plain_error = (plain.double() - truth).abs().max().item()
    allowed = 2 * plain_error + (FLOOR + extra) * truth.abs().max().item()
    assert error <= allowed, (
        f"error {error:.3g}, of plain torch {plain_error:.3g}, allowed {allowed:.3g}"
    )
