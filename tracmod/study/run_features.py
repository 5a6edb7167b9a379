"""The features of a run: their recipe, their preconditioners and their stores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from torch import Tensor

from tracmod.features.projection import Projection
from tracmod.features.recipe import FeatureRecipe, checkpoint_digests
from tracmod.features.rows import ChosenRows, Rows, StoreRows
from tracmod.features.store import FeatureStore
from tracmod.gradients.ekfac import checkpoint_preconditioner
from tracmod.gradients.preconditioner import Preconditioner
from tracmod.influence.scores import influence_scores
from tracmod.models.checkpoints import Checkpoint
from tracmod.study.context import RunContext
from tracmod.subnetworks.head_mask import HeadMask

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What a run trains with, whatever loss the config of its encoder names.

Digests = dict[str, str]  # of one checkpoint: see `checkpoint_digests`


class StoreKey(NamedTuple):
    """Which feature store of a run.

    Attributes:
        model: `full` or `sparse`.
        view: The name of a view with features of its own.
        language: The language of the mask, for views with one mask per language.
        epoch: The epoch of the checkpoint.
        split: `train` or `test`.
    """

    model: str
    view: str
    language: str | None
    epoch: int
    split: str


def recipe(context: RunContext, mask: HeadMask | None = None) -> FeatureRecipe:
    """Return the recipe of the run's features under a mask."""
    collect = context.config.collect
    projection = Projection(
        dim=collect.projection_dim,
        kind=collect.projection_kind,
        seed=collect.projection_seed,
        layers=collect.projection_layers,
    )
    return FeatureRecipe(
        projection,
        collect.parameters,
        collect.dtype,
        collect.batch_tokens,
        context.config.model.max_length,
        mask,
        loss=context.loss,
    )


# --- checkpoints ----------------------------------------------------------------------------


def preconditioner_of_run(
    context: RunContext,
    model_name: str,
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> Preconditioner | None:
    """Return the preconditioner of a checkpoint's features, if the run has one.

    It is fitted with all heads, whatever the mask of the view.
    """
    kind = context.config.collect.preconditioner
    if kind == "none":
        return None
    return preconditioner_of_kind(context, kind, model_name, checkpoint, model, tokenizer)


def preconditioner_of_kind(
    context: RunContext,
    kind: Literal["adam", "ekfac"],
    model_name: str,
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> Preconditioner:
    """Return a checkpoint's preconditioner of a kind; a fitted one is kept in preconditioners/."""
    collect = context.config.collect
    return checkpoint_preconditioner(
        kind,
        model,
        checkpoint.path,
        lambda: context.encode(tokenizer, context.table("train"), model),
        parameters=collect.parameters,
        damping=collect.damping,
        batch_tokens=collect.batch_tokens,
        keep_in=context.run.preconditioner(model_name, checkpoint.epoch),
        identity={
            **checkpoint_digests(model, context.tokenizer_digest(tokenizer), None),
            "data": context.data_digest("train"),
            "max_length": context.config.model.max_length,
        },
        loss=context.loss,
    )


class LoadedCheckpoint(NamedTuple):
    """A loaded checkpoint with all that collecting needs."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    preconditioner: Preconditioner | None
    digests: Digests


def load_checkpoint(
    context: RunContext, model_name: str, checkpoint: Checkpoint
) -> LoadedCheckpoint:
    """Load a checkpoint, on the device, with the preconditioner of the run's features."""
    model, tokenizer = context.load(checkpoint)
    preconditioner = preconditioner_of_run(context, model_name, checkpoint, model, tokenizer)
    digests = checkpoint_digests(model, context.tokenizer_digest(tokenizer), preconditioner)
    return LoadedCheckpoint(model, tokenizer, preconditioner, digests)


# --- stores ---------------------------------------------------------------------------------


def store_identity(
    context: RunContext, split: str, mask: HeadMask | None, digests: Digests
) -> dict[str, Any]:
    """Return the identity of a store, for a split, a mask and the digests of a checkpoint."""
    return recipe(context, mask).identity(data=context.data_digest(split), **digests)


def create_store(
    context: RunContext, key: StoreKey, mask: HeadMask | None, digests: Digests
) -> FeatureStore:
    """Make a store, or open it to continue; link the shards that a donor run already has."""
    collect, rows = context.config.collect, context.rows(key.split, key.language)
    store = FeatureStore.create(
        context.run.features(*key),
        ids=context.table(key.split).column("id").take(rows).to_pylist(),
        dim=collect.projection_dim,
        identity=store_identity(context, key.split, mask, digests),
        dtype=collect.store_dtype,
        shard_rows=collect.shard_rows,
    )
    for donor in context.donors:
        store.link_shards(donor.features(*key))
    return store


def open_stores(
    context: RunContext,
    model_name: str,
    view_name: str,
    language: str | None,
    split: str,
    digests: Sequence[Digests],
) -> list[FeatureStore]:
    """Open the feature stores of one pass over a split, one per checkpoint that is used.

    Args:
        context: The run.
        model_name, view_name, language, split: Which stores; see `StoreKey`.
        digests: (C,) digests of the checkpoints as they are now.

    Raises:
        ValueError: A store was made with another checkpoint, mask, data or projection.
    """
    stores = []
    for checkpoint, its_digests in zip(context.checkpoints(model_name), digests, strict=True):
        mask = context.mask(model_name, view_name, language, checkpoint.epoch)
        path = context.run.features(model_name, view_name, language, checkpoint.epoch, split)
        stores.append(FeatureStore.open(path, store_identity(context, split, mask, its_digests)))
    return stores


def view_features(
    context: RunContext,
    model_name: str,
    view_name: str,
    language: str | None,
    split: str,
    digests: Sequence[Digests],
) -> list[Rows]:
    """Return (C,) features that a view compares, for one of its masks and one split.

    The most recent stores stay open, because many rankings read them and each store verifies a
    shard only once. Those of both splits stay open together, hence the split in the kind. Digests
    are compared when stores are opened; they do not change within a process, so they are not part
    of the key.
    """

    def stored_rows(view_name: str, language: str | None) -> list[Rows]:
        stores = open_stores(context, model_name, view_name, language, split, digests)
        return [StoreRows(store) for store in stores]

    def assemble() -> list[Rows]:
        view = context.view(view_name)
        if view.collected:
            return stored_rows(view_name, language)
        if split == "test":
            return stored_rows(view.source, language)
        if view.train == "full":
            return stored_rows("full", None)
        # Each training example's features under its own language's mask.
        own = {other: stored_rows(view.source, other) for other in context.languages}
        train_languages = context.example_languages("train")
        return [
            ChosenRows({other: rows[position] for other, rows in own.items()}, train_languages)
            for position in range(len(digests))
        ]

    key = (model_name, view_name, language)
    return context.latest(f"{split} features", key, assemble)


def full_model_scores(context: RunContext, normalize: str | None) -> Tensor:
    """Return the (Q, N) scores of the full model with all heads, from its feature stores."""
    checkpoints = context.checkpoints("full")
    digests = [load_checkpoint(context, "full", checkpoint).digests for checkpoint in checkpoints]
    queries, trains = (
        open_stores(context, "full", "full", None, split, digests) for split in ("test", "train")
    )
    return influence_scores(queries, trains, context.weights(checkpoints), normalize)
