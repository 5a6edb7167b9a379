"""The run folder: its record in run.json, the state of its stages, and the lock on it."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

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
from tracmod.files.run_paths import PRECONDITIONERS, RunPaths
from tracmod.files.versions import package_version, versions
from tracmod.study.stage_table import STAGES, stage_named, stages_of, stages_through


class RunFolder(RunPaths):
    """A run folder and its run.json.

    Attributes:
        path: The folder.
        config: What the run does.
        record: run.json as a tree: config, versions, seeds, device, label_names, stages.
    """

    def __init__(self, path: str | Path, config: RunConfig | None = None) -> None:
        """Open the folder or, with a config, begin it.

        Raises:
            ValueError: There is no run and no config, run.json cannot be read, or the config
                differs in a value that a stage already made depends on (named, with both values).
        """
        super().__init__(path)
        self.record: dict[str, Any] = {"stages": {}}
        self._given_config = config
        self.config = self._read()

    def _read(self) -> RunConfig:
        """Read run.json as it is now, if there is one, and return the config that holds."""
        if not self.record_file.is_file():
            if self._given_config is None:
                raise ValueError(
                    f"{self.path}: expected a run folder, found no run.json; begin a run with "
                    f"`tracmod run CONFIG --out {self.path}` or give --config"
                )
            return self._given_config
        record = read_json(self.record_file)
        if not isinstance(record, dict) or "config" not in record or "stages" not in record:
            raise ValueError(
                f"{self.record_file}: expected the record of a run, with config and stages"
            )
        self.record = record
        stored = parse_config(record["config"], str(self.record_file))
        config = self._given_config or stored
        self._refuse_changed(stored, config)
        return config

    def _refuse_changed(self, stored: RunConfig, config: RunConfig) -> None:
        """Raise ValueError where a value differs that a stage already begun depends on."""
        begun = [stage for stage in STAGES if stage.name in self.record["stages"]]
        before, after = stored.model_dump(mode="json"), config.model_dump(mode="json")
        for stage in begun:
            for section in stage.reads:
                if section in stage.redone:
                    continue
                for key, old, new in _differences(section, before[section], after[section]):
                    raise ValueError(
                        f"{self.path}: the run was begun with {key}={old}, got {key}={new}; use "
                        f"another --out, or delete the folder"
                    )

    # --- features: not in RunPaths, because the config says where they lie ------------------

    @property
    def features_path(self) -> Location:
        """features/, or the folder or bucket that `collect.features` names."""
        elsewhere = self.config.collect.features
        return self.path / "features" if elsewhere is None else location(elsewhere)

    def features(
        self, model: str, view: str, language: str | None, epoch: int, split: str
    ) -> Location:
        """The feature store of one model, view (and its language's mask), checkpoint and split."""
        folder = self.features_path / model / view
        if language is not None:
            folder /= language
        return folder / f"checkpoint-{epoch}" / split

    # --- stages -----------------------------------------------------------------------------

    @property
    def stages(self) -> tuple[str, ...]:
        """The names of the stages that the run's config has work for, in order."""
        return stages_of(self.config)

    def is_done(self, stage: str) -> bool:
        """Return whether the stage was finished with this config."""
        entry = self.record["stages"].get(stage, {})
        return entry.get("state") == "done" and entry.get("inputs") == self._inputs(stage)

    @contextmanager
    def stage(self, stage: str) -> Iterator[None]:
        """Record a stage as running, then as done, with the seconds of all attempts.

        A stage that raises is recorded as interrupted.
        """
        entry = self.record["stages"].get(stage, {})
        inputs = self._inputs(stage)
        is_continued = entry.get("inputs") == inputs and entry.get("state") != "done"
        seconds_before = entry.get("seconds", 0.0) if is_continued else 0.0
        self._begin(stage, inputs, seconds_before)
        started = time.perf_counter()
        state = "interrupted"
        try:
            yield
            write_checksums(self.path, stage_named(stage).folder)
            if (self.path / PRECONDITIONERS).is_dir():  # made when it is first needed
                write_checksums(self.path, PRECONDITIONERS)
            if stage == "collect" and self.config.collect.features is not None:
                add_checksums(self.path, self._checksums_elsewhere())
            state = "done"
        finally:
            seconds = round(seconds_before + time.perf_counter() - started, 3)
            self.record["stages"][stage] = {"state": state, "seconds": seconds, "inputs": inputs}
            self.save()

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

    def _checksums_elsewhere(self) -> dict[str, str]:
        """Digest the manifests in `collect.features`, named as if they were in the run folder."""
        root = self.features_path
        return {
            f"features{str(file).removeprefix(str(root))}": file_sha256(file)
            for file in root.rglob("manifest.json")
        }

    def _inputs(self, stage: str) -> str:
        """Digest every value of the config that the stage and those before it read.

        Left out are values that change no result and values at their default. So a setting that a
        later version of tracmod adds, with a default that does what was done before, undoes no
        finished stage.
        """
        tree = self.config.model_dump(
            mode="json",
            exclude_defaults=True,
            exclude={"influence": {"memory"}, "collect": {"features"}},
        )
        # A section without values is as if it were absent, unless its presence adds a stage.
        adds_stage = {stage.requires for stage in STAGES}
        tree = {name: values for name, values in tree.items() if values != {} or name in adds_stage}
        sections = [
            section
            for earlier in stages_through(stage)
            for section in earlier.reads
            if section in tree
        ]
        text = json.dumps({section: tree[section] for section in sections}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    # --- stages taken over from another run -------------------------------------------------

    def has_same_inputs(self, stage: str, other: RunFolder) -> bool:
        """Return whether the other run does the same up to the end of the stage.

        That includes the device and, for `collect`, where the features lie.
        """
        same_device = self.config.device == other.config.device
        same_features = self.config.collect.features == other.config.collect.features
        return (
            same_device
            and (same_features or stage != "collect")
            and self._inputs(stage) == other._inputs(stage)
        )

    def take_over(self, stage: str, other: RunFolder) -> bool:
        """Take a stage from another run that has done the same: its files are hard-linked.

        Args:
            stage: A stage that is shareable. The report is not: it names its run.
            other: Another run. Nothing is done where it has not finished the stage, or where
                something before the stage is not the same in both, byte for byte.

        Returns:
            Whether the stage was taken over.
        """
        this = stage_named(stage)
        assert this.shareable
        earlier = self.stages[: self.stages.index(stage)]
        if not self.has_same_inputs(stage, other):
            return False
        if not all(other.is_done(name) for name in (*earlier, stage)):
            return False
        if any(self._checksums(name) != other._checksums(name) for name in earlier):
            return False
        done = other.record["stages"][stage]
        self._begin(stage, done["inputs"], 0.0)
        shutil.rmtree(self.path / this.folder, ignore_errors=True)
        link_folder(other.path / this.folder, self.path / this.folder)
        take_checksums(other.path, self.path, this.folder)
        if stage == "collect" and (other.path / PRECONDITIONERS).is_dir():
            link_folder(other.path / PRECONDITIONERS, self.path / PRECONDITIONERS)
            take_checksums(other.path, self.path, PRECONDITIONERS)
        self.record |= {key: other.record[key] for key in this.records if key in other.record}
        self.record["stages"][stage] = {**done, "taken_from": other.path.name}
        self.save()
        return True

    def _checksums(self, stage: str) -> dict[str, str]:
        """Return the recorded checksums of the files that a stage wrote."""
        sums, folder = read_checksums(self.path), stage_named(stage).folder
        return {name: sums[name] for name in sums if Path(name).is_relative_to(folder)}

    # --- run.json and the lock --------------------------------------------------------------

    def save(self) -> None:
        """Write run.json, whole or not at all."""
        write_json(self.record_file, self.record)

    @property
    def is_locked(self) -> bool:
        """Whether a process holds the folder now."""
        if not self.lock_file.exists():
            return False
        try:
            with FileLock(self.lock_file, timeout=0):
                return False
        except Timeout:
            return True

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process; the lock ends with the process, however it ends.

        run.json is read again, since another process may have continued the run in the meantime.

        Raises:
            ValueError: Another process holds the folder, or has changed a value that the config
                depends on.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(self.lock_file, timeout=0).acquire()
        except Timeout:
            raise ValueError(f"{self.path}: another tracmod process works in it") from None
        with lock:
            self.config = self._read()
            yield


def _differences(key: str, before: Any, after: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted key, value before, value after) where two trees differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in before.keys() | after.keys():
            yield from _differences(f"{key}.{name}", before.get(name), after.get(name))
    elif before != after:
        yield key, before, after
