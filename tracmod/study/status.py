"""The progress of a run or a sweep, from what is on disk alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tracmod.features.store import FeatureStore
from tracmod.files.durable import read_json
from tracmod.files.object_storage import entries
from tracmod.files.progress import read_progress
from tracmod.study.run_folder import RunFolder
from tracmod.study.sweep import SWEEP_FILE


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
        progress: The work within the stage that runs or was stopped, the outermost first: for each
            its description, done, total, unit, rate (per second) and note. Empty if there is none.
        unchanged: Seconds since anything was written; None if nothing has been.
    """

    working: bool
    stages: list[tuple[str, str, float]]
    shards: int
    shards_wanted: int
    rankings: int
    logs: dict[str, str]
    progress: list[dict[str, Any]] = field(default_factory=list)
    unchanged: float | None = None


def run_status(path: Path, clock: Callable[[], float] = time.time) -> RunStatus:
    """Return the progress of the run in a folder.

    Args:
        path: The run folder.
        clock: Returns the time in seconds since 1970.

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
    progress = read_progress(run.progress_file) or {"bars": []}
    return RunStatus(
        working=run.is_locked,
        stages=stages,
        shards=sum(name.startswith("shard-") for name in file_names),
        shards_wanted=sum(FeatureStore.open(manifest.parent).num_shards for manifest in manifests),
        rankings=len(list(run.progress.glob("*.safetensors"))),
        logs=logs,
        progress=progress["bars"],
        unchanged=_seconds_unchanged(run, clock()),
    )


def _seconds_unchanged(run: RunFolder, now: float) -> float | None:
    """Return the seconds since the record, the progress, a log or a training was written."""
    files = [run.record_file, run.progress_file, *run.logs.glob("worker-*.log")]
    files += run.path.glob("models/*/metrics.json")
    files += run.path.glob("models/*/resume/*/state.json")
    changed = []
    for file in files:
        try:
            changed.append(file.stat().st_mtime)
        except OSError:  # it is not there, or not any more
            continue
    return max(0.0, now - max(changed)) if changed else None


def sweep_status(path: Path) -> dict[str, RunStatus | None] | None:
    """Return the progress of every point of the sweep in a folder; None if there is no sweep.

    A point that has not begun has no progress.

    Raises:
        ValueError: The run of a point cannot be read.
    """
    if not (path / SWEEP_FILE).is_file():
        return None
    return {
        name: run_status(path / name) if (path / name / "run.json").is_file() else None
        for name in read_json(path / SWEEP_FILE)["points"]
    }
