"""The run folder: where things lie, which stages are done, and that only one process writes it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tracmod.config import RunConfig, parse_config
from tracmod.files.durable import (
    add_checksums,
    link_folder,
    read_checksums,
    read_json,
    take_checksums,
    write_checksums,
    write_json,
)
from tracmod.files.object_storage import Location, file_sha256, location
from tracmod.files.versions import package_version, versions

STAGES = (
    "data",
    "finetune",
    "prune",
    "sparse-finetune",
    "collect",
    "influence",
    "analyze",
    "retrain",
    "report",
)
# The config sections that each stage is the first to read.
_READ = {
    "data": ("task",),
    "finetune": ("seed", "model", "finetune"),
    "prune": ("prune",),
    "sparse-finetune": ("sparse_finetune",),
    "collect": ("collect", "views"),
    "influence": ("influence", "analyze"),
    "analyze": (),
    "retrain": ("retrain",),
    "report": ("name",),
}
# Where one of these has changed, the stage that reads it and those after it are done again. Any
# other section cannot be changed once its stage has begun: days of work depend on it.
_REMADE = ("views", "influence", "analyze", "retrain", "name")
# The part of the folder that each stage writes.
_OWNED = {
    "data": "data",
    "finetune": "models/full",
    "prune": "subnetworks",
    "sparse-finetune": "models/sparse",
    "collect": "features",
    "influence": "influence",
    "analyze": "analysis",
    "retrain": "retraining",
    "report": "report",
}
PRECONDITIONERS = "preconditioners"
# What stages add to run.json.
_FOUND = {
    "data": ("label_names", "languages", "parallel", "device"),
    "analyze": ("fidelity",),
}


class RunFolder:
    """A run folder and its run.json.

    Attributes:
        path: the folder.
        config: what the run does.
        record: run.json as a tree: config, versions, seeds, device, label_names, stages.
    """

    def __init__(self, path: str | Path, config: RunConfig | None = None) -> None:
        """Open the folder, or with a config begin it.

        Raises:
            ValueError: no run there and no config, an unreadable run.json, or a config that differs
                in what a stage already made depends on (named, with both values).
        """
        self.path = Path(path)
        self.record: dict[str, Any] = {"stages": {}}
        self._asked = config
        self.config = self._read()

    def _read(self) -> RunConfig:
        """Take run.json, if there is one, as it is now; the config that holds."""
        if not self._record_path.is_file():
            if self._asked is None:
                raise ValueError(
                    f"{self.path}: no run.json there; begin a run with `tracmod run CONFIG --out "
                    f"{self.path}` or give --config"
                )
            return self._asked
        self.record = _read_record(self._record_path)
        stored = parse_config(self.record["config"], str(self._record_path))
        config = self._asked or stored
        self._refuse_changed(stored, config)
        return config

    @property
    def _record_path(self) -> Path:
        return self.path / "run.json"

    @property
    def _lock_path(self) -> Path:
        return self.path / ".lock"

    # --- places -----------------------------------------------------------------------------

    def data(self, split: str) -> Path:
        """data/<split>.parquet."""
        return self.path / "data" / f"{split}.parquet"

    def model(self, model: str) -> Path:
        """models/<model>: the folder of the checkpoints of `full` or `sparse`."""
        return self.path / "models" / model

    def subnetwork(
        self, language: str, seed: int | None = None, threshold: float | None = None
    ) -> Path:
        """subnetworks/<language>.json, or that of one seed or of another threshold."""
        folder = self.path / "subnetworks"
        if seed is not None:
            folder /= f"seeds/{seed}"
        if threshold is not None:
            folder /= f"thresholds/{threshold}"
        return folder / f"{language}.json"

    def pruned_model(self, seed: int, language: str | None) -> Path:
        """subnetworks/models/<language or all>/seed-<seed>: a training made only to be pruned."""
        return self.path / "subnetworks" / "models" / (language or "all") / f"seed-{seed}"

    @property
    def features_path(self) -> Location:
        """features/, or where `collect.features` has them."""
        elsewhere = self.config.collect.features
        return self.path / "features" if elsewhere is None else location(elsewhere)

    def preconditioner(self, model: str, epoch: int) -> Path:
        """preconditioners/<model>/checkpoint-<epoch>.safetensors: a fitted one."""
        return self.path / PRECONDITIONERS / model / f"checkpoint-{epoch}.safetensors"

    def features(
        self, model: str, view: str, language: str | None, epoch: int, split: str
    ) -> Location:
        """The feature store of one model, view (and its language's mask), checkpoint and split."""
        view_path = self.features_path / model / view
        if language is not None:
            view_path /= language
        return view_path / f"checkpoint-{epoch}" / split

    @property
    def retraining(self) -> Path:
        """retraining/: the trainings without some examples, and what they say."""
        return self.path / "retraining"

    def influence(self, model: str, view: str) -> Path:
        """influence/<model>/<view>: the folder of its tables."""
        return self.path / "influence" / model / view

    # --- stages -----------------------------------------------------------------------------

    @property
    def stages(self) -> tuple[str, ...]:
        """Those of `STAGES` that the run's config has work for."""
        without = () if self.config.retrain else ("retrain",)
        return tuple(stage for stage in STAGES if stage not in without)

    def is_done(self, stage: str) -> bool:
        """Whether the stage was finished with this config."""
        entry = self.record["stages"].get(stage, {})
        return entry.get("state") == "done" and entry.get("inputs") == self._inputs(stage)

    @contextmanager
    def stage(self, stage: str) -> Iterator[None]:
        """Record a stage as running, then as done with its seconds, earlier tries counted in."""
        entry = self.record["stages"].get(stage, {})
        inputs = self._inputs(stage)
        before = entry.get("seconds", 0.0) if entry.get("inputs") == inputs else 0.0
        if entry.get("state") == "done":
            before = 0.0
        self._begin(stage, inputs, before)
        started = time.perf_counter()
        state = "interrupted"
        try:
            yield
            write_checksums(self.path, _OWNED[stage])
            if (self.path / PRECONDITIONERS).is_dir():  # made when it is first needed
                write_checksums(self.path, PRECONDITIONERS)
            if stage == "collect" and self.config.collect.features is not None:
                add_checksums(self.path, self._sums_elsewhere())
            state = "done"
        finally:
            seconds = round(before + time.perf_counter() - started, 3)
            self.record["stages"][stage] = {"state": state, "seconds": seconds, "inputs": inputs}
            self.save()

    def has_same_inputs(self, stage: str, other: RunFolder) -> bool:
        """Whether the other run does the same up to the end of the stage, on the same device.

        Of collecting also whether both have their features in the run folder, or in the same place.
        """
        same_device = self.config.device == other.config.device
        places = {run.config.collect.features for run in (self, other)}
        same_place = stage != "collect" or len(places) == 1
        return same_device and same_place and self._inputs(stage) == other._inputs(stage)

    def take_over(self, stage: str, other: RunFolder) -> bool:
        """Take a stage from another run that has done the same: its files are linked, not made.

        Args:
            stage: not the report, which says what it is the report of.
            other: another run; where it has not finished the stage, or something before it is not
                the same there, byte for byte, nothing is done.

        Returns:
            Whether the stage was taken over.
        """
        assert stage != "report"
        earlier = self.stages[: self.stages.index(stage)]
        same_inputs = self.has_same_inputs(stage, other)
        if not same_inputs or not all(other.is_done(one) for one in (*earlier, stage)):
            return False
        if any(self._sums(one) != other._sums(one) for one in earlier):
            return False
        owned, done = _OWNED[stage], other.record["stages"][stage]
        self._begin(stage, done["inputs"], 0.0)
        shutil.rmtree(self.path / owned, ignore_errors=True)
        link_folder(other.path / owned, self.path / owned)
        take_checksums(other.path, self.path, owned)
        if stage == "collect" and (other.path / PRECONDITIONERS).is_dir():
            link_folder(other.path / PRECONDITIONERS, self.path / PRECONDITIONERS)
            take_checksums(other.path, self.path, PRECONDITIONERS)
        found = _FOUND.get(stage, ())
        self.record |= {key: other.record[key] for key in found if key in other.record}
        self.record["stages"][stage] = {**done, "taken_from": other.path.name}
        self.save()
        return True

    def _sums_elsewhere(self) -> dict[str, str]:
        """Of manifests in `collect.features`, named as if they were in the run folder."""
        place = self.features_path
        return {
            f"features{str(file).removeprefix(str(place))}": file_sha256(file)
            for file in place.rglob("manifest.json")
        }

    def _sums(self, stage: str) -> dict[str, str]:
        """The recorded checksums of what a stage wrote."""
        sums = read_checksums(self.path)
        return {name: sums[name] for name in sums if Path(name).is_relative_to(_OWNED[stage])}

    def _begin(self, stage: str, inputs: str, seconds: float) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self.record["config"] = self.config.model_dump(mode="json")
        self.record["tracmod"] = package_version("tracmod")
        self.record["versions"] = versions()
        self.record["seeds"] = {
            "run": self.config.seed,
            "task": self.config.task.seed,
            "projection": self.config.collect.projection_seed,
        }
        self.record["stages"][stage] = {"state": "running", "seconds": seconds, "inputs": inputs}
        self.save()

    def _inputs(self, stage: str) -> str:
        """Digest of everything in the config that the stage and those before it read.

        Without what changes no result, and what is left at its default: a setting added to tracmod
        later, at a default that does what was done before, undoes no finished stage.
        """
        tree = self.config.model_dump(
            mode="json",
            exclude_defaults=True,
            exclude={"influence": {"memory"}, "collect": {"features"}},
        )
        # An empty `retrain` is not an absent one.
        tree = {name: values for name, values in tree.items() if values != {} or name == "retrain"}
        earlier = STAGES[: STAGES.index(stage) + 1]
        sections = [section for one in earlier for section in _READ[one] if section in tree]
        text = json.dumps({section: tree[section] for section in sections}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _refuse_changed(self, stored: RunConfig, config: RunConfig) -> None:
        begun = [stage for stage in STAGES if stage in self.record["stages"]]
        sections = [section for stage in begun for section in _READ[stage]]
        fixed = [section for section in sections if section not in _REMADE]
        before, after = stored.model_dump(mode="json"), config.model_dump(mode="json")
        for section in fixed:
            for key, old, new in _differences(section, before[section], after[section]):
                raise ValueError(
                    f"{self.path}: was begun with {key}={old}, now asked for {key}={new}; use "
                    f"another --out, or delete the folder"
                )

    # --- files ------------------------------------------------------------------------------

    def save(self) -> None:
        """Write run.json, whole or not at all."""
        write_json(self._record_path, self.record)

    @property
    def is_locked(self) -> bool:
        """Whether a process holds the folder now."""
        if not self._lock_path.exists():
            return False
        with self._lock_path.open() as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return True
        return False

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process; the lock ends with the process.

        run.json is read again: another process may have gone on with the run before this one.

        Raises:
            ValueError: another process holds it, or has changed what the config depends on.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with self._lock_path.open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(f"{self.path}: another tracmod process works in it") from None
            self.config = self._read()
            yield


def _read_record(path: Path) -> dict[str, Any]:
    tree = read_json(path)
    if not isinstance(tree, dict) or "config" not in tree or "stages" not in tree:
        raise ValueError(f"{path}: expected the record of a run, with config and stages")
    return tree


def _differences(key: str, before: Any, after: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(after, dict):
        for name in before.keys() | after.keys():
            yield from _differences(f"{key}.{name}", before.get(name), after.get(name))
    elif before != after:
        yield key, before, after
