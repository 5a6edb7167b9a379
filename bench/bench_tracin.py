"""Compare tracmod with naive TracIn and plain torch: collection, the whole job, and fidelity.

    python bench/bench_tracin.py collect --shape mini base   collection, with random weights
    python bench/bench_tracin.py train                       the small model of the next two parts
    python bench/bench_tracin.py job [--naive-train N]       5,000 x 500 examples, 3 checkpoints
    python bench/bench_tracin.py fidelity                    agreement with exact scores, per byte
    python bench/bench_tracin.py exact --device cuda         exact influence of many examples

Each part checks its results before it reports a time, and writes JSON into --out. `collect` and
`exact` write it after every measurement, time a wrong result as well, and then exit with code 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tracmod.bench.collect import BATCH_TOKENS, WrongResult, run_collect, run_exact
from tracmod.bench.fidelity import run_fidelity
from tracmod.bench.job import METHODS, run_job, run_method
from tracmod.bench.measure import write_json
from tracmod.bench.models import SHAPES, make_trained
from tracmod.bench.report import section


def collect(options: argparse.Namespace) -> None:
    device = torch.device(options.device)
    for shape in options.shape:
        count = options.examples or (64 if shape == "base" else 512)
        path = options.out / f"collect-{shape}-{options.device}.json"
        result = run_collect(
            shape, device, count, naive=options.naive, batch_tokens=options.batch_tokens,
            seconds=options.seconds, save=partial(write_json, path),
        )  # fmt: skip
        show(result, path)


def train(options: argparse.Namespace) -> None:
    make_trained(options.run)


def job(options: argparse.Namespace) -> None:
    result = run_job(
        options.run, options.device, options.method or list(METHODS), train=options.train,
        query=options.query,
        subsets={"naive": options.naive_train, "exact": options.exact_train},
    )  # fmt: skip
    show(result, options.out / f"job-{options.device}.json")


def fidelity(options: argparse.Namespace) -> None:
    result = run_fidelity(
        options.run, torch.device(options.device), options.train, options.query, options.seeds
    )
    show(result, options.out / "fidelity.json")


def exact(options: argparse.Namespace) -> None:
    path = options.out / f"exact-{options.device}.json"
    result = run_exact(
        options.shape[0], torch.device(options.device), options.train, options.query,
        bound=options.bound, save=partial(write_json, path),
    )  # fmt: skip
    show(result, path)


def method(options: argparse.Namespace) -> None:
    """Run one method of `job`; each has a process of its own."""
    run_method(options.name, json.loads(options.job), options.out)


def show(result: dict[str, Any], path: Path) -> None:
    write_json(path, result)
    print("\n".join(section(result)), flush=True)
    if result.get("wrong"):
        raise WrongResult("; ".join(result["wrong"]))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare tracmod with naive TracIn.")
    parts = parser.add_subparsers(required=True)

    def part(function: Any, trained: bool = True) -> argparse.ArgumentParser:
        command = parts.add_parser(function.__name__)
        command.set_defaults(function=function)
        command.add_argument("--device", default="cpu")
        command.add_argument("--out", type=Path, default=Path("bench/results"))
        if trained:
            command.add_argument("--run", type=Path, default=Path("runs/bench"))
        return command

    command = part(collect, trained=False)
    command.add_argument("--shape", nargs="+", choices=list(SHAPES), default=["mini", "base"])
    command.add_argument("--examples", type=int, help="default: mini 512, base 64")
    command.add_argument(
        "--naive", type=int, default=0, help="also time naive TracIn on this many examples"
    )
    command.add_argument("--seconds", type=float, default=60.0, help="time for all rounds")
    command.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS, help="largest batch")
    part(train)
    command = part(job)
    command.add_argument("--method", nargs="+", choices=list(METHODS))
    command.add_argument("--train", type=int, help="default: all, 5,000")
    command.add_argument("--query", type=int, help="default: all, 500")
    command.add_argument("--naive-train", type=int, help="examples for naive; extrapolate its time")
    command.add_argument("--exact-train", type=int, help="examples for exact; likewise")
    command = part(fidelity)
    command.add_argument("--train", type=int, default=600)
    command.add_argument("--query", type=int, default=60)
    command.add_argument("--seeds", type=int, default=3, help="number of seeds of the projection")
    command = part(exact, trained=False)
    command.add_argument("--shape", nargs=1, choices=list(SHAPES), default=["base"])
    command.add_argument("--train", type=int, default=10_000)
    command.add_argument("--query", type=int, default=2_500)
    command.add_argument("--bound", type=float, default=60.0, help="seconds; extrapolate beyond")
    command = parts.add_parser("method")
    command.set_defaults(function=method)
    command.add_argument("name")
    command.add_argument("job")
    command.add_argument("out", type=Path)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    try:
        options.function(options)
    except WrongResult as error:
        sys.exit(f"wrong result: {error}")


if __name__ == "__main__":
    main()
