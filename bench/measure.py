"""Shared by the benchmarks: clocks, the measured limits of the device, and the JSON they write."""

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

GPU_ROUND_SECONDS = 0.01  # a short call on a GPU is repeated for this long in a round


class Limits(NamedTuple):
    """The rates that the device itself reaches in this process, which bound those of an op.

    Attributes:
        bytes_per_second: rate of a large copy, with bytes read and bytes written both counted.
        flops_per_second: rate of a large square matrix product in the dtype of the run.
    """

    bytes_per_second: float
    flops_per_second: float


def clock(function: Callable[[], Any], device: torch.device, calls: int = 1) -> float:
    """Return the seconds per call, including the work that a GPU does after a call returns."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done all its work; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(
    functions: Mapping[str, Callable[[], Any]],
    device: torch.device,
    *,
    seconds: float = 1.0,
    rounds: int = 12,
    after: Callable[[dict[str, float]], None] | None = None,
) -> dict[str, float]:
    """Time functions in turns; return the seconds per call of each one's best round.

    They take turns so that other work on the machine disturbs all of them. The best round is the
    least disturbed one.

    Args:
        functions: functions to time, by name.
        device: device that they run on.
        seconds: stop after this time, but not before two rounds.
        rounds: largest number of rounds.
        after: called with the times so far after every function of the first round, and after
            every later round, to keep them if the process is stopped.
    """
    calls: dict[str, int] = {}
    best: dict[str, float] = {}
    start = time.perf_counter()
    for name, function in functions.items():
        first, calls[name] = clock(function, device), 1
        if device.type == "cuda":
            first = clock(function, device)  # the first call also loaded kernels
            calls[name] = max(1, min(200, int(GPU_ROUND_SECONDS / first)))
        best[name] = first
        if after is not None:
            after(dict(best))
    for done in range(1, rounds):
        if done >= 2 and time.perf_counter() - start > seconds:
            break
        for name, function in functions.items():
            best[name] = min(best[name], clock(function, device, calls[name]))
        if after is not None:
            after(dict(best))
    return best


def measure_limits(device: torch.device, dtype: torch.dtype, *, quick: bool = False) -> Limits:
    """Measure the copy bandwidth and the peak of the matrix product, best of several rounds.

    Args:
        device: CPU (with torch's number of threads) or GPU.
        dtype: dtype of the matrix product.
        quick: use small sizes, for tests; the result then means little.
    """
    megabytes, sizes = (2048, (8192, 16384)) if device.type == "cuda" else (256, (1024, 2048))
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
    """Return the peak memory of this process in bytes.

    On Linux, a process inherits `ru_maxrss` from its parent; VmHWM is the program's own.
    """
    status = Path("/proc/self/status")
    text = status.read_text(encoding="utf-8") if status.exists() else ""
    own = re.search(r"VmHWM:\s*(\d+) kB", text)
    kibibytes = own[1] if own else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * int(kibibytes)


def environment(device: torch.device) -> dict[str, Any]:
    """Return device, threads, versions and commit, to be recorded with every result."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
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
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    model = re.search(r"model name\s*: (.+)", text)
    return model[1].strip() if model else platform.machine()


def _commit() -> str:
    """Return the commit of the sources, with `+` for local changes; TRACMOD_COMMIT without git."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always"]
    try:
        done = subprocess.run(
            [*command, "--dirty=+", "--exclude=*"], capture_output=True, text=True, check=False
        )
        commit = done.stdout.strip()
    except OSError:
        commit = ""
    return commit or os.environ.get("TRACMOD_COMMIT", "unknown")


def write_json(path: Path | None, result: Mapping[str, Any]) -> None:
    """Write a result as JSON; None writes nothing."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def agreement(scores_QN: torch.Tensor, exact_QN: torch.Tensor) -> dict[str, float]:
    """Compare scores with exact scores: Spearman correlation per query, top-10 overlap and RMSE.

    Ties are ranked in an arbitrary order; scores are real numbers that hardly ever tie.
    """
    both = (scores_QN, exact_QN)
    ranks = [scores.argsort(1).argsort(1).double() for scores in both]
    a, b = (rank - rank.mean(1, keepdim=True) for rank in ranks)
    spearman_Q = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    count = min(10, exact_QN.shape[1])
    top = [torch.zeros_like(scores, dtype=torch.bool) for scores in both]
    for in_top, scores in zip(top, both, strict=True):
        in_top.scatter_(1, scores.topk(count).indices, True)
    return {
        "spearman": float(spearman_Q.mean()),
        "spearman_lowest": float(spearman_Q.min()),
        "top10": float((top[0] & top[1]).sum(1).double().mean() / count),
        "rmse": float((scores_QN - exact_QN).double().square().mean().sqrt()),
    }
