"""The entries of projections: equal in C++ and torch, balanced, and uncorrelated."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import tracmod
from tracmod import kernels
from tracmod.kernels import reference


@pytest.mark.parametrize("kind", ["rademacher", "sjlt"])
@pytest.mark.parametrize(("k", "size"), [(1, 1), (3, 31), (64, 33), (65, 127), (200, 3)])
@pytest.mark.parametrize(("seed", "key"), [(0, 0), (7, 12345), (-1, 2**40), (2**63, 1)])
def test_the_reference_has_the_same_entries(
    kind: str, k: int, size: int, seed: int, key: int
) -> None:
    native = kernels.projection_matrix(kind, k, size, seed, key)  # type: ignore[arg-type]
    stated = reference.projection_matrix(kind, k, size, seed, key)
    assert torch.equal(native.sign(), stated.sign().float())
    torch.testing.assert_close(native.double(), stated, rtol=1e-7, atol=0)


def signs(k: int, size: int, seed: int = 0, key: int = 0) -> Tensor:
    return kernels.projection_matrix("rademacher", k, size, seed, key).sign().double()


def assert_uncorrelated(correlations: Tensor, samples: int) -> None:
    """Check for normal correlations with deviation 1/sqrt(samples), as of independent signs."""
    z = correlations.flatten() * math.sqrt(samples)
    bound = math.sqrt(2 * math.log(max(2, z.numel()))) + 3
    assert z.abs().max() < bound
    if z.numel() > 1000:
        assert abs(z.square().mean().item() - 1) < 0.1
        assert abs(z.mean().item()) < 6 / math.sqrt(z.numel())


def off_diagonal(matrix: Tensor) -> Tensor:
    return matrix[~torch.eye(len(matrix), dtype=torch.bool)]


def test_dense_signs_are_balanced_and_rows_and_columns_uncorrelated() -> None:
    matrix = signs(130, 2048)
    assert_uncorrelated(matrix.mean(), matrix.numel())
    assert_uncorrelated(matrix.mean(0), 130)
    assert_uncorrelated(matrix.mean(1), 2048)
    assert_uncorrelated(off_diagonal(matrix @ matrix.T / 2048), 2048)
    assert_uncorrelated(off_diagonal(matrix.T @ matrix / 130), 130)


def test_dense_signs_have_no_parity_structure() -> None:
    """Products of entries at corners of rectangles, or at fixed distances, are balanced, too."""
    matrix = signs(128, 2048)
    for rows in (1, 2, 7, 64):
        for columns in (1, 2, 16, 1024):
            a, b = matrix[:-rows, :-columns], matrix[rows:, columns:]
            c, d = matrix[rows:, :-columns], matrix[:-rows, columns:]
            assert_uncorrelated((a * b).mean(), a.numel())
            assert_uncorrelated((a * b * c * d).mean(), a.numel())


def test_seeds_and_keys_are_uncorrelated() -> None:
    numbers = [0, 1, 2, 3, 64, 2**32, -1]
    by_seed = torch.stack([signs(64, 256, seed=n).flatten() for n in numbers])
    by_key = torch.stack([signs(64, 256, key=n).flatten() for n in numbers if n != 0])
    both = torch.cat([by_seed, by_key])
    assert_uncorrelated(off_diagonal(both @ both.T / both.shape[1]), both.shape[1])


def test_a_larger_dense_projection_begins_with_a_smaller_one() -> None:
    assert torch.equal(signs(100, 50)[:40, :30], signs(40, 30))


def test_sparse_columns_are_balanced() -> None:
    k, size = 50, 50_000
    matrix = kernels.projection_matrix("sjlt", k, size, 3, 4).double()
    assert torch.equal(matrix.abs().sum(0), torch.ones(size).double())
    for lane in range(0, 16, 5):  # one column of each group: rows are independent
        expected = size / 16 / k
        chi_square = ((matrix[:, lane::16].abs().sum(1) - expected) ** 2 / expected).sum().item()
        assert abs(chi_square - (k - 1)) < 5 * math.sqrt(2 * (k - 1))
    assert_uncorrelated(matrix.sum() / size, size)
    signs = matrix.sum(0)
    assert_uncorrelated(
        off_diagonal(signs.view(-1, 16).T @ signs.view(-1, 16) / (size // 16)), size // 16
    )
    rows = matrix.abs().argmax(0)
    for distance in (16, 23, 160):
        same = (rows[distance:] == rows[:-distance]).double().mean().item()
        assert abs(same - 1 / k) < 5 * math.sqrt(16 / k / size)


@pytest.mark.parametrize("k", [1, 2, 15, 16, 17, 31, 50])
def test_sparse_columns_collide_no_more_often_than_independent_ones(k: int) -> None:
    seeds, size = 2000, 48
    rows = torch.stack(
        [
            kernels.projection_matrix("sjlt", k, size, seed, 4).abs().argmax(0)
            for seed in range(seeds)
        ]
    )
    collisions = (rows[:, :, None] == rows[:, None]).double().mean(0)
    far = torch.arange(size)[:, None] // 16 != torch.arange(size) // 16
    bound = 5 * math.sqrt((k - 1) / k**2 / seeds)
    assert ((collisions[far] - 1 / k).abs() <= bound).all()
    near = off_diagonal(collisions[:16, :16])
    assert (near == 0).all() if k >= 16 else ((near - 1 / k).abs() <= bound).all()


@pytest.mark.parametrize("k", [2, 16, 40])
def test_sparse_inner_products_vary_as_those_of_independent_columns(k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 96, generator=generator, dtype=torch.float64)
    exact = (x @ y).item()
    independent = ((x @ x) * (y @ y) + exact**2 - 2 * (x**2 @ y**2)).item() / k
    errors = torch.stack(
        [
            (matrix @ x) @ (matrix @ y) - exact
            for seed in range(3000)
            for matrix in [kernels.projection_matrix("sjlt", k, 96, seed, 1).double()]
        ]
    )
    assert abs(errors.mean().item()) < 4.5 * errors.std().item() / math.sqrt(3000)
    assert errors.square().mean().item() < 1.15 * independent


def test_every_instruction_set_gives_right_results() -> None:
    """Run every set that this processor has, in a process each: it is selected at import."""
    script = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_kernels_project import *
from test_kernels_dot import products
from test_kernels_dot import check as check_dot
from test_kernels_top_k import test_matches_the_reference as check_top_k
from test_kernels_quantize import WIDTHS, test_matches_the_reference as check_quantized
from test_kernels_quantize import (
    test_a_product_is_rounded_to_float32_before_it_is_rounded_to_a_code as check_rounding,
)
cpu = torch.device("cpu")
for dtype in DTYPES:
    for layer, kind, bias in KINDS:
        batch = make_batch(layer, 3, 33, 70, 40, dtype)
        check(batch, cpu, **arguments(layer, kind, batch, bias, (21, 85)))
    for kind in ("rademacher", "sjlt", "reduced"):
        test_layers_that_read_the_same_x_in_one_call(kind, [33, 7, 64], True, dtype, cpu)
    for kind in ("rademacher", "sjlt", "sketch", "reduced"):
        test_left_out_columns_count_as_zeros(kind, 96, 260, "heads", True, dtype, cpu)
    for tokens, size in ((3, 90), (70, 19)):
        batch = make_batch("linear", 5, tokens, size, size, dtype)
        check_dot(batch, batch, cpu, bias=True)
    for queries in (1, 8, 9):
        check_top_k(1, queries, 67, 2051, 9, "cosine", dtype, cpu)
    for width in WIDTHS:
        check_quantized(width, dtype, cpu)
check_rounding(cpu)
info = kernels.build_info()
assert info["dense_signs"] == ("tables" if "avx512" in info["instructions"] else "products")
print(info["instructions"])
"""
    ran = []
    for name in ("baseline", "avx2", "avx512", "avx512_bf16"):
        done = subprocess.run(
            [sys.executable, "-c", script, os.path.dirname(__file__)],
            env={
                **os.environ,
                "TRACMOD_INSTRUCTIONS": name,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(sys.path),
            },
            capture_output=True,
            text=True,
        )
        if "this processor to have it" in done.stderr:
            continue
        assert done.returncode == 0, done.stderr
        ran.append(done.stdout.strip())
    assert "baseline" in ran
    assert kernels.build_info()["instructions"] in (*ran, os.environ.get("TRACMOD_INSTRUCTIONS"))


def test_build_info_describes_the_build() -> None:
    info = kernels.build_info()
    assert set(info) == {
        "version", "compiler", "cuda", "cuda_architectures", "instructions", "dense_signs",
        "threads",
    }  # fmt: skip
    assert info["version"] == tracmod.__version__
    assert info["threads"] == torch.get_num_threads()
    assert (info["cuda"] is None) == (info["cuda_architectures"] is None)
