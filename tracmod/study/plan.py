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
        seconds: The estimated time on free cores; None for stages of a few seconds.
        bytes: The bytes that it leaves on disk.
        range: The time on free cores by the fastest and the slowest measurements.
        seconds_now: The estimated time under the present load.
    """

    stage: str
    done: bool
    work: str
    seconds: float | None
    bytes: int
    range: tuple[float, float] = (0.0, 0.0)
    seconds_now: float | None = None


@dataclass(frozen=True)
class RunPlan:
    """All stages of a run.

    Attributes:
        stages: The stages, in order.
        notes: What a user should know before the run begins, a sentence each.
        busy_cores: On a machine that others use, the cores that this process got, and those that it
            has threads for; None if the cores are free.
    """

    stages: list[StagePlan]
    notes: list[str]
    busy_cores: tuple[float, int] | None = None

    @property
    def seconds(self) -> float:
        """The estimated time of the stages that are not done, on free cores."""
        return sum(stage.seconds or 0.0 for stage in self.stages if not stage.done)

    @property
    def seconds_now(self) -> float:
        """The same under the present load."""
        return sum(stage.seconds_now or 0.0 for stage in self.stages if not stage.done)

    @property
    def range(self) -> tuple[float, float]:
        """The time on free cores by the fastest and the slowest measurements."""
        ranges = [stage.range for stage in self.stages if not stage.done]
        return sum(low for low, _ in ranges), sum(high for _, high in ranges)

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
            estimates = {}
            for forecast.clock in ("free", "low", "high", "now"):
                estimates[forecast.clock] = stage_module(stage_named(name)).estimate(forecast)
            low, high = (estimates[clock].seconds or 0.0 for clock in ("low", "high"))
            now = estimates["now"].seconds
            stages.append(StagePlan(name, run.is_done(name), *estimates["free"], (low, high), now))
        stopwatch = forecast.stopwatch
        cores = (stopwatch.cores, stopwatch.threads) if stopwatch.is_busy else None
        plan = RunPlan(stages, [], cores)
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
