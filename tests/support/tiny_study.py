"""A small study for tests: three languages, a tiny model, two epochs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from tracmod.config import RunConfig, parse_config
from tracmod.validation.integrity import verify

LANGUAGES = ["en", "de", "es"]
# The files of a run that must not depend on interruptions, or on stages taken over from other runs.
RESULTS = (
    "data/*",
    "models/*/checkpoint-*/*",
    "models/*/metrics.json",
    "subnetworks/*",
    "subnetworks/seeds/**/*.json",
    "features/**/shard*",
    "features/**/*.json",
    "influence/**/*.parquet",
    "analysis/*",
)


def tiny_config(**overrides: Any) -> RunConfig:
    """Return a config whose whole run takes a few seconds.

    Args:
        overrides: Values by section (added to those of the section) or a top-level value.
    """
    tree: dict[str, Any] = {
        "name": "tiny",
        "device": "cpu",
        "task": {
            "name": "grammar",
            "shape": "nli",
            "languages": LANGUAGES,
            "train_per_language": 12,
            "dev_per_language": 9,
            "test_per_language": 6,
        },
        "model": {"layers": 2, "hidden": 24, "heads": 3, "vocabulary": 900, "max_length": 48},
        "finetune": {"epochs": 2, "batch_size": 8, "learning_rate": 1e-3},
        "views": {"random": 1, "other": ["de"]},
        "collect": {"projection_dim": 256, "shard_rows": 16, "batch_tokens": 512},
        "influence": {"k": 5},
        "analyze": {"bootstrap": 50, "permutations": 50},
    }
    for section, values in overrides.items():
        tree[section] = tree.get(section, {}) | values if isinstance(values, dict) else values
    return parse_config(tree, "tiny")


def files_of(folder: Path, *patterns: str) -> dict[str, bytes]:
    """Return the contents of the files that match glob patterns, by path within the folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for pattern in patterns
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    }


def assert_sound_with_own_metagradient(out: Path) -> None:
    """Check that a run verifies, and that its metagradient replayed both of its trainings."""
    assert verify(out) == []
    models = json.loads((out / "metagradient/summary.json").read_text())["models"]
    assert set(models) == {"full", "sparse"}
    for model in models.values():
        assert model["checkpoints_equal"]
        assert model["gradient_difference"] < 1e-4


def run_killing(config: RunConfig, out: Path) -> int:
    """Do a run in processes that are killed (SIGKILL) after ever longer times, until one finishes.

    Returns:
        The number of processes that were killed.
    """
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "tracmod.cli", "run", str(file), "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    seconds, kills = 6.0, 0
    while True:
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        try:
            if kills == 0:  # kill the first as soon as the data are written, on any machine
                while not (out / "data/train.parquet").exists() and process.poll() is None:
                    time.sleep(0.01)
            _, errors = process.communicate(timeout=seconds if kills else 0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills, seconds = kills + 1, seconds + 1.7
            continue
        assert process.returncode == 0, errors
        return kills
