"""The stage `analyze`: comparisons, intervals, tests and the certificate, into analysis/."""

from __future__ import annotations

import shutil

from tracmod.analysis.summary import analyze
from tracmod.files.durable import write_csv, write_parquet
from tracmod.study.context import RunContext
from tracmod.study.forecast import Estimate, Forecast
from tracmod.study.stages.influence_fidelity import certify_run
from tracmod.validation.planted import planted_answers


def run(context: RunContext) -> None:
    """Analyze the tables of the stage `influence`, afresh."""
    shutil.rmtree(context.run.analysis, ignore_errors=True)
    certify_run(context)
    config = context.config.analyze
    analyze(
        context.run.path,
        bootstrap=config.bootstrap,
        permutations=config.permutations,
        confidence=config.confidence,
        seed=context.config.seed,
        distances=config.distances,
        distance_names=config.distance_names,
    )
    if context.config.task.name == "planted":
        answers = planted_answers(context.run.path, context.resampling)
        write_parquet(context.run.analysis / "planted.parquet", answers)
        write_csv(context.run.analysis / "planted.csv", answers)


def estimate(forecast: Forecast) -> Estimate:
    """Say what is compared; it takes seconds."""
    return Estimate("comparisons, intervals, tests")
