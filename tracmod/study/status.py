"""The progress of a run, from what is on disk alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tracmod.features.store import FeatureStore
from tracmod.files.object_storage import entries
from tracmod.study.run_folder import RunFolder


@dataclass(frozen=True)
class RunStatus:
    """The progress of a run.

    Attributes:
        working: Whether a process works in the folder now.
        stages: (stage, state, seconds) with state done, running, interrupted or to do. A stage
            whose process was killed says running; `working` tells the difference.
        shards: The files of feature stores that are there (not verified: `tracmod verify` does it).
        shards_wanted: The files of these stores when they are complete.
        rankings: The parts of rankings that are there while the stage influence runs.
        logs: Worker -> the last line of its log.
    """

    working: bool
    stages: list[tuple[str, str, float]]
    shards: int
    shards_wanted: int
    rankings: int
    logs: dict[str, str]


def run_status(path: Path) -> RunStatus:
    """Return the progress of the run in a folder.

    Raises:
        ValueError: There is no run.
    """
    run = RunFolder(path)
    stages = []
    for stage in run.stages:
        entry = run.record["stages"].get(stage, {})
        state = "done" if run.is_done(stage) else entry.get("state", "to do")
        stages.append((stage, state, float(entry.get("seconds", 0.0))))
    features: Any = run.features_path
    manifests = list(features.rglob("manifest.json"))
    file_names = [file.name for manifest in manifests for file in entries(manifest.parent)]
    logs = {}
    for log in sorted(run.logs.glob("worker-*.log")):
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        logs[log.stem] = lines[-1] if lines else ""
    return RunStatus(
        working=run.is_locked,
        stages=stages,
        shards=sum(name.startswith("shard-") for name in file_names),
        shards_wanted=sum(FeatureStore.open(manifest.parent).num_shards for manifest in manifests),
        rankings=len(list(run.progress.glob("*.safetensors"))),
        logs=logs,
    )
