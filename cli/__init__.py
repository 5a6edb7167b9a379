"""The `tracmod` command: thin click commands over the package. `--help` loads no torch."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tracmod import __version__

if TYPE_CHECKING:
    from tracmod.engine import Engine
    from tracmod.influence.index import InfluenceIndex
    from tracmod.study.run_folder import RunFolder

EXISTING = click.Path(exists=True, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)


class _PathOrUrl(click.Path):
    """A path, or the URL of object storage as text: a Path would lose a slash."""

    def __init__(self, **options: Any) -> None:
        super().__init__(path_type=Path, **options)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if "://" in str(value) else super().convert(value, param, ctx)


PARAMETERS = click.Choice(["encoder", "all", "attention", "classifier"])


class _Group(click.Group):
    """Errors as one sentence: 2 for what the user can put right, 1 for a failed run, 130 for ^C."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except ValueError as error:
            _fail(_one_line(error), 2)
        except KeyboardInterrupt:
            _fail("stopped; the same command goes on where it was", 130)
        except Exception as error:
            if os.environ.get("TRACMOD_TRACEBACK"):
                raise
            _fail(f"{_one_line(error)} (TRACMOD_TRACEBACK=1 shows where)", 1)


def _one_line(error: BaseException) -> str:
    sentence = " ".join(str(error).split())
    known = isinstance(error, (ValueError, OSError, RuntimeError))
    return sentence if known and sentence else f"{type(error).__name__}: {sentence}"


def _fail(sentence: str, code: int) -> None:
    click.echo(f"tracmod: {sentence}", err=True)
    sys.exit(code)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="tracmod")
def main() -> None:
    """Which languages' training data does a multilingual classifier rely on?

    \b
    The whole study, embedded data:   tracmod run demo --out runs/demo
    On your own model and data:       tracmod attribute --model DIR --train T.tsv --query Q.tsv --out O
    What was built, what is found:    tracmod doctor
    """  # noqa: E501


# --- the study ------------------------------------------------------------------------------


def _options(options: list[Any]) -> Callable[[Any], Any]:
    """Several options as one decorator, in the order they are listed in --help."""
    return lambda command: functools.reduce(lambda inner, add: add(inner), options[::-1], command)


_RUN_OPTIONS = [
    click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        help="Override one value of the config, such as --set finetune.epochs=5; repeatable.",
    ),
    click.option(
        "--engine",
        type=click.Choice(["local", "ray"]),
        default="local",
        show_default=True,
        help="Where pruning, collecting and scoring run: on this machine, or on a Ray cluster.",
    ),
    click.option(
        "--address",
        help="Of the Ray cluster; auto: the one begun here with `ray start`. Absent: one of this "
        "machine alone, for this command.",
    ),
    click.option(
        "--workers",
        type=click.IntRange(min=1),
        help="Tasks done at a time. Absent: local 1, or one for each GPU; on Ray as many as fit.",
    ),
    click.option(
        "--worker-cpus",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        help="Cores and threads of each worker on Ray.",
    ),
    click.option(
        "--memory",
        help="What scoring may take for features, rankings and buffers, such as 4GB (the default); "
        "no number of training examples needs more. Short for --set influence.memory=4GB.",
    ),
]
_VIEW_OPTIONS = [
    click.option(
        "--model",
        type=click.Choice(["full", "sparse"]),
        default="full",
        show_default=True,
        help="Fine-tuned on all languages together, or each through its subnetwork.",
    ),
    click.option(
        "--view", default="full", show_default=True, help="full, subnetwork, random-0, ..."
    ),
    click.option("--mask", help="Language of the mask, for views with one per language."),
]


@main.command()
@click.argument("config")
@click.option("--out", required=True, type=FOLDER, help="Run folder; begun or gone on with.")
@click.option(
    "--check",
    is_flag=True,
    help="Only say what would be done: passes, time and disk of every stage, from a short probe.",
)
@_options(_RUN_OPTIONS)
def run(config: str, out: Path, check: bool, **options: Any) -> None:
    """Do every stage of CONFIG that is not yet done in the run folder.

    CONFIG is a YAML file or the name of an embedded one (demo, planted, xnli, pawsx, marc). Stopped
    at any time, the same command goes on where it was.

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
        _show_plan(folder)
        return
    _do(folder, folder.stages, options)
    report = out / "report" / "index.html"
    click.echo(f"report: {report}")


def _show_plan(folder: RunFolder) -> None:
    from tracmod.study.plan import plan_run

    plan = plan_run(folder)
    click.echo(f"{'stage':16} {'state':6} {'time':>8} {'disk':>9}  work")
    for one in plan.stages:
        seconds = "-" if one.seconds is None else _duration(one.seconds)
        state = "done" if one.done else "to do"
        click.echo(f"{one.stage:16} {state:6} {seconds:>8} {_size(one.bytes):>9}  {one.work}")
    total = f"about {_duration(plan.seconds)} and {_size(plan.bytes)}"
    click.echo(f"\nto do: {total} on this machine as it is now; pruning at its longest")
    for note in plan.notes:
        click.echo(f"note: {note}")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


@main.command()
@click.argument("config")
@click.option("--out", required=True, type=FOLDER, help="Folder of the runs and of the results.")
@click.option("--check", is_flag=True, help="Say which stages are to be done and which are shared.")
@_options(_RUN_OPTIONS)
def sweep(config: str, out: Path, check: bool, **options: Any) -> None:
    """Do many runs that differ in some settings; one table and figure of them all.

    CONFIG is a YAML file or the name of an embedded one (sparsity, thresholds, difficulty,
    typology, leave-one-out, imbalance, zero-shot): base, and points or a grid of settings. Every
    point is a run folder in --out; what points share is done once. Written: sweep.html,
    sweep.parquet, sweep.csv. Stopped at any time, the same command goes on where it was.

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
            told = [f"{stage}: {how}" for stage, how in stages.items()]
            click.echo(f"{point}\n  {', '.join(told)}")
        return
    device = next(iter(loaded.points.values())).device
    with _engine(device, **options) as engine:
        failed = run_sweep(loaded, out, click.echo, engine)
    if failed:
        _fail(f"{len(failed)} of {len(loaded.points)} points failed: {', '.join(failed)}", 1)
    click.echo(f"table: {out / 'sweep.csv'}, figures: {out / 'sweep.html'}")


def _stage(stage: str, does: str, example: str = "") -> None:
    """Add the command of one stage on a run folder."""

    @main.command(stage, help=f"{does}\n\n\b\nExample:\n  tracmod {stage} runs/demo{example}")
    @click.argument("run_dir", type=FOLDER)
    @click.option("--config", help="YAML file or embedded name; needed to begin a run folder.")
    @_options(_RUN_OPTIONS)
    def command(run_dir: Path, config: str | None, **options: Any) -> None:
        from tracmod.config import load_config, override_config
        from tracmod.study.run_folder import RunFolder

        overrides = _overrides(**options)
        if config is not None:
            folder = RunFolder(run_dir, load_config(config, overrides))
        else:
            folder = RunFolder(run_dir)
            if stage == "retrain" and folder.config.retrain is None:
                overrides = ("retrain={}", *overrides)
            folder = RunFolder(run_dir, override_config(folder.config, overrides))
        stages = ["data", stage] if stage == "finetune" else [stage]
        _do(folder, stages, options, again=stage)


def _overrides(overrides: tuple[str, ...], memory: str | None, **_: Any) -> tuple[str, ...]:
    """What the options of a run change in its config."""
    return overrides if memory is None else (*overrides, f"influence.memory={memory}")


def _engine(
    device: str,
    engine: str,
    address: str | None,
    workers: int | None,
    worker_cpus: int,
    **_: Any,
) -> closing[Engine]:
    """The engine that the options of a run ask for; `device` is its config's."""
    import torch

    from tracmod.engine import open_engine
    from tracmod.models.modes import resolve_device

    if engine == "local" and workers is None and resolve_device(device) == "cuda":
        workers = torch.cuda.device_count()
    return closing(open_engine(engine, address, workers, worker_cpus))


def _do(folder: RunFolder, stages: Any, options: dict[str, Any], again: str | None = None) -> None:
    from tracmod.models.modes import resolve_device
    from tracmod.study.pipeline import run_stages

    device = "cpu"
    to_do = [stage for stage in stages if stage == again or not folder.is_done(stage)]
    if not {"data", "analyze", "report"}.issuperset(to_do):  # the others compute with the model
        device = resolve_device(folder.config.device)
    with folder.locked(), _engine(device, **options) as engine:
        run_stages(folder, stages, again, engine=engine)


_stage("finetune", "Sample the data and fine-tune on all languages.", " --config demo")
_stage("prune", "Prune attention heads to one subnetwork per language.")
_stage("sparse-finetune", "Fine-tune again, each language only its subnetwork.")
_stage("collect", "Collect the features of every model, view and checkpoint.")
_stage("influence", "Score influence; write the strongest examples and language tables.")
_stage("analyze", "Compare views and models; intervals and tests.")
_stage(
    "retrain",
    "Train the model again without some examples: does that do what influence says?\n\n"
    "Without a section retrain in the run's config, with its defaults; `tracmod run` with the same "
    "--set and --check says how many trainings that is.",
    " --set retrain.subsets=16",
)
_stage("report", "Write report/index.html.")


# --- any model ------------------------------------------------------------------------------


@main.command()
@click.option(
    "--model", help="Transformers folder with its tokenizer. Absent: the last checkpoint."
)
@click.option(
    "--checkpoints",
    "folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Output folder of a training: every checkpoint-<number> in it, in that order.",
)
@click.option(
    "--checkpoint",
    "checkpoints",
    multiple=True,
    type=EXISTING,
    help="One folder saved in training, in place of --checkpoints; repeatable, in order. Neither: "
    "the model, with weight 1.",
)
@click.option("--train", required=True, type=EXISTING, help="Training examples.")
@click.option("--query", required=True, type=EXISTING, help="Examples to explain.")
@click.option("--out", required=True, type=FOLDER, help="Folder for the results.")
@click.option("-k", default=100, show_default=True, help="Proponents and opponents per query.")
@click.option(
    "--exact", is_flag=True, help="Whole gradients, no projection; exact/, not features/."
)
@click.option(
    "--projection-dim",
    default="4096",
    show_default=True,
    metavar="K|auto",
    help="Numbers per example; auto: as few as a sample scored exactly allows, 512 to 16384.",
)
@click.option(
    "--share-error",
    type=click.FloatRange(0, min_open=True),
    default=0.02,
    show_default=True,
    help="With auto: what the mean error in language shares is to stay below, at 95%.",
)
@click.option(
    "--normalize",
    type=click.Choice(["cosine", "none"]),
    default="cosine",
    show_default=True,
    help="Cosine of gradients per checkpoint, or plain inner products.",
)
@click.option("--head-mask", type=EXISTING, help="JSON of a mask, applied to both gradients.")
@click.option(
    "--parameters",
    type=PARAMETERS,
    default="encoder",
    show_default=True,
    help="Whose gradients: all but the embeddings, all, the heads', or the classifier's.",
)
@click.option(
    "--preconditioner",
    type=click.Choice(["none", "adam", "ekfac"]),
    default="none",
    show_default=True,
    help="Metric of inner products: of Adam's steps (checkpoints need its second moment, see "
    "tracmod.TracInCallback), or of the model's curvature, fitted on --train.",
)
@click.option("--seed", default=0, show_default=True, help="Of the projection.")
@click.option("--max-length", type=int, help="Tokens per example; absent: the model's, up to 512.")
@click.option("--batch-tokens", default=8192, show_default=True, help="Tokens per batch.")
@click.option(
    "--memory",
    default="4GB",
    show_default=True,
    help="What scoring may take for features, rankings and buffers.",
)
@click.option("--device", help="cpu, cuda, cuda:1; absent: a GPU if there is one.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Of the forward and backward pass.",
)
@click.option(
    "--store-dtype",
    type=click.Choice(["float32", "bfloat16", "float16", "int8"]),
    default="float32",
    show_default=True,
    help="Of the features on disk; int8: a quarter of the size, with a scale per example.",
)
def attribute(
    model: str | None,
    folder: Path | None,
    checkpoints: tuple[Path, ...],
    normalize: str,
    memory: str,
    projection_dim: str,
    **options: Any,
) -> None:
    """Which training examples raised or lowered the loss of each query, and of which language?

    Example files (.tsv, .csv, .jsonl, .parquet; .gz too) have the columns id, language, text_a,
    text_b (may be absent), label and group (may be absent). Written to --out: top.parquet,
    languages.parquet, examples.parquet, self_influence.parquet, fidelity.json (how well the scores
    stand for exact ones, on a sample), run.json and features/ (with --exact, each checkpoint's
    scores in exact/). Positive scores: the training example lowered the query's loss.

    The same command goes on where it was stopped. Where examples were added at the end of a file,
    it collects theirs alone.

    A checkpoint counts with the mean learning rate of its steps, from tracmod.json, which
    tracmod.TracInCallback has a transformers Trainer write, or else as logged by the Trainer.

    \b
    Examples:
      tracmod attribute --checkpoints my-training --train train.tsv --query test.tsv --out influence
      tracmod attribute --model my-model --checkpoint my-model/checkpoint-500 \\
          --checkpoint my-model/checkpoint-1000 --train train.tsv --query test.tsv --out influence
    """
    from tracmod.attribution.attribute import attribute, given_checkpoints
    from tracmod.attribution.options import AttributionOptions
    from tracmod.config import parse_bytes

    source, given = given_checkpoints(model, checkpoints, folder)
    if projection_dim != "auto" and not projection_dim.isdecimal():
        raise ValueError(f"projection-dim: expected a number or auto, got {projection_dim!r}")
    options["projection_dim"] = None if projection_dim == "auto" else int(projection_dim)
    normalized = None if normalize == "none" else normalize
    asked = AttributionOptions(
        source, checkpoints=given, normalize=normalized, memory=parse_bytes(memory), **options
    )
    attribute(asked)
    click.echo(f"written: {options['out']}/top.parquet, languages.parquet, run.json")


@main.command()
@click.option("--model", required=True, help="Transformers folder with its tokenizer.")
@click.option("--data", required=True, type=EXISTING, help="Example file.")
@click.option(
    "--parameters", type=PARAMETERS, default="all", show_default=True, help="Which to compare."
)
@click.option("--head-mask", type=EXISTING, help="JSON of a mask to check under.")
@click.option(
    "--examples",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="How many of the file's first.",
)
@click.option("--max-length", default=128, show_default=True, help="Tokens per example.")
def check(
    model: str, data: Path, parameters: str, head_mask: Path | None, examples: int, max_length: int
) -> None:
    """Compare the engine's gradients with plain autograd on your own model and data.

    Prints the relative error per kind of parameter, beside the error that plain float32 autograd
    itself makes against float64. Exit code 1 if one is worse than twice that (floor 1e-5).

    \b
    Example:
      tracmod check --model my-model --data train.tsv
    """
    from tracmod.validation.gradients import check_model

    errors = check_model(model, data, parameters, head_mask, examples, max_length)
    click.echo(f"{'parameters':44} {'tensors':>7} {'engine':>9} {'autograd':>9}")
    for error in errors:
        verdict = "ok" if error.passed else "WRONG"
        row = f"{error.kind:44} {error.num_parameters:7} {error.engine:9.1e} {error.autograd:9.1e}"
        click.echo(f"{row}  {verdict}")
    if not all(error.passed for error in errors):
        _fail("the engine's gradients differ from autograd's", 1)


@main.command()
@click.argument("folder", metavar="RUN", type=EXISTING)
@_options(_VIEW_OPTIONS)
@click.option(
    "--kind",
    type=click.Choice(["flat", "sq8", "ivf", "ivfpq", "hnsw"]),
    default="flat",
    show_default=True,
    help="flat is exact; the others are smaller or faster.",
)
@click.option(
    "--recall",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.95,
    show_default=True,
    help="Share of the exact top 100 that a search should find; more lists are probed for it.",
)
@click.option(
    "--memory", default="4GB", show_default=True, help="What training may take beside the index."
)
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    help="cpu, cuda, cuda:1: where lists are clustered; a GPU needs faiss-gpu, and ivf or ivfpq.",
)
def index(
    folder: Path,
    model: str,
    view: str,
    mask: str | None,
    kind: str,
    recall: float,
    memory: str,
    device: str,
) -> None:
    """Build a FAISS index over training features; `tracmod query` then uses it.

    RUN is a run folder or a folder of `tracmod attribute`. The index holds one row per training
    example, of the numbers of all checkpoints. Its recall is measured with features of the test or
    query examples.

    \b
    Examples:
      tracmod index runs/demo --kind hnsw
      tracmod index influence --kind ivfpq --recall 0.9 --memory 16GB
    """
    from tracmod.attribution.query import Attributor
    from tracmod.config import parse_bytes

    in_training = parse_bytes(memory)
    attributor = Attributor(folder, model, view, mask)
    built = attributor.build_index(kind, recall=recall, memory=in_training, device=device)
    _show_index(built, attributor.index_path)


def _show_index(built: InfluenceIndex, path: Path) -> None:
    count, found, seconds = len(built.ids), built.recall, built.seconds
    disk = sum((path / name).stat().st_size for name in ("index.faiss", "index.json"))
    click.echo(f"{path}: {built.kind}, {count:,} examples")
    click.echo(
        f"bytes per example: {disk / count:,.0f} on disk, {built.bytes_per_example:,.0f} in memory "
        f"and {built.fixed_bytes:,} bytes once"
    )
    click.echo(
        f"recall@{found['k']} against exact, {found['queries']} queries: "
        f"{found['proponents']:.3f} of proponents, {found['opponents']:.3f} of opponents"
    )
    if built.kind in ("ivf", "ivfpq"):
        click.echo(f"lists probed by a search: {built.effort:,} of {built.index.nlist:,}")
    if built.kind == "hnsw":
        click.echo(f"candidates kept by a search: {built.effort:,}")
    click.echo(
        f"seconds: {seconds['train']:.1f} training, {seconds['add']:.1f} adding, "
        f"{seconds['measure']:.1f} measuring"
    )


@main.command()
@click.argument("folder", metavar="RUN", type=EXISTING)
@click.argument("text")
@click.option("--text-b", help="Second text of a pair.")
@click.option("--label", help="Its label; absent: the model's prediction.")
@click.option(
    "--language",
    "languages",
    multiple=True,
    help="Only training examples of this language; repeatable. None: of all.",
)
@_options(_VIEW_OPTIONS)
@click.option("-k", default=5, show_default=True, help="Proponents and opponents.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def query(
    folder: Path,
    text: str,
    text_b: str | None,
    label: str | None,
    languages: tuple[str, ...],
    model: str,
    view: str,
    mask: str | None,
    k: int,
    as_json: bool,
) -> None:
    """Show the training examples that speak for and against a new example's label.

    RUN is a run folder or a folder of `tracmod attribute`. Scores are those of the stored features,
    with an index (`tracmod index`) too: it only chooses which are read.

    \b
    Examples:
      tracmod query runs/demo "The sad king is waiting in the evening." \\
          --text-b "The king is not waiting in the evening."
      tracmod query runs/demo "The sad king is not waiting." --text-b "The king is happy." \\
          --label contradiction --language de --language ru --json
      tracmod query influence "What a film!"
    """
    from tracmod.attribution.query import Attributor

    attributor = Attributor(folder, model, view, mask)
    answer = attributor.query(text, text_b, label, k, languages or None)
    if as_json:
        click.echo(json.dumps(answer, ensure_ascii=False, indent=1))
        return
    by = "exact" if answer["index"] is None else f"candidates of the {answer['index']} index"
    click.echo(f"label {answer['label']}, predicted {answer['prediction']}; {by}")
    for side, meaning in (("proponents", "lowered"), ("opponents", "raised")):
        click.echo(f"\n{side} (training examples that {meaning} its loss)")
        for row in answer[side]:
            texts = " | ".join(text for text in (row["text_a"], row["text_b"]) if text)
            score, where = f"{row['score']:+.3e}", f"{row['language']:>4} {row['label']:14}"
            click.echo(f"{row['rank']:4} {score}  {where} {texts}")


@main.command()
@click.argument("run_dir", type=EXISTING)
@click.option("--language", help="Whose subnetwork.")
@click.option("--mask", type=EXISTING, help="JSON of another mask, in place of a language's.")
@click.option(
    "--model",
    type=click.Choice(["full", "sparse"]),
    default="full",
    show_default=True,
    help="Whose last checkpoint.",
)
@click.option(
    "--form",
    type=click.Choice(["masked", "pruned"]),
    default="masked",
    show_default=True,
    help="Masked heads zero, the same shapes; or taken out, smaller and faster.",
)
@click.option("--out", required=True, type=FOLDER, help="Folder to make.")
def export(run_dir: Path, out: Path, **options: Any) -> None:
    """Write a run's model, as it is in a language's subnetwork, as a model of its own.

    Both forms give the logits of the masked model. transformers loads the masked form like any
    other folder; the pruned one, whose layers may differ in their number of heads, is loaded by
    tracmod.load_pruned.

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


# --- for papers and for looking --------------------------------------------------------------


@main.command()
@click.argument("run_dir", metavar="RUN", type=EXISTING)
@click.option(
    "--format",
    "form",
    type=click.Choice(["pdf", "svg", "png"]),
    default="pdf",
    show_default=True,
    help="pdf with its fonts in it, svg with text as text, png of 300 dots per inch.",
)
@click.option(
    "--width",
    type=click.Choice(["column", "page"]),
    default="page",
    show_default=True,
    help="3.3 or 6.9 inches; text is 7 points and more in both.",
)
@click.option("--out", type=FOLDER, help="Folder for the files. Absent: RUN/figures.")
def figures(run_dir: Path, form: str, width: str, out: Path | None) -> None:
    """Draw a run's results for a paper, a file per figure.

    Influence between languages under every view and its changes, reliance on the own language,
    its course over the epochs, accuracy, subnetworks, pruning, similarity against influence, and
    influence by head and layer. What the analysis has no table for is left out. Without titles that
    a caption would repeat: the names of the files say what they are.

    \b
    Examples:
      tracmod figures runs/demo
      tracmod figures runs/demo --format svg --width column --out paper/figures
    """
    from tracmod.report.paper.figures import write_figures

    written = write_figures(run_dir, out or run_dir / "figures", form=form, width=width)
    for path in written.files:
        click.echo(path)
    for text in written.left_out:
        click.echo(f"tracmod: left out: {text}", err=True)


@main.command()
@click.argument("run_dir", metavar="RUN", type=EXISTING)
@click.option(
    "--format",
    "form",
    type=click.Choice(["csv", "latex", "markdown"]),
    default="csv",
    show_default=True,
    help="csv: all digits; latex (booktabs) and markdown: as they are read, with intervals.",
)
@click.option("--out", type=FOLDER, help="Folder for the files. Absent: RUN/tables.")
def tables(run_dir: Path, form: str, out: Path | None) -> None:
    """Write every table of a run's analysis and retraining as CSV, LaTeX or Markdown.

    Beside the tables of analysis/, its summary and retraining/, each language x language matrix:
    rows are languages of test examples, columns languages of training examples.

    \b
    Examples:
      tracmod tables runs/demo
      tracmod tables runs/demo --format latex --out paper/tables
    """
    from tracmod.report.paper.tables import write_tables

    for path in write_tables(run_dir, out or run_dir / "tables", form):
        click.echo(path)


@main.command()
@click.argument("folder", metavar="RUN", type=EXISTING)
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    default=7860,
    show_default=True,
    help="Where to listen.",
)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on. Another than this machine's own lets others ask.",
)
def explore(folder: Path, port: int, host: str) -> None:
    """Open a local page: type a sentence, see its proponents under every subnetwork.

    RUN is a run folder or a folder of `tracmod attribute`, which has no subnetworks. The page
    shows, with all heads and in each language's subnetwork, the prediction, the languages of the
    strongest training examples, and these examples. It is for this machine alone, and loads nothing
    from elsewhere. Needs Gradio: pip install 'tracmod[explore]'.

    \b
    Examples:
      tracmod explore runs/demo
      tracmod explore influence --port 8000
    """
    from tracmod.attribution.explore import serve

    serve(folder, host, port)


# --- what is on disk, what is installed -----------------------------------------------------


@main.command()
@click.argument("run_dir", type=EXISTING)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def status(run_dir: Path, as_json: bool) -> None:
    """Say how far a run is: stages, features, and what every worker did last.

    Read from disk, so it may be asked on any machine that shares the folder, while the run works.

    \b
    Example:
      tracmod status runs/demo
    """
    from tracmod.study.status import run_status

    found = run_status(run_dir)
    if as_json:
        click.echo(json.dumps(asdict(found), indent=1))
        return
    click.echo(
        f"{run_dir}: {'a process works in it' if found.working else 'no process is at work'}"
    )
    for stage, state, seconds in found.stages:
        click.echo(f"  {stage:16} {state:12} {_duration(seconds) if seconds else ''}")
    click.echo(f"features: {found.shards} of {found.shards_wanted} shards of the stores begun")
    if found.rankings:
        click.echo(f"influence: {found.rankings} rankings in progress/")
    for worker, line in found.logs.items():
        click.echo(f"{worker}: {line}")


@main.command()
@click.argument("path", type=_PathOrUrl(exists=True))
def verify(path: Path | str) -> None:
    """Check the integrity of a run folder, an attribution or a feature store (path or URL).

    Names every file that is missing, damaged or does not belong there; exit code 1 if there is one.

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
        _fail(f"{path}: {len(problems)} problems", 1)
    click.echo(f"{path}: sound")


@main.command()
@click.argument("stores", nargs=-1, required=True, type=_PathOrUrl(exists=True))
@click.option(
    "--out", required=True, type=_PathOrUrl(file_okay=False), help="Folder or URL of the new store."
)
def merge(stores: tuple[Path | str, ...], out: Path | str) -> None:
    """Put the rows of several feature stores into one, in the order given.

    The stores must be complete and made alike: the same model, parameters, projection and dtype, of
    different examples. Rows are copied bit by bit. Stopped at any time, the same command goes on
    where it was.

    \b
    Example:
      tracmod merge a/features/checkpoint-1/train b/features/checkpoint-1/train --out both
      tracmod merge a b --out s3://bucket/both
    """
    from tqdm import tqdm

    from tracmod.features.store import FeatureStore

    rows = sum(len(FeatureStore.open(store)) for store in stores)
    with tqdm(total=rows, desc="merge", unit="example", disable=None) as bar:
        merged = FeatureStore.merge(out, stores, bar.update)
    click.echo(f"{out}: {len(merged)} examples of {len(stores)} stores")


@main.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def doctor(as_json: bool) -> None:
    """Say what was built and what is found: versions, native module, processor, GPU.

    \b
    Example:
      tracmod doctor --json
    """
    import torch

    from tracmod.files.versions import versions
    from tracmod.kernels import build_info

    found: dict[str, Any] = {"tracmod": __version__, **versions()}
    found |= {f"native {name}": value for name, value in build_info().items()}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found |= {"torch threads": torch.get_num_threads(), "GPUs": gpus or "none"}
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    for name, value in found.items():
        text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        click.echo(f"{name:24} {text}")


@main.command()
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Of the inputs.",
)
@click.option("--full", is_flag=True, help="Every case, minutes; else a few, under a minute.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write figures here.")
def bench(device: str, dtype: str, full: bool, json_path: Path | None) -> None:
    """Check the native ops against float64, then time them and plain torch.

    \b
    Examples:
      tracmod bench
      tracmod bench --dtype bfloat16 --full --json bench.json
    """
    from tracmod.bench.bench_kernels import run_bench
    from tracmod.models.modes import resolve_device

    if not run_bench(resolve_device(device), dtype, json_path, short=not full):
        _fail("a result is wrong, see above", 1)
