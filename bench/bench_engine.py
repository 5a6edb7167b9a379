"""The same collection by every engine: what Ray adds, and what a second worker saves.

    python bench/bench_engine.py [--run runs/engine] [--train N]

A small model is trained and pruned once; then its features are collected anew from nothing: in this
process, by one worker on Ray, by two, and by two processes; each worker with one thread. Every
engine's features are compared with the first's, bit by bit, before its time counts. Beginning the
cluster and the workers is in the time.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tracmod.bench.collect import require
from tracmod.bench.measure import environment, write_json
from tracmod.bench.models import TRAINED
from tracmod.config import parse_config
from tracmod.engine import Engine, open_engine
from tracmod.engine.local import LocalEngine
from tracmod.files.durable import file_sha256
from tracmod.study.pipeline import run_stages
from tracmod.study.run_folder import RunFolder
from tracmod.study.stage_table import STAGE_NAMES

ENGINES: dict[str, Callable[[], Engine]] = {
    "local": lambda: LocalEngine(),
    "ray, 1 worker": lambda: open_engine("ray", workers=1),
    "ray, 2 workers": lambda: open_engine("ray", workers=2),
    "local, 2 processes": lambda: LocalEngine(2),
}


def config_of(train: int) -> Any:
    tree = {
        **TRAINED,
        "task": {**TRAINED["task"], "train_per_language": train, "test_per_language": 50},
        "finetune": {**TRAINED["finetune"], "epochs": 2},
        "views": {"random": 0},
        "collect": {"shard_rows": 256},
    }
    return parse_config(tree, "bench")


def collected(run: Path) -> dict[str, str]:
    """The digest of every shard."""
    shards = sorted((run / "features").rglob("shard-*"))
    return {str(file.relative_to(run)): file_sha256(file) for file in shards}


def measure(run: Path, train: int) -> dict[str, Any]:
    """Seconds of every engine's collection, and the size of the work."""
    before = STAGE_NAMES[: STAGE_NAMES.index("collect")]
    folder = RunFolder(run, config_of(train))
    with folder.locked():
        run_stages(folder, before)
    seconds: dict[str, float] = {}
    expected: dict[str, str] = {}
    for name, make in ENGINES.items():
        shutil.rmtree(run / "features", ignore_errors=True)
        start = time.perf_counter()
        engine = make()
        try:
            with folder.locked():
                run_stages(RunFolder(run), ["collect"], again="collect", engine=engine)
        finally:
            engine.close()
        seconds[name] = time.perf_counter() - start
        found = collected(run)
        expected = expected or found
        require(found == expected, f"{name}: other features than {next(iter(ENGINES))}'s")
        print(f"{name:20} {seconds[name]:7.1f} s")
    one = seconds["ray, 1 worker"]
    return {
        "shards": len(expected),
        "seconds": seconds,
        "ray_adds": one / seconds["local"] - 1,
        "efficiency": {
            "ray, 2 workers": one / (2 * seconds["ray, 2 workers"]),
            "local, 2 processes": seconds["local"] / (2 * seconds["local, 2 processes"]),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = Path(__file__).resolve().parent
    parser.add_argument("--run", type=Path, default=here.parent / "runs" / "engine")
    parser.add_argument("--train", type=int, default=400, help="training examples per language")
    parser.add_argument("--out", type=Path, default=here / "results")
    given = parser.parse_args()
    torch.set_num_threads(1)
    result = {"part": "engine", "train": given.train, **measure(given.run, given.train)}
    write_json(
        given.out / "engine-cpu.json", {**result, "environment": environment(torch.device("cpu"))}
    )


if __name__ == "__main__":
    main()
