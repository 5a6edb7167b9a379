"""Commands that attribute predictions to training examples: attribute, index, query, explore."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tracmod.attribution.options import AttributionOptions
from tracmod.choices import IndexKind, Normalization
from tracmod.cli.options import (
    COLUMNS,
    ENGINE_OPTIONS,
    EXISTING,
    FOLDER,
    JSON,
    QUIET,
    VIEW_OPTIONS,
    Bytes,
    ColumnNames,
    CountOrAuto,
    GivenPath,
    ParameterNames,
    RealNumber,
    Weights,
    WholeNumber,
    choice,
    engine_of,
    field_option,
    merged_columns,
    options_of,
    with_options,
)

if TYPE_CHECKING:
    from tracmod.influence.index import InfluenceIndex

_MODEL_AND_CHECKPOINTS = [
    field_option(
        AttributionOptions,
        "model",
        required=False,
        help="Transformers folder with the model and its tokenizer. Default: the last checkpoint.",
    ),
    click.option(
        "--checkpoints",
        "folder",
        type=GivenPath(exists=True, file_okay=False),
        help="Output folder of a training; every checkpoint-<number> in it is used, in the order "
        "of the numbers.",
    ),
    click.option(
        "--checkpoint",
        "checkpoints",
        multiple=True,
        type=EXISTING,
        help="Folder saved during training, in place of --checkpoints. Can be repeated, in order. "
        "Default: the model, with weight 1.",
    ),
]


@click.command()
@with_options(
    options_of(
        AttributionOptions,
        {
            "model": _MODEL_AND_CHECKPOINTS,
            "checkpoints": [],
            "out": [field_option(AttributionOptions, "out", type=FOLDER)],
            "columns": [COLUMNS],
            "weights": [
                field_option(
                    AttributionOptions, "weights", type=Weights(), metavar="W,W,...|uniform"
                )
            ],
            "projection_dim": [
                field_option(
                    AttributionOptions, "projection_dim", type=CountOrAuto(), metavar="K|auto"
                )
            ],
            "parameters": [field_option(AttributionOptions, "parameters", type=ParameterNames())],
            "normalize": [
                field_option(AttributionOptions, "normalize", type=choice(Normalization))
            ],
        },
    )
)
@with_options(ENGINE_OPTIONS)
@QUIET
def attribute(
    model: str | None,
    folder: Path | None,
    checkpoints: tuple[Path, ...],
    normalize: str,
    engine: str,
    address: str | None,
    workers: int | None,
    worker_cpus: int,
    **options: Any,
) -> None:
    """Attribute predictions of your own classifier to training examples.

    Finds the training examples that raised or lowered the loss of each query, and sums their
    influence by language.

    Example files (.tsv, .csv, .jsonl, .json, .parquet, each also .gz) have the columns text_a and
    label, and perhaps text_b, id, language and group; --columns gives other names. Without ids,
    they are the numbers of the rows from 0; without languages, all examples are one group. Those of
    a token classifier have lists of words and of their tags in the columns tokens and tags (.jsonl,
    .json, .parquet), or are CoNLL-U (.conllu) or a word and its tag per line (.conll, .bio, .iob).
    Those of question answering have the columns question, context and answers, as datasets has
    them, or the form of SQuAD (.json).

    Writes to --out: top.parquet, languages.parquet, examples.parquet, self_influence.parquet,
    fidelity.json (agreement with exact scores on a sample), run.json and features/; with --exact,
    the scores of each checkpoint in exact/ instead of features. A positive score means that the
    training example lowered the loss of the query.

    With --workers or --engine ray, several processes or machines collect and score; --out must then
    be on a file system that all of them share. The results are the same bit for bit.

    Run the same command again to resume. If examples were added at the end of a file, only they are
    processed.

    Gradients are those of the loss that the model was trained with: the one that
    tracmod.TracInCallback records in tracmod.json, or else the one that transformers chooses by the
    model's config. --loss, --label-smoothing and --class-weights state it. Queries are measured
    without label smoothing and weights. For a model with several labels per text, a label is a list
    of names or of 0 and 1, in JSON lines or Parquet.

    The weight of a checkpoint is the mean learning rate of its steps. It is read from tracmod.json,
    which tracmod.TracInCallback makes a transformers Trainer write, or else from the log of the
    Trainer, or set by --weights. What is a guess is printed and written to run.json.

    \b
    Examples:
      tracmod attribute --checkpoints my-training --train train.tsv --query test.tsv --out influence
      tracmod attribute --model my-model --train nli.csv --query dev.csv --out influence \\
          --columns text_a=premise,text_b=hypothesis,label=gold_label --language en
      tracmod attribute --model my-model --checkpoint my-model/checkpoint-500 \\
          --checkpoint my-model/checkpoint-1000 --train train.tsv --query test.tsv --out influence
      tracmod attribute --checkpoints my-training --train train.tsv --query test.tsv \\
          --out influence --workers 4
    """
    from tracmod.attribution.attribute import attribute, given_checkpoints

    model, checkpoint_paths = given_checkpoints(model, checkpoints, folder)
    checked = AttributionOptions(
        model,
        checkpoints=checkpoint_paths,
        normalize=None if normalize == "none" else normalize,
        **options,
    )
    with engine_of(checked.device, engine, address, workers, worker_cpus) as opened:
        attribute(checked, opened)
    click.echo(f"written: {options['out']}/top.parquet, languages.parquet, run.json")


@click.command()
@click.argument("folder", metavar="RUN", type=EXISTING)
@with_options(VIEW_OPTIONS)
@click.option(
    "--kind",
    type=choice(IndexKind),
    default="flat",
    show_default=True,
    help="Kind of index. flat is exact; the others are smaller or faster.",
)
@click.option(
    "--recall",
    type=RealNumber(0, 1, min_open=True),
    default=0.95,
    show_default=True,
    help="Share of the exact top 100 that a search should find; searches are widened to reach it.",
)
@click.option(
    "--memory",
    type=Bytes(),
    default="4GB",
    show_default=True,
    help="Memory for training the index, beside the index itself.",
)
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    help="Where lists are clustered: cpu, cuda, cuda:1, ... A GPU needs faiss-gpu and the kind ivf "
    "or ivfpq.",
)
@QUIET
def index(
    folder: Path,
    model: str,
    view: str,
    mask: str | None,
    kind: str,
    recall: float,
    memory: int,
    device: str,
) -> None:
    """Build a FAISS index of the training features.

    `tracmod query` then uses the index. RUN is a run folder or a folder of `tracmod attribute`. The
    index has one row per training example, with the features of all checkpoints. Its recall is
    measured with the features of the test or query examples.

    \b
    Examples:
      tracmod index runs/demo --kind hnsw
      tracmod index influence --kind ivfpq --recall 0.9 --memory 16GB
    """
    from tracmod.attribution.query import Attributor

    attributor = Attributor(folder, model, view, mask)
    built = attributor.build_index(kind, recall=recall, memory=memory, device=device)
    _print_index(built, attributor.index_path)


def _print_index(built: InfluenceIndex, path: Path) -> None:
    count, recall, seconds = len(built.ids), built.recall, built.seconds
    disk = sum((path / name).stat().st_size for name in ("index.faiss", "index.json"))
    click.echo(f"{path}: {built.kind}, {count:,} examples")
    click.echo(
        f"bytes per example: {disk / count:,.0f} on disk, {built.bytes_per_example:,.0f} in memory "
        f"and {built.fixed_bytes:,} bytes once"
    )
    click.echo(
        f"recall@{recall['k']} against exact, {recall['queries']} queries: "
        f"{recall['proponents']:.3f} of proponents, {recall['opponents']:.3f} of opponents"
    )
    if built.kind in ("ivf", "ivfpq"):
        click.echo(f"lists probed by a search: {built.effort:,} of {built.index.nlist:,}")
    if built.kind == "hnsw":
        click.echo(f"candidates kept by a search: {built.effort:,}")
    click.echo(
        f"seconds: {seconds['train']:.1f} training, {seconds['add']:.1f} adding, "
        f"{seconds['measure']:.1f} measuring"
    )


@click.command()
@click.argument("folder", metavar="RUN", type=EXISTING)
@click.argument("text")
@click.option("--text-b", help="Second text of a pair.")
@click.option(
    "--label",
    help="Label of the example; of several labels per text, names separated by commas. Default: "
    "the model's prediction; for a regression, its output rounded to a whole number.",
)
@click.option(
    "--language",
    "languages",
    multiple=True,
    help="Show only training examples of this language. Can be repeated. Default: all languages.",
)
@with_options(VIEW_OPTIONS)
@click.option(
    "-k",
    type=WholeNumber(),
    default=5,
    show_default=True,
    help="Number of proponents and of opponents to show.",
)
@click.option(
    "--no-opponents",
    is_flag=True,
    help="Find proponents only.",
)
@click.option(
    "--by-word",
    is_flag=True,
    help="Token classifiers only: show which words of the sentence each score comes from.",
)
@click.option(
    "--text-language",
    metavar="NAME",
    help="X-MOD only: the language of TEXT, whose adapter the model uses.",
)
@click.option(
    "--columns",
    type=ColumnNames(),
    multiple=True,
    callback=merged_columns,
    help="Names of columns that the files of an attribution have been given since. Default: those "
    "of the attribution.",
)
@JSON
@QUIET
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
    no_opponents: bool,
    by_word: bool,
    text_language: str | None,
    columns: dict[str, str],
    as_json: bool,
) -> None:
    """Show the proponents and opponents of a new example.

    These are the training examples that speak most strongly for and against its label. RUN is a run
    folder or a folder of `tracmod attribute`. Scores are computed from the stored features. An
    index (see `tracmod index`) only selects the candidates that are scored.

    \b
    Examples:
      tracmod query runs/demo "The sad king is waiting in the evening." \\
          --text-b "The king is not waiting in the evening."
      tracmod query runs/demo "The sad king is not waiting." --text-b "The king is happy." \\
          --label contradiction --language de --language ru --json
      tracmod query influence "What a film!"
    """
    from tracmod.attribution.query import Attributor
    from tracmod.tasks.token_files import tagged_text

    attributor = Attributor(folder, model, view, mask, columns=columns)
    if text_language is not None and not attributor.needs_language:
        raise click.BadParameter(
            f"expected none for a model without an adapter for each language, got {text_language}",
            param_hint="--text-language",
        )
    answer = attributor.query(
        text,
        text_b,
        label,
        k,
        languages or None,
        opponents=not no_opponents,
        by_word=by_word,
        language=text_language,
    )
    if attributor.is_cut(text, text_b):
        length = attributor.source.max_length
        click.echo(f"tracmod: the text is longer than {length} tokens and was cut", err=True)
    if as_json:
        click.echo(json.dumps(answer, ensure_ascii=False, indent=1))
        return
    if label is None and attributor.source.loss_kind == "squared_error":
        click.echo(
            f"tracmod: explains the loss for the target {answer['label']}, the output "
            f"{answer['output']} rounded; --label gives another target",
            err=True,
        )
    source = "exact" if answer["index"] is None else f"candidates of the {answer['index']} index"
    click.echo(f"label {answer['label']}, predicted {answer['prediction']}; {source}")
    for side, effect in (("proponents", "lowered"), ("opponents", "raised")):
        if side == "opponents" and no_opponents:
            continue
        click.echo(f"\n{side} (training examples that {effect} the loss)")
        for row in answer[side]:
            texts = " | ".join(text for text in (row["text_a"], row["text_b"]) if text)
            score, label = f"{row['score']:+.3e}", f"{row['language']:>4} {row['label']:14}"
            if "tokens" in row:
                texts = tagged_text(row["tokens"], row["label"].split())
                label = f"{row['language']:>4}"
            elif "answer" in row:
                texts = row["text_a"]  # contexts are long; --json has them
            click.echo(f"{row['rank']:4} {score}  {label} {texts}")
            if by_word:
                parts = zip(text.split(), row["word_scores"], strict=True)
                shown = [f"{word} {part:+.1e}" for word, part in parts if part is not None]
                click.echo(f"{'':16} by word: {', '.join(shown)}")


@click.command()
@click.argument("folder", metavar="RUN", type=EXISTING)
@click.option(
    "--port",
    type=WholeNumber(1, 65535),
    default=7860,
    show_default=True,
    help="Port to listen on.",
)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on. Any address but the default lets other machines send queries.",
)
def explore(folder: Path, port: int, host: str) -> None:
    """Serve a page that shows the proponents of a sentence that you type.

    RUN is a run folder or a folder of `tracmod attribute` (which has no subnetworks). For a typed
    sentence, the page shows the prediction, the languages of the strongest training examples, and
    these examples: with all heads and in the subnetwork of each language. The page is served to
    this machine only and loads nothing from the network. It needs Gradio: pip install
    'tracmod[explore]'.

    \b
    Examples:
      tracmod explore runs/demo
      tracmod explore influence --port 8000
    """
    from tracmod.attribution.explore import serve

    serve(folder, host, port)


COMMANDS = [attribute, index, query, explore]
