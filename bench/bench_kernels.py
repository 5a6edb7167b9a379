"""The native ops against plain torch: each result checked, then both timed in the same run.

    python bench/bench_kernels.py [--device cuda] [--dtype bfloat16] [--short] [--json FILE]

A line per case. `times plain` above 1: faster than the fastest of plain torch's forms, which are
given their projection matrices ready-made; the native op makes its entries each time. `limit` is
what bounds the op on this device, measured in the same run: a large copy (bytes) or a large matrix
product in this dtype (operations); the share is the time that the limit allows over the op's.
A wrong result is reported as such, without its time, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from tracmod.bench.cases import Case, cases
from tracmod.bench.measure import Limits, environment, measure_limits, take_turns, write_json

# Of the largest number: what rounding alone may amount to. Plain torch rounds what lies between two
# matrix products to the inputs' dtype; the native op may err at most twice as much as it does.
FLOOR = 1e-5
PLAIN_ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def check(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """Errors against float64: plain torch's forms that are right, and whether the op is."""
    errors = {name: case.error(function) for name, function in case.plain.items()}
    right = {name: error for name, error in errors.items() if error <= PLAIN_ALLOWED[dtype]}
    if not right:
        raise RuntimeError(f"{case.op} {case.shape}: plain torch itself is off: {errors}")
    error, allowed = case.error(case.native), 2 * min(right.values()) + FLOOR
    return {
        "op": case.op, "shape": case.shape, "error": error, "allowed": allowed,
        "plain_errors": right, "right": error <= allowed,
    }  # fmt: skip


def speed(
    case: Case, row: dict[str, Any], limits: Limits, device: torch.device, seconds: float
) -> dict[str, Any]:
    """Times in turns, and what follows from them."""
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
    """A row of the table; a case that fails must not cost the others theirs."""
    try:
        row = check(case, dtype)
        return row | speed(case, row, limits, device, seconds) if row["right"] else row
    except (RuntimeError, TypeError, ValueError) as error:
        first = str(error).splitlines()[0]
        return {"op": case.op, "shape": case.shape, "right": False, "failed": first}


HEAD = (
    f"{'op':28} {'size':46} {'plain ms':>9} {'ours ms':>9} {'x plain':>7} "
    f"{'GB/s':>7} {'TFLOP/s':>7} {'of limit':>8}  {'error':>7}"
)


def line(row: dict[str, Any]) -> str:
    """A row of the table on the terminal."""
    start = f"{row['op']:28} {row['shape']:46} "
    if "failed" in row:
        return f"{start}FAILED: {row['failed']}"
    if not row["right"]:
        return f"{start}WRONG: off by {row['error']:.1e}, allowed {row['allowed']:.1e}; not timed"
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
    """Check and time every case; print a line each and, if asked, write all of it as JSON.

    Args:
        device_name, dtype_name: of the inputs.
        json_path: file to write.
        short: some cases alone, under a minute in all.
        seconds: for the rounds of a case.
        rows: at most so many examples, for tests.

    Returns:
        Whether every result was right.
    """
    device, dtype = torch.device(device_name), getattr(torch, dtype_name)
    torch.manual_seed(0)
    limits = measure_limits(device, dtype, quick=rows is not None)
    made = environment(device)
    print(
        f"{made['device']}, {made['threads']} threads, torch {made['torch']}, {dtype_name}: copy "
        f"{limits.bytes_per_second / 1e9:.1f} GB/s (b), matrix product "
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
        {"part": "kernels", "environment": made, "dtype": dtype_name,
         "limits": limits._asdict(), "cases": table},
    )  # fmt: skip
    return all(row["right"] for row in table)


def main() -> None:
    parser = argparse.ArgumentParser(description="The native ops against plain torch.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--short", action="store_true", help="some cases alone")
    parser.add_argument("--seconds", type=float, default=1.0, help="for the rounds of a case")
    parser.add_argument("--rows", type=int, help="at most so many examples, to try it out")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    given = parser.parse_args()
    right = run_bench(
        given.device, given.dtype, given.json, short=given.short, seconds=given.seconds,
        rows=given.rows,
    )  # fmt: skip
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
