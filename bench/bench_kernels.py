"""Compare the native ops with plain torch: check each result, then time both in the same run.

    python bench/bench_kernels.py [--device cuda] [--dtype bfloat16] [--short] [--json FILE]

Prints a line per case. The speed-up is over the fastest of several implementations in plain torch,
which get their projection matrices ready-made; the native op generates the entries each time. The
limit is what bounds the op on this device, measured in the same run: a large copy (bytes) or a
large matrix product in this dtype (operations). The share of the limit is the time that the limit
allows over the time of the op. An incorrect result is reported without a time, and the exit code is
then 1.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from tracmod.bench.cases import Case, cases
from tracmod.bench.measure import Limits, environment, measure_limits, take_turns, write_json

# Allowed errors, relative to the largest number of the result. Plain torch rounds intermediate
# results to the inputs' dtype, hence PLAIN_ALLOWED. The native op may be off by twice the error of
# plain torch, plus FLOOR for rounding of its own.
FLOOR = 1e-5
PLAIN_ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def check(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """Compare the op and the implementations in plain torch with float64.

    Implementations in plain torch that are off by more than rounding are left out of the timing.

    Raises:
        RuntimeError: every implementation in plain torch is off, and there is no other reference.
    """
    errors = {name: case.error(function) for name, function in case.plain.items()}
    right = {name: error for name, error in errors.items() if error <= PLAIN_ALLOWED[dtype]}
    if not right:
        raise RuntimeError(f"{case.op} {case.shape}: plain torch itself is incorrect: {errors}")
    error, allowed = case.error(case.native), 2 * min(right.values()) + FLOOR
    return {
        "op": case.op, "shape": case.shape, "error": error, "allowed": allowed,
        "plain_errors": right, "right": error <= allowed,
    }  # fmt: skip


def speed(
    case: Case, row: dict[str, Any], limits: Limits, device: torch.device, seconds: float
) -> dict[str, Any]:
    """Time the op and plain torch in turns; return times, rates and shares of the limit."""
    plain = {name: case.plain[name] for name in row["plain_errors"]}
    timed = take_turns({"native": case.native, **plain, **case.beside}, device, seconds=seconds)
    native, best = timed["native"], min(plain, key=lambda name: timed[name])
    bytes_moved = case.input_bytes + case.output_bytes
    bounds = {
        "bytes": bytes_moved / limits.bytes_per_second,
        "operations": case.flops / limits.flops_per_second,
    }
    bound = max(bounds, key=lambda name: bounds[name])
    return {
        "native_seconds": native, "plain_seconds": timed[best], "plain_form": best,
        "times_plain": timed[best] / native, "gbytes_per_second": bytes_moved / native / 1e9,
        "tflops": case.flops / native / 1e12, "bound_by": bound,
        "share_of_limit": bounds[bound] / native,
        "inputs_share_of_copy": case.input_bytes / native / limits.bytes_per_second,
        **{f"{name}_share": timed[name] / native for name in case.beside},
    }  # fmt: skip


def measured(
    case: Case, limits: Limits, device: torch.device, dtype: torch.dtype, seconds: float
) -> dict[str, Any]:
    """Return the row of a case; an error becomes its row, so that other cases still run."""
    try:
        row = check(case, dtype)
        return row | speed(case, row, limits, device, seconds) if row["right"] else row
    except (RuntimeError, TypeError, ValueError) as error:
        first = str(error).splitlines()[0]
        return {"op": case.op, "shape": case.shape, "right": False, "failed": first}


HEAD = (
    f"{'op':28} {'size':46} {'plain ms':>9} {'op ms':>9} {'speedup':>7} "
    f"{'GB/s':>7} {'TFLOP/s':>7} {'of limit':>8}  {'error':>7}"
)


def line(row: dict[str, Any]) -> str:
    """Format a row for the terminal."""
    start = f"{row['op']:28} {row['shape']:46} "
    if "failed" in row:
        return f"{start}FAILED: {row['failed']}"
    if not row["right"]:
        error, allowed = row["error"], row["allowed"]
        return f"{start}WRONG: off by {error:.1e}, allowed {allowed:.1e}; not timed"
    return (
        f"{start}{row['plain_seconds'] * 1e3:9.3f} {row['native_seconds'] * 1e3:9.3f} "
        f"{row['times_plain']:7.2f} {row['gbytes_per_second']:7.1f} {row['tflops']:7.3f} "
        f"{row['share_of_limit']:7.0%} {row['bound_by'][0]}  {row['error']:7.1e}"
    )


def run_bench(
    device_name: str,
    dtype_name: str,
    json_path: Path | None,
    *,
    short: bool = False,
    seconds: float = 1.0,
    rows: int | None = None,
) -> bool:
    """Check and time every case, print a line for each, and write all results as JSON.

    Args:
        device_name, dtype_name: device and dtype of the inputs.
        json_path: file to write; None writes none.
        short: run only some cases, in less than a minute.
        seconds: time for the rounds of a case.
        rows: largest number of examples, for tests.

    Returns:
        Whether every result was correct.
    """
    device, dtype = torch.device(device_name), getattr(torch, dtype_name)
    torch.manual_seed(0)
    limits = measure_limits(device, dtype, quick=rows is not None)
    machine = environment(device)
    print(
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"{dtype_name}: copy {limits.bytes_per_second / 1e9:.1f} GB/s (b), matrix product "
        f"{limits.flops_per_second / 1e12:.3f} TFLOP/s (o)\n{HEAD}",
        flush=True,
    )
    table = []
    with torch.no_grad():
        for case in cases(device, dtype, short=short, rows=rows):
            table.append(measured(case, limits, device, dtype, seconds))
            print(line(table[-1]), flush=True)
    write_json(
        json_path,
        {"part": "kernels", "environment": machine, "dtype": dtype_name,
         "limits": limits._asdict(), "cases": table},
    )  # fmt: skip
    return all(row["right"] for row in table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the native ops with plain torch.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--short", action="store_true", help="run only some cases")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for the rounds of a case")
    parser.add_argument("--rows", type=int, help="largest number of examples, for a trial run")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args()
    right = run_bench(
        options.device, options.dtype, options.json, short=options.short, seconds=options.seconds,
        rows=options.rows,
    )  # fmt: skip
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
