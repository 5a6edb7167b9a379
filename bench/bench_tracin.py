"""Ours against naive TracIn and plain torch: collection, the whole job, fidelity.

    python bench/bench_tracin.py collect --shape mini base   random weights, against the floor
    python bench/bench_tracin.py train                       the small model of the two next parts
    python bench/bench_tracin.py job [--naive-train N]       5,000 x 500 examples, 3 checkpoints
    python bench/bench_tracin.py fidelity                    agreement with exact, per byte
    python bench/bench_tracin.py exact --device cuda         exact influence at size

Each part checks its results before it reports a time, and writes JSON into --out.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from tracmod.bench.collect import WrongResult, run_collect, run_exact
from tracmod.bench.fidelity import run_fidelity
from tracmod.bench.job import METHODS, run_job, run_method
from tracmod.bench.measure import write_json
from tracmod.bench.models import SHAPES, make_trained
from tracmod.bench.report import section


def collect(given: argparse.Namespace) -> None:
    for shape in given.shape:
        result = run_collect(
            shape, torch.device(given.device), given.examples or (64 if shape == "base" else 512),
            naive=given.naive, seconds=given.seconds,
        )  # fmt: skip
        show(result, given.out / f"collect-{shape}-{given.device}.json")


def train(given: argparse.Namespace) -> None:
    make_trained(given.run)


def job(given: argparse.Namespace) -> None:
    result = run_job(
        given.run, given.device, given.method or list(METHODS), train=given.train,
        query=given.query, 
        subsets={"naive": given.naive_train, "exact": given.exact_train},
    )  # fmt: skip
    show(result, given.out / f"job-{given.device}.json")


def fidelity(given: argparse.Namespace) -> None:
    result = run_fidelity(
        given.run, torch.device(given.device), given.train, given.query, given.seeds
    )
    show(result, given.out / "fidelity.json")


def exact(given: argparse.Namespace) -> None:
    result = run_exact(
        given.shape[0], torch.device(given.device), given.train, given.query, bound=given.bound
    )
    show(result, given.out / f"exact-{given.device}.json")


def method(given: argparse.Namespace) -> None:
    """One method of `job`, in a process of its own."""
    run_method(given.name, json.loads(given.asked), given.to)


def show(result: dict[str, Any], path: Path) -> None:
    write_json(path, result)
    print("\n".join(section(result)), flush=True)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ours against naive TracIn and plain torch.")
    parts = parser.add_subparsers(required=True)

    def part(function: Any, trained: bool = True) -> argparse.ArgumentParser:
        one = parts.add_parser(function.__name__)
        one.set_defaults(function=function)
        one.add_argument("--device", default="cpu")
        one.add_argument("--out", type=Path, default=Path("bench/results"))
        if trained:
            one.add_argument("--run", type=Path, default=Path("runs/bench"))
        return one

    one = part(collect, trained=False)
    one.add_argument("--shape", nargs="+", choices=list(SHAPES), default=["mini", "base"])
    one.add_argument("--examples", type=int, help="default: mini 512, base 64")
    one.add_argument("--naive", type=int, default=0, help="also naive TracIn on so many examples")
    one.add_argument("--seconds", type=float, default=60.0, help="for all rounds")
    part(train)
    one = part(job)
    one.add_argument("--method", nargs="+", choices=list(METHODS))
    one.add_argument("--train", type=int, help="default: all, 5,000")
    one.add_argument("--query", type=int, help="default: all, 500")
    one.add_argument("--naive-train", type=int, help="naive on so many; its time extrapolated")
    one.add_argument("--exact-train", type=int, help="the same of ours, exact")
    one = part(fidelity)
    one.add_argument("--train", type=int, default=600)
    one.add_argument("--query", type=int, default=60)
    one.add_argument("--seeds", type=int, default=3, help="of the projection")
    one = part(exact, trained=False)
    one.add_argument("--shape", nargs=1, choices=list(SHAPES), default=["base"])
    one.add_argument("--train", type=int, default=10_000)
    one.add_argument("--query", type=int, default=2_500)
    one.add_argument("--bound", type=float, default=60.0, help="seconds")
    one = parts.add_parser("method")
    one.set_defaults(function=method)
    one.add_argument("name")
    one.add_argument("asked")
    one.add_argument("to", type=Path)
    return parser.parse_args()


def main() -> None:
    given = parsed()
    try:
        given.function(given)
    except WrongResult as error:
        sys.exit(f"wrong result: {error}")


if __name__ == "__main__":
    main()
