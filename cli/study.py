"""Commands of the study: run, sweep, the single stages, status and export."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tracmod.choices import ExportForm, ModelName
from tracmod.cli.errors import fail
from tracmod.cli.options import (
    EXISTING,
    FOLDER,
    JSON,
    RUN_OPTIONS,
    choice,
    engine_of,
    with_options,
)
from tracmod.files.progress import announce, describe, duration, set_quiet
from tracmod.study.stage_table import STAGES, Stage, stage_named, stages_through

if TYPE_CHECKING:
    from tracmod.study.run_folder import RunFolder
    from tracmod.study.status import RunStatus


@click.command()
@click.argument("config")
@click.option(
    "--out", required=True, type=FOLDER, help="Run folder; created, or continued if it exists."
)
@click.option(
    "--check",
    is_flag=True,
    help="Only print what would be done: the passes, time and disk space of every stage, estimated "
    "by a short probe.",
)
@with_options(RUN_OPTIONS)
def run(config: str, out: Path, check: bool, **options: Any) -> None:
    """Run the stages of CONFIG that are not yet done.

    CONFIG is a YAML file or the name of a built-in configuration (demo, planted, entities,
    xnli, pawsx, marc, ...). Run the same command again to resume.

    \b
    Examples:
      tracmod run demo --out runs/demo
      tracmod run xnli --out runs/xnli --check
      tracmod run xnli --out runs/xnli --set task.train_per_language=5000
    """
    from tracmod.config import load_config
    from tracmod.study.run_folder import RunFolder

    folder = RunFolder(out, load_config(config, _overrides(**options)))
    if check:
        _print_plan(folder)
        return
    _run_stages(folder, folder.stages, options)
    click.echo(f"report: {out / 'report' / 'index.html'}")


def _print_plan(folder: RunFolder) -> None:
    from tracmod.study.plan import plan_run

    announce("sampling the data and measuring, which takes some seconds")
    set_quiet(True)
    plan = plan_run(folder)
    click.echo(f"{'stage':16} {'state':6} {'time':>8} {'disk':>9}  work")
    for stage in plan.stages:
        seconds = "-" if stage.seconds is None else duration(stage.seconds)
        state = "done" if stage.done else "to do"
        click.echo(f"{stage.stage:16} {state:6} {seconds:>8} {_size(stage.bytes):>9}  {stage.work}")
    low, high = map(duration, plan.range)
    spread = "" if low == high else f" (between {low} and {high})"
    total = f"about {duration(plan.seconds)}{spread} and {_size(plan.bytes)}"
    click.echo(f"\nto do: {total} on free cores of this machine; at most, for pruning")
    if plan.busy_cores is not None:
        cores, threads = plan.busy_cores
        click.echo(
            f"this machine is busy: a product of matrices got {cores:.1f} of {threads} cores. The "
            f"times above are made from CPU time, as for free cores; under the present load the "
            f"run would take about {duration(plan.seconds_now)}"
        )
    for note in plan.notes:
        click.echo(f"note: {note}")


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


@click.command()
@click.argument("config")
@click.option(
    "--out", required=True, type=FOLDER, help="Folder for the run folders and for the results."
)
@click.option(
    "--check",
    is_flag=True,
    help="Only print which stages would be done, and which are shared between points.",
)
@with_options(RUN_OPTIONS)
def sweep(config: str, out: Path, check: bool, **options: Any) -> None:
    """Do runs that differ in some settings and compare them.

    CONFIG is a YAML file or the name of a built-in sweep (sparsity, thresholds, difficulty,
    typology, leave-one-out, imbalance, zero-shot, ...): a base configuration, and points or a grid
    of settings. Every point has a run folder in --out; stages that points have in common are done
    once. Writes a table and figures of all points: sweep.parquet, sweep.csv and sweep.html. Run the
    same command again to resume.

    \b
    Examples:
      tracmod sweep thresholds --out runs/thresholds --check
      tracmod sweep thresholds --out runs/thresholds --set finetune.epochs=5
      tracmod sweep my-sweep.yaml --out runs/mine
    """
    from tracmod.study.sweep import load_sweep, run_sweep, sweep_plan

    loaded = load_sweep(config, _overrides(**options))
    if check:
        for point, stages in sweep_plan(loaded, out).items():
            states = [f"{stage}: {state}" for stage, state in stages.items()]
            click.echo(f"{point}\n  {', '.join(states)}")
        return
    device = next(iter(loaded.points.values())).device
    with engine_of(device, **options) as engine:
        failed = run_sweep(loaded, out, click.echo, engine)
    if failed:
        fail(f"{len(failed)} of {len(loaded.points)} points failed: {', '.join(failed)}")
    click.echo(f"table: {out / 'sweep.csv'}, figures: {out / 'sweep.html'}")


def _stage_command(stage: Stage) -> click.Command:
    """Return the command that does one stage of a run folder."""
    paragraphs = [stage.summary, stage.details] if stage.details else [stage.summary]
    example = f"\b\nExample:\n  tracmod {stage.name} runs/demo {stage.options}".rstrip()

    @click.command(stage.name, help="\n\n".join([*paragraphs, example]))
    @click.argument("run_dir", type=FOLDER)
    @click.option(
        "--config",
        help="YAML file or name of a built-in configuration, needed to create a run folder.",
    )
    @with_options(RUN_OPTIONS)
    def command(run_dir: Path, config: str | None, **options: Any) -> None:
        from tracmod.config import load_config, override_config
        from tracmod.study.run_folder import RunFolder

        overrides = _overrides(**options)
        if config is not None:
            folder = RunFolder(run_dir, load_config(config, overrides))
        else:
            folder = RunFolder(run_dir)
            if stage.requires and getattr(folder.config, stage.requires) is None:
                overrides = (f"{stage.requires}={{}}", *overrides)
            folder = RunFolder(run_dir, override_config(folder.config, overrides))
        stages = [stage.name]
        if stage.name == "finetune":  # it also does what comes before it
            stages = [earlier.name for earlier in stages_through(stage.name)]
        _run_stages(folder, stages, options, again=stage.name)

    return command


def _overrides(overrides: tuple[str, ...], memory: int | None, **_: Any) -> tuple[str, ...]:
    """Return the overrides of the configuration that the options of a run stand for."""
    return overrides if memory is None else (*overrides, f"influence.memory={memory}")


def _run_stages(
    folder: RunFolder, stages: Sequence[str], options: dict[str, Any], again: str | None = None
) -> None:
    """Do stages that are not done yet, and the stage `again` in any case."""
    from tracmod.models.modes import resolve_device
    from tracmod.study.pipeline import run_stages

    device = "cpu"
    to_do = [stage for stage in stages if stage == again or not folder.is_done(stage)]
    if any(stage_named(stage).uses_model for stage in to_do):
        device = resolve_device(folder.config.device)
    with folder.locked(), engine_of(device, **options) as engine:
        done = sum(map(folder.is_done, folder.stages))
        state = f"{folder.path}: {done} of {len(folder.stages)} stages are done"
        if to_do:
            state += (
                f"; run the same command again to resume; `tracmod status {folder.path}` shows the "
                "progress"
            )
        announce(state)
        run_stages(folder, stages, again, engine=engine)


@click.command()
@click.argument("run_dir", type=EXISTING)
@JSON
def status(run_dir: Path, as_json: bool) -> None:
    """Show the progress of a run or a sweep.

    Prints the state of the stages, how far the stage is that runs or was stopped, the features that
    are written, and the last message of every worker. For the folder of a sweep, prints a line per
    point. Reads only what is on disk, so it works while the run is in progress and after it was
    killed, on any machine that shares the folder.

    \b
    Example:
      tracmod status runs/demo
    """
    from tracmod.study.status import run_status, sweep_status

    points = sweep_status(run_dir)
    if points is not None:
        _print_sweep_status(run_dir, points, as_json)
        return
    progress = run_status(run_dir)
    if as_json:
        click.echo(json.dumps(asdict(progress), indent=1))
        return
    state = _state(progress)
    click.echo(f"{run_dir}: {'done, not running' if state == 'done' else state}")
    for stage, state, seconds in progress.stages:
        shown = "stopped" if state == "running" and not progress.working else state
        click.echo(f"  {stage:16} {shown:12} {duration(seconds) if seconds else ''}")
        if state in ("running", "interrupted"):
            for bar in progress.progress[1:]:  # the first is the stage itself
                click.echo(f"    {describe(bar)}")
    click.echo(f"features: {progress.shards} of {progress.shards_wanted} shards written")
    if progress.rankings:
        click.echo(f"influence: {progress.rankings} rankings written")
    for worker, line in progress.logs.items():
        click.echo(f"{worker}: {line}")


def _state(progress: RunStatus) -> str:
    """Return whether a run is done, running or stopped, and since when nothing was written."""
    if all(state == "done" for _, state, _ in progress.stages):
        return "done"
    since = f"last change {duration(progress.unchanged or 0.0)} ago"
    if progress.working:
        return f"running, {since}"
    return f"not running, {since}; run the same command again to resume"


def _print_sweep_status(out: Path, points: dict[str, RunStatus | None], as_json: bool) -> None:
    """Print how many points of a sweep are done, and a line for each."""
    if as_json:
        trees = {name: None if point is None else asdict(point) for name, point in points.items()}
        click.echo(json.dumps(trees, indent=1))
        return
    states = {name: "to do" if point is None else _state(point) for name, point in points.items()}
    done = sum(state == "done" for state in states.values())
    click.echo(f"{out}: {done} of {len(points)} points done")
    for name, point in points.items():
        stages = [] if point is None else [s for s, state, _ in point.stages if state == "done"]
        count = "" if point is None else f" ({len(stages)} of {len(point.stages)} stages done)"
        click.echo(f"  {name}: {states[name]}{'' if states[name] == 'done' else count}")
        if point is not None and point.progress and states[name] != "done":
            click.echo(f"    {'; '.join(map(describe, point.progress))}")


@click.command()
@click.argument("run_dir", type=EXISTING)
@click.option("--language", help="Language whose subnetwork is exported.")
@click.option("--mask", type=EXISTING, help="JSON file of a head mask, in place of --language.")
@click.option(
    "--model",
    type=choice(ModelName),
    default="full",
    show_default=True,
    help="Model whose last checkpoint is exported.",
)
@click.option(
    "--form",
    type=choice(ExportForm),
    default="masked",
    show_default=True,
    help="masked: weights of masked heads are zero, all shapes are kept; pruned: masked heads are "
    "removed, which makes the model smaller and faster.",
)
@click.option("--out", required=True, type=FOLDER, help="Folder to create.")
def export(run_dir: Path, out: Path, **options: Any) -> None:
    """Export a model restricted to a language's subnetwork.

    Both forms give the logits of the masked model. transformers loads the masked form like any
    other folder. The layers of the pruned form may differ in their number of heads, so it is loaded
    with tracmod.load_pruned.

    \b
    Examples:
      tracmod export runs/demo --language de --out demo-de
      tracmod export runs/demo --mask my-mask.json --model sparse --form pruned --out demo-mine
    """
    from tracmod.study.export import export_subnetwork

    exported = export_subnetwork(run_dir, out, **options)
    heads, size = exported.mask.size, exported.mask.array.size
    click.echo(
        f"{out}: {heads} of {size} heads, {exported.num_bytes:,} bytes of weights; load with "
        f"{exported.loader}"
    )


COMMANDS = [
    run,
    sweep,
    # `finetune` also draws the examples, so `data` is no command of its own.
    *(_stage_command(stage) for stage in STAGES if stage.name != "data"),
    status,
    export,
]
