"""Batches for the kernels' tests, and the rule by which a result is near enough to the truth."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LAYERS = ["linear", "elementwise", "embedding"]
DTYPES = [torch.float32, torch.bfloat16]
FLOOR = 4 * torch.finfo(torch.float32).eps


class Batch(NamedTuple):
    x: Tensor
    g: Tensor
    lengths: Tensor | None

    def to(self, device: torch.device) -> Batch:
        return Batch(*(None if part is None else part.to(device) for part in self))  # type: ignore[arg-type]

    def cast(self, dtype: torch.dtype) -> Batch:
        """x and g in another float dtype; ids stay."""
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
    """Random x and g; ragged: lengths from 0 to S, both ends among them, and NaN behind them."""
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


def assert_close(actual: Tensor, truth: Tensor, plain: Tensor) -> None:
    """Within twice plain float32 torch's own error, plus a floor of 4 roundings of the largest."""
    truth, actual, plain = truth.cpu(), actual.cpu(), plain.cpu()
    assert actual.shape == truth.shape
    if not truth.numel():
        return
    error = (actual.double() - truth).abs().max().item()
    own = (plain.double() - truth).abs().max().item()
    allowed = 2 * own + FLOOR * truth.abs().max().item()
    assert error <= allowed, f"error {error:.3g}, plain torch's {own:.3g}, allowed {allowed:.3g}"
