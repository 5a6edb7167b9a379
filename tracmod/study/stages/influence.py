"""The stage `influence`: scores, strongest examples and tables by language, into influence/.

For each model:

1. Digest every checkpoint, and score the sampled pairs exactly (`influence_fidelity`).
2. Have the engine rank the training examples of every view, mask and checkpoint; the parts of the
   rankings stay in influence/progress/ until the stage is done.
3. Write the tables of every view from these rankings.
4. If `influence.blocks` is set, compute influence by head and layer (`influence_blocks`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from tracmod.analysis.influence_tables import InfluenceTables, self_influence_table
from tracmod.analysis.results import PREDICTED_ANSWERS, PREDICTED_TAGS, WITHOUT_GROUP
from tracmod.analysis.same_group import same_group_rows
from tracmod.files import progress
from tracmod.files.durable import write_parquet
from tracmod.influence.scores import (
    TopInfluences,
    self_influence,
    top_influences,
    without_examples,
)
from tracmod.models.checkpoints import Checkpoint
from tracmod.models.inputs import tags_of_words
from tracmod.models.plain_pass import predict, predict_tokens
from tracmod.models.questions import best_answers, best_span, span_f1
from tracmod.study.context import RunContext
from tracmod.study.forecast import Estimate, Forecast
from tracmod.study.run_features import Digests, load_checkpoint, view_features
from tracmod.study.stages.influence_blocks import BLOCK_VIEWS, influence_by_block
from tracmod.study.stages.influence_fidelity import compare_sample, score_sample
from tracmod.study.views import View, views_of
from tracmod.study.worker import Advance, run_tasks
from tracmod.subnetworks.head_mask import masked
from tracmod.tasks.tag_scores import sentence_class

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Rankings are cut into parts until there are this many tasks per worker, so that no worker is idle
# for long at the end.
TASKS_PER_WORKER = 4


def run(context: RunContext) -> None:
    """Compute influence for every model; reuse only what an interrupted attempt saved."""
    paths, with_blocks = context.run, context.config.influence.blocks
    # Views of an earlier config must not be left in the folder.
    kept = [paths.progress, paths.blocks] if with_blocks else [paths.progress]
    for path in (paths.path / "influence").glob("*"):
        if path not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    block_files: set[Path] = set()
    sampled: list[pa.Table] = []
    with progress.bar("influence", _count_scores(context), "score") as bar:
        for model_name in context.models:
            checkpoints = context.checkpoints(model_name)
            digests, exact = [], []
            for checkpoint in checkpoints:
                its_digests, scores = _score_sample_at(context, model_name, checkpoint)
                digests.append(its_digests)
                exact.append(scores)
            sampled.append(compare_sample(context, model_name, digests, exact))
            run_tasks(context, _ranking_tasks(context, model_name, digests), bar.update)
            # Predictions and masks are those of the last checkpoint.
            model, tokenizer = context.load(checkpoints[-1])
            test = context.encode(tokenizer, context.table("test"), model)
            for view in context.views_at(model_name, checkpoints[-1].epoch):
                folder = context.run.influence(model_name, view.name)
                if context.unit == "text":
                    predictions = _predictions(context, model, test, view)
                elif context.unit == "span":
                    predictions = [0] * len(test)  # all questions have one class
                    answers = _predicted_answers(context, model, tokenizer, test, view)
                else:
                    tags = _predicted_tags(context, model, tokenizer, test, view)
                    names = context.tag_names or []
                    predictions = [sentence_class(own, names) for own in tags]
                _write_view(context, model_name, view, digests, predictions)
                if context.unit == "span":
                    write_parquet(folder / PREDICTED_ANSWERS, answers)
                elif context.unit == "token":
                    _write_tags(context, model_name, view, tags)
            if with_blocks:
                block_files |= influence_by_block(context, model_name, digests)
    for path in paths.blocks.glob("*"):
        if path not in block_files:
            path.unlink()
    write_parquet(paths.exact_sample, pa.concat_tables(sampled))
    shutil.rmtree(paths.progress, ignore_errors=True)


def _score_sample_at(
    context: RunContext, model_name: str, checkpoint: Checkpoint
) -> tuple[Digests, Tensor]:
    """Return the digests of a checkpoint and its exact scores of the sample; keep no model."""
    loaded = load_checkpoint(context, model_name, checkpoint)
    return loaded.digests, score_sample(context, loaded, keep_in=context.run.progress)


def _count_scores(context: RunContext) -> int:
    """Count the scores to compute: over all checkpoints together, and at each."""
    tests = sum(
        len(context.rows("test", language)) for view in context.views for language, _ in view.masks
    )
    rankings = sum(1 + len(context.checkpoints(model_name)) for model_name in context.models)
    return rankings * tests * len(context.table("train"))


# --- rankings -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranking:
    """The strongest training examples of one model, view and mask.

    Attributes:
        model: `full` or `sparse`.
        view: The name of the view.
        language: The language of the mask, for views with one mask per language.
        epoch: The epoch of the only checkpoint that is scored; None for all checkpoints.
        parts: The number of tasks that it is cut into.
        digests: (C,) digests of the checkpoints.
    """

    model: str
    view: str
    language: str | None
    epoch: int | None
    parts: int
    digests: tuple[Digests, ...] = field(repr=False)  # too long for a log

    def compute(
        self, context: RunContext, part: int | None = None, advance: Advance | None = None
    ) -> TopInfluences:
        """Compute one part. Without `part`, return the whole ranking, reusing saved parts.

        Parts are saved in influence/progress/ under their number and the number of parts. An
        attempt with another number of workers may cut differently and then computes them again.
        """
        queries, trains = (
            view_features(context, self.model, self.view, self.language, split, self.digests)
            for split in ("test", "train")
        )
        checkpoints, config = context.checkpoints(self.model), context.config.influence
        weights, k = context.weights(checkpoints), num_ranked(context, self.language)
        if self.epoch is not None:
            position = [checkpoint.epoch for checkpoint in checkpoints].index(self.epoch)
            queries, trains, weights = [queries[position]], [trains[position]], None
            k = config.ks[0]
        return top_influences(
            queries,
            trains,
            k,
            context.example_languages("train"),
            weights,
            context.normalize,
            memory=config.memory,
            progress=context.run.progress,
            device=context.device,
            advance=advance,
            parts=self.parts,
            part=part,
        )


@dataclass(frozen=True)
class RankQueries:
    """A task: one part of a ranking, left in influence/progress/."""

    ranking: Ranking
    part: int

    def run(self, context: RunContext, advance: Advance) -> None:
        """Compute the part."""
        self.ranking.compute(context, self.part, advance)


def _ranking_tasks(
    context: RunContext, model_name: str, digests: Sequence[Digests]
) -> list[RankQueries]:
    """Return the tasks of every view, mask and checkpoint, and of all checkpoints together."""
    epochs = [None, *(checkpoint.epoch for checkpoint in context.checkpoints(model_name))]
    return [
        RankQueries(ranking, part)
        for view in context.views
        for language, _ in view.masks
        for epoch in epochs
        for ranking in [_ranking(context, model_name, view, language, epoch, digests)]
        for part in range(ranking.parts)
    ]


def _ranking(
    context: RunContext,
    model_name: str,
    view: View,
    language: str | None,
    epoch: int | None,
    digests: Sequence[Digests],
) -> Ranking:
    """Describe a ranking, with enough parts to keep all workers busy."""
    parts = 1
    if context.engine.workers > 1:
        masks = sum(len(view.masks) for view in context.views)
        num_rankings = masks * (1 + len(context.checkpoints(model_name)))
        # Rounded up. One part where there are enough rankings: each further part of a ranking reads
        # the training rows once more.
        parts = -(-TASKS_PER_WORKER * context.engine.workers // num_rankings)
    return Ranking(model_name, view.name, language, epoch, parts, tuple(digests))


def num_ranked(context: RunContext, language: str | None) -> int:
    """Return how many training examples are ranked for the test examples of a mask.

    Some tables leave out a test example's own group (its translations), so the number is k plus the
    largest number of training examples in the group of any of them.
    """
    same_group = _same_group(context)
    largest = max((len(same_group[row]) for row in context.rows("test", language)), default=0)
    return max(context.config.influence.ks) + largest


def _same_group(context: RunContext) -> list[list[int]]:
    """Return the training rows of each test example's own group."""
    return context.latest(
        "same group",
        "rows",
        lambda: same_group_rows(context.table("train"), context.table("test")),
    )


# --- tables ---------------------------------------------------------------------------------


def _predictions(
    context: RunContext, model: PreTrainedModel, test: Sequence[dict[str, Any]], view: View
) -> list[int]:
    """Return the predicted label of every test example, under the view's mask."""
    predicted = np.full(len(test), -1)  # every row is set: the masks of a view cover all languages
    for language, mask in view.masks:
        rows = context.rows("test", language)
        with masked(model, mask):
            logits = predict(model, [test[row] for row in rows])
        predicted[rows] = logits.argmax(dim=1).numpy()
    return predicted.tolist()


def _predicted_tags(
    context: RunContext,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    test: Sequence[dict[str, Any]],
    view: View,
) -> list[list[int]]:
    """Return the predicted tag of every word of the test sentences, under the view's mask."""
    table, length = context.table("test"), context.config.model.max_length
    predicted: list[list[int]] = [[]] * len(test)
    for language, mask in view.masks:
        rows = context.rows("test", language)
        with masked(model, mask):
            logits = predict_tokens(model, [test[row] for row in rows])
        own = tags_of_words(tokenizer, table.take(rows), length, logits)
        for row, tags in zip(rows, own, strict=True):
            predicted[row] = tags
    return predicted


def _write_tags(
    context: RunContext, model_name: str, view: View, tags: Sequence[Sequence[int]]
) -> None:
    """Write the predicted tags of a view, from which F1 is computed."""
    table = pa.table(
        {
            "test_id": context.table("test")["id"],
            "tags": pa.array([list(own) for own in tags], pa.list_(pa.int64())),
        }
    )
    write_parquet(context.run.influence(model_name, view.name) / PREDICTED_TAGS, table)


def _predicted_answers(
    context: RunContext,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    test: Sequence[dict[str, Any]],
    view: View,
) -> pa.Table:
    """Return the predicted answer of every test question, and its F1, under the view's mask."""
    table, length = context.table("test"), context.config.model.max_length
    answers, scores = [""] * len(test), np.zeros(len(test))
    for language, mask in view.masks:
        rows = context.rows("test", language)
        with masked(model, mask):
            logits = predict_tokens(model, [test[row] for row in rows])
        texts = best_answers(tokenizer, table.take(rows), length, logits)
        for row, text, own in zip(rows, texts, logits, strict=True):
            answers[row] = text
            scores[row] = span_f1(best_span(own), tuple(test[row]["labels"]))
    return pa.table({"test_id": table["id"], "answer": answers, "f1": scores})


def _write_view(
    context: RunContext,
    model_name: str,
    view: View,
    digests: Sequence[Digests],
    predictions: Sequence[int],
) -> None:
    """Write the tables of a view, from rankings whose parts are in influence/progress/."""
    checkpoints, ks = context.checkpoints(model_name), context.config.influence.ks
    train, test = context.table("train"), context.table("test")
    train_languages = context.example_languages("train")
    weights, same_group = context.weights(checkpoints), _same_group(context)
    tables, without_group = (InfluenceTables(train, test, predictions, ks) for _ in range(2))
    self_influences: list[pa.Table] = []
    for language, _ in view.masks:
        rows = context.rows("test", language)
        queries, trains = (
            view_features(context, model_name, view.name, language, split, digests)
            for split in ("test", "train")
        )
        if view.collected:
            own_scores = self_influence(trains, weights)
            self_influences.append(self_influence_table(train, own_scores, language))
        ranking = partial(_ranking, context, model_name, view, language, digests=digests)
        top = ranking(None).compute(context)
        tables.add(rows, top)
        if any(same_group):
            left_out = [same_group[row] for row in rows]
            rest = without_examples(
                top,
                left_out,
                queries,
                trains,
                max(ks),
                train_languages,
                weights,
                context.normalize,
            )
            without_group.add(rows, rest, left_out)
        for checkpoint in checkpoints:
            tables.add_epoch(checkpoint.epoch, rows, ranking(checkpoint.epoch).compute(context))
    folder = context.run.influence(model_name, view.name)
    config = context.config.analyze
    write: Callable[[InfluenceTables, Path], None] = partial(
        InfluenceTables.write,
        bootstrap=config.bootstrap,
        confidence=config.confidence,
        seed=context.config.seed,
    )
    write(tables, folder)
    if self_influences:
        write_parquet(folder / "self_influence.parquet", pa.concat_tables(self_influences))
    if any(same_group):
        write(without_group, folder / WITHOUT_GROUP)


def estimate(forecast: Forecast) -> Estimate:
    """Count the inner products, and the passes of influence by block."""
    config, rates = forecast.config, forecast.rates
    masks = dict.fromkeys(config.task.languages, forecast.all_heads)
    views = len(views_of(config.views, masks, config.seed))
    # All checkpoints together, then each alone.
    products = 2 * views * forecast.num_checkpoints()
    products *= forecast.count("test") * forecast.count("train")
    work = f"{views} views of {forecast.num_models} models, {products} inner products"
    seconds = products * rates.score
    if config.influence.blocks:
        passes = [one for one in forecast.passes() if one.view in BLOCK_VIEWS]
        examples = sum(one.num_train + one.num_test for one in passes)
        examples *= forecast.num_checkpoints()
        work += f"; by head and layer {examples} passes of an example"
        # Measured beside collecting: 1.5 times the time of plain features.
        seconds += 1.5 * examples * rates.features["none"]
    return Estimate(work, seconds)
