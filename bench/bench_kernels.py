"""The native ops against plain torch: each result checked, then both timed in the same run.

    python bench/bench_kernels.py [--device cuda] [--dtype bfloat16] [--json FILE]

Prints a line per case; `times plain` above 1: faster than torch.
Plain torch is given its projection matrices ready-made; the native op makes its entries each time.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tracmod import kernels

KINDS: tuple[kernels.Kind, ...] = ("rademacher", "sjlt")


class Case(NamedTuple):
    """One op at one size: both functions return their result."""

    op: str
    shape: str
    native: Callable[[], Tensor]
    plain: Callable[[], Tensor]


def project_cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """(B, S, I, O, k): layers of the mini and of the base model, and a classification head."""
    sizes = [(64, 24, 256, 256, 64), (64, 24, 256, 1024, 64), (32, 64, 768, 768, 64),
             (32, 64, 768, 3072, 64), (64, 1, 768, 768, 64)]  # fmt: skip
    for batch, tokens, size_in, size_out, k in sizes:
        x = torch.randn(batch, tokens, size_in, device=device).to(dtype)
        g = torch.randn(batch, tokens, size_out, device=device).to(dtype)
        for kind in KINDS:
            r_in = kernels.projection_matrix(kind, k, size_in, 0, 0).to(device, dtype)
            r_out = kernels.projection_matrix(kind, k, size_out, 0, 1).to(device, dtype)

            def native(
                x: Tensor = x, g: Tensor = g, kind: kernels.Kind = kind, k: int = k
            ) -> Tensor:
                out = torch.zeros(len(x), k * k, device=device)
                kernels.project_gradients(
                    x, g, out, kind=kind, k_out=k, k_in=k, seed=0, input_key=0, output_key=1
                )
                return out

            def plain(
                x: Tensor = x, g: Tensor = g, r_in: Tensor = r_in, r_out: Tensor = r_out
            ) -> Tensor:
                out = torch.zeros(len(x), len(r_in) * len(r_out), device=device)
                return out.add_(torch.bmm((g @ r_out.T).mT, x @ r_in.T).flatten(1))

            yield Case(
                f"project_gradients {kind}",
                str((batch, tokens, size_in, size_out, k)),
                native,
                plain,
            )


def dot_cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """(B1, B2, S, I, O); plain torch takes the better of its two forms."""
    sizes = [(32, 32, 24, 256, 256), (32, 32, 24, 256, 1024), (16, 16, 64, 768, 768)]
    for batch1, batch2, tokens, size_in, size_out in sizes:
        x1, g1, x2, g2 = (
            torch.randn(batch, tokens, size, device=device).to(dtype)
            for batch in (batch1, batch2)
            for size in (size_in, size_out)
        )
        batches = (x1, g1, x2, g2)

        def native(batches: tuple[Tensor, ...] = batches) -> Tensor:
            out = torch.zeros(len(batches[0]), len(batches[2]), device=device)
            x1, g1, x2, g2 = batches
            kernels.gradient_dot(x1, g1, x2, g2, out)
            return out

        def formed(batches: tuple[Tensor, ...] = batches) -> Tensor:
            x1, g1, x2, g2 = batches
            return torch.bmm(g1.mT, x1).flatten(1) @ torch.bmm(g2.mT, x2).flatten(1).T

        def pairs(batches: tuple[Tensor, ...] = batches) -> Tensor:
            x1, g1, x2, g2 = (part.flatten(0, 1) for part in batches)
            products = (g1 @ g2.T).float() * (x1 @ x2.T).float()
            tokens = batches[0].shape[1]
            return products.view(len(batches[0]), tokens, len(batches[2]), tokens).sum((1, 3))

        shape = str((batch1, batch2, tokens, size_in, size_out))
        formed_seconds, pairs_seconds = seconds((formed, pairs), device)
        plain = formed if formed_seconds < pairs_seconds else pairs
        yield Case("gradient_dot", shape, native, plain)


def top_k_cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """(Q, N, K, C), the 100 best of both signs and the sums of 5 groups."""
    for queries, trains, width, checkpoints in [(100, 4000, 1024, 3), (250, 2000, 4096, 1)]:
        q = [torch.randn(queries, width, device=device).to(dtype) for _ in range(checkpoints)]
        n = [torch.randn(trains, width, device=device).to(dtype) for _ in range(checkpoints)]
        groups = torch.arange(trains, device=device) % 5

        def native(q: list[Tensor] = q, n: list[Tensor] = n, groups: Tensor = groups) -> Tensor:
            return kernels.top_k_dot(q, n, k=100, groups=groups, num_groups=5).scores

        def plain(q: list[Tensor] = q, n: list[Tensor] = n, groups: Tensor = groups) -> Tensor:
            scores = sum(a.float() @ b.float().T for a, b in zip(q, n, strict=True))
            assert isinstance(scores, Tensor)
            scores.topk(100, largest=False)
            torch.zeros(len(scores), 5, device=device).index_add_(1, groups, scores)
            return scores.topk(100).values

        yield Case("top_k_dot", str((queries, trains, width, checkpoints)), native, plain)


def seconds(functions: Sequence[Callable[[], Any]], device: torch.device) -> list[float]:
    """Each function's best run; they take turns, so that other work on the machine hits all."""

    def run(function: Callable[[], Any]) -> float:
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    rounds = [[run(function) for function in functions] for _ in range(12)]
    return [min(times) for times in zip(*rounds[1:], strict=True)]


def check(case: Case, dtype: torch.dtype) -> float:
    """The largest difference over the largest number; raises where it is not rounding."""
    native, plain = case.native().double(), case.plain().double()
    error = ((native - plain).abs().max() / plain.abs().max()).item()
    allowed = 1e-5 if dtype is torch.float32 else 3e-2  # plain torch rounds P and Q to bfloat16
    if not error <= allowed:
        raise RuntimeError(f"{case.op} {case.shape}: differs from plain torch by {error:.2g}")
    return error


def measure(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    error = check(case, dtype)
    plain, native = seconds((case.plain, case.native), device)
    print(
        f"{case.op:30} {case.shape:28} plain {plain * 1e3:9.3f} ms  native {native * 1e3:9.3f} ms"
        f"  times plain {plain / native:6.2f}  error {error:.1e}",
        flush=True,
    )
    return {
        "op": case.op, "shape": case.shape, "plain_seconds": plain, "native_seconds": native,
        "times_plain": plain / native, "error": error,
    }  # fmt: skip


def run_bench(device_name: str, dtype_name: str, json_path: Path | None) -> None:
    """Check and time every case; print a line each and, if asked, write all of it as JSON."""
    device, dtype = torch.device(device_name), getattr(torch, dtype_name)
    on_gpu = device.type == "cuda"
    torch.manual_seed(0)
    rows = [
        measure(case, device, dtype)
        for cases in (project_cases, dot_cases, top_k_cases)
        for case in cases(device, dtype)
    ]
    result = {
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.machine(),
        "dtype": dtype_name,
        "torch": torch.__version__,
        "build": kernels.build_info(),
        "cases": rows,
    }
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="The native ops against plain torch.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    run_bench(arguments.device, arguments.dtype, arguments.json)


if __name__ == "__main__":
    main()
