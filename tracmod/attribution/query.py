"""Influence on a new example, from feature stores that are there and, if built, their index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tracmod.attribution.attribute import Work, read_attribution
from tracmod.features.collector import Collector
from tracmod.features.rows import SomeRows, StoreRows
from tracmod.features.store import FeatureStore
from tracmod.files.durable import read_json
from tracmod.gradients.preconditioner import Preconditioner
from tracmod.influence.index import InfluenceIndex, gpu_number
from tracmod.influence.scores import TopInfluences, top_influences
from tracmod.models.inputs import as_examples, encode, predict
from tracmod.models.loading import load_model
from tracmod.models.modes import frozen, to_device
from tracmod.study.pipeline import MODELS, Study, feature_digests
from tracmod.study.run_folder import RunFolder
from tracmod.subnetworks.head_mask import HeadMask, masked

# Candidates that an inexact index is asked for, per place and at least; exact scores decide.
CANDIDATES, LEAST_CANDIDATES = 4, 100


class Attributor:
    """One folder's models and training features, kept open to answer repeatedly.

    The checkpoints stay in memory, the features on disk: they are read in blocks, or an index
    (`tracmod index`) says which rows to read. Scores are those of the folder's own results: same
    projection, mask, weights and normalisation; an inexact index only chooses the candidates.

    Examples:
        >>> attributor = tm.Attributor("runs/demo")
        >>> answer = attributor.query("The king is waiting.", "The king is not waiting.")
        >>> answer["label"], answer["proponents"][0]["text_a"], answer["proponents"][0]["score"]
    """

    def __init__(
        self, folder: str | Path, model: str = "full", view: str = "full", mask: str | None = None
    ) -> None:
        """Open a run folder or a folder of `tracmod attribute`.

        Args:
            folder: a run with the stage `collect` done, or a finished attribution without --exact,
                whose model, checkpoints and example files are still where they were.
            model: of a run: `full` or `sparse`.
            view: of a run: `full`, `subnetwork`, `random-<i>` or `other-<language>`.
            mask: the language whose mask is applied, for views with one mask per language.

        Raises:
            ValueError: no such folder, view or mask, or no features in it.
        """
        folder = Path(folder)
        file = folder / "run.json"
        record = read_json(file) if file.is_file() else {}
        self.source: _Source
        if isinstance(record, dict) and "arguments" in record:
            self.source = _OfAttribution(folder, record["weights"], (model, view, mask))
        else:
            self.source = _OfRun(folder, model, view, mask)

    def under(self, view: str, mask: str | None = None) -> Attributor:
        """The same model of the run under another view's masks; the checkpoints are shared.

        Args:
            view, mask: as in `__init__`.

        Raises:
            ValueError: as there.
        """
        other = object.__new__(Attributor)
        other.source = self.source.under(view, mask)
        return other

    @property
    def views(self) -> list[tuple[str, str | None]]:
        """Every view that can be asked, and the language of its mask if it has several."""
        return self.source.views

    @property
    def index_path(self) -> Path:
        """Where the FAISS index of these features lies."""
        return self.source.index_path

    def build_index(
        self,
        kind: str,
        *,
        recall: float = 0.95,
        memory: int = 4_000_000_000,
        device: str = "cpu",
    ) -> InfluenceIndex:
        """Build and save a FAISS index over the training examples' features.

        Args:
            kind, recall, memory, device: as in `InfluenceIndex.build`.

        Raises:
            ValueError: as there; features made with something else than what is there now.
        """
        gpu_number(device, kind)  # refused before the models are read
        index = InfluenceIndex.build(
            self.train_stores,
            kind=kind,
            languages=self._languages.tolist(),
            weights=self.source.weights,
            normalize=self.source.normalize,
            queries=self.source.query_stores(),
            recall=recall,
            memory=memory,
            device=device,
        )
        index.save(self.index_path)
        return index

    def query(
        self,
        text_a: str,
        text_b: str | None = None,
        label: str | None = None,
        k: int = 10,
        languages: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """Strongest proponents and opponents of one example.

        Args:
            text_a, text_b: the texts.
            label: its label's name (of a model with one output, a whole number); None: the last
                checkpoint's prediction, so that the answer is about why the model says what it
                says.
            k: how many of each sign.
            languages: only training examples of these; None: of all.

        Returns:
            `label`, `prediction`, `probabilities` (by label; None for a model with one output),
            `languages`, `index` (the kind of the index that chose the candidates, or None), and
            `proponents` and `opponents`: lists of dicts with rank, score, id, language, label,
            text_a, text_b, group. Positive scores: the training example lowered the loss of the
            label.

        Raises:
            ValueError: a label or language that is not there; features or an index made with
                something else than what is there now.
        """
        if k < 1:
            raise ValueError(f"k: expected at least 1, got {k}")
        given = None if label is None else self._label_number(label)
        rows = self._rows_of(languages)
        table = pa.table(
            {"id": ["query"], "text_a": [text_a], "text_b": pa.array([text_b], pa.string()),
             "label": [0 if given is None else given]}
        )  # fmt: skip
        prediction, probabilities = self._predict(table)
        if given is None:
            given = prediction
            table = table.set_column(3, "label", [[prediction]])
        top, kind = self._nearest(self._features(table), k, rows, languages)
        return {
            "label": self._label_name(given),
            "prediction": self._label_name(prediction),
            "probabilities": probabilities,
            "languages": None if languages is None else list(languages),
            "index": kind,
            "proponents": self._examples(top.indices[0], top.scores[0]),
            "opponents": self._examples(top.opponent_indices[0], top.opponent_scores[0]),
        }

    @cached_property
    def train_stores(self) -> list[FeatureStore]:
        """One feature store per checkpoint, made with what is there now."""
        return self.source.train_stores()

    @cached_property
    def _languages(self) -> np.ndarray:
        return np.array(self.source.train.column("language").to_pylist())

    def _rows_of(self, languages: Sequence[str] | None) -> Tensor:
        """The numbers of the training examples of some languages, ascending."""
        if languages is None:
            return torch.arange(len(self._languages))
        there = np.unique(self._languages).tolist()
        unknown = sorted(set(languages) - set(there))
        if unknown or not languages:
            raise ValueError(
                f"language: expected some of {', '.join(there)}, got {', '.join(unknown) or 'none'}"
            )
        return torch.from_numpy(np.flatnonzero(np.isin(self._languages, list(languages))))

    # --- the example ------------------------------------------------------------------------

    def _label_number(self, label: str) -> int:
        names = self.source.label_names
        if len(names) == 1:
            if not label.isdecimal():
                raise ValueError(f"label: expected a whole number, got {label}")
            return int(label)
        if label not in names:
            raise ValueError(f"label: expected one of {', '.join(names)}, got {label}")
        return names.index(label)

    def _label_name(self, label: int) -> str:
        names = self.source.label_names
        return str(label) if len(names) == 1 else names[label]

    def _predict(self, table: pa.Table) -> tuple[int, dict[str, float] | None]:
        """The last checkpoint's label, and its probability of every label."""
        model, tokenizer = self.source.models[-1]
        with masked(model, self.source.masks[-1]):
            logits_C = predict(model, encode(tokenizer, table, self.source.max_length))[0]
        if len(logits_C) == 1:
            return round(float(logits_C)), None
        probabilities = logits_C.double().softmax(0).tolist()
        named = dict(zip(self.source.label_names, probabilities, strict=True))
        return int(logits_C.argmax()), named

    def _features(self, table: pa.Table) -> list[Tensor]:
        """(C,) the example's features (1, K)."""
        found = []
        source = self.source
        for (model, tokenizer), collector in zip(source.models, source.collectors, strict=True):
            examples = as_examples(encode(tokenizer, table, source.max_length))
            with frozen(model):
                found.append(collector.collect(examples))
        return found

    # --- the training examples --------------------------------------------------------------

    def _nearest(
        self,
        features: list[Tensor],
        k: int,
        rows: Tensor,
        languages: Sequence[str] | None,
    ) -> tuple[TopInfluences, str | None]:
        """The strongest of `rows`, and the kind of the index that was used, if one was."""
        index = self._index
        if index is not None:
            chosen = self._candidates(index, features, min(k, len(rows)), languages)
            if chosen is not None:
                return self._rank(features, k, chosen), index.kind
        return self._rank(features, k, rows), None

    def _candidates(
        self,
        index: InfluenceIndex,
        features: list[Tensor],
        k: int,
        languages: Sequence[str] | None,
    ) -> Tensor | None:
        """Rows among which an index finds the strongest of both signs; None: it finds too few.

        Too few: lists or a part of a graph that hold next to none of a filter's languages.
        """
        asked = k if index.kind == "flat" else max(CANDIDATES * k, LEAST_CANDIDATES)
        asked = min(asked, len(index.ids))
        on_cpu = [one.cpu() for one in features]
        found = []
        for opponents in (False, True):
            near = index.search(on_cpu, asked, opponents=opponents, languages=languages).indices[0]
            found.append(near[near >= 0])
        if min(map(len, found)) < k:
            return None
        return torch.cat(found).unique()

    def _rank(self, features: list[Tensor], k: int, rows: Tensor) -> TopInfluences:
        """The k strongest of both signs among `rows`, by their stored features."""
        stores = [StoreRows(store) for store in self.train_stores]
        every = len(rows) == stores[0].shape[0]
        with tqdm(total=len(rows), desc="query", unit="example", disable=None) as bar:
            top = top_influences(
                features,
                stores if every else [SomeRows(store, rows) for store in stores],
                k,
                weights=self.source.weights,
                normalize=self.source.normalize,
                device=self.source.device,
                advance=bar.update,
            )
        found, against = rows[top.indices.cpu()], rows[top.opponent_indices.cpu()]
        return replace(top, indices=found, opponent_indices=against)

    @cached_property
    def _index(self) -> InfluenceIndex | None:
        if not (self.index_path / "index.json").is_file():
            return None
        index = InfluenceIndex.load(self.index_path)
        index.check_built_from(self.train_stores, self.source.weights, self.source.normalize)
        return index

    def _examples(self, indices: Tensor, scores: Tensor) -> list[dict[str, Any]]:
        """Examples as the answer shows them."""
        rows = self.source.train.take(indices.numpy()).to_pylist()
        return [
            {"rank": rank, "score": score} | row | {"label": self._label_name(row["label"])}
            for rank, (row, score) in enumerate(zip(rows, scores.tolist(), strict=True), 1)
        ]


# --- where features come from ---------------------------------------------------------------


class _Source(Protocol):
    """What an `Attributor` needs of a folder. C checkpoints, in order."""

    index_path: Path
    model_names: Sequence[str]
    label_names: list[str]
    device: str
    max_length: int
    weights: list[float] | None
    normalize: str | None

    @property
    def train(self) -> pa.Table:
        """The training examples, in the order of the features."""

    @property
    def queries(self) -> pa.Table:
        """Examples like those to be asked about, with their labels."""

    @property
    def k(self) -> int:
        """Over how many of the strongest examples the folder's own shares are counted."""

    @property
    def views(self) -> list[tuple[str, str | None]]:
        """The views with features, and the language of each of their masks."""

    def under(self, view: str, mask: str | None) -> _Source:
        """The same model under other masks; what was loaded of it is shared."""

    @property
    def models(self) -> list[tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
        """(C,) on the device."""

    @property
    def masks(self) -> list[HeadMask | None]:
        """(C,) the mask that features are made under."""

    @property
    def collectors(self) -> list[Collector]:
        """(C,) what turns examples into features."""

    def train_stores(self) -> list[FeatureStore]:
        """(C,) refused where made with something else than what is there now."""

    def query_stores(self) -> list[FeatureStore]:
        """(C,) of examples like those to be asked about, to measure an index with."""


class _OfRun:
    """One model and view of a run folder."""

    model_names: Sequence[str] = MODELS

    def __init__(self, folder: Path, model: str, view: str, mask: str | None) -> None:
        self.study = Study(RunFolder(folder))
        self.model = model
        if not self.study.run.is_done("collect"):
            raise ValueError(f"{folder}: expected collected features; run `tracmod collect`")
        views = {one.name: one for one in self.study.views if one.collected}
        if model not in MODELS or view not in views:
            raise ValueError(
                f"{folder}: expected model full or sparse and a view of {', '.join(views)}, "
                f"got {model} and {view}"
            )
        self.view = views[view]
        names = [language for language, _ in self.view.masks]
        self.language = None if None in names else mask
        if self.language not in names:
            raise ValueError(
                f"{folder}: the view {view} has a mask per language: expected one of "
                f"{', '.join(map(str, names))}, got {mask}"
            )
        self.index_path = folder / "index" / model / view / (self.language or "")
        self.label_names: list[str] = self.study.run.record["label_names"]
        self.device = self.study.device
        self.max_length = self.study.config.model.max_length
        self.checkpoints = self.study.checkpoints(model)
        self.weights = self.study.weights(self.checkpoints)
        self.normalize = self.study.normalize

    @property
    def train(self) -> pa.Table:
        return self.study.table("train")

    @property
    def queries(self) -> pa.Table:
        return self.study.table("test")

    @property
    def k(self) -> int:
        return self.study.config.influence.ks[0]

    @property
    def views(self) -> list[tuple[str, str | None]]:
        collected = (view for view in self.study.views if view.collected)
        return [(view.name, language) for view in collected for language, _ in view.masks]

    def under(self, view: str, mask: str | None) -> _OfRun:
        other = _OfRun(self.study.run.path, self.model, view, mask)
        other.models, other._metrics, other._digests = self.models, self._metrics, self._digests
        return other

    @cached_property
    def models(self) -> list[tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
        loaded = (load_model(one.path) for one in self.checkpoints)
        return [(to_device(model, self.device), tokenizer) for model, tokenizer in loaded]

    @cached_property
    def masks(self) -> list[HeadMask | None]:
        epochs = [one.epoch for one in self.checkpoints]
        return [self.study.mask(self.model, self.view, self.language, epoch) for epoch in epochs]

    @cached_property
    def collectors(self) -> list[Collector]:
        parts = zip(self.models, self.masks, self._metrics, strict=True)
        return [self.study.collector(model, mask, metric) for (model, _), mask, metric in parts]

    def train_stores(self) -> list[FeatureStore]:
        return self._stores("train")

    def query_stores(self) -> list[FeatureStore]:
        return self._stores("test")

    def _stores(self, split: str) -> list[FeatureStore]:
        return self.study.stores(self.model, self.view, self.language, split, self._digests)

    @cached_property
    def _digests(self) -> list[dict[str, str]]:
        parts = zip(self.models, self._metrics, strict=True)
        return [feature_digests(model, tokenizer, metric) for (model, tokenizer), metric in parts]

    @cached_property
    def _metrics(self) -> list[Preconditioner | None]:
        parts = zip(self.checkpoints, self.models, strict=True)
        return [self.study.preconditioner(self.model, one, *loaded) for one, loaded in parts]


class _OfAttribution:
    """A folder of `tracmod attribute`."""

    model_names: Sequence[str] = ("full",)

    def __init__(
        self, folder: Path, weights: list[float], view: tuple[str, str, str | None]
    ) -> None:
        if view != ("full", "full", None):
            raise ValueError(
                f"{folder}: an attribution has one model and one mask: model, view and mask are "
                f"choices of a run folder"
            )
        asked = read_attribution(folder)
        if asked.exact:
            raise ValueError(
                f"{folder}: an attribution with --exact keeps scores and no features to compare a "
                f"new example with: make one without --exact"
            )
        self.work = Work(asked)
        self.index_path = folder / "index"
        self.label_names = self.work.label_names
        self.device = self.work.device
        self.max_length = self.work.max_length
        # Of the results there: without checkpoints given, the model's own weight was 1.
        self.weights: list[float] | None = weights
        self.normalize = asked.normalize

    @property
    def train(self) -> pa.Table:
        return self.work.tables["train"]

    @property
    def queries(self) -> pa.Table:
        return self.work.tables["query"]

    @property
    def k(self) -> int:
        return self.work.asked.k

    @property
    def views(self) -> list[tuple[str, str | None]]:
        return [("full", None)]

    def under(self, view: str, mask: str | None) -> _OfAttribution:
        raise ValueError(
            "an attribution has one model and one mask: other views are those of a run folder"
        )

    @cached_property
    def models(self) -> list[tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
        return [(self.work.load(one), self.work.tokenizer) for one in self.work.checkpoints]

    @cached_property
    def masks(self) -> list[HeadMask | None]:
        return [self.work.mask] * len(self.work.checkpoints)

    @cached_property
    def collectors(self) -> list[Collector]:
        loaded = zip(self.work.checkpoints, self.models, strict=True)
        return [self.work.collector(one, model) for one, (model, _) in loaded]

    def train_stores(self) -> list[FeatureStore]:
        loaded = zip(self.work.checkpoints, self.models, strict=True)
        return [self.work.open_train_store(one, model) for one, (model, _) in loaded]

    def query_stores(self) -> list[FeatureStore]:
        # Whatever their file holds now: an index only asks that they were made like the others.
        paths = [self.work.store_path(one, "query") for one in self.work.checkpoints]
        return [FeatureStore.open(path) for path in paths]
