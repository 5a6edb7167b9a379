"""`tracmod attribute`: influence on any model's predictions, from the user's own files.

1. Check the options, load the model, read the examples (`AttributionContext`).
2. Collect features of every checkpoint and rank (`_projected`), or score whole gradients
   (`_exact`), each in tasks of an engine (`tracmod.attribution.tasks`).
3. Certify the features against exact scores on a sample (`tracmod.attribution.fidelity`).
4. Write the tables and run.json.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from tracmod.analysis.influence_tables import InfluenceTables, self_influence_table
from tracmod.attribution.context import SPLITS, AttributionContext
from tracmod.attribution.fidelity import certify_features, choose_projection_dim
from tracmod.attribution.options import AttributionOptions
from tracmod.attribution.tasks import (
    RankQueries,
    ScoreExactly,
    ScoreSample,
    collect_stores,
    exact_scores,
    rank,
    run_tasks,
)
from tracmod.engine import Engine
from tracmod.engine.local import LocalEngine
from tracmod.features.store import SHARD_ROWS
from tracmod.files import progress
from tracmod.files.durable import read_json, write_checksums, write_json, write_parquet
from tracmod.files.versions import versions
from tracmod.gradients.capture import frozen_as_configured
from tracmod.influence.scores import (
    TopInfluences,
    self_influence,
    top_of_scores,
)
from tracmod.influence.streaming import Sizes, check_memory
from tracmod.models.checkpoints import checkpoint_folders
from tracmod.models.inputs import tags_of_words
from tracmod.models.loading import has_tokenizer
from tracmod.models.plain_pass import predict, predict_tokens
from tracmod.models.questions import best_answers
from tracmod.subnetworks.head_mask import masked


def given_checkpoints(
    model: str | None, checkpoints: Sequence[Path], folder: Path | None
) -> tuple[str, Sequence[Path]]:
    """Return the model and the checkpoints of an attribution; one may stand for the other.

    Args:
        model: As in `AttributionOptions`; None for the last checkpoint.
        checkpoints: As in `AttributionOptions`.
        folder: The output folder of a training, in place of `checkpoints`: every
            checkpoint-<number>/ in it, in order of the numbers.

    Raises:
        ValueError: Nothing or too much is given, there is no checkpoint in the folder, or no model
            is given and the last checkpoint has no tokenizer.
    """
    if folder is not None:
        if checkpoints:
            raise ValueError("expected --checkpoint or --checkpoints, got both")
        checkpoints = checkpoint_folders(folder)
    if model is not None:
        return model, checkpoints
    if not checkpoints:
        raise ValueError("expected --model, --checkpoint or --checkpoints, got none of them")
    last = checkpoints[-1]
    if not has_tokenizer(last):
        raise ValueError(
            f"{last}: expected a tokenizer in the last checkpoint, found none; give --model, a "
            f"folder with the model and its tokenizer"
        )
    return str(last), checkpoints


def attribute(options: AttributionOptions, engine: Engine | None = None) -> None:
    """Write top, languages and examples.parquet, run.json and features/ or exact/ into `out`.

    With features also self_influence.parquet and fidelity.json.

    Called again with the same options it resumes: neither whole shards of features nor a
    checkpoint's exact scores are computed twice. Where examples were added at the end of a file
    since, only their features are collected; any other change of the examples is refused.

    `test_prediction` in examples.parquet is that of the last checkpoint. For a model with one
    output it is the output rounded to a whole number, and both it and `test_label` are float64; for
    several targets they are lists of float64. For several labels per text they are lists of a
    number per label, and a label is predicted if its probability is above 0.5. Answers to questions
    are texts.

    Gradients of training examples are those of the loss that the checkpoints were trained with;
    queries are measured by the same loss without label smoothing and weights. run.json has both.

    Args:
        options: The options.
        engine: Where features are collected and scores computed; None for this process. The results
            do not depend on it, for as many threads per worker.

    Raises:
        ValueError: Files or labels are not valid, the mask has another shape, the device is not
            there, checkpoints are of another model or only some have a learning rate, or `out`
            holds results of other options.
        OSError: `out` cannot be written.
    """
    with frozen_as_configured():  # a note has their names, and that of the command-line option
        _attribute(options, LocalEngine() if engine is None else engine)


def _attribute(options: AttributionOptions, engine: Engine) -> None:
    started = time.perf_counter()
    _check_out(options.out, options.exact)
    context = AttributionContext(options)
    context.examples  # noqa: B018 (read and checked before the long part begins)
    details: dict[str, Any] = {"projection_choice": None, "fidelity": None}
    top = _exact(context, engine) if options.exact else _projected(context, engine, details)
    num_queries = len(context.tables["query"])
    predictions = _predictions(context)
    has_classes = context.loss.kind == "cross_entropy"
    queries = context.tables["query"]
    if not has_classes:  # the labels are written below
        no_class = pa.array([0] * num_queries, pa.int64())
        queries = queries.set_column(queries.column_names.index("label"), "label", no_class)
    tables = InfluenceTables(
        context.tables["train"], queries, predictions if has_classes else [0] * num_queries
    )
    tables.add(list(range(num_queries)), top)
    tables.write(options.out, bootstrap=1000, confidence=0.95, seed=options.seed)
    if not has_classes:
        _write_targets(context, predictions)
    details["cut_texts"] = _report_cut_texts(context)  # at the end: a refusal is one line
    context.say_notes()
    details["loss"] = _report_loss(context)
    seconds = round(time.perf_counter() - started, 3)
    write_json(options.out / "run.json", _record(context, details, seconds))
    shutil.rmtree(context.progress, ignore_errors=True)
    write_checksums(options.out)


def _check_out(out: Path, exact: bool) -> None:
    """Refuse a folder that cannot be written or holds results of the other kind; make nothing."""
    existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"out {out}: expected a folder, {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "cannot be written", str(existing))
    other, way = ("features", "without") if exact else ("exact", "with")
    if (out / other).exists():
        raise ValueError(
            f"out {out}: holds {other}/ of an attribution {way} --exact; take another folder or "
            f"remove this one"
        )


def _report_loss(context: AttributionContext) -> dict[str, Any]:
    """Return the losses of both files and where they are from; print what is not plain."""
    options, loss = context.options, context.loss
    origin = "transformers' choice by the model's config"
    if any(checkpoint.loss is not None for checkpoint in context.checkpoints):
        origin = "recorded in tracmod.json"
    if (options.loss, options.label_smoothing, options.class_weights) != (None, None, None):
        origin = "stated"
    if loss != loss.measured:
        tqdm.write(
            f"tracmod: training examples are scored by {loss} ({origin}), queries by "
            f"{loss.measured}",
            file=sys.stderr,
        )
    elif options.checkpoints and origin.startswith("transformers"):
        tqdm.write(
            f"tracmod: the checkpoints record no loss in tracmod.json: scores are of {loss}, "
            f"{origin}; --loss, --label-smoothing or --class-weights state another",
            file=sys.stderr,
        )
    return {"train": loss.to_json(), "query": loss.measured.to_json(), "origin": origin}


def _report_cut_texts(context: AttributionContext) -> dict[str, int]:
    """Return how many examples of each file were cut at the maximum length, and print it."""
    cut = {split: context.num_cut(split) for split in SPLITS}
    for split, count in cut.items():
        table = context.tables[split]
        cut_of = f"{count} of {len(table)} {split} examples are longer than"
        end = "tokens and were cut"
        if "tokens" in table.column_names:
            num_words = sum(map(len, table["tokens"].to_pylist()))
            cut_of = f"{count} of {num_words} words of {split} sentences are beyond"
            end = "tokens and were cut off"
        if count:
            tqdm.write(
                f"tracmod: {cut_of} {context.max_length} {end} (--max-length)", file=sys.stderr
            )
    return cut


def _saying_notes_first(
    context: AttributionContext, advance: Callable[[int], Any]
) -> Callable[[int], Any]:
    """Return `advance` that prints the notes at its first call, when nothing is refused any more.

    They are printed again at the end, below all progress bars.
    """
    is_first = True

    def advance_and_say(count: int) -> None:
        nonlocal is_first
        if is_first and count:  # 0 when a worker is ready, which may yet refuse its task
            is_first = False
            context.say_notes()
        advance(count)

    return advance_and_say


# --- scores from whole gradients ------------------------------------------------------------


def _exact(context: AttributionContext, engine: Engine) -> TopInfluences:
    """Rank by whole gradients; the scores of every checkpoint stay in `out`/exact."""
    num_queries, num_train = len(context.examples["query"]), len(context.examples["train"])
    with context.bar(num_train) as bar:
        tasks = [ScoreExactly(checkpoint.epoch) for checkpoint in context.checkpoints]
        run_tasks(context, engine, tasks, _saying_notes_first(context, bar.update))
    scores_QN = torch.zeros(num_queries, num_train)
    for checkpoint, weight in zip(context.checkpoints, context.weights, strict=True):
        scores_QN += weight * exact_scores(context, checkpoint, lambda _: None)
    return top_of_scores(scores_QN, context.options.k, context.example_languages("train"))


# --- scores from features -------------------------------------------------------------------


def _projected(
    context: AttributionContext, engine: Engine, details: dict[str, Any]
) -> TopInfluences:
    """Rank by features, which stay in `out`/features.

    Args:
        context: The attribution.
        engine: Where features are collected and ranked.
        details: Gets the choice of the dimension and the certificate, for run.json.
    """
    options, workers = context.options, engine.workers
    if options.projection_dim is None:
        details["projection_choice"] = choose_projection_dim(context)
    _check_memory(context)
    with context.bar(sum(len(context.examples[split]) for split in SPLITS)) as bar:
        collect_stores(context, engine, bar.skip, _saying_notes_first(context, bar.update))
    if workers > 1:  # this process would score the sample of one checkpoint after the other
        samples = [ScoreSample(checkpoint.epoch) for checkpoint in context.checkpoints]
        run_tasks(context, engine, samples, lambda _: None)
    table = self_influence_table(
        context.tables["train"], self_influence(context.stores_of("train"), context.weights)
    )
    write_parquet(options.out / "self_influence.parquet", table)
    details["fidelity"] = certify_features(context)
    context.forget_model()
    num_scores = len(context.tables["query"]) * len(context.tables["train"])
    with progress.bar("influence", num_scores, "score") as bar:
        tasks = [RankQueries(part, workers) for part in range(workers)]
        run_tasks(context, engine, tasks, bar.update)
    return rank(context, lambda _: None, workers)


def _check_memory(context: AttributionContext) -> None:
    """Refuse a bound on memory that is too small for scoring now, not after collecting."""
    num_queries, num_train = len(context.tables["query"]), len(context.tables["train"])
    row_bytes = 4 * context.recipe().projection.dim * len(context.checkpoints)
    k, num_groups = min(context.options.k, num_train), len(set(context.example_languages("train")))
    sizes = Sizes.of_stores(num_queries, num_train, row_bytes, k, num_groups, SHARD_ROWS)
    check_memory(sizes, context.options.memory)


# --- results --------------------------------------------------------------------------------


def _predictions(context: AttributionContext) -> list[Any]:
    """Return the last checkpoint's prediction of every query, under the mask.

    A class, a target or targets, a number 0 or 1 for each of several labels, a class for each word
    of a sentence, -100 for those without a label, or the text of an answer.
    """
    model = context.loaded(context.checkpoints[-1])
    if context.loss.kind == "token_cross_entropy":
        with masked(model, context.mask):
            logits = predict_tokens(
                model, context.examples["query"], batch_tokens=context.options.batch_tokens
            )
        return tags_of_words(context.tokenizer, context.tables["query"], context.max_length, logits)
    if context.loss.kind == "span_cross_entropy":
        with masked(model, context.mask):
            logits = predict_tokens(
                model, context.examples["query"], batch_tokens=context.options.batch_tokens
            )
        return best_answers(context.tokenizer, context.tables["query"], context.max_length, logits)
    with masked(model, context.mask):
        logits_QC = predict(
            model, context.examples["query"], batch_tokens=context.options.batch_tokens
        )
    if context.loss.kind == "cross_entropy":
        return logits_QC.argmax(dim=1).tolist()
    if context.loss.kind == "binary_cross_entropy":
        return (logits_QC > 0).double().tolist()
    if logits_QC.shape[1] == 1:
        return logits_QC[:, 0].round().double().tolist()
    return logits_QC.double().tolist()


def _write_targets(context: AttributionContext, predictions: list[Any]) -> None:
    """Put labels that are no classes into examples.parquet, whose labels are classes."""
    file = context.options.out / "examples.parquet"
    examples, queries = pq.read_table(file), context.tables["query"]
    labels = next(name for name in ("tags", "answer", "label") if name in queries.column_names)
    for name, values in (
        ("test_label", queries[labels].to_pylist()),
        ("test_prediction", predictions),
    ):
        value_of = dict(zip(queries["id"].to_pylist(), values, strict=True))
        column = pa.array(
            [value_of[query] for query in examples["test_id"].to_pylist()],
            queries.schema.field(labels).type,
        )
        position = examples.column_names.index(name)
        examples = examples.set_column(position, name, column)
    write_parquet(file, examples)


def _record(context: AttributionContext, details: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Return run.json; paths are absolute, so that the folder answers queries from anywhere."""
    arguments = asdict(context.options)
    for name in ("model", "train", "query", "out", "head_mask"):
        if arguments[name] is not None:
            arguments[name] = _absolute(arguments[name])
    arguments["columns"] = dict(context.options.columns)
    arguments["checkpoints"] = [_absolute(one.path) for one in context.checkpoints]
    arguments["weights"] = context.weights  # the ones that queries are to use as well
    arguments["projection_dim"] = context.projection_dim
    return {
        "arguments": arguments,
        **details,
        "weights": context.weights,
        "checkpoints": [
            {
                "path": _absolute(checkpoint.path),
                "step": checkpoint.step,
                "weight": weight,
                "weight_source": source,
                "left_out": left_out,
            }
            for checkpoint, weight, source, left_out in zip(
                context.checkpoints,
                context.weights,
                context.weight_sources,
                context.left_out,
                strict=True,
            )
        ],
        "notes": context.notes,
        "label_names": context.label_names,
        "versions": versions(),
        "device": context.device,
        "seconds": seconds,
    }


def _absolute(path: str | Path) -> str:
    """Return a path from the root, and a name on the Hub as it is."""
    return str(Path(path).absolute() if Path(path).exists() else path)


def read_attribution(out: Path) -> AttributionOptions:
    """Return the options of the attribution in a folder, with the checkpoints that it used.

    Raises:
        ValueError: There is no finished attribution.
    """
    file = out / "run.json"
    record = read_json(file) if file.is_file() else None
    if not isinstance(record, dict) or "arguments" not in record:
        raise ValueError(f"{out}: expected a folder of `tracmod attribute`, finished")
    arguments = record["arguments"]
    head_mask = arguments["head_mask"]
    return AttributionOptions(
        **arguments
        | {
            "train": Path(arguments["train"]),
            "query": Path(arguments["query"]),
            "out": out,
            "head_mask": None if head_mask is None else Path(head_mask),
            "checkpoints": [Path(path) for path in arguments["checkpoints"]],
        }
    )
