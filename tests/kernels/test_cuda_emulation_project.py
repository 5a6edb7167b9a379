"""The emulated CUDA kernels of project_gradients (see test_cuda_emulation.py).

Awkward sizes, many numbers of tokens per tile, several outputs, columns left out, and bitwise
reproducibility.
"""

from __future__ import annotations

import random

import pytest
import test_kernels_project as projections
import torch
from kernel_cases import DTYPES, Batch, make_batch
from test_cuda_emulation import built, emulated

from tracmod import kernels

pytestmark = pytest.mark.slow
__all__ = ["built", "emulated"]  # fixtures
CPU = torch.device("cpu")
# One example per tile, several examples per tile, and several tiles per example; widths that can
# and cannot be copied 16 bytes at a time; grids of one and of four blocks.
TOKENS = [1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 200, 300]
WIDTHS = [1, 8, 33, 64, 100, 129, 256]
GRIDS = [1, 7, 57, 64, 65, 100]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["rademacher", "sjlt", "sketch", "reduced"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_awkward_sizes(tokens: int, kind: str, dtype: torch.dtype) -> None:
    draw = random.Random(f"{tokens} {kind} {dtype}")
    for bias in (False, True):
        sizes = (draw.choice([1, 3, 5]), tokens, draw.choice(WIDTHS), draw.choice(WIDTHS))
        batch = make_batch("linear", *sizes, dtype, ragged=draw.random() < 0.8)
        k = (draw.choice(GRIDS), draw.choice(GRIDS))
        projections.check(batch, CPU, **projections.arguments("linear", kind, batch, bias, k))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["rademacher", "sjlt", "sketch", "reduced"])
def test_many_short_examples_in_a_tile(kind: str, dtype: torch.dtype) -> None:
    batch = make_batch("linear", 300, 3, 40, 17, dtype)
    projections.check(batch, CPU, **projections.arguments("linear", kind, batch, True, (7, 9)))


@pytest.mark.parametrize("kind", ["rademacher", "sjlt"])
def test_a_real_layer(kind: str) -> None:
    for dtype in DTYPES:
        batch = make_batch("linear", 2, 64, 768, 3072, dtype, ragged=False)
        projections.check(
            batch, CPU, **projections.arguments("linear", kind, batch, True, (64, 64))
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["rademacher", "sjlt", "reduced"])
def test_layers_that_read_the_same_x(kind: str, dtype: torch.dtype) -> None:
    for sizes in ([1], [31, 1], [127, 3, 64, 31]):
        projections.test_layers_that_read_the_same_x_in_one_call(kind, sizes, True, dtype, CPU)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["rademacher", "sjlt", "sketch", "reduced"])
def test_columns_left_out(kind: str, dtype: torch.dtype) -> None:
    projections.test_left_out_columns_count_as_zeros(kind, 127, 31, "any", True, dtype, CPU)
    projections.test_left_out_columns_count_as_zeros(kind, 96, 260, "heads", False, dtype, CPU)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["rademacher", "sketch", "reduced"])
@pytest.mark.parametrize("tokens", [5, 50, 200])
def test_bits_do_not_depend_on_neighbours_padding_or_repetition(
    tokens: int, kind: str, dtype: torch.dtype
) -> None:
    batch = make_batch("linear", 9, tokens, 100, 90, dtype)
    assert batch.lengths is not None
    kwargs = projections.arguments("linear", kind, batch, True, (70, 20))
    whole = projections.project(batch, **kwargs)
    assert whole.isfinite().all()  # although the padding is NaN
    assert torch.equal(projections.project(batch, **kwargs), whole)
    order = [4, 0, 8, 2, 1, 7, 3, 5, 6]
    assert torch.equal(projections.project(batch.rows(order), **kwargs), whole[order])
    assert torch.equal(projections.project(batch.rows([3]), **kwargs), whole[[3]])
    short = int(batch.lengths[:4].max())
    cut = Batch(
        batch.x[:4, :short].contiguous(), batch.g[:4, :short].contiguous(), batch.lengths[:4]
    )
    assert torch.equal(projections.project(cut, **kwargs), whole[:4])
    # The tiles of a single example are separate blocks; among many, it shares a tile or a block.
    many = [3] * 40
    assert torch.equal(projections.project(batch.rows(many), **kwargs), whole[many])


@pytest.mark.parametrize("kind", ["rademacher", "sketch", "reduced"])
@pytest.mark.parametrize("tokens", [0, 4, 150])
def test_invalid_lengths_give_nan(tokens: int, kind: str) -> None:
    x, g, _ = make_batch("linear", 3, tokens, 5, 5, ragged=False)
    out = torch.zeros(3, 4)
    lengths = torch.tensor([tokens, tokens + 1, -1])
    rows = 5 if kind == "reduced" else 0
    kernels.project_gradients(
        x, g, out, lengths=lengths, kind="sketch" if rows else kind, k_out=2, k_in=2, rows=rows,
        **projections.KEYS,
    )  # fmt: skip
    assert out[0].isfinite().all()
    assert out[1:].isnan().all()
