"""Compare the native ops with plain torch: check each result, then time both in the same run.

    python bench/bench_kernels.py [--device cuda] [--dtype bfloat16] [--cases short] [--json FILE]

Prints a line per case. The speed-up is over the fastest of several implementations in plain torch,
which get their projection matrices ready-made; the native op generates the entries each time. The
limit is what bounds the op on this device, measured in the same run: a large copy (bytes) or a
large matrix product in this dtype (operations). The share of the limit is the time that the limit
allows over the time of the op. Beside the measured times of a GPU stand the predicted ones
(predict.py). An incorrect result is marked as wrong, and the exit code is then 1. The JSON file is
written after every case.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from tracmod.bench.cases import Case, Spec, headline_specs, specs
from tracmod.bench.measure import Limits, environment, measure_limits, take_turns, write_json
from tracmod.bench.predict import predictions

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
    error, allowed = case.error(case.native), 2 * min(right.values()) + FLOOR + case.drift
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
    cost = case.cost
    bytes_moved = cost.input_bytes + cost.output_bytes
    bounds = {
        "bytes": bytes_moved / limits.bytes_per_second,
        "operations": cost.flops / limits.flops_per_second,
    }
    bound = max(bounds, key=lambda name: bounds[name])
    return {
        "native_seconds": native, "plain_seconds": timed[best], "plain_form": best,
        "times_plain": timed[best] / native, "gbytes_per_second": bytes_moved / native / 1e9,
        "tflops": cost.flops / native / 1e12, "bound_by": bound,
        "share_of_limit": bounds[bound] / native,
        "inputs_share_of_copy": cost.input_bytes / native / limits.bytes_per_second,
        **{f"{name}_share": timed[name] / native for name in case.beside},
    }  # fmt: skip


def measured(
    spec: Spec, limits: Limits | None, device: torch.device, dtype: torch.dtype, seconds: float
) -> dict[str, Any]:
    """Return the row of a case; an error becomes its row, so that other cases still run.

    A wrong result is timed as well: it may be wrong by little, and the time on a GPU is short.
    Without `limits` nothing is timed.
    """
    try:
        case = spec.case(device, dtype)
        row = check(case, dtype)
        return row if limits is None else row | speed(case, row, limits, device, seconds)
    except (RuntimeError, TypeError, ValueError) as error:
        first = str(error).splitlines()[0]
        return {"op": spec.op, "shape": str(spec.size), "right": False, "failed": first}


HEAD = (
    f"{'op':29} {'size':52} {'plain ms':>9} {'op ms':>9} {'predicted':>9} {'speedup':>7} "
    f"{'GB/s':>7} {'TFLOP/s':>7} {'of limit':>8}  {'error':>7}"
)


def line(row: dict[str, Any]) -> str:
    """Format a row for the terminal."""
    start = f"{row['op']:29} {row['shape']:52} "
    if "failed" in row:
        return f"{start}FAILED: {row['failed']}"
    error = f"{row['error']:7.1e}"
    if not row["right"]:
        error += f" WRONG: allowed {row['allowed']:.1e}"
    if "native_seconds" not in row:
        return f"{start}{'':71}{error}"
    predicted = "" if row["predicted"] is None else f"{row['predicted']['seconds'] * 1e3:.3f}"
    return (
        f"{start}{row['plain_seconds'] * 1e3:9.3f} {row['native_seconds'] * 1e3:9.3f} "
        f"{predicted:>9} {row['times_plain']:7.2f} {row['gbytes_per_second']:7.1f} "
        f"{row['tflops']:7.3f} {row['share_of_limit']:7.0%} {row['bound_by'][0]}  {error}"
    )


def run_bench(
    device_name: str,
    dtype_name: str,
    json_path: Path | None,
    *,
    selection: str = "all",
    op: str | None = None,
    seconds: float | None = 1.0,
    rows: int | None = None,
) -> bool:
    """Check and time cases; print a line for each, and write the results so far as JSON.

    Args:
        device_name, dtype_name: device and dtype of the inputs.
        json_path: file to write after every case; None writes none.
        selection: "all", "short" (some cases, less than a minute) or "headline" (those that the
            goals on a GPU are stated for).
        op: run only this op.
        seconds: time for the rounds of a case; None only checks.
        rows: largest number of examples, for tests.

    Returns:
        Whether every result was correct.
    """
    device, dtype = torch.device(device_name), getattr(torch, dtype_name)
    torch.manual_seed(0)
    limits = None if seconds is None else measure_limits(device, dtype, quick=rows is not None)
    machine = environment(device)
    print(
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, {dtype_name}"
    )
    if limits is not None:
        print(
            f"copy {limits.bytes_per_second / 1e9:.1f} GB/s (b), matrix product "
            f"{limits.flops_per_second / 1e12:.3f} TFLOP/s (o)"
        )
    print(HEAD, flush=True)
    if selection == "headline":
        chosen = headline_specs(dtype, rows=rows)
    else:
        chosen = specs(device.type == "cuda", dtype, short=selection == "short", rows=rows)
    predicted = predictions(dtype_name) if device.type == "cuda" else {}
    table: list[dict[str, Any]] = []
    with torch.no_grad():
        for spec in chosen:
            if op is not None and spec.op.split()[0] != op:
                continue
            row = measured(spec, limits, device, dtype, seconds or 0.0)
            row["predicted"] = predicted.get(f"{row['op']}, {row['shape']}")
            table.append(row)
            print(line(row), flush=True)
            write_json(
                json_path,
                {"part": "kernels", "environment": machine, "dtype": dtype_name,
                 "limits": None if limits is None else limits._asdict(), "cases": table},
            )  # fmt: skip
    return all(row["right"] for row in table)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare the native ops with plain torch.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument(
        "--cases", default="all", choices=["all", "short", "headline"], help="cases to run"
    )
    parser.add_argument("--op", help="run only this op")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for the rounds of a case")
    parser.add_argument("--check-only", action="store_true", help="measure no times")
    parser.add_argument("--rows", type=int, help="largest number of examples, for a trial run")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    right = run_bench(
        options.device, options.dtype, options.json, selection=options.cases, op=options.op,
        seconds=None if options.check_only else options.seconds, rows=options.rows,
    )  # fmt: skip
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
