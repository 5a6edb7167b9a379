"""Counts and short measurements from which the estimates of a run's stages are made.

Times are those of this machine: a training step, a forward pass, a gradient feature and a score are
measured on the run's own examples, for about a second each (`tracmod.study.probes`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from tracmod.choices import MetricKind
from tracmod.gradients.capture import select_layers
from tracmod.gradients.ekfac import FIT_EXAMPLES
from tracmod.gradients.preconditioner import Metric, Preconditioner, gradient_shape
from tracmod.influence.scores import top_influences
from tracmod.models.adapters import adapter_parameters
from tracmod.models.architecture import attention_layers
from tracmod.models.inputs import collate, pad_token_id
from tracmod.models.loss import per_example_loss
from tracmod.models.modes import frozen, to_device
from tracmod.models.plain_pass import model_logits, predict, predict_tokens
from tracmod.study.context import SPLITS, RunContext
from tracmod.study.probes import SIZES, Cost, Stopwatch
from tracmod.study.retrain_scores import preconditioned_passes
from tracmod.study.run_features import recipe
from tracmod.study.run_folder import RunFolder
from tracmod.study.run_training import check_trained, initial_model, training_settings
from tracmod.study.views import views_of
from tracmod.subnetworks.head_mask import HeadMask
from tracmod.subnetworks.importance import head_importance
from tracmod.training.fine_tune import untrained_parameters
from tracmod.training.optimizer import HeadwiseAdamW

# The field of `Cost` that an estimate is made from.
Clock = Literal["free", "low", "high", "now"]


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


class _Costs(NamedTuple):
    """Measured costs; see `Rates`."""

    step: Cost
    forward: Cost
    importance: Cost
    features: dict[MetricKind, Cost]
    score: Cost


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
        clock: Which of the measured times `rates` has: on free cores (the median, or the fastest or
            slowest probe), or under the present load.
        checkpoint_bytes: The size of a checkpoint on disk.
        second_moment_bytes: The size of Adam's second moment on disk.
    """

    def __init__(self, run: RunFolder, context: RunContext) -> None:
        """Load the model.

        Args:
            run: The run folder.
            context: A context whose data is there: that of the run, or of a folder with its data.
        """
        self.run, self.config, self.context = run, run.config, context
        self.clock: Clock = "free"
        self._model, self._tokenizer = initial_model(context)
        to_device(self._model, context.device)
        check_trained(context, self._model)
        settings = training_settings(self.config.finetune, self.config.seed)
        for parameter in untrained_parameters(self._model, settings):
            parameter.requires_grad_(False)  # as in checkpoints
        self.tables = {split: context.table(split) for split in SPLITS}
        layers = attention_layers(self._model)
        self.all_heads = HeadMask.full(len(layers), layers[0].num_heads)
        saved = adapter_parameters(self._model) or dict(self._model.named_parameters())
        parameters = list(saved.values())
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
        return len(self.context.models)

    def checkpoints_of(self, model_name: str) -> int:
        """Count the checkpoints of a model that are used for influence."""
        return len(self.context.counted_epochs(model_name))

    def num_checkpoints(self) -> int:
        """Count the checkpoints of all models that are used for influence."""
        return sum(map(self.checkpoints_of, self.context.models))

    def passes(self) -> list[Pass]:
        """Return the passes of collecting at one checkpoint of one model."""
        masks = dict.fromkeys(self.config.task.languages, self.all_heads)
        views = views_of(self.config.views, masks, self.config.seed)
        return [
            Pass(view.name, self.count("train"), self.count("test", language))
            for view, language, _ in self.context.passes(views)
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

    @property
    def rates(self) -> Rates:
        """The rates by `clock`; they are measured once, which takes some seconds."""
        costs, clock = self._costs, self.clock
        return Rates(
            step=getattr(costs.step, clock),
            forward=getattr(costs.forward, clock),
            importance=getattr(costs.importance, clock),
            features={kind: getattr(cost, clock) for kind, cost in costs.features.items()},
            score=getattr(costs.score, clock),
        )

    @cached_property
    def stopwatch(self) -> Stopwatch:
        """Measures on the device of the run."""
        return Stopwatch(self.context.device)

    @cached_property
    def _costs(self) -> _Costs:
        examples = self._examples("train", max(SIZES))
        retrain_passes = preconditioned_passes(self.config, self.checkpoints_of("full"))
        features: dict[MetricKind, Cost] = {}
        # Also those of influence by head and layer, if there are any, have no preconditioner.
        kinds: set[MetricKind] = {self.preconditioner} | {kind for kind, _ in retrain_passes}
        if self.config.influence.blocks:
            kinds.add("none")
        for kind in kinds:
            metric = self._placeholder(kind, self._model.device)
            collector = recipe(self.context).collector(self._model, metric)
            with frozen(self._model):
                features[kind] = cost_per_example(self.stopwatch, collector.collect, examples)
        importance = partial(head_importance, self._model)
        forward = predict if self.context.unit == "text" else predict_tokens
        return _Costs(
            step=self._step_cost(examples),
            forward=cost_per_example(self.stopwatch, partial(forward, self._model), examples),
            importance=cost_per_example(self.stopwatch, importance, examples),
            features=features,
            score=self._score_cost(),
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
        return self.context.encode(self._tokenizer, table.take(rows), self._model)

    def _step_cost(self, examples: list[dict[str, Any]]) -> Cost:
        """Measure a training step: its gradient by example, then its update; restore the weights.

        A whole step of a large model takes longer than the measurements of all else.
        """
        model, config = self._model, self.config.finetune
        batch_size, dtype = config.batch_size, getattr(torch, config.dtype)
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        optimizer = HeadwiseAdamW(model, weight_decay=0.0, split_heads=False)
        model.train(config.dropout)

        def gradient(batch: list[dict[str, Any]]) -> None:
            model.zero_grad(set_to_none=True)
            inputs = collate(batch, pad_token_id(model), model.device)
            labels_B = inputs.pop("labels")
            with torch.autocast(labels_B.device.type, dtype, enabled=dtype != torch.float32):
                logits_BC = model_logits(model, inputs)
            per_example_loss(logits_BC, labels_B).mean().backward()

        cost = cost_per_example(self.stopwatch, gradient, examples, batch_size).scaled(batch_size)
        update = self.stopwatch.probe(lambda size: optimizer.step(0.0), sizes=(1, 1))
        model.zero_grad(set_to_none=True)
        model.eval()
        model.load_state_dict(weights)
        return cost.plus(update)

    def _score_cost(self) -> Cost:
        """Measure one inner product of two feature rows, with finding the strongest."""
        dim, k = self.config.collect.projection_dim, max(self.config.influence.ks)
        device, generator = self.context.device, torch.Generator().manual_seed(0)
        train = torch.randn(min(2048, self.count("train")), dim, generator=generator).to(device)
        query = torch.randn(min(64, self.count("test")), dim, generator=generator).to(device)
        cost = self.stopwatch.probe(
            lambda size: top_influences(query, train, k, normalize="cosine"), sizes=(1, 1)
        )
        return cost.scaled(1 / (len(query) * len(train)))


def cost_per_example(
    stopwatch: Stopwatch,
    work: Callable[[Any], Any],
    examples: list[dict[str, Any]],
    most: int | None = None,
) -> Cost:
    """Measure work on a few examples; return its cost for an example of mean length.

    Args:
        stopwatch: Measures.
        work: Is given a list of examples.
        examples: Examples in random order.
        most: The largest number that work is given at a time.
    """
    lengths = [len(example["input_ids"]) for example in examples]
    sizes = [size for size in SIZES if size <= min(most or len(examples), len(examples))]
    mean, costs = sum(lengths) / len(lengths), []

    def on(size: int) -> None:
        work(examples[:size])
        costs.append(size * mean / sum(lengths[:size]))  # of the size that is tried last

    return stopwatch.probe(on, sizes).scaled(costs[-1])
