"""A sweep: runs that differ in a few settings, what they share done once; one table and figure."""

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

from tracmod.config import RunConfig, parse_config, parse_overrides, read_tree, set_value
from tracmod.engine import Engine
from tracmod.files.durable import write_csv, write_parquet
from tracmod.study.run_folder import STAGES, RunFolder

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.,+-]*")


class SweepFile(BaseModel):
    """A sweep's YAML file. Keys are dotted, as in `--set`: `prune.threshold`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = "sweep"
    base: str | dict[str, Any] = Field(
        description="what every point starts from: a YAML file (seen from this one), the name of "
        "an embedded configuration, or its sections"
    )
    set: dict[str, Any] = Field(
        default_factory=dict, description="settings of every point that are not the base's"
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
    """What `tracmod sweep` does.

    Attributes:
        name: for the figure's title.
        settings: the keys that vary (dotted).
        points: name -> what its run does; the name is its folder's.
    """

    name: str
    settings: list[str]
    points: dict[str, RunConfig]

    def values(self, point: str) -> dict[str, Any]:
        """The settings that vary, as they are at a point."""
        tree = self.points[point].model_dump(mode="json")
        return {key: _value(tree, key) for key in self.settings}


def load_sweep(path: str | Path, overrides: tuple[str, ...] = ()) -> Sweep:
    """Read a sweep and every point's configuration.

    Args:
        path: a YAML file, or the name of an embedded one (`thresholds`).
        overrides: `section.key=value`, for every point.

    Raises:
        ValueError: one sentence: which file and point, what was expected, what was found.
    """
    try:
        sweep = SweepFile.model_validate(read_tree(path, "sweeps"))
    except ValidationError as error:
        faults = (f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise ValueError(f"{path}: {'; '.join(faults)}") from None
    differences = dict(_points(sweep, str(path)))
    settings = list(dict.fromkeys(key for point in differences.values() for key in point))
    fixed = sweep.set | parse_overrides(overrides)
    for key in parse_overrides(overrides):
        if key in settings:
            raise ValueError(f"--set {key}: the sweep itself varies it; edit a copy of {path}")
    base = sweep.base if isinstance(sweep.base, dict) else read_tree(_base(sweep.base, Path(path)))
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


def _base(base: str, sweep: Path) -> str | Path:
    beside = sweep.parent / base
    return beside if beside.is_file() else base


def _points(sweep: SweepFile, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every point's name and settings: each of `points` with each combination of `grid`."""
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
    """`threshold-0.9` for prune.threshold = 0.9; `languages-en,de` for a list."""
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"{key.rpartition('.')[2]}-{re.sub(r'[^A-Za-z0-9._,+-]', '-', text)}"


def _value(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


# --- running --------------------------------------------------------------------------------


def sweep_plan(sweep: Sweep, out: Path) -> dict[str, dict[str, str]]:
    """What `run_sweep` would do: point -> stage -> `done`, `to do`, or the point it is taken from.

    Where `collect` is to do, features of the same identity are taken from other points all the
    same: which those are, only the masks will tell.

    Raises:
        ValueError: a folder in `out` was begun with another configuration.
    """
    runs = _runs(sweep, out)
    plan: dict[str, dict[str, str]] = {}
    for name, run in runs.items():
        others = {other: runs[other] for other in runs if other != name}
        plan[name] = {}
        for stage in run.stages:
            # By this point's turn those before it have everything, others what is on disk now.
            donors = (
                other
                for other, theirs in others.items()
                if run.has_same_inputs(stage, theirs)
                and (other in plan or all(map(theirs.is_done, _up_to(stage))))
            )
            donor = next(donors, None) if stage != "report" else None
            plan[name][stage] = "done" if run.is_done(stage) else donor or "to do"
    return plan


def _up_to(stage: str) -> tuple[str, ...]:
    return STAGES[: STAGES.index(stage) + 1]


def run_sweep(
    sweep: Sweep, out: Path, say: Callable[[str], None], engine: Engine | None = None
) -> dict[str, str]:
    """Do every point's run in `out/<point>/`, then write `out/sweep.{parquet,csv,html}`.

    A stage that another point has finished with the same settings is taken over, and so are feature
    stores with the same identity where the stage differs; files are hard links, which nothing
    writes into. Stopped at any time, the same call goes on. A point that fails does not stop the
    others; the table is of those that are done.

    Args:
        sweep: from `load_sweep`.
        out: folder of the points' run folders.
        say: is told of progress, a line at a time.
        engine: where every point's pruning, collecting and scoring run; None: in this process.

    Returns:
        Point -> why it failed, of those that did.

    Raises:
        ValueError: a folder in `out` was begun with another configuration, or there is no such
            device.
    """
    from tracmod.models.modes import (
        resolve_device,  # here: they load torch, which --check needs not
    )
    from tracmod.study.pipeline import run_stages

    runs = _runs(sweep, out)
    for run in runs.values():
        resolve_device(run.config.device)
    failed = {}
    for number, (name, run) in enumerate(runs.items(), 1):
        say(f"point {number} of {len(runs)}: {name}")
        try:
            with run.locked():
                run_stages(run, donors=_begun_runs(sweep, out, name), engine=engine)
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


def _runs(sweep: Sweep, out: Path) -> dict[str, RunFolder]:
    return {name: RunFolder(out / name, config) for name, config in sweep.points.items()}


def _begun_runs(sweep: Sweep, out: Path, but: str) -> list[RunFolder]:
    """The other points' runs as they are on disk now."""
    folders = (out / name for name in sweep.points if name != but)
    return [RunFolder(folder) for folder in folders if (folder / "run.json").is_file()]


# --- results --------------------------------------------------------------------------------


def write_sweep(sweep: Sweep, out: Path, points: list[str]) -> None:
    """Write `out/sweep.{parquet,csv,html}` of finished points."""
    from tracmod.analysis.sweeps import sweep_rows  # here: --check needs neither
    from tracmod.report.html.sweeps import write_sweep_page

    rows: list[dict[str, Any]] = []
    for name in points:
        found = {"point": name, **sweep.values(name)}
        rows += [found | row for row in sweep_rows(out / name)]
    table = pa.table({key: _column([row[key] for row in rows]) for key in rows[0]})
    write_parquet(out / "sweep.parquet", table)
    write_csv(out / "sweep.csv", table)
    write_sweep_page(out / "sweep.html", sweep.name, sweep.settings, table)


def _column(values: list[Any]) -> pa.Array:
    """Numbers and text as they are; lists, sections and mixtures as JSON."""
    if all(value is None for value in values):
        return pa.array(values, pa.float64())
    if not any(isinstance(value, list | dict) for value in values):
        with contextlib.suppress(pa.ArrowInvalid, pa.ArrowTypeError):
            return pa.array(values)
    return pa.array([None if one is None else _text(one) for one in values], pa.string())


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
