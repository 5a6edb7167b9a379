"""Scores that are compared with retraining: one (Q, N) matrix per method, kept between attempts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from tracmod.choices import Method, MetricKind
from tracmod.config import RunConfig
from tracmod.files import progress
from tracmod.files.durable import canonical_json, file_sha256, sha256
from tracmod.files.tensor_cache import read_tensors, write_tensors
from tracmod.influence.scores import influence_scores
from tracmod.models.checkpoints import SECOND_MOMENT, Checkpoint
from tracmod.models.modes import frozen
from tracmod.study.context import RunContext
from tracmod.study.run_features import full_model_scores, preconditioner_of_kind, recipe
from tracmod.study.run_training import fine_tune_on
from tracmod.validation.baselines import bm25_scores, embedding_scores, random_scores

METHODS: tuple[Method, ...] = get_args(Method)
WEIGHT_FILES = "model*.safetensors"  # of a checkpoint; the weights of a large one are in several
Normalize = Literal["cosine"] | None


def methods_of(config: RunConfig) -> list[Method]:
    """Return the methods that the config names; by default all that differ from `tracin`."""
    assert config.retrain is not None
    kind, is_cosine = config.collect.preconditioner, config.influence.normalize == "cosine"
    if kind == "none":
        same_as_tracin = ["tracin-cosine" if is_cosine else "tracin-dot"]
    else:
        same_as_tracin = [] if is_cosine else [kind]
    left_out = same_as_tracin if config.has_metagradient else [*same_as_tracin, "metagradient"]
    return config.retrain.methods or [name for name in METHODS if name not in left_out]


def preconditioned_passes(config: RunConfig, checkpoints: int) -> list[tuple[MetricKind, int]]:
    """Return the passes for features of their own: (preconditioner, checkpoints) of each method.

    Args:
        config: The run's config.
        checkpoints: The number of checkpoints that count for influence.
    """
    if config.retrain is None:
        return []
    passes: dict[str, tuple[MetricKind, int]] = {
        "adam": ("adam", checkpoints),
        "ekfac": ("ekfac", checkpoints),
        "ekfac-last": ("ekfac", 1),
    }
    return [passes[method] for method in methods_of(config) if method in passes]


def method_scores(context: RunContext, method: Method) -> np.ndarray:
    """Return the (Q, N) scores of a method; rows and columns as in data/{test,train}.parquet.

    The larger a score, the more the training example is expected to lower the loss of the test
    example. Gradients are those of the full model with all heads.

    - tracin: The scores of the run's own influence, with its normalization and preconditioner.
    - tracin-dot, tracin-cosine: Inner products or cosines of plain gradients, whatever the run has.
    - adam, ekfac: Inner products preconditioned by Adam's second moment or by the curvature at each
      checkpoint.
    - ekfac-last: The same at the last checkpoint alone, which is what influence functions are.
    - metagradient: That of the mean loss of the test example's language, for each of its examples.
    - bm25: Over both texts of an example; knows no labels.
    - embedding: Cosine of the mean last hidden states at the last checkpoint; knows no labels.
    - random: No knowledge at all.
    """
    train, test = context.table("train"), context.table("test")
    match method:
        case "tracin":
            return full_model_scores(context, context.normalize).numpy()
        case "tracin-dot":
            return _plain_scores(context, None)
        case "tracin-cosine":
            return _plain_scores(context, "cosine")
        case "adam" | "ekfac":
            return _cached_scores(context, method, context.checkpoints("full"), None)
        case "ekfac-last":
            return _cached_scores(context, "ekfac", context.checkpoints("full")[-1:], None)
        case "metagradient":
            influence = pq.read_table(context.run.metagradient / "full.parquet")
            by_test = [influence[name].to_numpy() for name in test["language"].to_pylist()]
            return np.stack(by_test).astype(np.float32)
        case "bm25":
            return bm25_scores(_texts(test), _texts(train))
        case "embedding":
            model, tokenizer = context.load(context.checkpoints("full")[-1])
            queries, trains = (context.encode(tokenizer, table, model) for table in (test, train))
            return embedding_scores(model, queries, trains)
        case "random":
            return random_scores(len(test), len(train), context.config.seed)


def _texts(table: pa.Table) -> list[str]:
    pairs = zip(table["text_a"].to_pylist(), table["text_b"].to_pylist(), strict=True)
    return [" ".join(text for text in pair if text) for pair in pairs]


def _plain_scores(context: RunContext, normalize: Normalize) -> np.ndarray:
    """Return scores of plain gradients: from the stores, unless those are preconditioned."""
    if context.config.collect.preconditioner == "none":
        return full_model_scores(context, normalize).numpy()
    return _cached_scores(context, "none", context.checkpoints("full"), normalize)


def _cached_scores(
    context: RunContext, kind: MetricKind, checkpoints: Sequence[Checkpoint], normalize: Normalize
) -> np.ndarray:
    """Return scores with a preconditioner, from features of their own; in retraining/scores/."""
    weights = context.weights(checkpoints)
    identity = {
        "kind": kind,
        "normalize": normalize,
        "weights": weights,
        "collect": context.config.collect.model_dump(
            mode="json", exclude={"features", "store_dtype", "preconditioner"}
        ),
        "max_length": context.config.model.max_length,
        "checkpoints": [
            file_sha256(file)
            for checkpoint in checkpoints
            for file in sorted(checkpoint.path.glob(WEIGHT_FILES))
        ],
        **{split: context.data_digest(split) for split in ("train", "test")},
    }
    name = sha256(canonical_json(identity))[:32]
    file = context.run.retraining / "scores" / f"{name}.safetensors"
    try:
        cached = read_tensors(file, identity)
    except ValueError:  # damaged: computed again
        cached = None
    if cached is None:
        if kind == "adam":
            checkpoints = _with_second_moments(context, checkpoints)
        scores: Tensor | float = 0.0
        with progress.bar(f"scores {kind}", len(checkpoints), "checkpoint") as bar:
            for position, checkpoint in enumerate(checkpoints):
                queries, trains = _features(context, kind, checkpoint)
                weight = None if weights is None else [weights[position]]
                scores = scores + influence_scores(queries, trains, weight, normalize)
                bar.update()
        cached = {"scores": torch.as_tensor(scores)}
        write_tensors(file, cached, identity)
    return cached["scores"].numpy()


def _with_second_moments(
    context: RunContext, checkpoints: Sequence[Checkpoint]
) -> list[Checkpoint]:
    """Return the checkpoints if they hold Adam's second moment, else those of the same training."""
    if all((checkpoint.path / SECOND_MOMENT).is_file() for checkpoint in checkpoints):
        return list(checkpoints)
    folder, seed = context.run.retraining / "with-second-moment", context.config.seed
    fine_tune_on(
        context,
        context.table("train"),
        seed,
        folder,
        "for Adam's second moment",
        keep="all",
        second_moment=True,
    )
    return [replace(checkpoint, path=folder / checkpoint.path.name) for checkpoint in checkpoints]


def _features(
    context: RunContext, kind: MetricKind, checkpoint: Checkpoint
) -> tuple[Tensor, Tensor]:
    """Return (test, training) features of one checkpoint with a preconditioner."""
    model, tokenizer = context.load(checkpoint)
    preconditioner = None
    if kind != "none":
        preconditioner = preconditioner_of_kind(context, kind, "full", checkpoint, model, tokenizer)
    collector = recipe(context).collector(model, preconditioner)
    with frozen(model):
        test, train = (
            collector.collect(context.encode(tokenizer, context.table(split), model))
            for split in ("test", "train")
        )
    return test.cpu(), train.cpu()
