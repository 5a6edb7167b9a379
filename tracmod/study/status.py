"""How far a run is: its stages, its features, its workers' logs; from what is on disk alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tracmod.features.store import FeatureStore
from tracmod.files.object_storage import entries
from tracmod.study.run_folder import RunFolder


@dataclass(frozen=True)
class RunStatus:
    """How far a run is.

    Attributes:
        working: whether a process works in the folder now.
        stages: (stage, state, seconds): done, running, interrupted or to do. A stage whose process
            was killed says running; `working` tells.
        shards, shards_wanted: files of the feature stores that are begun, and of them all when they
            are complete (not verified: that is `tracmod verify`).
        rankings: rankings of the influence stage that are there while it works.
        logs: worker -> the last line of its log.
    """

    working: bool
    stages: list[tuple[str, str, float]]
    shards: int
    shards_wanted: int
    rankings: int
    logs: dict[str, str]


def run_status(path: Path) -> RunStatus:
    """How far the run in a folder is.

    Raises:
        ValueError: no run there.
    """
    run = RunFolder(path)
    records = run.record["stages"]
    stages = [
        (
            stage,
            "done" if run.is_done(stage) else records.get(stage, {}).get("state", "to do"),
            float(records.get(stage, {}).get("seconds", 0.0)),
        )
        for stage in run.stages
    ]
    features: Any = run.features_path
    manifests = list(features.rglob("manifest.json"))
    stores = [FeatureStore.open(file.parent) for file in manifests]
    names = [file.name for manifest in manifests for file in entries(manifest.parent)]
    return RunStatus(
        working=run.is_locked,
        stages=stages,
        shards=sum(name.startswith("shard-") for name in names),
        shards_wanted=sum(store.num_shards for store in stores),
        rankings=len(list((path / "influence" / "progress").glob("*.safetensors"))),
        logs={file.stem: _last_line(file) for file in sorted((path / "logs").glob("worker-*.log"))},
    )


def _last_line(file: Path) -> str:
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    return lines[-1] if lines else ""
