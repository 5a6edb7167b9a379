"""Time the same work by every engine: the overhead of Ray, and the gain of a second worker.

    python bench/bench_engine.py [--run runs/engine] [--train N]

A small model is trained and pruned once. Then each engine collects its features, starting from an
empty folder: this process, one worker on Ray, two workers on Ray, and two local processes, with one
thread per worker. Then each does a whole `tracmod attribute` of the same checkpoints: collecting,
certificate, scoring and tables. The time includes starting the cluster and the workers. It counts
only if the files are identical to those of the first engine bit for bit.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tracmod.attribution.attribute import attribute
from tracmod.attribution.options import AttributionOptions
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


def file_digests(folder: Path, *patterns: str) -> dict[str, str]:
    """Return the digests of the files in a folder that match patterns."""
    files = sorted(file for pattern in patterns for file in folder.glob(pattern))
    return {str(file.relative_to(folder)): file_sha256(file) for file in files}


def time_engines(
    folder: Path, patterns: Sequence[str], work: Callable[[Engine], None]
) -> dict[str, Any]:
    """Let every engine do the same work; return the seconds, their ratios and the number of shards.

    Args:
        folder: folder of the results, whose files that match are removed before each engine.
        patterns: patterns of the files that have to be the same bit for bit.
        work: does the work by an engine.

    Raises:
        WrongResult: an engine wrote other files than the first.
    """
    seconds: dict[str, float] = {}
    expected: dict[str, str] = {}
    for name, open_named in ENGINES.items():
        for file in file_digests(folder, *patterns):
            (folder / file).unlink()
        start = time.perf_counter()
        engine = open_named()
        try:
            work(engine)
        finally:
            engine.close()
        seconds[name] = time.perf_counter() - start
        digests = file_digests(folder, *patterns)
        expected = expected or digests
        require(digests == expected, f"{name}: other files than those of {next(iter(ENGINES))}")
        print(f"{name:20} {seconds[name]:7.1f} s")
    ray_alone = seconds["ray, 1 worker"]
    return {
        "shards": sum("shard-" in name for name in expected),
        "seconds": seconds,
        "ray_adds": ray_alone / seconds["local"] - 1,
        "efficiency": {
            "ray, 2 workers": ray_alone / (2 * seconds["ray, 2 workers"]),
            "local, 2 processes": seconds["local"] / (2 * seconds["local, 2 processes"]),
        },
    }


def time_run(run: Path, train: int) -> dict[str, Any]:
    """Time the stage `collect` of a run, whose earlier stages are done once."""
    earlier_stages = STAGE_NAMES[: STAGE_NAMES.index("collect")]
    folder = RunFolder(run, study_config(train))
    with folder.locked():
        run_stages(folder, earlier_stages)

    def collect(engine: Engine) -> None:
        with folder.locked():
            run_stages(RunFolder(run), ["collect"], again="collect", engine=engine)

    return time_engines(run, ["features/**/shard-*"], collect)


def time_attribution(run: Path) -> dict[str, Any]:
    """Time a whole `tracmod attribute` of the checkpoints of a run, with the run's examples."""
    options = AttributionOptions(
        str(run / "models/full/checkpoint-2"),
        run / "data/train.parquet",
        run / "data/test.parquet",
        run / "attribution",
        checkpoints=[run / f"models/full/checkpoint-{epoch}" for epoch in (1, 2)],
    )
    patterns = ["features/**/*.*", "*.parquet", "fidelity.json"]
    return time_engines(options.out, patterns, lambda engine: attribute(options, engine))


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
    result = {"part": "engine", "train": options.train}
    print("collecting of a run")
    result |= time_run(options.run, options.train)
    print("a whole attribution")
    result["attribution"] = time_attribution(options.run)
    machine = environment(torch.device("cpu"))
    write_json(options.out / "engine-cpu.json", {**result, "environment": machine})


if __name__ == "__main__":
    main()
