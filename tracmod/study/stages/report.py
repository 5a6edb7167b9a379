"""The stage `report`: report/index.html."""

from __future__ import annotations

from tracmod.report import write_report
from tracmod.study.context import RunContext
from tracmod.study.forecast import Estimate, Forecast


def run(context: RunContext) -> None:
    """Write the report of the run."""
    write_report(context.run.path)


def estimate(forecast: Forecast) -> Estimate:
    """Name the file; it takes seconds."""
    return Estimate("report/index.html")
