"""The stages of `tracmod run`: each reads the run folder, adds its part, and can be resumed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tracmod.analysis.language_pairs import read_distances
from tracmod.analysis.results import WITHOUT_GROUP
from tracmod.analysis.same_group import same_group_rows
from tracmod.analysis.study import analyze
from tracmod.capture import frozen
from tracmod.config import FinetuneConfig, RunConfig
from tracmod.durable import file_sha256, write_parquet
from tracmod.features import Collector, Projection, collect_to_store, feature_identity, masked
from tracmod.heads import HeadMask, prune
from tracmod.influence import top_influences, without_examples
from tracmod.model import (
    Checkpoint,
    create_model,
    encode,
    load_checkpoints,
    load_model,
    model_digest,
    predict,
    resolve_device,
    to_device,
    tokenizer_digest,
)
from tracmod.report import write_report
from tracmod.run_folder import STAGES, RunFolder
from tracmod.store import FeatureStore
from tracmod.tables import InfluenceTables
from tracmod.tasks import load_task
from tracmod.tokenizer import read_sentencepiece, train_tokenizer
from tracmod.train import Settings, accuracy_by_language, fine_tune

MODELS = ("full", "sparse")
SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class View:
    """Under which head masks influence is computed.

    Attributes:
        name: `full`, `subnetwork`, `random-<i>` or `other-<language>`.
        masks: one entry per pass: (language, mask). With a language, only its test examples are
            attributed under the mask; with None, all are.
    """

    name: str
    masks: list[tuple[str | None, HeadMask | None]]


def run_stages(run: RunFolder, stages: Sequence[str] = STAGES, again: str | None = None) -> None:
    """Do the stages that are not yet done, in order.

    Args:
        run: the folder, locked.
        stages: which; those before them must be done.
        again: a stage to do even if it is done (what is on disk and whole is not made twice).

    Raises:
        ValueError: a stage before these is not done, or `analyze.distances` cannot be used.
    """
    study = Study(run)
    study.check_distances()
    for stage in stages:
        if run.is_done(stage) and stage != again:
            continue
        for earlier in STAGES[: STAGES.index(stage)]:
            if not run.is_done(earlier):
                raise ValueError(
                    f"{run.path}: {stage} needs {earlier}, which is not done: "
                    f"`tracmod run` does every stage that is missing"
                )
        with run.stage(stage):
            getattr(study, stage.replace("-", "_"))()


class Study:
    """The stages, one method each, and what they share."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.config: RunConfig = run.config
        self._tables: dict[str, pa.Table] = {}
        self._data_digests: dict[str, str] = {}

    def check_distances(self) -> None:
        """ValueError where `analyze.distances` cannot be used: now, not after days of work."""
        asked = self.config.analyze
        if asked.distances is not None:
            read_distances(asked.distances, self.languages, asked.distance_names)

    # --- stages -----------------------------------------------------------------------------

    def data(self) -> None:
        """Sampled examples into data/, label names into run.json."""
        task = load_task(self.config.task)
        for split in SPLITS:
            write_parquet(self.run.data(split), getattr(task, split))
        self.run.record |= {
            "label_names": task.label_names,
            "languages": task.languages,
            "parallel": task.parallel,
            "device": self.device,
        }

    def finetune(self) -> None:
        """Fine-tune on all languages: models/full/."""
        self._fine_tune("full", self.config.finetune, None)

    def prune(self) -> None:
        """One subnetwork per language: subnetworks/<language>.json."""
        checkpoint = self.checkpoints("full")[-1]
        model, tokenizer = self._load(checkpoint)
        dev = self.table("dev")
        for language in self.languages:
            if _holds_mask(self.run.subnetwork(language)):
                continue
            examples = self._encode(tokenizer, _of_language(dev, language), model)
            result = prune(
                model,
                examples,
                threshold=self.config.prune.threshold,
                step=self.config.prune.step,
                description=f"prune {language}",
            )
            result.save(self.run.subnetwork(language), language, [self.config.seed])

    def sparse_finetune(self) -> None:
        """Fine-tune from the same start, each batch in one language through its subnetwork."""
        masks = {language: self.subnetwork(language) for language in self.languages}
        self._fine_tune("sparse", self.config.sparse_finetune or self.config.finetune, masks)

    def collect(self) -> None:
        """Features of every model, checkpoint, view and mask: features/."""
        with self._bar("collect", self._count_passes()) as bar:
            for model_name in MODELS:
                for checkpoint in self.checkpoints(model_name):
                    self._collect_checkpoint(model_name, checkpoint, bar.update)

    def influence(self) -> None:
        """Scores, strongest training examples and language tables: influence/."""
        self._begin_anew("influence")  # views of an earlier config must not be left in it
        with self._bar("influence", len(MODELS) * len(self.views), "view") as bar:
            for model_name in MODELS:
                digests = []
                for checkpoint in self.checkpoints(model_name):
                    model, tokenizer = self._load(checkpoint)
                    digests.append(model_digests(model, tokenizer))
                test = self._encode(tokenizer, self.table("test"), model)
                for view in self.views:  # predictions are the last checkpoint's
                    predictions = self._predictions(model, test, view)
                    self._influence_of_view(model_name, view, digests, predictions)
                    bar.update(1)

    def analyze(self) -> None:
        """Comparisons, intervals and tests: analysis/."""
        self._begin_anew("analysis")
        analyze(
            self.run.path,
            bootstrap=self.config.analyze.bootstrap,
            permutations=self.config.analyze.permutations,
            confidence=self.config.analyze.confidence,
            seed=self.config.seed,
            distances=self.config.analyze.distances,
            distance_names=self.config.analyze.distance_names,
        )

    def report(self) -> None:
        """report/index.html."""
        write_report(self.run.path)

    # --- fine-tuning ------------------------------------------------------------------------

    def _fine_tune(
        self, name: str, config: FinetuneConfig, masks: dict[str, HeadMask] | None
    ) -> None:
        model, tokenizer = self._initial_model()
        train, test = self.table("train"), self.table("test")
        languages = test.column("language").to_pylist()
        test_examples = self._encode(tokenizer, test, model)

        def evaluate(model: PreTrainedModel) -> dict[str, float]:
            return accuracy_by_language(model, test_examples, languages, masks)

        fine_tune(
            model,
            tokenizer,
            self._encode(tokenizer, train, model),
            train.column("language").to_pylist(),
            self.run.model(name),
            Settings(seed=self.config.seed, **config.model_dump(exclude={"save_seconds"})),
            masks=masks,
            evaluate=evaluate,
            device=self.device,
            save_seconds=config.save_seconds,
            ids=train.column("id").to_pylist(),
            description=f"fine-tune {name}",
        )

    def _initial_model(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Where full and sparse fine-tuning both begin: the same weights, by the same seed."""
        shape, labels = self.config.model, self.run.record["label_names"]
        if shape.name is not None:
            return load_model(shape.name, labels, seed=self.config.seed)
        tokenizer: PreTrainedTokenizerBase
        if shape.sentencepiece is not None:
            tokenizer = read_sentencepiece(shape.sentencepiece, shape.max_length)
        else:
            tokenizer = train_tokenizer(
                _texts(self.table("train")), shape.vocabulary, shape.max_length
            )
        model = create_model(
            tokenizer,
            labels,
            layers=shape.layers,
            hidden=shape.hidden,
            heads=shape.heads,
            intermediate=shape.intermediate,
            dropout=shape.dropout,
            max_length=shape.max_length,
            seed=self.config.seed,
        )
        return model, tokenizer

    # --- collecting -------------------------------------------------------------------------

    def _count_passes(self) -> int:
        train, test = len(self.table("train")), len(self.table("test"))
        per_checkpoint = sum(
            train + (test if language is None else len(_of_language(self.table("test"), language)))
            for view in self.views
            for language, _ in view.masks
        )
        return per_checkpoint * sum(len(self.checkpoints(model)) for model in MODELS)

    def _collect_checkpoint(
        self, model_name: str, checkpoint: Checkpoint, advance: Callable[[int], Any]
    ) -> None:
        model, tokenizer = self._load(checkpoint)
        digests = model_digests(model, tokenizer)
        encoded = {
            split: self._encode(tokenizer, self.table(split), model) for split in ("train", "test")
        }
        for view, language, mask in self._masks():
            with frozen(model):
                collector = self.collector(model, mask)
                for split in ("train", "test"):
                    path = self.run.features(
                        model_name, view.name, language, checkpoint.epoch, split
                    )
                    rows = self._rows(split, language)
                    with self._store(path, split, rows, mask, digests) as store:
                        missing = store.missing_shards()
                        lacking = sum(len(store.shard_range(shard)) for shard in missing)
                        advance(len(rows) - lacking)
                        examples = [encoded[split][row] for row in rows]
                        collect_to_store(collector, examples, store, advance)

    def _masks(self) -> Iterator[tuple[View, str | None, HeadMask | None]]:
        for view in self.views:
            for language, mask in view.masks:
                yield view, language, mask

    def _rows(self, split: str, language: str | None) -> list[int]:
        languages = self.table(split).column("language").to_pylist()
        if split == "train" or language is None:
            return list(range(len(languages)))
        return [row for row, other in enumerate(languages) if other == language]

    def collector(self, model: PreTrainedModel, mask: HeadMask | None) -> Collector:
        """What turns examples into the run's features."""
        collect = self.config.collect
        return Collector(
            model,
            self._projection,
            collect.parameters,
            collect.batch_tokens,
            getattr(torch, collect.dtype),
            mask,
        )

    @property
    def _projection(self) -> Projection:
        collect = self.config.collect
        return Projection(
            dim=collect.projection_dim,
            kind=collect.projection_kind,
            seed=collect.projection_seed,
            layers=collect.projection_layers,
        )

    def _store(
        self,
        path: Path,
        split: str,
        rows: list[int],
        mask: HeadMask | None,
        digests: dict[str, str],
    ) -> FeatureStore:
        collect = self.config.collect
        return FeatureStore.create(
            path,
            ids=self.table(split).column("id").take(rows).to_pylist(),
            dim=collect.projection_dim,
            identity=self._identity(split, mask, digests),
            shard_rows=collect.shard_rows,
        )

    def _identity(
        self, split: str, mask: HeadMask | None, digests: dict[str, str]
    ) -> dict[str, Any]:
        """What the features of a split depend on; `digests` are those of the checkpoint."""
        collect = self.config.collect
        return feature_identity(
            self._projection,
            collect.parameters,
            mask,
            collect.dtype,
            data=self._data_digest(split),
            max_length=str(self.config.model.max_length),
            batch_tokens=str(collect.batch_tokens),
            **digests,
        )

    def stores(
        self,
        model_name: str,
        view: View,
        language: str | None,
        split: str,
        digests: Sequence[dict[str, str]],
    ) -> list[FeatureStore]:
        """The feature stores of one pass over a split, one per checkpoint that counts.

        Args:
            model_name, view, language, split: which; the language of one of the view's masks.
            digests: (C,) `model_digests` of the checkpoints as they are now.

        Raises:
            ValueError: a store made with another checkpoint, mask, data or projection than these.
        """
        mask = dict(view.masks)[language]
        return [
            FeatureStore.open(
                self.run.features(model_name, view.name, language, one.epoch, split),
                self._identity(split, mask, of_checkpoint),
            )
            for one, of_checkpoint in zip(self.checkpoints(model_name), digests, strict=True)
        ]

    # --- influence --------------------------------------------------------------------------

    def _influence_of_view(
        self,
        model_name: str,
        view: View,
        digests: Sequence[dict[str, str]],
        predictions: Sequence[int],
    ) -> None:
        checkpoints = self.checkpoints(model_name)
        train, test = self.table("train"), self.table("test")
        groups = train.column("language").to_pylist()
        ks, weights = self.config.influence.ks, self.weights(checkpoints)
        tables, without_group = (InfluenceTables(train, test, predictions, ks) for _ in range(2))
        same_group = same_group_rows(train, test)
        for language, _ in view.masks:
            rows = self._rows("test", language)
            queries, trains = (
                [
                    store.read().to(self.device)
                    for store in self.stores(model_name, view, language, split, digests)
                ]
                for split in ("test", "train")
            )
            left_out = [same_group[row] for row in rows]
            longest = max(ks) + max(map(len, left_out), default=0)
            top = top_influences(queries, trains, longest, groups, weights, self.normalize)
            tables.add(rows, top)
            if any(same_group):
                rest = without_examples(
                    top, left_out, queries, trains, max(ks), groups, weights, self.normalize
                )
                without_group.add(rows, rest, left_out)
            for place, checkpoint in enumerate(checkpoints):
                query, train_one = [queries[place]], [trains[place]]
                alone = top_influences(query, train_one, ks[0], groups, None, self.normalize)
                tables.add_epoch(checkpoint.epoch, rows, alone)
        folder = self.run.influence(model_name, view.name)
        self._write_tables(tables, folder)
        if any(same_group):
            self._write_tables(without_group, folder / WITHOUT_GROUP)

    def _write_tables(self, tables: InfluenceTables, folder: Path) -> None:
        analyze = self.config.analyze
        tables.write(
            folder,
            bootstrap=analyze.bootstrap,
            confidence=analyze.confidence,
            seed=self.config.seed,
        )

    @property
    def normalize(self) -> str | None:
        """What the functions of `influence` call it."""
        normalize = self.config.influence.normalize
        return None if normalize == "none" else normalize

    def weights(self, checkpoints: list[Checkpoint]) -> list[float] | None:
        """What each checkpoint counts; None: 1 each."""
        if self.config.influence.weights == "uniform":
            return None
        return checkpoint_weights(checkpoints)

    def _predictions(
        self, model: PreTrainedModel, test: Sequence[dict[str, Any]], view: View
    ) -> list[int]:
        """The predicted label of every test example, under the view's mask."""
        predicted = np.full(len(test), -1)
        for language, mask in view.masks:
            rows = self._rows("test", language)
            with masked(model, mask):
                logits = predict(model, [test[row] for row in rows])
            predicted[rows] = logits.argmax(dim=1).numpy()
        return predicted.tolist()

    def _begin_anew(self, folder: str) -> None:
        if (self.run.path / folder).exists():
            shutil.rmtree(self.run.path / folder)

    # --- what the stages share --------------------------------------------------------------

    @property
    def languages(self) -> list[str]:
        """The task's languages."""
        return self.config.task.languages

    @cached_property
    def device(self) -> str:
        """Where to compute."""
        return resolve_device(self.config.device)

    def table(self, split: str) -> pa.Table:
        """data/<split>.parquet, read once."""
        if split not in self._tables:
            self._tables[split] = pq.read_table(self.run.data(split))
        return self._tables[split]

    def _data_digest(self, split: str) -> str:
        """Digest of data/<split>.parquet, read once."""
        if split not in self._data_digests:
            self._data_digests[split] = file_sha256(self.run.data(split))
        return self._data_digests[split]

    @cached_property
    def views(self) -> list[View]:
        """The views of the config, in the order they are computed."""
        config = self.config.views
        subnetworks = {language: self.subnetwork(language) for language in self.languages}
        views = [View("full", [(None, None)])]
        if config.subnetwork:
            views.append(View("subnetwork", list(subnetworks.items())))
        for draw in range(config.random):
            masks = [
                (language, _random_like(mask, self.config.seed, draw, place))
                for place, (language, mask) in enumerate(subnetworks.items())
            ]
            views.append(View(f"random-{draw}", list(masks)))
        views += [View(f"other-{name}", [(None, subnetworks[name])]) for name in config.other]
        return views

    def subnetwork(self, language: str) -> HeadMask:
        """The language's pruned mask."""
        return HeadMask.load(self.run.subnetwork(language))

    def checkpoints(self, model_name: str) -> list[Checkpoint]:
        """The checkpoints that count for influence: every `collect.every` epochs, and the last.

        A checkpoint stands for the steps since the one before it that counts, so its learning rate
        is the mean over the epochs between.

        Raises:
            ValueError: one of them has no learning rate, and the weights are learning rates.
        """
        last, every = self._epochs(model_name), self.config.collect.every
        chosen = sorted({*range(every, last + 1, every), last})
        folder = self.run.model(model_name)
        all_epochs = load_checkpoints(folder / f"checkpoint-{e}" for e in range(1, last + 1))
        found = []
        for before, epoch in zip([0, *chosen], chosen, strict=False):
            rate = self._mean_rate(all_epochs[before:epoch])
            found.append(replace(all_epochs[epoch - 1], learning_rate=rate))
        return found

    def _mean_rate(self, checkpoints: Sequence[Checkpoint]) -> float | None:
        """None where learning rates do not count."""
        if self.config.influence.weights == "uniform":
            return None
        rates = checkpoint_weights(checkpoints)
        return sum(rates) / len(rates)

    def _epochs(self, model_name: str) -> int:
        sparse = self.config.sparse_finetune if model_name == "sparse" else None
        return (sparse or self.config.finetune).epochs

    def _load(self, checkpoint: Checkpoint) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        model, tokenizer = load_model(checkpoint.path)
        return to_device(model, self.device), tokenizer

    def _encode(
        self, tokenizer: PreTrainedTokenizerBase, table: pa.Table, model: PreTrainedModel
    ) -> list[dict[str, Any]]:
        num_labels = int(model.config.num_labels or 0)
        return encode(tokenizer, table, self.config.model.max_length, num_labels=num_labels)

    def _bar(self, name: str, total: int, unit: str = "example") -> Any:
        return tqdm(total=total, desc=name, unit=unit, disable=None, smoothing=0.05)


def checkpoint_weights(checkpoints: Sequence[Checkpoint]) -> list[float]:
    """TracIn's eta_c: the checkpoints' learning rates.

    Raises:
        ValueError: a checkpoint without one.
    """
    weights = []
    for checkpoint in checkpoints:
        if checkpoint.learning_rate is None:
            raise ValueError(
                f"{checkpoint.path}: expected a learning rate in tracmod.json or "
                f"trainer_state.json, found none; use uniform weights"
            )
        weights.append(checkpoint.learning_rate)
    return weights


def model_digests(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """What of a checkpoint its features depend on."""
    return {"model": model_digest(model), "tokenizer": tokenizer_digest(tokenizer)}


def _holds_mask(path: Path) -> bool:
    """False for a file that is not there or broken."""
    try:
        HeadMask.load(path)
    except ValueError:
        return False
    return True


def _random_like(mask: HeadMask, seed: int, draw: int, place: int) -> HeadMask:
    layers, heads = mask.array.shape
    entropy = np.random.SeedSequence([seed, draw, place]).generate_state(1)[0]
    return HeadMask.random(layers, heads, mask.size, seed=int(entropy))


def _of_language(table: pa.Table, language: str) -> pa.Table:
    return table.filter(pa.compute.equal(table.column("language"), language))


def _texts(table: pa.Table) -> list[str]:
    texts = table.column("text_a").to_pylist() + table.column("text_b").to_pylist()
    return [text for text in texts if text is not None]
