"""Commands that check gradients, files, the installation and its speed, and `merge`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from tracmod import __version__
from tracmod.attribution.options import AttributionOptions
from tracmod.choices import PassDtype, StatedLossKind
from tracmod.cli.errors import fail
from tracmod.cli.options import (
    COLUMNS,
    EXISTING,
    JSON,
    QUIET,
    GivenPath,
    ParameterNames,
    PathOrUrl,
    WholeNumber,
    choice,
    field_option,
)


@click.command()
@click.option("--model", required=True, help="Transformers folder with the model and tokenizer.")
@click.option("--data", required=True, type=EXISTING, help="Example file.")
@COLUMNS
@click.option(
    "--parameters",
    type=ParameterNames(),
    default="all",
    show_default=True,
    help="Parameters whose gradients are compared: a set of them, or patterns of the names of "
    "parameters or modules.",
)
@click.option("--head-mask", type=EXISTING, help="JSON file of a head mask to apply.")
@click.option(
    "--examples",
    type=WholeNumber(min=1),
    default=8,
    show_default=True,
    help="Number of examples, from the start of the file.",
)
@click.option(
    "--max-length",
    type=WholeNumber(),
    default=128,
    show_default=True,
    help="Tokens per example.",
)
@click.option(
    "--include-frozen",
    is_flag=True,
    help="Also compare parameters that tracmod.json names as frozen.",
)
@field_option(AttributionOptions, "loss")
@field_option(AttributionOptions, "label_smoothing")
@field_option(AttributionOptions, "class_weights")
def check(
    model: str,
    data: Path,
    columns: dict[str, str],
    parameters: str | list[str],
    head_mask: Path | None,
    examples: int,
    max_length: int,
    include_frozen: bool,
    loss: StatedLossKind | None,
    label_smoothing: float | None,
    class_weights: str | None,
) -> None:
    """Compare the engine's gradients with plain autograd.

    Uses your own model and data, and the loss that transformers itself computes. Prints the
    relative error against the model's own pass in float64 for the logits and every kind of
    parameter, beside the error of plain float32 autograd. Exits with code 1 if an error exceeds
    twice that of autograd and 1e-5, or 0.01 in any case. Warns if float32 autograd itself is
    further than 1e-4 from float64. Models and examples that `attribute` refuses are refused.

    \b
    Example:
      tracmod check --model my-model --data train.tsv
    """
    from tracmod.validation.gradients import FAR, check_model

    result = check_model(
        model,
        data,
        parameters,
        head_mask,
        examples,
        max_length,
        include_frozen,
        columns=columns,
        loss=loss,
        label_smoothing=label_smoothing,
        class_weights=class_weights,
    )
    click.echo(f"{'parameters':44} {'tensors':>7} {'engine':>9} {'autograd':>9}")
    for error in result.errors:
        row = f"{error.kind:44} {error.num_parameters:7} {error.engine:9.1e} {error.autograd:9.1e}"
        click.echo(f"{row}  {error.verdict}")
    counted, unit = result.num_examples, "texts were cut"
    if result.num_words is not None:
        counted, unit = result.num_words, "words were cut off"
    click.echo(f"{result.num_cut} of {counted} {unit} at {result.max_length} tokens")
    worst = max(result.errors, key=lambda error: error.autograd)
    if worst.autograd > FAR:
        click.echo(
            f"warning: float32 is coarse for this model and these examples: plain float32 autograd "
            f"differs from float64 by {worst.autograd:.1e} ({worst.kind})",
            err=True,
        )
    if not all(error.passed for error in result.errors):
        fail("the engine's gradients differ from autograd's")


@click.command()
@click.argument("path", type=PathOrUrl(exists=True))
@QUIET
def verify(path: Path | str) -> None:
    """Check that a run, attribution or store is undamaged.

    PATH is a run folder, a folder of `tracmod attribute` or a feature store, which may be the URL
    of object storage. Prints every file that is missing, damaged or unexpected, and exits with code
    1 if there is one.

    \b
    Examples:
      tracmod verify runs/demo
      tracmod verify runs/demo/features/full/full/checkpoint-1/train
      tracmod verify s3://bucket/both
    """
    from tracmod.validation.integrity import verify

    problems = verify(path)
    for problem in problems:
        click.echo(problem)
    if problems:
        fail(f"{path}: {len(problems)} problems")
    click.echo(f"{path}: sound")


@click.command()
@click.argument("stores", nargs=-1, required=True, type=PathOrUrl(exists=True))
@click.option(
    "--out", required=True, type=PathOrUrl(file_okay=False), help="Folder or URL of the new store."
)
@QUIET
def merge(stores: tuple[Path | str, ...], out: Path | str) -> None:
    """Copy the rows of feature stores into a new store.

    Rows are copied bit by bit, in the order given. The stores must be complete, have different
    examples, and agree in model, parameters, projection and dtype. Run the same command again to
    resume.

    \b
    Examples:
      tracmod merge a/features/checkpoint-1/train b/features/checkpoint-1/train --out both
      tracmod merge a b --out s3://bucket/both
    """
    from tracmod.features.store import FeatureStore
    from tracmod.files import progress

    rows = sum(len(FeatureStore.open(store)) for store in stores)
    with progress.bar("merge", rows) as bar:
        merged = FeatureStore.merge(out, stores, bar.update)
    click.echo(f"{out}: {len(merged)} examples of {len(stores)} stores")


@click.command()
@JSON
def doctor(as_json: bool) -> None:
    """Print versions, native build, processor and GPUs.

    \b
    Example:
      tracmod doctor --json
    """
    import torch

    from tracmod.files.versions import versions
    from tracmod.kernels import build_info

    facts: dict[str, Any] = {"tracmod": __version__, **versions()}
    facts |= {f"native {name}": value for name, value in build_info().items()}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts |= {"torch threads": torch.get_num_threads(), "GPUs": gpus or "none"}
    if as_json:
        click.echo(json.dumps(facts, indent=1))
        return
    for name, value in facts.items():
        text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        click.echo(f"{name:24} {text}")


@click.command()
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option(
    "--dtype",
    type=choice(PassDtype),
    default="float32",
    show_default=True,
    help="Precision of the inputs.",
)
@click.option(
    "--full", is_flag=True, help="Time all cases (minutes) instead of a few (less than a minute)."
)
@click.option("--json", "json_path", type=GivenPath(), help="File to write the results to.")
def bench(device: str, dtype: str, full: bool, json_path: Path | None) -> None:
    """Check the native ops against float64, then time them.

    Plain torch is timed beside them.

    \b
    Examples:
      tracmod bench
      tracmod bench --dtype bfloat16 --full --json bench.json
    """
    from tracmod.bench.bench_kernels import run_bench
    from tracmod.models.modes import resolve_device

    selection = "all" if full else "short"
    if not run_bench(resolve_device(device), dtype, json_path, selection=selection):
        fail("a result is wrong, see above")


COMMANDS = [check, verify, merge, doctor, bench]
