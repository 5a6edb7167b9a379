"""What a run would do, before it does it: passes, time and disk of every stage, from a short probe.

Times are of this machine as it is now: one training step, one forward pass, one gradient feature
and one score are timed for a second or two each on the run's own examples, and multiplied.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from tracmod.config import FinetuneConfig, MetricKind
from tracmod.features.store_format import DTYPES
from tracmod.gradients.capture import select_layers
from tracmod.gradients.ekfac import FIT_EXAMPLES
from tracmod.gradients.preconditioner import Metric, Preconditioner, gradient_shape
from tracmod.influence.scores import top_influences
from tracmod.models.architecture import attention_layers
from tracmod.models.inputs import collate, encode, pad_token_id, per_example_loss, predict
from tracmod.models.modes import frozen, to_device
from tracmod.study.pipeline import BLOCK_VIEWS, MODELS, Study, check_outside, run_stages
from tracmod.study.run_folder import RunFolder
from tracmod.study.stages.retrain import check_memory, check_subsets, counted, methods_of
from tracmod.study.views import views_of
from tracmod.subnetworks.head_mask import HeadMask
from tracmod.subnetworks.importance import head_importance
from tracmod.training.optimizer import HeadwiseAdamW

# Examples of a probe, one number after the other, until one takes long enough to tell: full batches
# are several times as fast per example as small ones.
_PROBED = (1, 1, 8, 64, 512)
_LONG_ENOUGH = 0.5  # seconds


@dataclass(frozen=True)
class StagePlan:
    """One stage of a run.

    Attributes:
        stage: its name.
        done: finished already, so that it costs nothing.
        work: what it does, in words.
        seconds: estimate; None where it is not worth one (seconds at most).
        bytes: what it leaves on disk.
    """

    stage: str
    done: bool
    work: str
    seconds: float | None
    bytes: int


@dataclass(frozen=True)
class RunPlan:
    """A run.

    Attributes:
        stages: in order.
        notes: what a user should know before the run begins, a sentence each.
    """

    stages: list[StagePlan]
    notes: list[str]

    @property
    def seconds(self) -> float:
        """Of the stages to do."""
        return sum(one.seconds or 0.0 for one in self.stages if not one.done)

    @property
    def bytes(self) -> int:
        """Of the stages to do."""
        return sum(one.bytes for one in self.stages if not one.done)


@dataclass(frozen=True)
class _Rates:
    """Seconds each: a training step; forward, importance and features per example; a score.

    Features by their preconditioner, of the kinds that the run has.
    """

    step: float
    forward: float
    importance: float
    features: dict[MetricKind, float]
    score: float


def plan_run(run: RunFolder) -> RunPlan:
    """Sample the data, load the model, time it briefly, and say what the run would do.

    Nothing is written into the run folder. Everything that the config gets wrong about data, model
    and device is found here.

    Args:
        run: the folder, begun or not.

    Raises:
        ValueError: as the stages raise it.
    """
    check_outside(run.config)
    with tempfile.TemporaryDirectory() as place:
        data = run
        if not run.is_done("data"):
            data = RunFolder(place, run.config)
            run_stages(data, ["data"])
        return _Planner(run, Study(data)).plan()


class _Planner:
    """Counts of one run, from its config, its data and its model."""

    def __init__(self, run: RunFolder, study: Study) -> None:
        self.run, self.study, self.config = run, study, run.config
        self.model, self.tokenizer = study.initial_model()
        to_device(self.model, study.device)
        self.tables = {split: study.table(split) for split in ("train", "dev", "test")}
        layers = attention_layers(self.model)
        self.all_heads = HeadMask.full(len(layers), layers[0].num_heads)
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        self.checkpoint_bytes = weights + 4_000_000  # and a tokenizer
        self.kind: MetricKind = self.config.collect.preconditioner
        self.moment_bytes = 4 * sum(p.numel() for p in self.model.parameters())

    def plan(self) -> RunPlan:
        rates = self._probe()
        works = {
            "data": (self._data_work(), None, 0),
            "finetune": self._training(self.config.finetune, rates, by_language=False),
            "prune": self._pruning(rates),
            "sparse-finetune": self._training(self.config.sparse, rates, by_language=True),
            "collect": self._collecting(rates),
            "influence": self._scoring(rates),
            "analyze": ("comparisons, intervals, tests", None, 0),
            "report": ("report/index.html", None, 0),
        }
        if self.config.retrain is not None:
            works["retrain"] = self._retraining(rates)
        stages = [StagePlan(one, self.run.is_done(one), *works[one]) for one in self.run.stages]
        plan = RunPlan(stages, [])
        plan.notes.extend(self._notes(plan))
        return plan

    # --- counts -----------------------------------------------------------------------------

    def _count(self, split: str, language: str | None = None) -> int:
        languages = self.tables[split].column("language").to_pylist()
        return len(languages) if language is None else languages.count(language)

    def _data_work(self) -> str:
        counts = ", ".join(f"{self._count(split)} {split}" for split in self.tables)
        return f"{counts} examples in {len(self.config.task.languages)} languages"

    def _training(
        self, config: FinetuneConfig, rates: _Rates, *, by_language: bool
    ) -> tuple[str, float, int]:
        languages = self.config.task.trained_languages
        counts = [self._count("train", language) for language in languages]
        if config.sampling == "uniform":
            counts = [math.ceil(self._count("train") / len(languages))] * len(languages)
        if not by_language:
            counts = [sum(counts)]
        steps = config.epochs * sum(math.ceil(count / config.batch_size) for count in counts)
        seconds = steps * rates.step + config.epochs * self._count("test") * rates.forward
        work = f"{steps} steps of {config.batch_size}, {config.epochs} checkpoints"
        checkpoint_bytes = self.checkpoint_bytes
        if self.kind == "adam":
            work += " with Adam's second moment"
            checkpoint_bytes += self.moment_bytes
        return work, seconds, config.epochs * checkpoint_bytes

    def _pruning(self, rates: _Rates) -> tuple[str, float, int]:
        config, finetune = self.config.prune, self.config.finetune
        heads, languages = self.all_heads.size, self.config.task.languages
        rounds = math.ceil((heads - 1) / max(1, round(config.step * heads)))
        per_example = rounds * (rates.importance + rates.forward) + rates.forward
        seconds = config.seeds * self._count("dev") * per_example
        monolingual = config.model == "monolingual"
        models = config.seeds * len(languages) if monolingual else config.seeds - 1
        trained = self._count("train") * (config.seeds if monolingual else config.seeds - 1)
        seconds += finetune.epochs * trained / finetune.batch_size * rates.step
        work = f"{config.seeds * len(languages)} courses of at most {rounds} rounds"
        if models:
            work += f", {models} more models fine-tuned"
        return work, seconds, models * self.checkpoint_bytes

    def _counts_of_passes(self) -> list[tuple[str, tuple[int, int]]]:
        """View and (training, test) examples of every pass, at one checkpoint of one model."""
        masks = dict.fromkeys(self.config.task.languages, self.all_heads)
        views = views_of(self.config.views, masks, self.config.seed)
        return [
            (view.name, (self._count("train"), self._count("test", language)))
            for view in views
            if view.collected
            for language, _ in view.masks
        ]

    def _checkpoints(self) -> int:
        return sum(len(self.study.counted_epochs(model)) for model in MODELS)

    def _collecting(self, rates: _Rates) -> tuple[str, float, int]:
        passes = self._counts_of_passes()
        examples = self._checkpoints() * sum(train + test for _, (train, test) in passes)
        work = (
            f"{len(passes)} passes (view, mask) x {self._checkpoints()} checkpoints = "
            f"{examples} forward and backward passes of an example"
        )
        seconds = examples * rates.features[self.kind]
        collect = self.config.collect
        size = examples * DTYPES[collect.store_dtype].itemsize * collect.projection_dim
        if self.kind == "adam":
            work += ", preconditioned by Adam's second moment"
        if self.kind == "ekfac":
            fits, fit_seconds, fit_bytes = self._fits(self._checkpoints(), rates)
            work += f", preconditioned; {fits}"
            seconds, size = seconds + fit_seconds, size + fit_bytes
        return work, seconds, size

    def _fits(self, checkpoints: int, rates: _Rates) -> tuple[str, float, int]:
        """EK-FAC at so many checkpoints: two passes over its examples at each."""
        examples = min(FIT_EXAMPLES, self._count("train"))
        seconds = checkpoints * 2 * examples * rates.features["ekfac"]
        places = "1 checkpoint" if checkpoints == 1 else f"{checkpoints} checkpoints"
        work = f"EK-FAC fitted at {places}, two passes over {examples} examples"
        return work, seconds, checkpoints * self._ekfac_bytes()

    def _scoring(self, rates: _Rates) -> tuple[str, float, int]:
        masks = dict.fromkeys(self.config.task.languages, self.all_heads)
        views = len(views_of(self.config.views, masks, self.config.seed))
        # All checkpoints together, then each alone.
        pairs = 2 * views * self._checkpoints() * self._count("test") * self._count("train")
        work = f"{views} views of {len(MODELS)} models, {pairs} inner products"
        seconds = pairs * rates.score
        if self.config.influence.blocks:
            passes = [counts for view, counts in self._counts_of_passes() if view in BLOCK_VIEWS]
            examples = self._checkpoints() * sum(train + test for train, test in passes)
            work += f"; by head and layer {examples} passes of an example"
            seconds += 1.5 * examples * rates.features["none"]  # 1.5: as measured beside collecting
        return work, seconds, 0

    def _retraining(self, rates: _Rates) -> tuple[str, float, int]:
        config, kinds = self.config.finetune, counted(self.config, self.tables["train"])
        check_subsets(self.config, self.tables["train"])
        if not self.run.is_done("retrain"):
            check_memory(self.config, self._count("train"), self._count("test"))
        trainings = sum(number for _, number, _ in kinds)
        trained = trainings * self._count("train") - sum(left_out for _, _, left_out in kinds)
        steps = config.epochs * trained / config.batch_size
        seconds = steps * rates.step + trainings * self._count("test") * rates.forward
        parts = ", ".join(f"{number} {what}" for what, number, _ in kinds)
        work, size = f"at most {trainings} trainings: {parts}", self.checkpoint_bytes
        passes = self._preconditioned_passes()
        examples = self._count("train") + self._count("test")
        seconds += sum(n * examples * rates.features[kind] for kind, n in passes)
        # Of the two methods the one of all checkpoints fits those of the other too.
        fitted = max((n for kind, n in passes if kind == "ekfac"), default=0)
        if fitted and self.kind != "ekfac":
            fits, fit_seconds, fit_bytes = self._fits(fitted, rates)
            work, seconds, size = f"{work}; {fits}", seconds + fit_seconds, size + fit_bytes
        return work, seconds, size

    def _preconditioned_passes(self) -> list[tuple[MetricKind, int]]:
        """Of each method of retrain with features of its own: their kind, at how many checkpoints.

        That these are in a metric says retrain.method_scores.
        """
        if self.config.retrain is None:
            return []
        checkpoints = len(self.study.counted_epochs("full"))
        passes: dict[str, tuple[MetricKind, int]] = {
            "adam": ("adam", checkpoints),
            "ekfac": ("ekfac", checkpoints),
            "ekfac-last": ("ekfac", 1),
        }
        return [passes[method] for method in methods_of(self.config) if method in passes]

    def _notes(self, plan: RunPlan) -> list[str]:
        notes = []
        train = self._count("train")
        for k in self.config.influence.ks:
            if k > train:
                notes.append(
                    f"influence.k is {k}, but there are only {train} training examples: all"
                )
            elif 2 * k > train:
                notes.append(
                    f"influence.k is {k} of {train} training examples: shares are close to the "
                    f"null whatever the model does; a smaller k tells more"
                )
        free = shutil.disk_usage(_existing(self.run.path)).free
        if plan.bytes > free:
            notes.append(
                f"{self.run.path}: {plan.bytes / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free"
            )
        return notes

    def _ekfac_bytes(self) -> int:
        """Of one checkpoint, in preconditioners/."""
        metric = self._stand_in("ekfac", torch.device("meta"))
        assert metric is not None
        layers = metric.metrics.values()
        return sum(tensor.nbytes for layer in layers for tensor in layer.tensors().values())

    # --- the probe --------------------------------------------------------------------------

    def _probe(self) -> _Rates:
        batch_size, device = self.config.finetune.batch_size, self.study.device
        train = self._examples("train", max(*_PROBED, batch_size))
        features: dict[MetricKind, float] = {}
        for kind in {self.kind} | {kind for kind, _ in self._preconditioned_passes()}:
            metric = self._stand_in(kind, self.model.device)
            collector = self.study.collector(self.model, None, metric)
            with frozen(self.model):
                features[kind] = _seconds_each(device, collector.collect, train)
        return _Rates(
            step=self._step_seconds(train[:batch_size]),
            forward=_seconds_each(device, partial(predict, self.model), train),
            importance=_seconds_each(device, partial(head_importance, self.model), train),
            features=features,
            score=self._score_seconds(),
        )

    def _stand_in(self, kind: MetricKind, device: torch.device) -> Preconditioner | None:
        """A metric of a checkpoint's shapes that changes nothing: as slow, and as large."""
        if kind == "none":
            return None
        identity = cache(partial(torch.eye, device=device))
        metrics = {}
        for layer in select_layers(self.model, self.config.collect.parameters):
            rows, columns = gradient_shape(layer)
            turned = kind == "ekfac" and layer.kind == "linear"
            turns = (identity(columns), identity(rows)) if turned else ()
            metrics[layer.name] = Metric(torch.ones(rows, columns, device=device), *turns)
        return Preconditioner(kind, metrics)

    def _examples(self, split: str, number: int) -> list[dict[str, Any]]:
        """Examples of a split in random order, so of all its languages and lengths."""
        table = self.tables[split]
        rows = np.random.default_rng(0).permutation(len(table))[:number]
        labels = int(self.model.config.num_labels or 0)
        taken: pa.Table = table.take(rows)
        return encode(self.tokenizer, taken, self.config.model.max_length, num_labels=labels)

    def _step_seconds(self, batch: list[dict[str, Any]]) -> float:
        """A training step, the first (which allocates) left out; the weights are put back."""
        before = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        optimizer = HeadwiseAdamW(self.model, weight_decay=0.0, split_heads=False)
        self.model.train()

        def step() -> None:
            inputs = collate(batch, pad_token_id(self.model), self.model.device)
            labels_B = inputs.pop("labels")
            per_example_loss(self.model(**inputs).logits, labels_B).mean().backward()
            optimizer.step(0.0)
            self.model.zero_grad(set_to_none=True)

        step()
        seconds = min(_seconds(self.study.device, step) for _ in range(2))
        self.model.eval()
        self.model.load_state_dict(before)
        return seconds

    def _score_seconds(self) -> float:
        """One inner product of two features, with what finding the strongest takes."""
        dim, k = self.config.collect.projection_dim, max(self.config.influence.ks)
        generator = torch.Generator().manual_seed(0)
        train = torch.randn(min(2048, self._count("train")), dim, generator=generator)
        query = torch.randn(min(64, self._count("test")), dim, generator=generator)
        query, train = query.to(self.study.device), train.to(self.study.device)
        score = partial(top_influences, query, train, k, normalize="cosine")
        score()
        return _seconds(self.study.device, score) / (len(query) * len(train))


def _seconds_each(device: str, work: Callable[[Any], Any], examples: list[Any]) -> float:
    """Seconds per example, of as many as take long enough; the first call is to warm up."""
    for number in _PROBED:
        some = examples[:number]
        seconds = _seconds(device, lambda: work(some))  # noqa: B023 - called at once
        if seconds > _LONG_ENOUGH:
            break
    return seconds / len(some)


def _seconds(device: str, work: Callable[[], Any]) -> float:
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if on_gpu:
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _existing(path: Path) -> Path:
    return next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())
