"""One module for each stage of a run; `tracmod.study.stage_table` lists them in order."""

from __future__ import annotations

from importlib import import_module
from typing import Protocol, cast

from tracmod.study.context import RunContext
from tracmod.study.forecast import Estimate, Forecast
from tracmod.study.stage_table import Stage


class StageModule(Protocol):
    """The functions that the module of every stage has."""

    def run(self, context: RunContext) -> None:
        """Do the stage; files that are there and right are not made again."""

    def estimate(self, forecast: Forecast) -> Estimate:
        """Say what the stage would do, in words, seconds and bytes."""


def stage_module(stage: Stage) -> StageModule:
    """Import the module of a stage."""
    return cast(StageModule, import_module(stage.module))
