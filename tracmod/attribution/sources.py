"""Where an `Attributor` finds models, training features and examples: a run or an attribution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pyarrow as pa

from tracmod.attribution.attribute import read_attribution
from tracmod.attribution.context import AttributionContext
from tracmod.choices import LossKind
from tracmod.features.collector import Collector
from tracmod.features.recipe import checkpoint_digests
from tracmod.features.store import FeatureStore
from tracmod.gradients.preconditioner import Preconditioner
from tracmod.models.checkpoints import Checkpoint
from tracmod.study.context import MODELS, RunContext
from tracmod.study.run_features import open_stores, preconditioner_of_run, recipe
from tracmod.study.run_folder import RunFolder
from tracmod.subnetworks.head_mask import HeadMask

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Source(Protocol):
    """One model under one view's masks, with C checkpoints in order.

    Attributes:
        index_path: The folder of the FAISS index of the training features.
        model_names: The models that can be chosen.
        label_names: The names of the labels, in order.
        loss_kind: The kind of the loss, which says what a label is.
        device: The device to compute on.
        max_length: The number of tokens at which texts are cut.
        weights: (C,) the weights of the checkpoints; None for 1 each.
        normalize: The normalization mode of scores, "cosine" or None.
    """

    index_path: Path
    model_names: Sequence[str]
    label_names: list[str]
    loss_kind: LossKind
    device: str
    max_length: int
    weights: list[float] | None
    normalize: str | None

    @property
    def train(self) -> pa.Table:
        """The training examples, in the order of the features."""

    @property
    def queries(self) -> pa.Table:
        """Examples like those to be explained, with their labels."""

    @property
    def k(self) -> int:
        """The number of strongest examples over which the folder's own shares are counted."""

    @property
    def views(self) -> list[tuple[str, str | None]]:
        """The views with features, and the language of each of their masks."""

    def under(self, view: str, mask: str | None) -> Source:
        """Return the same model under other masks; what was loaded of it is shared."""

    @property
    def models(self) -> list[tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
        """(C,) the models, on the device, and their tokenizers."""

    @property
    def masks(self) -> list[HeadMask | None]:
        """(C,) the masks that features are made under."""

    @property
    def collectors(self) -> list[Collector]:
        """(C,) the collectors that turn examples into features."""

    def train_stores(self) -> list[FeatureStore]:
        """Open the (C,) training features; those of anything else than is there are refused."""

    def query_stores(self) -> list[FeatureStore]:
        """Open (C,) features of examples like those to be explained, to measure an index with."""


class RunSource:
    """One model and view of a run folder."""

    model_names: Sequence[str] = MODELS

    def __init__(self, folder: Path, model: str, view: str, mask: str | None) -> None:
        self.context = RunContext(RunFolder(folder))
        self.model = model
        if not self.context.run.is_done("collect"):
            raise ValueError(f"{folder}: expected collected features; run `tracmod collect`")
        views = {view.name: view for view in self.context.views if view.collected}
        if model not in MODELS or view not in views:
            raise ValueError(
                f"{folder}: expected model full or sparse and a view of {', '.join(views)}, "
                f"got {model} and {view}"
            )
        self.view = view
        languages = [language for language, _ in views[view].masks]
        self.language = None if None in languages else mask
        if self.language not in languages:
            raise ValueError(
                f"{folder}: the view {view} has a mask per language: expected one of "
                f"{', '.join(map(str, languages))}, got {mask}"
            )
        self.index_path = folder / "index" / model / view / (self.language or "")
        self.label_names: list[str] = self.context.class_names
        self.loss_kind: LossKind = self.context.loss.kind
        self.device = self.context.device
        self.max_length = self.context.config.model.max_length
        self.checkpoints = self.context.checkpoints(model)
        self.weights = self.context.weights(self.checkpoints)
        self.normalize = self.context.normalize

    @property
    def train(self) -> pa.Table:
        return self.context.table("train")

    @property
    def queries(self) -> pa.Table:
        return self.context.table("test")

    @property
    def k(self) -> int:
        return self.context.config.influence.ks[0]

    @property
    def views(self) -> list[tuple[str, str | None]]:
        passes = self.context.passes(self.context.views)
        return [(view.name, language) for view, language, _ in passes]

    def under(self, view: str, mask: str | None) -> RunSource:
        other = RunSource(self.context.run.path, self.model, view, mask)
        other.models, other._digests = self.models, self._digests
        other._preconditioners = self._preconditioners
        return other

    @cached_property
    def models(self) -> list[tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
        return [self.context.load(checkpoint) for checkpoint in self.checkpoints]

    @cached_property
    def masks(self) -> list[HeadMask | None]:
        return [
            self.context.mask(self.model, self.view, self.language, checkpoint.epoch)
            for checkpoint in self.checkpoints
        ]

    @cached_property
    def collectors(self) -> list[Collector]:
        return [
            recipe(self.context, mask).collector(model, preconditioner)
            for (model, _), mask, preconditioner in zip(
                self.models, self.masks, self._preconditioners, strict=True
            )
        ]

    def train_stores(self) -> list[FeatureStore]:
        return self._stores("train")

    def query_stores(self) -> list[FeatureStore]:
        return self._stores("test")

    def _stores(self, split: str) -> list[FeatureStore]:
        return open_stores(self.context, self.model, self.view, self.language, split, self._digests)

    @cached_property
    def _digests(self) -> list[dict[str, str]]:
        return [
            checkpoint_digests(model, self.context.tokenizer_digest(tokenizer), preconditioner)
            for (model, tokenizer), preconditioner in zip(
                self.models, self._preconditioners, strict=True
            )
        ]

    @cached_property
    def _preconditioners(self) -> list[Preconditioner | None]:
        return [
            preconditioner_of_run(self.context, self.model, checkpoint, *loaded)
            for checkpoint, loaded in zip(self.checkpoints, self.models, strict=True)
        ]


class AttributionSource:
    """A folder of `tracmod attribute`."""

    model_names: Sequence[str] = ("full",)

    def __init__(
        self,
        folder: Path,
        weights: list[float],
        view: tuple[str, str, str | None],
        columns: Mapping[str, str] | None = None,
    ) -> None:
        if view != ("full", "full", None):
            raise ValueError(
                f"{folder}: an attribution has one model and one mask: model, view and mask are "
                f"choices of a run folder"
            )
        options = read_attribution(folder)
        if columns:
            options = replace(options, columns={**options.columns, **columns})
        if options.exact:
            raise ValueError(
                f"{folder}: an attribution with --exact keeps scores and no features to compare a "
                f"new example with: make one without --exact"
            )
        self.context = AttributionContext(options)
        self.index_path = folder / "index"
        self.label_names = self.context.label_names
        self.loss_kind: LossKind = self.context.loss.kind
        self.device = self.context.device
        self.max_length = self.context.max_length
        # Those of the results: if no checkpoints were given, the weight of the model was 1.
        self.weights: list[float] | None = weights
        self.normalize: str | None = options.normalize

    @property
    def train(self) -> pa.Table:
        return self.context.tables["train"]

    @property
    def queries(self) -> pa.Table:
        return self.context.tables["query"]

    @property
    def k(self) -> int:
        return self.context.options.k

    @property
    def views(self) -> list[tuple[str, str | None]]:
        return [("full", None)]

    def under(self, view: str, mask: str | None) -> AttributionSource:
        raise ValueError(
            "an attribution has one model and one mask: other views are those of a run folder"
        )

    @cached_property
    def models(self) -> list[tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
        tokenizer = self.context.tokenizer
        return [
            (self.context.load(checkpoint), tokenizer) for checkpoint in self.context.checkpoints
        ]

    @cached_property
    def masks(self) -> list[HeadMask | None]:
        return [self.context.mask] * len(self.context.checkpoints)

    @cached_property
    def collectors(self) -> list[Collector]:
        feature_recipe = self.context.recipe()
        return [
            feature_recipe.collector(
                model, self.context.preconditioner(checkpoint, model), measured=True
            )
            for checkpoint, model in self._loaded()
        ]

    def train_stores(self) -> list[FeatureStore]:
        return [
            self.context.open_train_store(checkpoint, model) for checkpoint, model in self._loaded()
        ]

    def query_stores(self) -> list[FeatureStore]:
        # Whatever their file holds now: an index only needs features made like the others.
        paths = [self.context.store_path(one, "query") for one in self.context.checkpoints]
        return [FeatureStore.open(path) for path in paths]

    def _loaded(self) -> list[tuple[Checkpoint, PreTrainedModel]]:
        return [
            (checkpoint, model)
            for checkpoint, (model, _) in zip(self.context.checkpoints, self.models, strict=True)
        ]
