"""The stage `collect`: features of every model, checkpoint, view and mask, into features/."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tracmod.analysis.results import UNTRAINED
from tracmod.features.collector import collect_to_store, divide_shards
from tracmod.features.store import FeatureStore
from tracmod.features.store_format import DTYPES
from tracmod.files import progress
from tracmod.influence.streaming import Sizes, check_memory
from tracmod.models.checkpoints import Checkpoint
from tracmod.models.modes import frozen
from tracmod.study.context import RunContext
from tracmod.study.forecast import Estimate, Forecast
from tracmod.study.run_features import (
    LoadedCheckpoint,
    StoreKey,
    create_store,
    load_checkpoint,
    recipe,
)
from tracmod.study.run_training import initial_model, training_settings
from tracmod.study.stages.influence import num_ranked
from tracmod.study.worker import Advance, run_tasks
from tracmod.training.fine_tune import trainable
from tracmod.training.folder import TrainingFolder


def run(context: RunContext) -> None:
    """Make the stores, then have the engine fill the shards that are missing."""
    _check_memory(context)
    if context.config.collect.untrained:
        _write_untrained(context)
    checkpoints = sum(len(context.checkpoints(model_name)) for model_name in context.models)
    with progress.bar("collect", context.examples_per_checkpoint() * checkpoints) as bar:
        tasks: list[CollectShards] = []
        for model_name in context.models:
            for checkpoint in context.checkpoints(model_name):
                tasks += _begin_stores(context, model_name, checkpoint, bar.skip)
        run_tasks(context, tasks, bar.update)
    features = context.run.features_path
    if isinstance(features, Path):
        for leftover in features.rglob(".*.tmp"):  # of workers that were killed
            leftover.unlink(missing_ok=True)


def _write_untrained(context: RunContext) -> None:
    """Write the model that both fine-tunings begin with, as the checkpoint of epoch 0."""
    folder = TrainingFolder(context.run.model(UNTRAINED))
    if not folder.has_checkpoint(0):
        model, tokenizer = initial_model(context)
        # With the parameters that the full model's training does not move marked as such.
        with trainable(model, training_settings(context.config.finetune, context.config.seed)):
            folder.write_checkpoint(model, tokenizer, epoch=0, step=0, learning_rate=1.0)


def _check_memory(context: RunContext) -> None:
    """Refuse an `influence.memory` too small for scoring now, not after collecting."""
    collect, influence = context.config.collect, context.config.influence
    checkpoints = max(len(context.counted_epochs(model_name)) for model_name in context.models)
    train, test = len(context.table("train")), len(context.table("test"))
    sizes = Sizes.of_stores(
        test,
        train,
        4 * collect.projection_dim * checkpoints,
        min(train, num_ranked(context, None)),
        len(context.languages),
        collect.shard_rows,
        isinstance(context.run.features_path, Path),
    )
    check_memory(sizes, influence.memory)


def _begin_stores(
    context: RunContext, model_name: str, checkpoint: Checkpoint, skip: Advance
) -> Iterator[CollectShards]:
    """Make a checkpoint's stores, and yield the tasks that fill them."""
    digests = load_checkpoint(context, model_name, checkpoint).digests
    for view, language, mask in context.passes(context.views_at(model_name, checkpoint.epoch)):
        for split in ("train", "test"):
            key = StoreKey(model_name, view.name, language, checkpoint.epoch, split)
            with create_store(context, key, mask, digests) as store:
                missing = store.missing_shards()
                num_missing = sum(len(store.shard_range(shard)) for shard in missing)
                skip(store.num_rows - num_missing)
            for shards in divide_shards(missing, context.engine.workers):
                yield CollectShards(key, shards)


@dataclass(frozen=True)
class CollectShards:
    """A task: some shards of a feature store that has been made."""

    key: StoreKey
    shards: tuple[int, ...]

    def run(self, context: RunContext, advance: Advance) -> None:
        """Compute and write the shards."""
        model_name, view_name, language, epoch, split = self.key
        loaded = context.latest(
            "checkpoint to collect",
            (model_name, epoch),
            lambda: _encode_for(context, model_name, epoch),
        )
        mask = context.mask(model_name, view_name, language, epoch)
        examples = [loaded.encoded[split][row] for row in context.rows(split, language)]
        with frozen(loaded.checkpoint.model):
            store = FeatureStore.share(context.run.features(*self.key))
            collector = recipe(context, mask).collector(
                loaded.checkpoint.model, loaded.checkpoint.preconditioner
            )
            collect_to_store(collector, examples, store, advance, self.shards)


class _Encoded(NamedTuple):
    checkpoint: LoadedCheckpoint
    encoded: dict[str, list[dict[str, Any]]]


def _encode_for(context: RunContext, model_name: str, epoch: int) -> _Encoded:
    """Load a checkpoint, and encode the examples of both splits for it."""
    loaded = load_checkpoint(context, model_name, context.checkpoint(model_name, epoch))
    encoded = {
        split: context.encode(loaded.tokenizer, context.table(split), loaded.model)
        for split in ("train", "test")
    }
    return _Encoded(loaded, encoded)


def estimate(forecast: Forecast) -> Estimate:
    """Count the passes, and the bytes of their features."""
    collect, passes = forecast.config.collect, forecast.passes()
    if not forecast.run.is_done("influence"):
        _check_memory(forecast.context)
    checkpoints = forecast.num_checkpoints()
    examples = checkpoints * sum(one.num_train + one.num_test for one in passes)
    work = (
        f"{len(passes)} passes (view, mask) x {checkpoints} checkpoints = "
        f"{examples} forward and backward passes of an example"
    )
    seconds = examples * forecast.rates.features[forecast.preconditioner]
    num_bytes = examples * DTYPES[collect.store_dtype].itemsize * collect.projection_dim
    if forecast.preconditioner == "adam":
        work += ", preconditioned by Adam's second moment"
    if forecast.preconditioner == "ekfac":
        fits = forecast.ekfac_fits(checkpoints)
        work += f", preconditioned; {fits.work}"
        seconds, num_bytes = seconds + (fits.seconds or 0), num_bytes + fits.num_bytes
    return Estimate(work, seconds, num_bytes)
