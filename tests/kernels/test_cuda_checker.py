"""The emulated CUDA kernels make no race, no access outside of their tensors, no wrong barrier.

The checker (support/cuda_emulation/checker.cpp) watches every access to memory, at sizes with tails
in every dimension. Faults that are put into the sources must be reported: without that, a clean
report would prove nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import test_kernels_dot as dots
import test_kernels_project as projections
import test_kernels_quantize as quantized
import test_kernels_top_k as top_k
import torch
from cuda_emulation import native
from kernel_cases import DTYPES, make_batch

from tracmod import kernels

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
FLOAT, HALF = DTYPES


def project(
    layer: str, kind: str, sizes: tuple[int, ...], k: tuple[int, int], dtype: torch.dtype
) -> None:
    batch = make_batch(layer, *sizes, dtype)
    arguments = projections.arguments(layer, kind, batch, layer != "embedding", k)
    projections.check(batch, CPU, **arguments)


def top(sizes: tuple[int, ...], cosine: bool, dtype: torch.dtype) -> None:
    top_k.test_matches_the_reference(*sizes, "cosine" if cosine else None, dtype, CPU)


def top_without_groups(k: int, dtype: torch.dtype) -> None:
    q, n = (top_k.make_rows(1, rows, 33, rows, dtype) for rows in (3, 700))
    scores = q[0].float() @ n[0].float().T
    assert torch.allclose(kernels.top_k_dot(q, n, k=k).scores, scores.topk(k).values, atol=1e-4)


def dot(layer: str, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    dots.test_matches_the_reference(layer, layer != "embedding", sizes, dtype, CPU)


def quantize(rows: int, width: int, dtype: torch.dtype, offset: int = 0) -> None:
    values = torch.randn(rows * width + offset).to(dtype)
    quantized.check(values[offset:].view(rows, width), CPU)


# Sizes (batch, tokens, in, out): one tile with many examples, one example per tile, and examples of
# several tiles. The emulation's limits are small (native.CHANGES), so that each op takes several
# waves, parts or rows per block.
CASES: dict[str, list[Callable[[], None]]] = {
    "quantize_rows": [
        lambda: quantize(7, 300, FLOAT),
        lambda: quantize(7, 33, HALF),
        lambda: quantize(9, 4096, HALF),
        lambda: quantize(6, 64, FLOAT, offset=1),
    ],
    "top_k_dot": [
        lambda: top((2, 3, 31, 33, 3), True, HALF),
        lambda: top((2, 3, 31, 33, 3), False, FLOAT),
        lambda: top((1, 5, 300, 64, 7), True, FLOAT),
        lambda: top((3, 5, 129, 520, 127), True, HALF),
        lambda: top_without_groups(300, HALF),
    ],
    "gradient_dot": [
        lambda: dot("elementwise", (3, 33, 2, 31, 31, 31), FLOAT),
        lambda: dot("embedding", (3, 33, 2, 31, 31, 3), HALF),
        lambda: dot("linear", (2, 31, 3, 17, 127, 31), HALF),
        lambda: dot("linear", (3, 60, 2, 70, 140, 150), FLOAT),
        lambda: dot("linear", (2, 130, 2, 140, 64, 40), HALF),
    ],
    "project_gradients": [
        *[
            lambda layer=layer, dtype=dtype, kind=kind: project(  # type: ignore[misc]
                layer, kind, (3, 20, 40, 40), (7, 49), dtype
            )
            for dtype in DTYPES
            for layer, kind in (
                ("linear", "identity"), ("elementwise", "rademacher"),
                ("elementwise", "identity"), ("embedding", "rademacher"),
            )
        ],
        *[
            lambda sizes=sizes, dtype=dtype, kind=kind: project(  # type: ignore[misc]
                "linear", kind, sizes, (20, 65), dtype
            )
            for dtype in DTYPES
            for kind in ("rademacher", "sjlt")
            for sizes in ((3, 17, 33, 64), (9, 1, 40, 24), (2, 150, 264, 40))
        ],
        *[
            lambda sizes=sizes, dtype=dtype, kind=kind: project(  # type: ignore[misc]
                "linear", kind, sizes, (1, 79), dtype
            )
            for dtype in DTYPES
            for kind in ("sketch", "reduced")
            for sizes in ((3, 17, 33, 64), (9, 1, 40, 24), (2, 1, 20, 300), (2, 70, 70, 20))
        ],
        lambda: project("linear", "sketch", (2, 3, 20, 5), (1, 7), HALF),
        lambda: project("linear", "sketch", (3, 1, 20, 5), (1, 7), FLOAT),
    ],
}  # fmt: skip

# Name, file, text, replacement, and the first word of a report that must follow.
FAULTS = [
    (
        "a read of one pack behind the last row", "quantize_rows.cu",
        "i < packs; i += blockDim.x) {\n    const Pack<T, V> numbers = row[i];\n    for",
        "i < packs + FAULT; i += blockDim.x) {\n    const Pack<T, V> numbers = row[i];\n    for",
        "outside",
    ),
    (
        "a read of one value behind the last row", "top_k_dot.cu",
        "d < width; d += kWarp", "d < width + FAULT; d += kWarp", "outside",
    ),
    (
        "a read of one token behind the last example", "gradient_dot.cu",
        "s < lengths.of(b); ++s) {", "s < lengths.of(b) + FAULT; ++s) {", "outside",
    ),
    (
        "a read of one column behind the matrix", "tile.cuh",
        "if (column < width)", "if (column < width + FAULT)", "outside",
    ),
    (
        "a read of one row behind g", "formed_sketch.cuh",
        "if (row < lists.rows) {", "if (row < lists.rows + FAULT) {", "outside",
    ),
    (
        "a half-warp that adds to a bucket of the next one", "formed_sketch.cuh",
        "|| bucket >= limit) return;", "|| bucket >= limit + FAULT) return;", "race",
    ),
    (
        "sums that are not set to 0", "formed_sketch.cuh",
        "i < buckets; i += 16) sums[i] = 0.0f;", "i < buckets - FAULT; i += 16) sums[i] = 0.0f;",
        "uninitialized",
    ),
    (
        "a run that is listed for no owner", "formed_sketch.cuh",
        "if (pass == 1 && listed) {", "if (pass == 1 && listed && !(FAULT && lane == 3)) {",
        "uninitialized",
    ),
    (
        "a write of one row behind the result", "gradient_dot.cu",
        "if (row >= job.batch1 || column", "if (row >= job.batch1 + FAULT || column", "outside",
    ),
    (
        "vector loads of rows that are not aligned", "quantize_rows.cu",
        "reinterpret_cast<uintptr_t>(job.rows) % 16 == 0",
        "(FAULT || reinterpret_cast<uintptr_t>(job.rows) % 16 == 0)", "misaligned",
    ),
    (
        "a write to an input", "quantize_rows.cu",
        "if (threadIdx.x == 0) scales[n] = scaling.scale;",
        "if (threadIdx.x == 0) scales[n] = scaling.scale; "
        "if (FAULT) const_cast<Pack<T, V>*>(row)->at[0] = T{};", "read-only",
    ),
    (
        "a lane mask of half a warp", "quantize_rows.cu",
        "__shfl_xor_sync(0xffffffffu, value", "__shfl_xor_sync(FAULT ? 0xffffu : ~0u, value",
        "lanes",
    ),
    (
        "a lane that has returned is named in a mask", "top_k_dot.cu",
        "for (int lane = kWarp / 2; lane > 0; lane /= 2) {",
        "if (FAULT && threadIdx.x % kWarp == 5) return; "
        "for (int lane = kWarp / 2; lane > 0; lane /= 2) {", "lanes",
    ),
    (
        "two warps at different barriers", "gradient_dot.cu",
        "  values[threadIdx.x] = value;\n  for",
        "  values[threadIdx.x] = value; if (FAULT && threadIdx.x < 32) { __syncthreads(); } else\n "
        "  if (FAULT) { __syncthreads(); } for", "barrier",
    ),
    (
        "threads that return before a barrier", "gradient_dot.cu",
        "__shared__ double values[kThreads];",
        "__shared__ double values[kThreads]; if (FAULT && threadIdx.x > 200) return 0.0;",
        "barrier",
    ),
    (
        "static shared memory that is read before it is written", "top_k_dot.cu",
        "if (column < columns) groups[column] =", "if (column < columns - FAULT) groups[column] =",
        "uninitialized",
    ),
    (
        "scratch that is read before it is written", "gradient_dot.cu",
        "to = (job.overwrite ? 0.0 : to)", "to = (job.overwrite && !FAULT ? 0.0 : to)",
        "uninitialized",
    ),
    (
        "a copy that is not waited for", "product.cuh",
        "    wait_copies<kStages - 2>();",
        "    if (FAULT) wait_copies<kStages>(); else wait_copies<kStages - 2>();", "uninitialized",
    ),
    (
        "a copy whose addresses are not aligned", "product.cuh",
        "return bits % 16 == 0 ? 16", "return bits % (FAULT ? 4 : 16) == 0 ? 16", "misaligned",
    ),
    (
        "a block of more threads than its bound", "quantize_rows.cu",
        "std::min(kMaxThreads, kWarp * warps)",
        "std::min(kMaxThreads * (1 + FAULT), kWarp * warps)",
        "launch",
    ),
    (
        "shared memory that was not granted", "gradient_dot.cu",
        "check_call(kOp, cudaFuncSetAttribute(dot_shares,",
        "if (!FAULT) check_call(kOp, cudaFuncSetAttribute(dot_shares,", "launch",
    ),
]  # fmt: skip
BARRIERS = native.removed_barriers()


@pytest.fixture(scope="module", autouse=True)
def checked(tmp_path_factory: pytest.TempPathFactory) -> None:
    compiler = shutil.which("g++")
    if compiler is None or shutil.which("addr2line") is None:
        pytest.skip("no g++ or addr2line")
    seeded = [native.find_fault(*fault[1:4]) for fault in FAULTS]
    native.build(
        tmp_path_factory.mktemp("checked"),
        compiler,
        check=True,
        faults=[*seeded, *BARRIERS.values()],
    )


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_C", native)


def reports_of(file: str, number: int, wanted: str) -> list[str]:
    """Run the ops that a file may belong to until the fault is reported; return the reports."""
    cuda = native.CSRC / "cuda"
    included = f'#include "cuda/{file}"'
    ops = [
        op
        for op in CASES
        if op.startswith(Path(file).stem) or included in (cuda / f"{op}.cu").read_text()
    ] or list(CASES)
    reports: list[str] = []
    for case in [case for op in ops for case in CASES[op]]:
        native.start_check(number)
        with suppress(AssertionError):  # the result may be wrong as well
            case()
        reports = native.reports()
        if any(report.startswith(wanted) for report in reports):
            break
    return reports


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=f"{op}-{i}") for op in CASES for i, case in enumerate(CASES[op])]
)
def test_nothing_is_reported(case: Callable[[], None]) -> None:
    native.start_check()
    case()
    assert native.reports() == []


@pytest.mark.parametrize("number", range(len(FAULTS)), ids=[fault[0] for fault in FAULTS])
def test_a_fault_is_reported(number: int) -> None:
    _, file, _, _, kind = FAULTS[number]
    reports = reports_of(file, number + 1, kind)
    assert any(report.startswith(kind) for report in reports), reports


@pytest.mark.parametrize("barrier", BARRIERS)
def test_a_removed_barrier_is_reported(barrier: str) -> None:
    number = len(FAULTS) + 1 + list(BARRIERS).index(barrier)
    reports = reports_of(BARRIERS[barrier].file, number, "race")
    assert any(report.startswith("race") for report in reports), reports
