"""The plan of a run, before anything is done: work, time and disk of every stage."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

from tracmod.study.context import RunContext
from tracmod.study.forecast import Forecast
from tracmod.study.pipeline import check_outside_files, run_stages
from tracmod.study.run_folder import RunFolder
from tracmod.study.stage_table import stage_named
from tracmod.study.stages import stage_module


@dataclass(frozen=True)
class StagePlan:
    """One stage of a run.

    Attributes:
        stage: Its name.
        done: Whether it is finished already, so that it costs nothing.
        work: What it does, in words.
        seconds: The estimated time; None for stages of a few seconds.
        bytes: The bytes that it leaves on disk.
    """

    stage: str
    done: bool
    work: str
    seconds: float | None
    bytes: int


@dataclass(frozen=True)
class RunPlan:
    """All stages of a run.

    Attributes:
        stages: The stages, in order.
        notes: What a user should know before the run begins, a sentence each.
    """

    stages: list[StagePlan]
    notes: list[str]

    @property
    def seconds(self) -> float:
        """The estimated time of the stages that are not done."""
        return sum(stage.seconds or 0.0 for stage in self.stages if not stage.done)

    @property
    def bytes(self) -> int:
        """The bytes of the stages that are not done."""
        return sum(stage.bytes for stage in self.stages if not stage.done)


def plan_run(run: RunFolder) -> RunPlan:
    """Sample the data, load the model, time it briefly, and say what the run would do.

    Nothing is written into the run folder. Everything that the config gets wrong about data, model
    and device is found here.

    Args:
        run: The run folder, begun or not.

    Raises:
        ValueError: As the stages raise it.
    """
    check_outside_files(run.config)
    with tempfile.TemporaryDirectory() as temporary:
        data = run
        if not run.is_done("data"):
            data = RunFolder(temporary, run.config)
            run_stages(data, ["data"])
        forecast = Forecast(run, RunContext(data))
        stages = []
        for name in run.stages:
            estimate = stage_module(stage_named(name)).estimate(forecast)
            stages.append(StagePlan(name, run.is_done(name), *estimate))
        plan = RunPlan(stages, [])
        plan.notes.extend(_notes(forecast, plan))
        return plan


def _notes(forecast: Forecast, plan: RunPlan) -> Iterator[str]:
    num_train = forecast.count("train")
    for k in forecast.config.influence.ks:
        if k > num_train:
            yield f"influence.k is {k}, but there are only {num_train} training examples: all"
        elif 2 * k > num_train:
            yield (
                f"influence.k is {k} of {num_train} training examples: shares are close to the "
                f"null whatever the model does; a smaller k says more"
            )
    run = forecast.run
    existing = next(p for p in (run.path.absolute(), *run.path.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if plan.bytes > free:
        yield f"{run.path}: {plan.bytes / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free"
