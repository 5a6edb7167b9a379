"""What the benchmarks share: clocks, the device's own measured limits, and the JSON they write."""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

import tracmod
from tracmod import kernels

GPU_ROUND_SECONDS = 0.01  # a round on a GPU repeats a short call for so long


class Limits(NamedTuple):
    """What the device itself does in this process: the bounds that shares are of."""

    bytes_per_second: float  # a large copy, read and written
    flops_per_second: float  # a large square matrix product in the dtype of the run


def clock(function: Callable[[], Any], device: torch.device, calls: int = 1) -> float:
    """Seconds per call, until the device has done it."""
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    _synchronize(device)
    return (time.perf_counter() - start) / calls


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(
    functions: Mapping[str, Callable[[], Any]],
    device: torch.device,
    *,
    seconds: float = 1.0,
    rounds: int = 12,
) -> dict[str, float]:
    """Each function's best round, in seconds per call.

    They take turns, so that other work on the machine hits all of them. Ends after `rounds`, or
    once `seconds` are used up, but not before two.
    """
    calls, best = {}, {}
    start = time.perf_counter()
    for name, function in functions.items():
        first = clock(function, device)
        if device.type == "cuda":
            first = clock(function, device)  # without what is loaded on first use
        calls[name] = max(1, min(200, int(GPU_ROUND_SECONDS / first))) if _gpu(device) else 1
        best[name] = first
    for done in range(1, rounds):
        if done >= 2 and time.perf_counter() - start > seconds:
            break
        for name, function in functions.items():
            best[name] = min(best[name], clock(function, device, calls[name]))
    return best


def _gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def measure_limits(device: torch.device, dtype: torch.dtype, *, quick: bool = False) -> Limits:
    """Copy bandwidth and the peak of the matrix product, each the best of several rounds.

    Args:
        device: CPU (with the threads that torch has) or GPU.
        dtype: of the matrix product.
        quick: small sizes, for tests: the figures then mean little.
    """
    megabytes, sizes = (2048, (8192, 16384)) if _gpu(device) else (256, (1024, 2048))
    if quick:
        megabytes, sizes = 8, (128, 256)
    source = torch.zeros(megabytes << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = take_turns({"copy": lambda: target.copy_(source)}, device)["copy"]
    products = []
    for size in sizes:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        product = torch.empty_like(a)
        best = take_turns({"product": lambda: torch.mm(a, b, out=product)}, device)  # noqa: B023
        products.append(2 * size**3 / best["product"])
    return Limits(2 * source.nbytes / copied, max(products))


def peak_memory() -> int:
    """Bytes of memory that this process has held at most.

    Linux starts `ru_maxrss` at what the parent held; VmHWM is the program's own.
    """
    status = Path("/proc/self/status")
    text = status.read_text(encoding="utf-8") if status.exists() else ""
    own = re.search(r"VmHWM:\s*(\d+) kB", text)
    kibibytes = own[1] if own else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * int(kibibytes)


def environment(device: torch.device) -> dict[str, Any]:
    """Device, versions, commit and threads: what a figure means nothing without."""
    return {
        "device": torch.cuda.get_device_name(device) if _gpu(device) else _processor(),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "tracmod": tracmod.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "build": kernels.build_info(),
    }


def _processor() -> str:
    try:
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[1].strip() if found else platform.machine()


def _commit() -> str:
    """The commit of the sources, `+` if they differ; TRACMOD_COMMIT where there is no git."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always"]
    try:
        done = subprocess.run(
            [*command, "--dirty=+", "--exclude=*"], capture_output=True, text=True, check=False
        )
    except OSError:
        done = None
    found = done.stdout.strip() if done is not None else ""
    return found or os.environ.get("TRACMOD_COMMIT", "unknown")


def write_json(path: Path | None, result: Mapping[str, Any]) -> None:
    """Write a part's result, if a file is asked for."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def agreement(scores_QN: torch.Tensor, exact_QN: torch.Tensor) -> dict[str, float]:
    """With exact scores: Spearman per query (mean and lowest), top-10 overlap, error."""
    ranks = [one.argsort(1).argsort(1).double() for one in (scores_QN, exact_QN)]
    a, b = (one - one.mean(1, keepdim=True) for one in ranks)
    spearman_Q = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    places = min(10, exact_QN.shape[1])
    top = [torch.zeros_like(one, dtype=torch.bool) for one in (scores_QN, exact_QN)]
    for hit, one in zip(top, (scores_QN, exact_QN), strict=True):
        hit.scatter_(1, one.topk(places).indices, True)
    return {
        "spearman": float(spearman_Q.mean()),
        "spearman_lowest": float(spearman_Q.min()),
        "top10": float((top[0] & top[1]).sum(1).double().mean() / places),
        "rmse": float((scores_QN - exact_QN).double().square().mean().sqrt()),
    }
