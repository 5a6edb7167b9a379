"""Tasks of an attribution, and the worker that does them where an engine puts it.

A task is a part of an attribution that is independent of the others. Its results are files in
`out`, each written whole or not at all, and what they contain does not depend on the worker:

    FitPreconditioner   the preconditioner of a checkpoint          preconditioners/
    CollectShards       some shards of a feature store              features/
    ScoreSample         the exact scores of the certificate         progress/
    RankQueries         the rankings of some of the queries         progress/
    ScoreExactly        the scores of all pairs at a checkpoint     exact/
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from tracmod.attribution.context import SPLITS, AttributionContext
from tracmod.attribution.fidelity import certificate_sample, sample_scores
from tracmod.engine import Engine
from tracmod.features.collector import collect_to_store, divide_shards
from tracmod.features.store import FeatureStore
from tracmod.files.tensor_cache import read_tensors, write_tensors
from tracmod.influence.exact import exact_influence
from tracmod.influence.scores import TopInfluences, top_influences
from tracmod.models.checkpoints import Checkpoint
from tracmod.models.modes import device_of_worker, frozen

Advance = Callable[[int], Any]  # called with the number of parts done (examples, scores)


class AttributionTask(Protocol):
    """A part of an attribution."""

    def run(self, context: AttributionContext, advance: Advance) -> None:
        """Do the task."""


class AttributionWorker:
    """Does tasks of one attribution, and keeps what its context has loaded between them."""

    def __init__(self, context: AttributionContext, number: int) -> None:
        """Take the context: that of the command in its own process, a copy of it elsewhere."""
        self._context = context
        context.device = device_of_worker(context.device, number)

    def do(self, task: AttributionTask, advance: Advance) -> None:
        """See `Worker.do`."""
        task.run(self._context, advance)


def run_tasks(
    context: AttributionContext,
    engine: Engine,
    tasks: Sequence[AttributionTask],
    advance: Advance,
    twice: bool = False,
) -> None:
    """Have an engine do tasks, and return when all are done.

    Args:
        context: The attribution.
        engine: Where the tasks run.
        tasks: The tasks, in the order in which they are begun.
        advance: Called in this process for parts that are done.
        twice: Whether a task that falls behind may be begun a second time elsewhere.
    """
    logs = context.options.out.absolute() / "logs"
    engine.run(partial(AttributionWorker, context), tasks, advance, logs, twice)


# --- features -------------------------------------------------------------------------------


@dataclass(frozen=True)
class FitPreconditioner:
    """A task: the preconditioner of a checkpoint, which later tasks read."""

    checkpoint: int

    def run(self, context: AttributionContext, advance: Advance) -> None:
        """Fit and save it."""
        checkpoint = context.checkpoint(self.checkpoint)
        context.preconditioner(checkpoint, context.loaded(checkpoint))


@dataclass(frozen=True)
class CollectShards:
    """A task: some shards of a feature store that has been made."""

    checkpoint: int
    split: str
    shards: tuple[int, ...]

    def run(self, context: AttributionContext, advance: Advance) -> None:
        """Compute and write the shards."""
        checkpoint = context.checkpoint(self.checkpoint)
        model = context.loaded(checkpoint)
        preconditioner = context.preconditioner(checkpoint, model)
        store = context.stores.get((self.checkpoint, self.split))
        if store is None:  # in another process than the one that made it
            store = FeatureStore.share(context.store_path(checkpoint, self.split))
        with frozen(model):
            collector = context.recipe().collector(
                model, preconditioner, measured=self.split == "query"
            )
            collect_to_store(collector, context.examples[self.split], store, advance, self.shards)


def collect_stores(
    context: AttributionContext, engine: Engine, skip: Advance, advance: Advance
) -> None:
    """Collect the features of both files at every checkpoint; rows that are there stay.

    Args:
        context: The attribution.
        engine: Where the features are collected.
        skip: Called with the number of examples whose features are there.
        advance: Called with the number of examples whose features were collected.
    """
    if context.options.preconditioner == "ekfac" and engine.workers > 1:
        context.fitted_on()  # chosen by this process, before several workers need it
        fits = [FitPreconditioner(checkpoint.epoch) for checkpoint in context.checkpoints]
        run_tasks(context, engine, fits, advance)
    # A single worker collects at one checkpoint after the other, so that it loads each once.
    at_once = 1 if engine.workers == 1 else len(context.checkpoints)
    for first in range(0, len(context.checkpoints), at_once):
        with ExitStack() as locks:
            tasks: list[CollectShards] = []
            for checkpoint in context.checkpoints[first : first + at_once]:
                for split in SPLITS:
                    store = locks.enter_context(context.begin_store(checkpoint, split))
                    missing = store.missing_shards()
                    num_missing = sum(len(store.shard_range(shard)) for shard in missing)
                    skip(store.num_rows - num_missing)
                    tasks += [
                        CollectShards(checkpoint.epoch, split, shards)
                        for shards in divide_shards(missing, engine.workers)
                    ]
            run_tasks(context, engine, tasks, advance, twice=True)
    features = context.options.out / "features"
    for leftover in features.rglob(".*.tmp"):  # of workers that were killed
        leftover.unlink(missing_ok=True)


# --- scores ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoreSample:
    """A task: the exact scores of the certificate's sample at a checkpoint, in progress/."""

    checkpoint: int

    def run(self, context: AttributionContext, advance: Advance) -> None:
        """Compute and save the scores."""
        sample_scores(context, certificate_sample(context), context.checkpoint(self.checkpoint))


@dataclass(frozen=True)
class RankQueries:
    """A task: the rankings of some of the queries, in progress/."""

    part: int
    parts: int

    def run(self, context: AttributionContext, advance: Advance) -> None:
        """Compute and save the rankings."""
        rank(context, advance, self.parts, self.part)


def rank(
    context: AttributionContext, advance: Advance, parts: int, part: int | None = None
) -> TopInfluences:
    """Rank the training examples for the queries of one part, or of all.

    Args:
        context: The attribution, whose features are collected.
        advance: Called with the number of scores just computed.
        parts: The number of tasks that the queries are divided among.
        part: The part; None for the whole ranking, which reuses saved parts.
    """
    options = context.options
    return top_influences(
        context.stores_of("query"),
        context.stores_of("train"),
        options.k,
        context.example_languages("train"),
        context.weights,
        options.normalize,
        memory=options.memory,
        progress=context.progress,
        device=context.device,
        advance=advance,
        parts=parts,
        part=part,
    )


@dataclass(frozen=True)
class ScoreExactly:
    """A task: the exact scores of all pairs at a checkpoint, in exact/."""

    checkpoint: int

    def run(self, context: AttributionContext, advance: Advance) -> None:
        """Compute and save the scores."""
        exact_scores(context, context.checkpoint(self.checkpoint), advance)


def exact_scores(context: AttributionContext, checkpoint: Checkpoint, advance: Advance) -> Tensor:
    """Return the (Q, N) unweighted scores of one checkpoint, from its file if that is there."""
    options = context.options
    file = options.out / "exact" / f"checkpoint-{checkpoint.epoch}.safetensors"
    identity = context.exact_identity(checkpoint)
    cached = read_tensors(file, identity)
    if cached is not None:
        advance(cached["scores"].shape[1])
        return cached["scores"]
    model = context.loaded(checkpoint)
    with context.naming_examples({split: range(len(context.tables[split])) for split in SPLITS}):
        scores_QN = exact_influence(
            model,
            context.examples["train"],
            context.examples["query"],
            options.parameters,
            context.mask,
            options.normalize,
            options.batch_tokens,
            advance=advance,
            dtype=getattr(torch, options.dtype),
            preconditioner=context.preconditioner(checkpoint, model),
            include_frozen=options.include_frozen,
            loss=context.loss,
            query_loss=context.loss.measured,
        ).cpu()
    write_tensors(file, {"scores": scores_QN}, identity)
    return scores_QN
