"""The pipeline: the stages of a run, in order, each done once.

    data             sampled examples                                          data/
    finetune         all languages together                                    models/full/
    prune            one subnetwork of attention heads per language            subnetworks/
    sparse-finetune  each language through its subnetwork                      models/sparse/
    collect          projected gradients of every model, view, checkpoint      features/
    influence        scores, strongest examples, shares by language            influence/
    analyze          comparisons, intervals, tests, certificate                analysis/
    metagradient     derivatives through the fine-tuning (if configured)       metagradient/
    retrain          models trained without some examples (if configured)      retraining/
    report           one page                                                  report/

Each stage reads what those before it wrote, and can be stopped at any time: done again, it takes
what is whole and makes the rest. `tracmod.study.stage_table` has a record for each.
"""

from __future__ import annotations

from collections.abc import Sequence

from tracmod.analysis.language_pairs import read_distances
from tracmod.config import RunConfig
from tracmod.engine import Engine
from tracmod.files import progress
from tracmod.files.object_storage import location
from tracmod.gradients.capture import frozen_as_configured
from tracmod.study.context import RunContext
from tracmod.study.run_folder import RunFolder
from tracmod.study.stage_table import stage_named
from tracmod.study.stages import stage_module


def run_stages(
    run: RunFolder,
    stages: Sequence[str] | None = None,
    again: str | None = None,
    donors: Sequence[RunFolder] = (),
    engine: Engine | None = None,
) -> None:
    """Do the stages that are not yet done, in order.

    Args:
        run: The run folder, locked.
        stages: The names of the stages to do; those before them must be done. None for all.
        again: The name of a stage to do even if it is done. Files that are whole are not made
            again.
        donors: Runs whose finished stages and features are taken over where they are the same.
        engine: Where pruning, collecting, scoring and retraining run; None for this process.

    Raises:
        ValueError: A stage before these is not done, or `analyze.distances` or `collect.features`
            cannot be used.
    """
    check_outside_files(run.config)
    context = RunContext(run, donors, engine)
    for name in run.stages if stages is None else stages:
        if run.is_done(name) and name != again:
            continue
        stage = stage_named(name)
        if name not in run.stages:
            raise ValueError(f"{run.path}: {name}: the run's config has no section {name}")
        for earlier in run.stages[: run.stages.index(name)]:
            if not run.is_done(earlier):
                raise ValueError(
                    f"{run.path}: {name} needs {earlier}, which is not done; `tracmod run` does "
                    f"every stage that is missing"
                )
        may_share = stage.shareable and name != again
        if may_share and any(run.take_over(name, donor) for donor in donors):
            continue
        with (
            progress.kept_in(run.progress_file),
            progress.stage(name, run.stages.index(name) + 1, len(run.stages)),
            run.stage(name),
            frozen_as_configured(),
        ):
            stage_module(stage).run(context)


def check_outside_files(config: RunConfig) -> None:
    """Check the files outside the run folder now, not after days of work.

    Raises:
        ValueError: `analyze.distances` or `collect.features` cannot be used.
    """
    if config.collect.features is not None:
        location(config.collect.features)
    analyze = config.analyze
    if analyze.distances is not None:
        read_distances(analyze.distances, config.task.languages, analyze.distance_names)
