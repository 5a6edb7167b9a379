"""Time the same collection by every engine: the overhead of Ray, and the gain of a second worker.

    python bench/bench_engine.py [--run runs/engine] [--train N]

A small model is trained and pruned once. Then each engine collects its features, starting from an
empty folder: this process, one worker on Ray, two workers on Ray, and two local processes, with one
thread per worker. The time includes starting the cluster and the workers. It counts only if the
features are identical to those of the first engine bit for bit.
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


def study_config(train: int) -> Any:
    """Build the config of the run, with `train` training examples per language."""
    tree = {
        **TRAINED,
        "task": {**TRAINED["task"], "train_per_language": train, "test_per_language": 50},
        "finetune": {**TRAINED["finetune"], "epochs": 2},
        "views": {"random": 0},
        "collect": {"shard_rows": 256},
    }
    return parse_config(tree, "bench")


def shard_digests(run: Path) -> dict[str, str]:
    """Return the digest of every feature shard of a run."""
    shards = sorted((run / "features").rglob("shard-*"))
    return {str(file.relative_to(run)): file_sha256(file) for file in shards}


def measure(run: Path, train: int) -> dict[str, Any]:
    """Collect with every engine; return the seconds and the number of shards.

    Raises:
        WrongResult: an engine collected other features than the first.
    """
    earlier_stages = STAGE_NAMES[: STAGE_NAMES.index("collect")]
    folder = RunFolder(run, study_config(train))
    with folder.locked():
        run_stages(folder, earlier_stages)
    seconds: dict[str, float] = {}
    expected: dict[str, str] = {}
    for name, open_named in ENGINES.items():
        shutil.rmtree(run / "features", ignore_errors=True)
        start = time.perf_counter()
        engine = open_named()
        try:
            with folder.locked():
                run_stages(RunFolder(run), ["collect"], again="collect", engine=engine)
        finally:
            engine.close()
        seconds[name] = time.perf_counter() - start
        digests = shard_digests(run)
        expected = expected or digests
        require(digests == expected, f"{name}: other features than those of {next(iter(ENGINES))}")
        print(f"{name:20} {seconds[name]:7.1f} s")
    ray_alone = seconds["ray, 1 worker"]
    return {
        "shards": len(expected),
        "seconds": seconds,
        "ray_adds": ray_alone / seconds["local"] - 1,
        "efficiency": {
            "ray, 2 workers": ray_alone / (2 * seconds["ray, 2 workers"]),
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
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = {"part": "engine", "train": options.train, **measure(options.run, options.train)}
    machine = environment(torch.device("cpu"))
    write_json(options.out / "engine-cpu.json", {**result, "environment": machine})


if __name__ == "__main__":
    main()
