"""Compare tracmod with other libraries on the same model, data and parameters.

    python bench/bench_peers.py environments   install the libraries, each into its environment
    python bench/bench_peers.py features --model trained untrained base
    python bench/bench_peers.py features --method NAME ...   measure some methods again
    python bench/bench_peers.py job            process start to the file of the 100 strongest

Every measurement has a process of its own, and the methods take turns, so that other work on the
machine disturbs all of them. Times are CPU time (user and system) and reported relative to two
floors of the same run. A library that is not installed is listed as absent, and one whose scores
are wrong as failed, without a time.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tracmod.bench.measure import agreement, environment, write_json
from tracmod.bench.peers.data import MODELS, prepare
from tracmod.bench.peers.methods import (
    METHODS,
    Method,
    interpreter,
    is_installed,
    make_environments,
    script_lines,
)
from tracmod.bench.report import section

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tracmod-peers"
SIZE = {"trained": 8, "untrained": 8, "base": 4}  # examples of a peer's batch
TIMEOUT = 900.0  # seconds after which a measurement is given up


def run_worker(
    part: str, method: str, options: dict[str, Any], folder: Path, cache: Path
) -> dict[str, Any]:
    """Run one measurement in a new process and return its result.

    The CPU time and load of the process are added; a process that fails gives `failed`.
    """
    package = METHODS[method].package if method in METHODS else "tracmod"
    command = [
        str(interpreter(package, cache)), "-m", "tracmod.bench.peers.worker", part,
        json.dumps({**options, "method": method}), str(folder),
    ]  # fmt: skip
    return run_process(command, folder)


def run_process(command: list[str], folder: Path) -> dict[str, Any]:
    """Run a command that may leave `result.json` in the folder; add its CPU and wall time."""
    threads = str(torch.get_num_threads())
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    variables = {
        **os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TQDM_DISABLE": "1",
        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    result_file = folder / "result.json"
    result_file.unlink(missing_ok=True)
    load, start = os.getloadavg()[0], time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        done = subprocess.run(
            command, env=variables, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {TIMEOUT:.0f} s"}
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"failed": lines[-1][-200:]}
    result = json.loads(result_file.read_text("utf-8")) if result_file.exists() else {}
    return {
        **result,
        "process_cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "process_wall_seconds": time.perf_counter() - start,
        "load_before": load,
    }


def model_options(data: Path, name: str) -> dict[str, Any]:
    """Return the options of a worker: examples, checkpoints and their weights."""
    checkpoints = sorted(data.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    records = [path / "tracmod.json" for path in checkpoints]
    rates = [
        json.loads(r.read_text("utf-8"))["learning_rate"] if r.exists() else 1 for r in records
    ]
    return {
        "examples": str((data / "examples.json").resolve()),
        "checkpoints": [str(path.resolve()) for path in checkpoints],
        "weights": rates,
        "exact": str((data / "exact.safetensors").resolve()),
        "size": SIZE[name],
    }


# --- features -------------------------------------------------------------------------------


def run_features(
    data: Path, name: str, methods: list[str], *, rounds: int, cache: Path
) -> dict[str, Any]:
    """Measure every method on the last checkpoint; return the best round of each.

    Args:
        data: folder of the model and its examples, from `prepare`.
        name: name of the model, of `MODELS`.
        methods: names from `METHODS`.
        rounds: number of rounds; the check is made in the first.
        cache: folder of the environments.
    """
    options = model_options(data, name)
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if not Path(options["exact"]).exists():
            done = run_worker("exact", "exact", options, folder, cache)
            if "failed" in done:
                raise SystemExit(f"exact scores: {done['failed']}")
        exact = load_file(options["exact"])
        for turn in range(rounds):
            for method in methods:
                row = rows.setdefault(method, describe(METHODS[method], cache))
                if "failed" in row or row.get("absent"):
                    continue
                measured = run_worker(
                    "measure", method, {**options, "check": turn == 0}, folder, cache
                )
                keep_best(row, measured)
                scores = folder / f"{method}.safetensors"
                if turn == 0 and "failed" not in row and scores.exists():
                    row["fidelity"] = fidelity(METHODS[method], load_file(scores), exact)
                    scores.unlink()
                print(f"{name} {method}: {progress(row)}", file=sys.stderr, flush=True)
        add_ratios(rows)
    example_count = len(exact["dot"]) + exact["dot"].shape[1]
    examples = json.loads(Path(options["examples"]).read_text("utf-8"))
    lengths = [len(e["input_ids"]) for part in examples.values() for e in part]
    return {
        "part": "peers", "environment": environment(torch.device("cpu")), "model": name,
        "train": exact["dot"].shape[1], "query": len(exact["dot"]), "rounds": rounds,
        "tokens_per_example": sum(lengths) / example_count, "methods": rows,
    }  # fmt: skip


def replace_rows(earlier: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """Return the earlier result with the rows of methods that were measured again.

    Times stay relative to the floors of the run that measured them, so the floors' rows stay too.
    """
    measured = {
        name: row | {"measured_again": True}
        for name, row in result["methods"].items()
        if METHODS[name].kind != "floor" or name not in earlier["methods"]
    }
    rows = earlier["methods"] | measured
    return {**earlier, "methods": {name: rows[name] for name in METHODS if name in rows}}


def describe(method: Method, cache: Path) -> dict[str, Any]:
    """Return the row of a method before it is measured."""
    row: dict[str, Any] = {"label": method.label, "package": method.package}
    if method.kind != "floor":
        row["script_lines"] = script_lines(method.script)
    if not is_installed(method.package, cache):
        row["absent"] = True
    return row


def keep_best(row: dict[str, Any], measured: dict[str, Any]) -> None:
    """Keep the round with the least CPU time in the row, and the CPU seconds of all rounds."""
    if "failed" in measured:
        row["failed"] = measured["failed"]
        return
    seconds = [*row.get("all_cpu_seconds", []), measured["cpu_seconds"]]
    if measured["cpu_seconds"] == min(seconds):
        row.update(measured)
    row["all_cpu_seconds"] = seconds


def progress(row: dict[str, Any]) -> str:
    return row.get("failed") or f"{row['cpu_seconds']:.1f} s"


def fidelity(
    method: Method, tensors: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Compare dot products and, for features, cosines with the exact ones."""
    suffix = "_encoder" if method.parameters == "encoder" else ""
    if method.kind == "exact":
        return {"dot": agreement(tensors["scores"].double(), exact[f"dot{suffix}"])}
    result = {}
    for kind in ("dot", "cosine"):
        query, train = tensors["query"].double(), tensors["train"].double()
        if kind == "cosine":
            query, train = (torch.nn.functional.normalize(part, dim=1) for part in (query, train))
        result[kind] = agreement(query @ train.T, exact[f"{kind}{suffix}"])
    return result


def add_ratios(rows: dict[str, dict[str, Any]]) -> None:
    """Add the times relative to the floors."""
    for name in ("floor", "lean"):
        floor = rows.get(name, {}).get("cpu_seconds")
        for row in rows.values():
            if floor and "cpu_seconds" in row and "failed" not in row:
                row[f"times_{name}"] = row["cpu_seconds"] / floor


# --- the whole job --------------------------------------------------------------------------


def run_job(data: Path, methods: list[str], cache: Path) -> dict[str, Any]:
    """Measure CPU time from process start to the file of rankings, over all checkpoints.

    Every library computes TracIn with dot products. `tracmod` with a name of `COMMANDS` is the
    command line, which also reads texts and splits them into tokens.
    """
    options = model_options(data, "trained")
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for method in methods:
            folder = Path(temporary) / method
            folder.mkdir()
            if method in COMMANDS:
                label, choices = COMMANDS[method]
                arguments = {"arguments": [*command_arguments(data), *choices]}
                row = {"label": label, "script_lines": 1}
                rows[method] = row | run_worker("command", method, arguments, folder, cache)
            else:
                row = describe(METHODS[method], cache)
                if not row.get("absent"):
                    row |= run_worker("job", method, options, folder, cache)
                rows[method] = row
            seconds = rows[method].get("process_cpu_seconds")
            print(f"job {method}: {seconds}", file=sys.stderr, flush=True)
    examples = json.loads(Path(options["examples"]).read_text("utf-8"))
    return {
        "part": "peers-job", "environment": environment(torch.device("cpu")),
        "train": len(examples["train"]), "query": len(examples["query"]),
        "checkpoints": len(options["checkpoints"]), "methods": rows,
    }  # fmt: skip


COMMANDS: dict[str, tuple[str, list[str]]] = {
    "command-4096": ("tracmod attribute", ["--projection-dim", "4096"]),
    "command-4096-bfloat16": (
        "tracmod attribute, bfloat16", ["--projection-dim", "4096", "--dtype", "bfloat16"]
    ),
    "command-exact": ("tracmod attribute --exact", ["--exact"]),
}  # fmt: skip


def command_arguments(data: Path) -> list[str]:
    """Return the arguments of the command of tracmod that does the whole job."""
    return [
        "attribute", "--checkpoints", str(data), "--train", str(data / "train.parquet"),
        "--query", str(data / "query.parquet"), "--normalize", "none",
    ]  # fmt: skip


# --- command line ---------------------------------------------------------------------------


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare tracmod with other libraries.")
    parser.add_argument("part", choices=("environments", "features", "job"))
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--method", nargs="+", choices=[*METHODS, *COMMANDS])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the environments")
    parser.add_argument("--run", type=Path, default=Path("runs/peers"))
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    suffix = "" if options.threads == 1 else f"-{options.threads}-threads"
    if options.part == "environments":
        make_environments(options.cache)
    elif options.part == "features":
        methods = [m for m in options.method or METHODS if m in METHODS]
        for name in options.model:
            data = prepare(options.run, name)
            result = run_features(data, name, methods, rounds=options.rounds, cache=options.cache)
            file = options.out / f"peers-{name}{suffix}.json"
            if options.method and file.exists():
                result = replace_rows(json.loads(file.read_text("utf-8")), result)
            write_json(file, result)
            print("\n".join(section(result)), flush=True)
    else:
        default = [*COMMANDS, *(m for m in METHODS if METHODS[m].kind != "floor")]
        data = prepare(options.run, "trained")
        result = run_job(data, options.method or default, options.cache)
        write_json(options.out / f"peers-job{suffix}.json", result)
        print("\n".join(section(result)), flush=True)


if __name__ == "__main__":
    main()
