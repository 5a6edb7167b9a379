"""The projections' entries: equal in C++ and torch, fair, and unrelated to each other."""

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


def assert_unrelated(correlations: Tensor, samples: int) -> None:
    """Correlations of independent signs are normal with deviation 1/sqrt(samples)."""
    z = correlations.flatten() * math.sqrt(samples)
    bound = math.sqrt(2 * math.log(max(2, z.numel()))) + 3
    assert z.abs().max() < bound
    if z.numel() > 1000:
        assert abs(z.square().mean().item() - 1) < 0.1
        assert abs(z.mean().item()) < 6 / math.sqrt(z.numel())


def off_diagonal(matrix: Tensor) -> Tensor:
    return matrix[~torch.eye(len(matrix), dtype=torch.bool)]


def test_dense_signs_are_fair_and_rows_and_columns_unrelated() -> None:
    matrix = signs(130, 2048)
    assert_unrelated(matrix.mean(), matrix.numel())
    assert_unrelated(matrix.mean(0), 130)
    assert_unrelated(matrix.mean(1), 2048)
    assert_unrelated(off_diagonal(matrix @ matrix.T / 2048), 2048)
    assert_unrelated(off_diagonal(matrix.T @ matrix / 130), 130)


def test_dense_signs_have_no_parity_structure() -> None:
    """Products of entries at the corners of rectangles, and at fixed distances, are fair too."""
    matrix = signs(128, 2048)
    for rows in (1, 2, 7, 64):
        for columns in (1, 2, 16, 1024):
            a, b = matrix[:-rows, :-columns], matrix[rows:, columns:]
            c, d = matrix[rows:, :-columns], matrix[:-rows, columns:]
            assert_unrelated((a * b).mean(), a.numel())
            assert_unrelated((a * b * c * d).mean(), a.numel())


def test_seeds_and_keys_are_unrelated() -> None:
    numbers = [0, 1, 2, 3, 64, 2**32, -1]
    by_seed = torch.stack([signs(64, 256, seed=n).flatten() for n in numbers])
    by_key = torch.stack([signs(64, 256, key=n).flatten() for n in numbers if n != 0])
    both = torch.cat([by_seed, by_key])
    assert_unrelated(off_diagonal(both @ both.T / both.shape[1]), both.shape[1])


def test_a_larger_dense_projection_begins_with_a_smaller_one() -> None:
    assert torch.equal(signs(100, 50)[:40, :30], signs(40, 30))


def test_sparse_columns_are_fair() -> None:
    k, size = 50, 50_000
    matrix = kernels.projection_matrix("sjlt", k, size, 3, 4).double()
    assert torch.equal(matrix.abs().sum(0), torch.ones(size).double())
    expected = size / k
    chi_square = ((matrix.abs().sum(1) - expected) ** 2 / expected).sum().item()
    assert abs(chi_square - (k - 1)) < 5 * math.sqrt(2 * (k - 1))
    assert_unrelated(matrix.sum() / size, size)
    rows = matrix.abs().argmax(0)
    same = (rows[1:] == rows[:-1]).double().mean().item()
    assert abs(same - 1 / k) < 5 * math.sqrt(1 / k / size)


def test_every_instruction_set_gives_right_results() -> None:
    """What this processor has, each in a process of its own: it is chosen once."""
    script = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_kernels_project import *
from test_kernels_dot import products
from test_kernels_dot import check as check_dot
cpu = torch.device("cpu")
for dtype in DTYPES:
    for layer, kind, bias in KINDS:
        batch = make_batch(layer, 3, 33, 70, 40, dtype)
        check(batch, cpu, **arguments(layer, kind, batch, bias, (21, 85)))
    for tokens, size in ((3, 90), (70, 19)):
        batch = make_batch("linear", 5, tokens, size, size, dtype)
        check_dot(batch, batch, cpu, bias=True)
print(kernels.build_info()["instructions"])
"""
    ran = []
    for name in ("baseline", "avx2", "avx512", "avx512_bf16"):
        done = subprocess.run(
            [sys.executable, "-c", script, os.path.dirname(__file__)],
            env={**os.environ, "TRACMOD_INSTRUCTIONS": name, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if "this processor to have it" in done.stderr:
            continue
        assert done.returncode == 0, done.stderr
        ran.append(done.stdout.strip())
    assert "baseline" in ran
    assert kernels.build_info()["instructions"] in (*ran, os.environ.get("TRACMOD_INSTRUCTIONS"))


def test_build_info_says_what_was_built() -> None:
    info = kernels.build_info()
    assert set(info) == {
        "version", "compiler", "cuda", "cuda_architectures", "instructions", "threads",
    }  # fmt: skip
    assert info["version"] == tracmod.__version__
    assert info["threads"] == torch.get_num_threads()
    assert (info["cuda"] is None) == (info["cuda_architectures"] is None)
