"""A sweep: runs that differ in a few settings, with one table and figure of them all."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tracmod.config import RunConfig, parse_config
from tracmod.engine import Engine
from tracmod.files.durable import write_csv, write_json, write_parquet
from tracmod.files.yaml_tree import parse_overrides, read_tree, set_value
from tracmod.study.run_folder import RunFolder
from tracmod.study.stage_table import stage_named, stages_through

SWEEP_FILE = "sweep.json"  # the names of the points, for `tracmod status`
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.,+-]*")


class SweepFile(BaseModel):
    """A sweep's YAML file. Keys are dotted, as in `--set`: `prune.threshold`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = "sweep"
    base: str | dict[str, Any] = Field(
        description="what every point starts from: a YAML file (relative to this one), the name of "
        "an embedded configuration, or its sections"
    )
    set: dict[str, Any] = Field(
        default_factory=dict, description="settings of every point that differ from the base"
    )
    points: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="name of a point -> its settings"
    )
    grid: dict[str, list[Any]] = Field(
        default_factory=dict,
        description="setting -> its values: each combination is a point, or several, one for each "
        "of `points`",
    )


@dataclass(frozen=True)
class Sweep:
    """The runs of a sweep.

    Attributes:
        name: The name in the title of the figure.
        settings: The dotted keys that vary.
        points: Name of a point, and of its folder -> its configuration.
    """

    name: str
    settings: list[str]
    points: dict[str, RunConfig]

    def values(self, point: str) -> dict[str, Any]:
        """Return the settings that vary, with their values at a point."""
        tree = self.points[point].model_dump(mode="json")
        return {key: _value(tree, key) for key in self.settings}


def load_sweep(path: str | Path, overrides: tuple[str, ...] = ()) -> Sweep:
    """Read a sweep and every point's configuration.

    Args:
        path: A YAML file, or the name of an embedded one (`thresholds`).
        overrides: `section.key=value`, for every point.

    Raises:
        ValueError: The file is not a sweep, or a point is not a valid configuration.
    """
    try:
        sweep = SweepFile.model_validate(read_tree(path, "sweeps"))
    except ValidationError as error:
        faults = (f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise ValueError(f"{path}: {'; '.join(faults)}") from None
    differences = dict(_points(sweep, str(path)))
    settings = list(dict.fromkeys(key for point in differences.values() for key in point))
    fixed = sweep.set | parse_overrides(overrides)
    for key in parse_overrides(overrides):
        if key in settings:
            raise ValueError(f"--set {key}: the sweep itself varies it; edit a copy of {path}")
    base = sweep.base
    if isinstance(base, str):
        beside = Path(path).parent / base
        base = read_tree(beside if beside.is_file() else base)
    points = {}
    for name, values in differences.items():
        tree = copy.deepcopy(base)
        tree["name"] = f"{sweep.name} {name}"
        for key, value in (fixed | values).items():
            set_value(tree, key, copy.deepcopy(value))
        features = _value(tree, "collect.features")
        if isinstance(features, str) and "collect.features" not in values:
            set_value(tree, "collect.features", f"{features.rstrip('/')}/{name}")
        points[name] = parse_config(tree, f"{path}: point {name}")
    return Sweep(sweep.name, settings, points)


def _points(sweep: SweepFile, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every point's name and settings: each of `points` with each combination of `grid`."""
    if not sweep.points and not sweep.grid:
        raise ValueError(f"{path}: expected points or grid, found neither")
    seen = set()
    for point, own in (sweep.points or {"": {}}).items():
        for values in itertools.product(*sweep.grid.values()):
            combination = dict(zip(sweep.grid, values, strict=True))
            repeated = sorted(own.keys() & combination.keys())
            if repeated:
                raise ValueError(f"{path}: {repeated[0]} is both in point {point} and in grid")
            parts = [point, *(_point_name(key, value) for key, value in combination.items())]
            name = "_".join(part for part in parts if part)
            if not _NAME.fullmatch(name) or name in seen:
                raise ValueError(
                    f"{path}: expected points with distinct names of letters, digits and _.,+- "
                    f"(they name folders), got {name!r}"
                )
            seen.add(name)
            yield name, own | combination


def _point_name(key: str, value: Any) -> str:
    """Return `threshold-0.9` for prune.threshold = 0.9, and `languages-en,de` for a list."""
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"{key.rpartition('.')[2]}-{re.sub(r'[^A-Za-z0-9._,+-]', '-', text)}"


def _value(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


# --- running --------------------------------------------------------------------------------


def sweep_plan(sweep: Sweep, out: Path) -> dict[str, dict[str, str]]:
    """Return what `run_sweep` would do: point -> stage -> `done`, `to do` or the donor point.

    Where `collect` is to do, single feature stores are still taken from other points if their
    identities are equal; which ones is only known when the masks are.

    Raises:
        ValueError: A folder in `out` was begun with another configuration.
    """
    runs = _open_runs(sweep, out)
    plan: dict[str, dict[str, str]] = {}
    for name, run in runs.items():
        others = {other: runs[other] for other in runs if other != name}
        plan[name] = {}
        for stage in run.stages:
            # When a point's turn comes, those before it have every stage, and those after it what
            # is on disk now.
            donors = (
                other
                for other, its_run in others.items()
                if run.has_same_inputs(stage, its_run)
                and (
                    other in plan
                    or all(its_run.is_done(earlier.name) for earlier in stages_through(stage))
                )
            )
            donor = next(donors, None) if stage_named(stage).shareable else None
            plan[name][stage] = "done" if run.is_done(stage) else donor or "to do"
    return plan


def run_sweep(
    sweep: Sweep, out: Path, say: Callable[[str], None], engine: Engine | None = None
) -> dict[str, str]:
    """Do every point's run in `out/<point>/`, then write `out/sweep.{parquet,csv,html}`.

    A stage that another point has finished with the same settings is taken over; where a stage
    differs, feature stores with the same identity are. Their files are hard links, which nothing
    writes into. An interrupted sweep resumes when it is called again. A point that fails does not
    stop the others; the table has the points that are done.

    Args:
        sweep: The sweep, from `load_sweep`.
        out: The folder of the points' run folders.
        say: Called with each line about progress.
        engine: Where the tasks of every point run; None for this process.

    Returns:
        The points that failed -> the reason.

    Raises:
        ValueError: A folder in `out` was begun with another configuration, or a device is not
            there.
    """
    # Imported here because they load torch, which `--check` does without.
    from tracmod.models.modes import resolve_device
    from tracmod.study.pipeline import run_stages

    runs = _open_runs(sweep, out)
    for run in runs.values():
        resolve_device(run.config.device)
    write_json(out / SWEEP_FILE, {"name": sweep.name, "points": list(sweep.points)})
    failed = {}
    for number, (name, run) in enumerate(runs.items(), 1):
        say(f"point {number} of {len(runs)}: {name}")
        # The other points' runs as they are on disk now.
        others = (out / other for other in sweep.points if other != name)
        donors = [RunFolder(folder) for folder in others if (folder / "run.json").is_file()]
        try:
            with run.locked():
                run_stages(run, donors=donors, engine=engine)
        except Exception as error:
            if os.environ.get("TRACMOD_TRACEBACK"):
                raise
            failed[name] = " ".join(str(error).split()) or type(error).__name__
            say(f"point {name} failed: {failed[name]}")
            continue
        entries = run.record["stages"].items()
        taken = [f"{stage} from {e['taken_from']}" for stage, e in entries if "taken_from" in e]
        say(f"point {name} is done" + (f"; taken over: {', '.join(taken)}" if taken else ""))
    finished = [name for name, run in runs.items() if all(map(run.is_done, run.stages))]
    if finished:
        write_sweep(sweep, out, finished)
    return failed


def _open_runs(sweep: Sweep, out: Path) -> dict[str, RunFolder]:
    return {name: RunFolder(out / name, config) for name, config in sweep.points.items()}


# --- results --------------------------------------------------------------------------------


def write_sweep(sweep: Sweep, out: Path, points: list[str]) -> None:
    """Write `out/sweep.{parquet,csv,html}` of finished points."""
    # Imported here because `--check` needs neither.
    from tracmod.analysis.sweeps import sweep_rows
    from tracmod.report.html.sweeps import write_sweep_page

    rows: list[dict[str, Any]] = []
    for name in points:
        settings = {"point": name, **sweep.values(name)}
        rows += [settings | row for row in sweep_rows(out / name)]
    table = pa.table({key: _column([row[key] for row in rows]) for key in rows[0]})
    write_parquet(out / "sweep.parquet", table)
    write_csv(out / "sweep.csv", table)
    write_sweep_page(out / "sweep.html", sweep.name, sweep.settings, table)


def _column(values: list[Any]) -> pa.Array:
    """Make a column: numbers and text as they are, lists, sections and mixtures as JSON."""
    if all(value is None for value in values):
        return pa.array(values, pa.float64())
    if not any(isinstance(value, list | dict) for value in values):
        with contextlib.suppress(pa.ArrowInvalid, pa.ArrowTypeError):
            return pa.array(values)
    texts = [
        value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for value in values
    ]
    return pa.array(texts, pa.string())
