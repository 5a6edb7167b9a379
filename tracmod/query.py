"""Influence on a new example, from a run's models, feature stores and, if there, its index."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from tracmod.capture import frozen
from tracmod.features import as_examples, masked
from tracmod.heads import HeadMask
from tracmod.index import InfluenceIndex
from tracmod.influence import top_influences
from tracmod.model import encode, load_model, predict, to_device
from tracmod.pipeline import Study, model_digests
from tracmod.run_folder import RunFolder
from tracmod.store import FeatureStore


class Attributor:
    """One model and view of a run, kept open to answer repeatedly.

    The checkpoints stay in memory; scores are those of the run: same projection, mask, weights and
    normalisation.
    """

    def __init__(
        self, run_dir: str | Path, model: str = "full", view: str = "full", mask: str | None = None
    ) -> None:
        """Open a run.

        Args:
            run_dir: a run folder with the stage `collect` done.
            model: `full` or `sparse`.
            view: `full`, `subnetwork`, `random-<i>` or `other-<language>`.
            mask: the language whose mask is applied, for views with one mask per language.

        Raises:
            ValueError: no such view or mask, or features not collected.
        """
        self.study = Study(RunFolder(run_dir))
        self.model = model
        if not self.study.run.is_done("collect"):
            raise ValueError(f"{run_dir}: expected collected features; run `tracmod collect`")
        views = {one.name: one for one in self.study.views if one.collected}
        if model not in ("full", "sparse") or view not in views:
            raise ValueError(
                f"{run_dir}: expected model full or sparse and a view of {', '.join(views)}, "
                f"got {model} and {view}"
            )
        self.view = views[view]
        masks = dict(self.view.masks)
        self.mask_language = None if None in masks else mask
        if self.mask_language not in masks:
            raise ValueError(
                f"{run_dir}: the view {view} has a mask per language: expected one of "
                f"{', '.join(map(str, masks))}, got {mask}"
            )

    @property
    def index_path(self) -> Path:
        """Where this model and view's FAISS index lies."""
        folder = self.study.run.path / "index" / self.model / self.view.name
        return folder if self.mask_language is None else folder / self.mask_language

    def build_index(self, kind: str) -> InfluenceIndex:
        """Build and save a FAISS index over the training examples' features."""
        index = InfluenceIndex.build(
            self.train_stores,
            kind=kind,
            languages=self.train.column("language").to_pylist(),
            weights=self.weights,
            normalize=self.study.normalize,
            queries=self._stores("test"),
        )
        index.save(self.index_path)
        return index

    def query(
        self,
        text_a: str,
        text_b: str | None = None,
        label: str | None = None,
        k: int = 10,
    ) -> dict[str, Any]:
        """Strongest proponents and opponents of one example.

        Args:
            text_a, text_b: the texts.
            label: its label's name; None: the last checkpoint's prediction, so that the answer is
                about why the model says what it says.
            k: how many of each sign.

        Returns:
            `label`, `prediction`, and `proponents` and `opponents`: lists of dicts with rank,
            score, id, language, label, text_a, text_b. Positive scores: the training example
            lowered the loss of the label.
        """
        names = self.study.run.record["label_names"]
        if label is not None and label not in names:
            raise ValueError(f"label: expected one of {', '.join(names)}, got {label}")
        table = pa.table(
            {"id": ["query"], "text_a": [text_a], "text_b": pa.array([text_b], pa.string()),
             "label": [0 if label is None else names.index(label)]}
        )  # fmt: skip
        prediction = names[self._predict(table)]
        if label is None:
            table = table.set_column(3, "label", [[names.index(prediction)]])
        features = self._features(table)
        proponents, opponents = self._nearest(features, k)
        return {
            "label": label or prediction,
            "prediction": prediction,
            "proponents": proponents,
            "opponents": opponents,
        }

    @cached_property
    def train(self) -> pa.Table:
        """The training examples."""
        return pq.read_table(self.study.run.data("train"))

    @cached_property
    def train_stores(self) -> list[FeatureStore]:
        """One feature store per checkpoint."""
        return self._stores("train")

    @cached_property
    def weights(self) -> list[float] | None:
        """One weight per checkpoint."""
        return self.study.weights(self.study.checkpoints(self.model))

    def _stores(self, split: str) -> list[FeatureStore]:
        return self.study.stores(self.model, self.view, self.mask_language, split, self._digests)

    @cached_property
    def _digests(self) -> list[dict[str, str]]:
        return [model_digests(model, tokenizer) for model, tokenizer in self._models]

    @cached_property
    def _models(self) -> list[Any]:
        loaded = (load_model(one.path) for one in self.study.checkpoints(self.model))
        return [(to_device(model, self.study.device), tokenizer) for model, tokenizer in loaded]

    @cached_property
    def _masks(self) -> list[HeadMask | None]:
        """Of each checkpoint."""
        return [
            self.study.mask(self.model, self.view, self.mask_language, one.epoch)
            for one in self.study.checkpoints(self.model)
        ]

    def _predict(self, table: pa.Table) -> int:
        model, tokenizer = self._models[-1]
        with masked(model, self._masks[-1]):
            examples = encode(tokenizer, table, self.study.config.model.max_length)
            return int(predict(model, examples).argmax())

    def _features(self, table: pa.Table) -> list[Tensor]:
        found = []
        for (model, tokenizer), mask in zip(self._models, self._masks, strict=True):
            examples = as_examples(encode(tokenizer, table, self.study.config.model.max_length))
            with frozen(model):
                found.append(self.study.collector(model, mask).collect(examples).cpu())
        return found

    def _nearest(self, features: list[Tensor], k: int) -> list[list[dict[str, Any]]]:
        if (self.index_path / "index.json").is_file():
            index = self._index
            sides = [index.search(features, k, opponents=side) for side in (False, True)]
            return [self._rows(one.indices[0], one.scores[0]) for one in sides]
        device = self.study.device
        top = top_influences(
            [one.to(device) for one in features],
            [store.read().to(device) for store in self.train_stores],
            k,
            weights=self.weights,
            normalize=self.study.normalize,
        )
        return [
            self._rows(top.indices[0], top.scores[0]),
            self._rows(top.opponent_indices[0], top.opponent_scores[0]),
        ]

    @cached_property
    def _index(self) -> InfluenceIndex:
        index = InfluenceIndex.load(self.index_path)
        index.check_built_from(self.train_stores, self.weights, self.study.normalize)
        return index

    def _rows(self, indices: Tensor, scores: Tensor) -> list[dict[str, Any]]:
        names = self.study.run.record["label_names"]
        rows = []
        for rank, (row, score) in enumerate(zip(indices.tolist(), scores.tolist(), strict=True), 1):
            if row < 0:
                break
            example = self.train.slice(row, 1).to_pylist()[0]
            example["label"] = names[example["label"]]
            rows.append({"rank": rank, "score": score} | example)
        return rows
