"""The stages of `tracmod run`: each reads the run folder, adds its part, and can be resumed."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tracmod.analysis.influence_tables import InfluenceTables, self_influence_table
from tracmod.analysis.language_pairs import read_distances
from tracmod.analysis.results import WITHOUT_GROUP
from tracmod.analysis.same_group import same_group_rows
from tracmod.analysis.statistics import Resampling
from tracmod.analysis.summary import analyze
from tracmod.config import FinetuneConfig, RunConfig
from tracmod.engine import Engine
from tracmod.engine.local import LocalEngine
from tracmod.features.collector import Collector, collect_to_store, feature_identity
from tracmod.features.projection import Projection
from tracmod.features.rows import ChosenRows, Rows, StoreRows
from tracmod.features.store import FeatureStore
from tracmod.files.durable import (
    canonical_json,
    file_sha256,
    sha256,
    write_csv,
    write_json,
    write_parquet,
)
from tracmod.files.object_storage import location
from tracmod.gradients.ekfac import checkpoint_preconditioner
from tracmod.gradients.preconditioner import Preconditioner
from tracmod.influence.blocks import block_influence, weighted_sum
from tracmod.influence.scores import (
    TopInfluences,
    influence_scores,
    self_influence,
    top_influences,
    without_examples,
)
from tracmod.influence.streaming import Sizes, check_memory
from tracmod.models.checkpoints import Checkpoint, load_checkpoints
from tracmod.models.digests import model_digest, tokenizer_digest
from tracmod.models.inputs import encode, predict
from tracmod.models.loading import create_model, load_model
from tracmod.models.modes import frozen, resolve_device, to_device
from tracmod.models.tokenizer import read_sentencepiece, train_tokenizer
from tracmod.report import write_report
from tracmod.study.run_folder import RunFolder
from tracmod.study.stages import retrain
from tracmod.study.views import View, views_of
from tracmod.subnetworks.head_mask import HeadMask, masked
from tracmod.subnetworks.importance import masked_accuracy
from tracmod.subnetworks.pruning import PruneResult, combine_masks, prune
from tracmod.tasks import load_task
from tracmod.training.fine_tune import Masks, Settings, accuracy_by_language, fine_tune
from tracmod.training.folder import epoch_masks
from tracmod.validation.fidelity import (
    Sample,
    Terms,
    certify_table,
    draw_sample,
    exact_sample_scores,
    failure,
    over_checkpoints,
    projected_sample_scores,
    sample_table,
)
from tracmod.validation.planted import planted_answers

MODELS = ("full", "sparse")
SPLITS = ("train", "dev", "test")
BLOCK_VIEWS = ("full", "subnetwork")


SHARDS_PER_TASK = 4  # with several workers; alone, a worker is given a store at a time
TASKS_PER_WORKER = 4  # at least, so that none is idle long at the end


class Digests(tuple[dict[str, str], ...]):
    """(C,) `feature_digests` of checkpoints."""


class Task(NamedTuple):
    """A part of a stage that is independent of the others: a method of `Study`, and arguments."""

    does: str
    arguments: tuple[Any, ...]

    def __str__(self) -> str:
        """As a log shows it: without the digests of models."""
        told = [str(one) for one in self.arguments if not isinstance(one, Digests)]
        return " ".join([self.does, *told])


class StudyWorker:
    """Does tasks of a run, where an engine puts it; keeps the models that it has loaded."""

    def __init__(self, path: Path, device: str, place: int) -> None:
        """Open the run folder.

        Args:
            path: of the run, on a file system that all workers share.
            device: where to compute; of several GPUs of this machine, each worker has its own.
            place: of the worker.
        """
        self._study = Study(RunFolder(path))
        gpus = torch.cuda.device_count()
        self._study.device = f"cuda:{place % gpus}" if device == "cuda" and gpus else device

    def do(self, task: Task, advance: Callable[[int], Any]) -> None:
        """See `Worker.do`."""
        getattr(self._study, task.does)(*task.arguments, advance)


def run_stages(
    run: RunFolder,
    stages: Sequence[str] | None = None,
    again: str | None = None,
    donors: Sequence[RunFolder] = (),
    engine: Engine | None = None,
) -> None:
    """Do the stages that are not yet done, in order.

    Args:
        run: the folder, locked.
        stages: which; those before them must be done. None: all that the run has.
        again: a stage to do even if it is done (what is on disk and whole is not made twice).
        donors: runs whose finished stages and features are taken over where they are the same.
        engine: where pruning, collecting and scoring run; None: in this process.

    Raises:
        ValueError: a stage before these is not done, or `analyze.distances` or `collect.features`
            cannot be used.
    """
    check_outside(run.config)
    study = Study(run, donors, engine)
    for stage in run.stages if stages is None else stages:
        if run.is_done(stage) and stage != again:
            continue
        if stage not in run.stages:
            raise ValueError(f"{run.path}: {stage}: the run's config has no section {stage}")
        for earlier in run.stages[: run.stages.index(stage)]:
            if not run.is_done(earlier):
                raise ValueError(
                    f"{run.path}: {stage} needs {earlier}, which is not done: "
                    f"`tracmod run` does every stage that is missing"
                )
        if stage not in (again, "report") and any(run.take_over(stage, one) for one in donors):
            continue
        with run.stage(stage):
            getattr(study, stage.replace("-", "_"))()


def check_outside(config: RunConfig) -> None:
    """ValueError where `analyze.distances` or `collect.features` cannot be used.

    Now, not after days of work.
    """
    if config.collect.features is not None:
        location(config.collect.features)
    asked = config.analyze
    if asked.distances is not None:
        read_distances(asked.distances, config.task.languages, asked.distance_names)


class Study:
    """The stages, one method each, and what they share."""

    def __init__(
        self, run: RunFolder, donors: Sequence[RunFolder] = (), engine: Engine | None = None
    ) -> None:
        self.run = run
        self._donors = donors
        self._engine = engine or LocalEngine()
        self.config: RunConfig = run.config
        self._tables: dict[str, pa.Table] = {}
        self._data_digests: dict[str, str] = {}
        # The model pruned last, and the checkpoint collected last: each is large, and many tasks
        # need the same one.
        self._prunable: dict[tuple[int, str | None], Any] = {}
        self._collectable: dict[tuple[str, int], Any] = {}
        # The stores opened last: each verifies a shard once, and many rankings read the same ones.
        self._opened: dict[tuple[str, str, str | None], dict[str, list[Rows]]] = {}

    # --- stages -----------------------------------------------------------------------------

    def data(self) -> None:
        """Sampled examples into data/, label names into run.json."""
        task = load_task(self.config.task)
        for split in SPLITS:
            write_parquet(self.run.data(split), getattr(task, split))
        for name, table in task.known.items():
            write_parquet(self.run.data(name), table)
        self.run.record |= {
            "label_names": task.label_names,
            "languages": task.languages,
            "parallel": task.parallel,
            "device": self.device,
        }
        if self.config.retrain is not None:
            retrain.check_subsets(self.config, task.train)

    def finetune(self) -> None:
        """Fine-tune on all languages: models/full/."""
        self._fine_tune("full", self.config.finetune, None)

    def prune(self) -> None:
        """Each seed's subnetworks into subnetworks/seeds/, combined into subnetworks/."""
        missing = [
            (seed, language)
            for seed in self.prune_seeds
            for language in self.languages
            if not _holds_mask(self.run.subnetwork(language, seed))
        ]
        models = dict.fromkeys((seed, self._pruned_of(language)) for seed, language in missing)
        to_tune = [one for one in models if one != (self.config.seed, None)]
        with self.bar("prune", len(to_tune) + len(missing), "subnetwork") as bar:
            # Once each at a time: a fine-tuning keeps what it goes on from in its folder.
            self._do("fine_tune_to_prune", to_tune, bar.update, twice=False)
            self._do("prune_language", missing, bar.update, twice=False)
        for language in self.languages:
            if not self._is_combined(language):
                self._combine_seeds(language)
        self._prunable.clear()

    def sparse_finetune(self) -> None:
        """Fine-tune from the same start, each batch in one language through its subnetwork."""
        self._fine_tune("sparse", self.config.sparse, self.subnetworks)

    def collect(self) -> None:
        """Features of every model, checkpoint, view and mask: features/."""
        self._check_memory()
        with self.bar("collect", self._count_passes()) as bar:
            tasks: list[tuple[Any, ...]] = []
            for model_name in MODELS:
                for checkpoint in self.checkpoints(model_name):
                    tasks += self._begin_stores(model_name, checkpoint, bar.update)
            self._do("collect_shards", tasks, bar.update)
        features = self.run.features_path
        if isinstance(features, Path):
            for leftover in features.rglob(".*.tmp"):  # of workers that were lost
                leftover.unlink(missing_ok=True)

    def influence(self) -> None:
        """Scores, strongest training examples, language tables, exact pairs: influence/."""
        blocks = self.config.influence.blocks
        # Views of an earlier config must not be left in it.
        progress = self.run.path / "influence" / "progress"
        self._begin_anew("influence", keep=[progress.name, *(["blocks"] if blocks else [])])
        block_parts: set[Path] = set()
        sampled: list[pa.Table] = []
        with self.bar("influence", self._count_scores(), "score") as bar:
            for model_name in MODELS:
                digests, exact = [], []
                for checkpoint in self.checkpoints(model_name):
                    model, tokenizer = self.load(checkpoint)
                    metric = self.preconditioner(model_name, checkpoint, model, tokenizer)
                    digests.append(feature_digests(model, tokenizer, metric))
                    exact.append(
                        self._exact_of_sample(model, tokenizer, metric, digests[-1], progress)
                    )
                sampled.append(self._sample_table(model_name, digests, exact))
                self._do("rank_queries", self._searches(model_name, digests), bar.update)
                test = self.encode(tokenizer, self.table("test"), model)
                for view in self.views_at(model_name, checkpoint.epoch):  # the last checkpoint's
                    predictions = self._predictions(model, test, view)
                    self._influence_of_view(model_name, view, digests, predictions)
                if blocks:
                    block_parts |= self._influence_of_blocks(model_name, digests)
        for path in (self.run.path / "influence" / "blocks").glob("*"):
            if path not in block_parts:
                path.unlink()
        write_parquet(self.run.path / "influence" / "fidelity.parquet", pa.concat_tables(sampled))
        shutil.rmtree(progress, ignore_errors=True)

    def analyze(self) -> None:
        """Comparisons, intervals and tests, the fidelity certificate: analysis/."""
        self._begin_anew("analysis")
        self._certify()
        analyze(
            self.run.path,
            bootstrap=self.config.analyze.bootstrap,
            permutations=self.config.analyze.permutations,
            confidence=self.config.analyze.confidence,
            seed=self.config.seed,
            distances=self.config.analyze.distances,
            distance_names=self.config.analyze.distance_names,
        )
        if self.config.task.name == "planted":
            answers = planted_answers(self.run.path, self.resampling)
            write_parquet(self.run.path / "analysis" / "planted.parquet", answers)
            write_csv(self.run.path / "analysis" / "planted.csv", answers)

    def retrain(self) -> None:
        """The full model trained again without some examples, and what that says: retraining/."""
        design = retrain.design_of(self)
        missing = retrain.begin(self, design)
        with self.bar("retrain", len(missing), "training") as bar:
            # Once each at a time: a fine-tuning keeps what it goes on from in its folder.
            self._do("retrain_without", missing, bar.update, twice=False)
        retrain.finish(self, design)

    def report(self) -> None:
        """report/index.html."""
        write_report(self.run.path)

    # --- tasks ------------------------------------------------------------------------------

    def _do(
        self,
        does: str,
        arguments: Sequence[tuple[Any, ...]],
        advance: Callable[[int], Any],
        twice: bool = True,
    ) -> None:
        """Have the engine call a method of a study of this run, once for each of the arguments."""
        self._engine.run(
            partial(StudyWorker, self.run.path.absolute(), self.device),
            [Task(does, one) for one in arguments],
            advance,
            self.run.path / "logs",
            twice,
        )

    def retrain_without(
        self, left_out: str, seed: int, result: str, advance: Callable[[int], Any]
    ) -> None:
        """A task: the losses after one training without a set of examples."""
        retrain.train_without(self, left_out, seed, result)
        advance(1)

    # --- pruning ----------------------------------------------------------------------------

    @property
    def prune_seeds(self) -> list[int]:
        """The seeds of the fine-tunings that are pruned; the first is the run's own."""
        return [self.config.seed + place for place in range(self.config.prune.seeds)]

    def fine_tune_to_prune(
        self, seed: int, language: str | None, advance: Callable[[int], Any]
    ) -> None:
        """A task: the model that subnetworks of a seed are pruned from (of a language, or all)."""
        self._fine_tune_to_prune(seed, language)
        advance(1)

    def prune_language(self, seed: int, language: str, advance: Callable[[int], Any]) -> None:
        """A task: one subnetwork, into subnetworks/seeds/."""
        settings = self.config.prune
        result = prune(
            *self._model_and_dev(seed, language),
            threshold=settings.threshold,
            step=settings.step,
            lowest=min([settings.threshold, *settings.other_thresholds]),
            description=f"prune {language}, seed {seed}",
        )
        if not result.pruned:
            tqdm.write(
                f"tracmod: prune {language}, seed {seed}: the first step already falls below "
                f"{settings.threshold:.0%} of the full score, so every head is kept; a smaller "
                f"prune.step prunes fewer heads at a time",
                file=sys.stderr,
            )
        result.save(self.run.subnetwork(language, seed), language, [seed])
        advance(1)

    def _pruned_of(self, language: str) -> str | None:
        """The one language of the model that this language's subnetwork is pruned from, if one."""
        return language if self.config.prune.model == "monolingual" else None

    def _model_and_dev(
        self, seed: int, language: str
    ) -> tuple[PreTrainedModel, list[dict[str, Any]]]:
        """The model that the language's subnetwork of a seed is pruned from, and its dev examples.

        The run's own model where that is the one asked for; else one fine-tuned here, from the same
        start, kept in subnetworks/models/ (its last checkpoint).
        """
        own = self._pruned_of(language)
        if (seed, own) not in self._prunable:
            self._prunable.clear()
            if own is None and seed == self.config.seed:
                loaded = self.load(self.checkpoints("full")[-1])
            else:
                loaded = self._fine_tune_to_prune(seed, own)
            self._prunable[seed, own] = loaded
        model, tokenizer = self._prunable[seed, own]
        return model, self.encode(tokenizer, _of_language(self.table("dev"), language), model)

    def _fine_tune_to_prune(
        self, seed: int, language: str | None
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        train = self.table("train")
        if language is not None:
            train = _of_language(train, language)
        folder = self.run.pruned_model(seed, language)
        return self.fine_tuned(train, seed, folder, f"fine-tune {language or 'all'}, seed {seed}")

    def _is_combined(self, language: str) -> bool:
        thresholds = [None, *self.config.prune.other_thresholds]
        return all(_holds_mask(self.run.subnetwork(language, None, one)) for one in thresholds)

    def _combine_seeds(self, language: str) -> None:
        """The subnetworks of every threshold, of one seed or of several combined."""
        settings, seeds = self.config.prune, self.prune_seeds
        courses = [PruneResult.load(self.run.subnetwork(language, seed)) for seed in seeds]
        for threshold in (settings.threshold, *settings.other_thresholds):
            found = [course.at(threshold) for course in courses]
            result = found[0]
            if len(seeds) > 1 and settings.combine != "first":
                mask = combine_masks([one.mask for one in found], settings.combine)
                model, dev = self._model_and_dev(seeds[0], language)
                result = replace(result, mask=mask, score=masked_accuracy(model, dev, mask))
            named = None if threshold == settings.threshold else threshold
            path = self.run.subnetwork(language, None, named)
            fields = {"model": settings.model, "combine": settings.combine}
            result.save(path, language, seeds, **fields)

    # --- fine-tuning ------------------------------------------------------------------------

    def _fine_tune(
        self, name: str, config: FinetuneConfig, masks: dict[str, HeadMask] | None
    ) -> None:
        model, tokenizer = self.initial_model()
        train, test = self.table("train"), self.table("test")
        languages = test.column("language").to_pylist()
        test_examples = self.encode(tokenizer, test, model)
        dev = {
            language: self.encode(tokenizer, _of_language(self.table("dev"), language), model)
            for language in masks or {}
        }

        def evaluate(model: PreTrainedModel, masks: Masks | None) -> dict[str, float]:
            return accuracy_by_language(model, test_examples, languages, masks)

        fine_tune(
            model,
            tokenizer,
            self.encode(tokenizer, train, model),
            train.column("language").to_pylist(),
            self.run.model(name),
            self._settings(config, self.config.seed),
            masks=masks,
            dev=dev,
            evaluate=evaluate,
            device=self.device,
            save_seconds=config.save_seconds,
            ids=train.column("id").to_pylist(),
            description=f"fine-tune {name}",
            second_moment=self.config.collect.preconditioner == "adam",
        )

    def fine_tuned(
        self,
        train: pa.Table,
        seed: int,
        folder: Path,
        description: str,
        keep: Literal["all", "last"] = "last",
        second_moment: bool = False,
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """A model trained as the run's `full` one, on other examples or with another seed.

        The same initial weights and tokenizer; the seed is that of order and dropout. Epochs are
        the same, so fewer examples are fewer steps.

        Args:
            train: the examples.
            seed: of the training.
            folder: where it keeps its checkpoints, and what it goes on from.
            description: of its progress bar.
            keep: which checkpoints.
            second_moment: whether they hold Adam's.
        """
        model, tokenizer = self.initial_model()
        last = fine_tune(
            model,
            tokenizer,
            self.encode(tokenizer, train, model),
            train.column("language").to_pylist(),
            folder,
            replace(self._settings(self.config.finetune, seed), keep=keep),
            device=self.device,
            save_seconds=self.config.finetune.save_seconds,
            ids=train.column("id").to_pylist(),
            description=description,
            second_moment=second_moment,
        )[-1]
        return self.load(last)

    def _settings(self, config: FinetuneConfig, seed: int) -> Settings:
        return Settings(seed=seed, **config.model_dump(exclude={"save_seconds", "masks"}))

    def initial_model(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
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
        checkpoints = sum(len(self.checkpoints(model)) for model in MODELS)
        return self._passes_per_checkpoint() * checkpoints

    def _passes_per_checkpoint(self) -> int:
        """Examples that features are collected of at a checkpoint, over all masks."""
        train, test = len(self.table("train")), len(self.table("test"))
        return sum(
            train + (test if language is None else len(_of_language(self.table("test"), language)))
            for view, language, _ in self._passes(self.views)
        )

    def _begin_stores(
        self, model_name: str, checkpoint: Checkpoint, advance: Callable[[int], Any]
    ) -> Iterator[tuple[Any, ...]]:
        """Make a checkpoint's stores; what `collect_shards` has to be called with to fill them."""
        model, tokenizer = self.load(checkpoint)
        metric = self.preconditioner(model_name, checkpoint, model, tokenizer)
        digests = feature_digests(model, tokenizer, metric)
        alone = self._engine.workers == 1
        for view, language, mask in self._passes(self.views_at(model_name, checkpoint.epoch)):
            for split in ("train", "test"):
                place = (model_name, view.name, language, checkpoint.epoch, split)
                rows = self._rows(split, language)
                with self._store(place, rows, mask, digests) as store:
                    missing = store.missing_shards()
                    lacking = sum(len(store.shard_range(shard)) for shard in missing)
                    advance(len(rows) - lacking)
                size = max(1, len(missing)) if alone else SHARDS_PER_TASK
                for first in range(0, len(missing), size):
                    shards = missing[first : first + size]
                    yield *place, shards

    def collect_shards(
        self,
        model_name: str,
        view_name: str,
        language: str | None,
        epoch: int,
        split: str,
        shards: Sequence[int],
        advance: Callable[[int], Any],
    ) -> None:
        """A task: some shards of a store that is there."""
        model, metric, encoded = self._to_collect(model_name, epoch)
        mask = self.mask(model_name, self._view(view_name), language, epoch)
        path = self.run.features(model_name, view_name, language, epoch, split)
        examples = [encoded[split][row] for row in self._rows(split, language)]
        with frozen(model):
            store = FeatureStore.share(path)
            collector = self.collector(model, mask, metric)
            collect_to_store(collector, examples, store, advance, shards)

    def _to_collect(
        self, model_name: str, epoch: int
    ) -> tuple[PreTrainedModel, Preconditioner | None, dict[str, list[dict[str, Any]]]]:
        """A checkpoint's model, its preconditioner and the encoded examples; kept till the next."""
        if (model_name, epoch) not in self._collectable:
            self._collectable.clear()
            checkpoint = self._checkpoint(model_name, epoch)
            model, tokenizer = self.load(checkpoint)
            metric = self.preconditioner(model_name, checkpoint, model, tokenizer)
            encoded = {
                split: self.encode(tokenizer, self.table(split), model)
                for split in ("train", "test")
            }
            self._collectable[model_name, epoch] = model, metric, encoded
        return self._collectable[model_name, epoch]

    def _checkpoint(self, model_name: str, epoch: int) -> Checkpoint:
        return next(one for one in self.checkpoints(model_name) if one.epoch == epoch)

    def _view(self, name: str) -> View:
        return _named(self.views, name)

    def _check_memory(self) -> None:
        """Whether scoring can be done within `influence.memory`: now, not after collecting."""
        collect, influence = self.config.collect, self.config.influence
        checkpoints = max(len(self.counted_epochs(model_name)) for model_name in MODELS)
        train, test = len(self.table("train")), len(self.table("test"))
        row_bytes = 4 * collect.projection_dim * checkpoints
        k = min(train, max(influence.ks) + self._most_left_out(None))
        groups = len(self.config.task.languages)
        on_disk = isinstance(self.run.features_path, Path)
        sizes = Sizes.of_stores(test, train, row_bytes, k, groups, collect.shard_rows, on_disk)
        check_memory(sizes, influence.memory)

    def _passes(self, views: Sequence[View]) -> Iterator[tuple[View, str | None, HeadMask | None]]:
        """Every view with features of its own, and the masks under which they are collected."""
        for view in views:
            if view.collected:
                for language, mask in view.masks:
                    yield view, language, mask

    def _rows(self, split: str, language: str | None) -> list[int]:
        languages = self.table(split).column("language").to_pylist()
        if split == "train" or language is None:
            return list(range(len(languages)))
        return [row for row, other in enumerate(languages) if other == language]

    def preconditioner(
        self,
        model_name: str,
        checkpoint: Checkpoint,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
    ) -> Preconditioner | None:
        """The metric of a checkpoint's features: that of all heads, whatever the view's mask."""
        kind = self.config.collect.preconditioner
        if kind == "none":
            return None
        return self.metric(kind, model_name, checkpoint, model, tokenizer)

    def metric(
        self,
        kind: Literal["adam", "ekfac"],
        model_name: str,
        checkpoint: Checkpoint,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
    ) -> Preconditioner:
        """A checkpoint's preconditioner of a kind; a fitted one is kept in preconditioners/."""
        collect = self.config.collect
        return checkpoint_preconditioner(
            kind,
            model,
            checkpoint.path,
            lambda: self.encode(tokenizer, self.table("train"), model),
            parameters=collect.parameters,
            damping=collect.damping,
            batch_tokens=collect.batch_tokens,
            keep_in=self.run.preconditioner(model_name, checkpoint.epoch),
            identity={
                **feature_digests(model, tokenizer, None),
                "data": self._data_digest("train"),
                "max_length": self.config.model.max_length,
            },
        )

    def collector(
        self, model: PreTrainedModel, mask: HeadMask | None, metric: Preconditioner | None
    ) -> Collector:
        """What turns examples into the run's features, with a checkpoint's `preconditioner`."""
        collect = self.config.collect
        return Collector(
            model,
            self._projection,
            collect.parameters,
            collect.batch_tokens,
            getattr(torch, collect.dtype),
            mask,
            metric,
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
        place: tuple[str, str, str | None, int, str],
        rows: list[int],
        mask: HeadMask | None,
        digests: dict[str, str],
    ) -> FeatureStore:
        """Make or go on with the store of a place, the arguments of `RunFolder.features`."""
        collect, split = self.config.collect, place[-1]
        store = FeatureStore.create(
            self.run.features(*place),
            ids=self.table(split).column("id").take(rows).to_pylist(),
            dim=collect.projection_dim,
            identity=self._identity(split, mask, digests),
            dtype=collect.store_dtype,
            shard_rows=collect.shard_rows,
        )
        for donor in self._donors:
            store.link_shards(donor.features(*place))
        return store

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
            model_name, view, language, split: which; a view with features of its own, and the
                language of one of its masks.
            digests: (C,) `feature_digests` of the checkpoints as they are now.

        Raises:
            ValueError: a store made with another checkpoint, mask, data or projection than these.
        """
        return [
            FeatureStore.open(
                self.run.features(model_name, view.name, language, one.epoch, split),
                self._identity(
                    split, self.mask(model_name, view, language, one.epoch), of_checkpoint
                ),
            )
            for one, of_checkpoint in zip(self.checkpoints(model_name), digests, strict=True)
        ]

    def mask(
        self, model_name: str, view: View, language: str | None, epoch: int
    ) -> HeadMask | None:
        """The mask of one pass of a view at the checkpoint of an epoch."""
        return dict(_named(self.views_at(model_name, epoch), view.name).masks)[language]

    # --- influence --------------------------------------------------------------------------

    def _count_scores(self) -> int:
        """Scores over all checkpoints, and of each alone."""
        tests = sum(
            len(self._rows("test", language)) for view in self.views for language, _ in view.masks
        )
        rankings = sum(1 + len(self.checkpoints(model_name)) for model_name in MODELS)
        return rankings * tests * len(self.table("train"))

    def _searches(
        self, model_name: str, digests: Sequence[dict[str, str]]
    ) -> list[tuple[Any, ...]]:
        """What `rank_queries` has to be called with: every view, mask and checkpoint, and all."""
        epochs = [None, *(one.epoch for one in self.checkpoints(model_name))]
        searches = [
            (view.name, language, epoch)
            for view in self.views
            for language, _ in view.masks
            for epoch in epochs
        ]
        shares = self._shares
        return [
            (model_name, *search, Digests(digests), share, shares)
            for search in searches
            for share in range(shares)
        ]

    @property
    def _shares(self) -> int:
        """Into how many tasks a ranking is cut: so many that all workers have work."""
        if self._engine.workers == 1:
            return 1
        rankings = sum(len(view.masks) for view in self.views)
        return -(-TASKS_PER_WORKER * self._engine.workers // rankings)

    def rank_queries(
        self,
        model_name: str,
        view_name: str,
        language: str | None,
        epoch: int | None,
        digests: Sequence[dict[str, str]],
        share: int,
        shares: int,
        advance: Callable[[int], Any],
    ) -> None:
        """A task: a share of a ranking, which stays in influence/progress/."""
        view = self._view(view_name)
        self._rank(model_name, view, language, epoch, digests, shares, share, advance)

    def _rank(
        self,
        model_name: str,
        view: View,
        language: str | None,
        epoch: int | None,
        digests: Sequence[dict[str, str]],
        shares: int,
        share: int | None = None,
        advance: Callable[[int], Any] | None = None,
    ) -> TopInfluences:
        """The ranking over all checkpoints, or of the one of an epoch alone."""
        queries, trains = (
            self._features(model_name, view, language, split, digests)
            for split in ("test", "train")
        )
        checkpoints, settings = self.checkpoints(model_name), self.config.influence
        weights, k = self.weights(checkpoints), settings.ks[0]
        if epoch is None:
            k = max(settings.ks) + self._most_left_out(language)
        else:
            place = [one.epoch for one in checkpoints].index(epoch)
            queries, trains, weights = [queries[place]], [trains[place]], None
        return top_influences(
            queries,
            trains,
            k,
            self.table("train").column("language").to_pylist(),
            weights,
            self.normalize,
            memory=settings.memory,
            progress=self.run.path / "influence" / "progress",
            device=self.device,
            advance=advance,
            passes=shares,
            only=share,
        )

    def _most_left_out(self, language: str | None) -> int:
        """The most training examples of a test example's own group."""
        return max((len(self._same_group[row]) for row in self._rows("test", language)), default=0)

    @cached_property
    def _same_group(self) -> list[list[int]]:
        return same_group_rows(self.table("train"), self.table("test"))

    def _influence_of_view(
        self,
        model_name: str,
        view: View,
        digests: Sequence[dict[str, str]],
        predictions: Sequence[int],
    ) -> None:
        """The tables of a view, from rankings that `rank_queries` has left."""
        checkpoints = self.checkpoints(model_name)
        train, test = self.table("train"), self.table("test")
        groups = train.column("language").to_pylist()
        ks, weights = self.config.influence.ks, self.weights(checkpoints)
        tables, without_group = (InfluenceTables(train, test, predictions, ks) for _ in range(2))
        own: list[pa.Table] = []
        for language, _ in view.masks:
            rows = self._rows("test", language)
            queries = self._features(model_name, view, language, "test", digests)
            trains = self._features(model_name, view, language, "train", digests)
            left_out = [self._same_group[row] for row in rows]
            if view.collected:
                own.append(self_influence_table(train, self_influence(trains, weights), language))
            rank = partial(self._rank, model_name, view, language, digests=digests)
            top = rank(None, shares=self._shares)
            tables.add(rows, top)
            if any(self._same_group):
                rest = without_examples(
                    top, left_out, queries, trains, max(ks), groups, weights, self.normalize
                )
                without_group.add(rows, rest, left_out)
            for checkpoint in checkpoints:
                alone = rank(checkpoint.epoch, shares=self._shares)
                tables.add_epoch(checkpoint.epoch, rows, alone)
        folder = self.run.influence(model_name, view.name)
        self._write_tables(tables, folder)
        if own:
            write_parquet(folder / "self_influence.parquet", pa.concat_tables(own))
        if any(self._same_group):
            self._write_tables(without_group, folder / WITHOUT_GROUP)

    def _write_tables(self, tables: InfluenceTables, folder: Path) -> None:
        analyze = self.config.analyze
        tables.write(
            folder,
            bootstrap=analyze.bootstrap,
            confidence=analyze.confidence,
            seed=self.config.seed,
        )

    def _features(
        self,
        model_name: str,
        view: View,
        language: str | None,
        split: str,
        digests: Sequence[dict[str, str]],
    ) -> list[Rows]:
        """(C,) what a view sets against each other; kept until another view is asked for."""
        place = (model_name, view.name, language)
        if place not in self._opened:
            self._opened = {place: {}}
        opened = self._opened[place]
        if split not in opened:
            opened[split] = self._open_features(model_name, view, language, split, digests)
        return opened[split]

    def _open_features(
        self,
        model_name: str,
        view: View,
        language: str | None,
        split: str,
        digests: Sequence[dict[str, str]],
    ) -> list[Rows]:
        """Features of the view's own, or of other views."""

        def rows(name: str, language: str | None) -> list[Rows]:
            stores = self.stores(model_name, _named(self.views, name), language, split, digests)
            return [StoreRows(store) for store in stores]

        if view.collected:
            return rows(view.name, language)
        if split == "test":
            return rows(view.source, language)
        if view.train == "full":
            return rows("full", None)
        # Each training example's features under its own language's mask.
        own = {language: rows(view.source, language) for language in self.languages}
        names = self.table("train").column("language").to_pylist()
        return [
            ChosenRows({language: of[place] for language, of in own.items()}, names)
            for place in range(len(digests))
        ]

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

    def dense_scores(self, normalize: str | None) -> Tensor:
        """(Q, N) scores of the full model, all heads, from its feature stores."""
        digests = []
        for one in self.checkpoints("full"):
            model, tokenizer = self.load(one)
            metric = self.preconditioner("full", one, model, tokenizer)
            digests.append(feature_digests(model, tokenizer, metric))
        full = self._view("full")
        queries, trains = (
            self.stores("full", full, None, split, digests) for split in ("test", "train")
        )
        return influence_scores(queries, trains, self.weights(self.checkpoints("full")), normalize)

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

    def _begin_anew(self, folder: str, keep: Sequence[str] = ()) -> None:
        """Empty a stage's folder, but for what is named in `keep`."""
        for path in (self.run.path / folder).glob("*"):
            if path.name not in keep:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    # --- fidelity ---------------------------------------------------------------------------

    @cached_property
    def _sample(self) -> Sample:
        """The pairs of the certificate, the same at every checkpoint of both models."""
        asked = self.config.influence.certify
        return draw_sample(
            self.table("test").column("language").to_pylist(),
            len(self.table("train")),
            self._passes_per_checkpoint(),
            self.config.seed,
            asked.queries,
            asked.train,
        )

    def _exact_of_sample(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        metric: Preconditioner | None,
        digests: dict[str, str],
        keep_in: Path,
    ) -> Tensor:
        """(Q, N) exact scores of the sample at one checkpoint, all heads."""
        queries, trains = (
            self.encode(tokenizer, self.table(split).take(rows), model)
            for split, rows in (("test", self._sample.queries), ("train", self._sample.trains))
        )
        identity = {
            "normalize": self.normalize,
            "sample": asdict(self._sample),
            **{split: self._identity(split, None, digests) for split in ("train", "test")},
        }
        return exact_sample_scores(
            model,
            queries,
            trains,
            parameters=self.config.collect.parameters,
            head_mask=None,
            normalize=self.normalize,
            dtype=self.config.collect.dtype,
            batch_tokens=self.config.collect.batch_tokens,
            keep_in=keep_in,
            identity=identity,
            preconditioner=metric,
        )

    def _sample_table(
        self, model_name: str, digests: Sequence[dict[str, str]], exact: Sequence[Tensor]
    ) -> pa.Table:
        """Exact scores of the sample over the checkpoints beside those from the view `full`."""
        weights = self.weights(self.checkpoints(model_name))
        full = _named(self.views, "full")
        queries, trains = (
            self._features(model_name, full, None, split, digests) for split in ("test", "train")
        )
        return sample_table(
            model_name,
            self._sample,
            self.table("test"),
            self.table("train"),
            over_checkpoints(exact, weights),
            projected_sample_scores(self._sample, queries, trains, weights, self.normalize),
        )

    def _certify(self) -> None:
        """analysis/fidelity.json and run.json's `fidelity`, from influence/fidelity.parquet."""
        file = self.run.path / "influence" / "fidelity.parquet"
        self.run.record.pop("fidelity", None)
        if not file.is_file():  # of an earlier version of tracmod
            return
        config, analyze = self.config.influence, self.config.analyze
        terms = Terms(
            config.ks[0],
            len(self.table("train")),
            config.certify.least_spearman,
            analyze.bootstrap,
            analyze.confidence,
            self.config.seed,
        )
        certificates = certify_table(pq.read_table(file), terms)
        write_json(self.run.path / "analysis" / "fidelity.json", certificates)
        self.run.record["fidelity"] = certificates
        for model_name, certificate in certificates.items():
            if text := failure(certificate, f"the {model_name} model"):
                tqdm.write(f"tracmod: WARNING: {text}", file=sys.stderr)

    # --- influence by head and layer --------------------------------------------------------

    def _influence_of_blocks(self, model_name: str, digests: Sequence[dict[str, str]]) -> set[Path]:
        """blocks.parquet of the views full and subnetwork; the files that it is the sum of."""
        checkpoints, used = self.checkpoints(model_name), set[Path]()
        tables: dict[str, list[pa.Table]] = {}
        for checkpoint, of_checkpoint in zip(checkpoints, digests, strict=True):
            for view in self.views_at(model_name, checkpoint.epoch):
                if view.name not in BLOCK_VIEWS:
                    continue
                parts = {self._block_part(*one, of_checkpoint): one for one in view.masks}
                self._make_block_parts(checkpoint, parts)
                tables.setdefault(view.name, []).append(pa.concat_tables(map(pq.read_table, parts)))
                used |= parts.keys()
        weights = self.weights(checkpoints) or [1.0] * len(checkpoints)
        for name, of_checkpoints in tables.items():
            path = self.run.influence(model_name, name) / "blocks.parquet"
            write_parquet(path, weighted_sum(of_checkpoints, weights))
        return used

    def _make_block_parts(
        self, checkpoint: Checkpoint, parts: dict[Path, tuple[str | None, HeadMask | None]]
    ) -> None:
        """Influence by block at one checkpoint, under each mask that has no file yet."""
        missing = {file: one for file, one in parts.items() if not file.is_file()}
        if not missing:
            return
        model, tokenizer = self.load(checkpoint)
        encoded = {
            split: self.encode(tokenizer, self.table(split), model) for split in ("train", "test")
        }
        collect = self.config.collect
        total = sum(
            len(self._rows(s, language)) for language, _ in missing.values() for s in encoded
        )
        with self.bar(f"blocks of epoch {checkpoint.epoch}", total) as bar:
            for file, (language, mask) in missing.items():
                train, test = (
                    self._by_language(split, encoded[split], language) for split in encoded
                )
                table = block_influence(
                    model,
                    train,
                    test,
                    collect.parameters,
                    mask,
                    self.normalize,
                    dtype=getattr(torch, collect.dtype),
                    advance=bar.update,
                )
                write_parquet(file, table)

    def _by_language(
        self, split: str, examples: Sequence[dict[str, Any]], language: str | None
    ) -> dict[str, list[dict[str, Any]]]:
        """A split's examples that one of a view's masks is for, by their own language."""
        names = self.table(split).column("language").to_pylist()
        found: dict[str, list[dict[str, Any]]] = {}
        for row in self._rows(split, language):
            found.setdefault(names[row], []).append(examples[row])
        return found

    def _block_part(
        self, language: str | None, mask: HeadMask | None, digests: dict[str, str]
    ) -> Path:
        """Where influence by block at one checkpoint, under one mask, is kept.

        The name is a digest of all that it depends on: a stage that is done again finds what is
        still right, and never takes anything else for it.
        """
        identity = {
            "language": language,
            "normalize": self.config.influence.normalize,
            **{split: self._identity(split, mask, digests) for split in ("train", "test")},
        }
        name = sha256(canonical_json(identity))
        return self.run.path / "influence" / "blocks" / f"{name[:32]}.parquet"

    # --- what the stages share --------------------------------------------------------------

    @property
    def resampling(self) -> Resampling:
        """Of intervals and tests."""
        asked = self.config.analyze
        return Resampling(asked.bootstrap, asked.permutations, asked.confidence, self.config.seed)

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
        return views_of(self.config.views, self.subnetworks, self.config.seed)

    def views_at(self, model_name: str, epoch: int) -> list[View]:
        """The views with the masks of a checkpoint.

        They differ from `views` where sparse fine-tuning re-estimates the masks.
        """
        if model_name != "sparse" or self.config.sparse.masks == "static":
            return self.views
        masks = epoch_masks(self.run.model(model_name), epoch, self.subnetworks)
        return views_of(self.config.views, masks, self.config.seed)

    @cached_property
    def subnetworks(self) -> dict[str, HeadMask]:
        """Every language's pruned mask."""
        return {
            language: HeadMask.load(self.run.subnetwork(language)) for language in self.languages
        }

    def checkpoints(self, model_name: str) -> list[Checkpoint]:
        """The checkpoints that count for influence: every `collect.every` epochs, and the last.

        A checkpoint stands for the steps since the one before it that counts, so its learning rate
        is the mean over the epochs between.

        Raises:
            ValueError: one of them has no learning rate, and the weights are learning rates.
        """
        last, chosen = self._epochs(model_name), self.counted_epochs(model_name)
        folder = self.run.model(model_name)
        all_epochs = load_checkpoints(folder / f"checkpoint-{e}" for e in range(1, last + 1))
        found = []
        for before, epoch in zip([0, *chosen], chosen, strict=False):
            rate = self._mean_rate(all_epochs[before:epoch])
            found.append(replace(all_epochs[epoch - 1], learning_rate=rate))
        return found

    def counted_epochs(self, model_name: str) -> list[int]:
        """The epochs whose checkpoints count for influence."""
        last, every = self._epochs(model_name), self.config.collect.every
        return sorted({*range(every, last + 1, every), last})

    def _mean_rate(self, checkpoints: Sequence[Checkpoint]) -> float | None:
        """None where learning rates do not count."""
        if self.config.influence.weights == "uniform":
            return None
        rates = checkpoint_weights(checkpoints)
        return sum(rates) / len(rates)

    def _epochs(self, model_name: str) -> int:
        return (self.config.sparse if model_name == "sparse" else self.config.finetune).epochs

    def load(self, checkpoint: Checkpoint) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """A checkpoint's model, on the device, and its tokenizer."""
        model, tokenizer = load_model(checkpoint.path)
        return to_device(model, self.device), tokenizer

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, table: pa.Table, model: PreTrainedModel
    ) -> list[dict[str, Any]]:
        """Examples as the model takes them."""
        num_labels = int(model.config.num_labels or 0)
        return encode(tokenizer, table, self.config.model.max_length, num_labels=num_labels)

    def bar(self, name: str, total: int, unit: str = "example") -> Any:
        """A progress bar."""
        return tqdm(
            total=total, desc=name, unit=unit, unit_scale=True, disable=None, smoothing=0.05
        )


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


def feature_digests(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, metric: Preconditioner | None
) -> dict[str, str]:
    """What of a checkpoint its features depend on."""
    digests = {"model": model_digest(model), "tokenizer": tokenizer_digest(tokenizer)}
    return digests if metric is None else {**digests, "preconditioner": metric.digest}


def _named(views: Sequence[View], name: str) -> View:
    return next(view for view in views if view.name == name)


def _holds_mask(path: Path) -> bool:
    """False for a file that is not there or broken."""
    try:
        HeadMask.load(path)
    except ValueError:
        return False
    return True


def _of_language(table: pa.Table, language: str) -> pa.Table:
    return table.filter(pa.compute.equal(table.column("language"), language))


def _texts(table: pa.Table) -> list[str]:
    texts = table.column("text_a").to_pylist() + table.column("text_b").to_pylist()
    return [text for text in texts if text is not None]
