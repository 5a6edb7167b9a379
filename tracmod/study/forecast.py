"""Counts and short measurements from which the estimates of a run's stages are made.

Times are those of this machine as it is now: one training step, one forward pass, one gradient
feature and one score are timed for a second or two each on the run's own examples.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch

from tracmod.config import MetricKind
from tracmod.gradients.capture import select_layers
from tracmod.gradients.ekfac import FIT_EXAMPLES
from tracmod.gradients.preconditioner import Metric, Preconditioner, gradient_shape
from tracmod.influence.scores import top_influences
from tracmod.models.architecture import attention_layers
from tracmod.models.inputs import collate, pad_token_id
from tracmod.models.loss import per_example_loss
from tracmod.models.modes import frozen, to_device
from tracmod.models.plain_pass import predict
from tracmod.study.context import SPLITS, RunContext
from tracmod.study.retrain_scores import preconditioned_passes
from tracmod.study.run_features import recipe
from tracmod.study.run_folder import RunFolder
from tracmod.study.run_training import initial_model
from tracmod.study.views import views_of
from tracmod.subnetworks.head_mask import HeadMask
from tracmod.subnetworks.importance import head_importance
from tracmod.training.optimizer import HeadwiseAdamW

# Numbers of examples that are timed, one after the other, until one takes long enough to be
# measured: full batches are several times as fast per example as small ones.
TIMED_EXAMPLES = (1, 1, 8, 64, 512)
LONG_ENOUGH = 0.5  # seconds


class Estimate(NamedTuple):
    """The estimated work of a stage.

    Attributes:
        work: The work in words.
        seconds: The time it takes; None for stages of a few seconds.
        num_bytes: The bytes that it leaves on disk.
    """

    work: str
    seconds: float | None = None
    num_bytes: int = 0


class Pass(NamedTuple):
    """One pass of collecting, at one checkpoint of one model.

    Attributes:
        view: The name of the view.
        num_train, num_test: The examples whose features are collected.
    """

    view: str
    num_train: int
    num_test: int


@dataclass(frozen=True)
class Rates:
    """Measured times, in seconds.

    Attributes:
        step: One training step.
        forward, importance: One example's forward pass, and its pass for head importance.
        features: One example's features, by preconditioner, for each kind that the run has.
        score: One inner product of two feature rows, with its share of finding the strongest.
    """

    step: float
    forward: float
    importance: float
    features: dict[MetricKind, float]
    score: float


class Forecast:
    """Counts and rates of one run, from its config, its data and its model.

    Attributes:
        run: The run folder, whose stages may be done or not.
        config: Its config.
        tables: The examples of each split.
        all_heads: The mask of all heads of the model.
        preconditioner: The kind of the run's features.
        checkpoint_bytes: The size of a checkpoint on disk.
        second_moment_bytes: The size of Adam's second moment on disk.
    """

    def __init__(self, run: RunFolder, context: RunContext) -> None:
        """Load the model.

        Args:
            run: The run folder.
            context: A context whose data is there: that of the run, or of a folder with its data.
        """
        self.run, self.config, self._context = run, run.config, context
        self._model, self._tokenizer = initial_model(context)
        to_device(self._model, context.device)
        self.tables = {split: context.table(split) for split in SPLITS}
        layers = attention_layers(self._model)
        self.all_heads = HeadMask.full(len(layers), layers[0].num_heads)
        parameters = list(self._model.parameters())
        tokenizer_bytes = 4_000_000
        self.checkpoint_bytes = tokenizer_bytes + sum(
            parameter.numel() * parameter.element_size() for parameter in parameters
        )
        self.second_moment_bytes = 4 * sum(parameter.numel() for parameter in parameters)
        self.preconditioner: MetricKind = self.config.collect.preconditioner

    # --- counts -----------------------------------------------------------------------------

    def count(self, split: str, language: str | None = None) -> int:
        """Count the examples of a split, or of one language of it."""
        languages = self.tables[split].column("language").to_pylist()
        return len(languages) if language is None else languages.count(language)

    @property
    def num_models(self) -> int:
        """The number of models whose influence is computed."""
        return len(self._context.models)

    def checkpoints_of(self, model_name: str) -> int:
        """Count the checkpoints of a model that are used for influence."""
        return len(self._context.counted_epochs(model_name))

    def num_checkpoints(self) -> int:
        """Count the checkpoints of all models that are used for influence."""
        return sum(map(self.checkpoints_of, self._context.models))

    def passes(self) -> list[Pass]:
        """Return the passes of collecting at one checkpoint of one model."""
        masks = dict.fromkeys(self.config.task.languages, self.all_heads)
        views = views_of(self.config.views, masks, self.config.seed)
        return [
            Pass(view.name, self.count("train"), self.count("test", language))
            for view, language, _ in self._context.passes(views)
        ]

    def ekfac_fits(self, checkpoints: int) -> Estimate:
        """Estimate fitting EK-FAC: two passes over its examples at each checkpoint."""
        examples = min(FIT_EXAMPLES, self.count("train"))
        where = "1 checkpoint" if checkpoints == 1 else f"{checkpoints} checkpoints"
        metric = self._placeholder("ekfac", torch.device("meta"))
        assert metric is not None
        num_bytes = sum(
            tensor.nbytes
            for layer in metric.metrics.values()
            for tensor in layer.tensors().values()
        )
        return Estimate(
            f"EK-FAC fitted at {where}, two passes over {examples} examples",
            checkpoints * 2 * examples * self.rates.features["ekfac"],
            checkpoints * num_bytes,
        )

    # --- measurements -----------------------------------------------------------------------

    @cached_property
    def rates(self) -> Rates:
        """The measured rates; measuring takes some seconds."""
        batch_size, device = self.config.finetune.batch_size, self._context.device
        examples = self._examples("train", max(*TIMED_EXAMPLES, batch_size))
        retrain_passes = preconditioned_passes(self.config, self.checkpoints_of("full"))
        features: dict[MetricKind, float] = {}
        for kind in {self.preconditioner} | {kind for kind, _ in retrain_passes}:
            metric = self._placeholder(kind, self._model.device)
            collector = recipe(self._context).collector(self._model, metric)
            with frozen(self._model):
                features[kind] = seconds_per_example(device, collector.collect, examples)
        importance = partial(head_importance, self._model)
        return Rates(
            step=self._step_seconds(examples[:batch_size]),
            forward=seconds_per_example(device, partial(predict, self._model), examples),
            importance=seconds_per_example(device, importance, examples),
            features=features,
            score=self._score_seconds(),
        )

    def _placeholder(self, kind: MetricKind, device: torch.device) -> Preconditioner | None:
        """Make a preconditioner that changes nothing: as slow and as large as a fitted one."""
        if kind == "none":
            return None
        identity = cache(partial(torch.eye, device=device))
        metrics = {}
        for layer in select_layers(self._model, self.config.collect.parameters):
            rows, columns = gradient_shape(layer)
            is_rotated = kind == "ekfac" and layer.kind == "linear"
            rotations = (identity(columns), identity(rows)) if is_rotated else ()
            metrics[layer.name] = Metric(torch.ones(rows, columns, device=device), *rotations)
        return Preconditioner(kind, metrics)

    def _examples(self, split: str, number: int) -> list[dict[str, Any]]:
        """Encode examples in random order, so that all languages and lengths are among them."""
        table = self.tables[split]
        rows = np.random.default_rng(0).permutation(len(table))[:number]
        return self._context.encode(self._tokenizer, table.take(rows), self._model)

    def _step_seconds(self, batch: list[dict[str, Any]]) -> float:
        """Time a training step, without the first, which allocates; restore the weights."""
        model = self._model
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        optimizer = HeadwiseAdamW(model, weight_decay=0.0, split_heads=False)
        model.train()

        def step() -> None:
            inputs = collate(batch, pad_token_id(model), model.device)
            labels_B = inputs.pop("labels")
            per_example_loss(model(**inputs).logits, labels_B).mean().backward()
            optimizer.step(0.0)
            model.zero_grad(set_to_none=True)

        step()
        seconds = min(seconds_of(self._context.device, step) for _ in range(2))
        model.eval()
        model.load_state_dict(weights)
        return seconds

    def _score_seconds(self) -> float:
        """Time one inner product of two feature rows, with finding the strongest."""
        dim, k = self.config.collect.projection_dim, max(self.config.influence.ks)
        device, generator = self._context.device, torch.Generator().manual_seed(0)
        train = torch.randn(min(2048, self.count("train")), dim, generator=generator).to(device)
        query = torch.randn(min(64, self.count("test")), dim, generator=generator).to(device)
        score = partial(top_influences, query, train, k, normalize="cosine")
        score()
        return seconds_of(device, score) / (len(query) * len(train))


def seconds_per_example(device: str, work: Callable[[Any], Any], examples: list[Any]) -> float:
    """Time work on as many examples as take long enough; the first call only warms up."""
    for number in TIMED_EXAMPLES:
        some = examples[:number]
        seconds = seconds_of(device, lambda: work(some))  # noqa: B023 - called at once
        if seconds > LONG_ENOUGH:
            break
    return seconds / len(some)


def seconds_of(device: str, work: Callable[[], Any]) -> float:
    """Time one call, the work that it leaves on a GPU included."""
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if on_gpu:
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
