"""The stage `retrain`: the full model trained again without some examples, checked against scores.

Every training begins with the run's own initial weights and tokenizer (which was made from all
training texts) and has the settings of `finetune`; only the examples differ, and the seed of order
and dropout. Epochs are the same, so fewer examples are fewer steps, as in the literature on linear
datamodelling scores.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from tracmod.analysis.results import RunResults
from tracmod.config import Method, MetricKind, RetrainConfig, RunConfig
from tracmod.files.durable import (
    canonical_json,
    file_sha256,
    sha256,
    write_csv,
    write_json,
    write_parquet,
)
from tracmod.files.tensor_cache import read_tensors, write_tensors
from tracmod.influence.scores import influence_scores
from tracmod.models.checkpoints import SECOND_MOMENT, Checkpoint
from tracmod.models.inputs import as_examples, encode, per_example_loss, predict
from tracmod.models.loading import load_model
from tracmod.models.modes import frozen, to_device
from tracmod.validation.baselines import bm25_scores, embedding_scores, random_scores
from tracmod.validation.retraining import (
    ALL,
    Retrained,
    Summed,
    draw_subsets,
    languages_left_out,
    leave_one_out_table,
    leave_one_out_tests,
    removal_table,
    removals_left_out,
    subset_lds,
    subsets_left_out,
)

if TYPE_CHECKING:
    from tracmod.study.pipeline import Study

METHODS: tuple[Method, ...] = get_args(Method)
WEIGHTS = "model*.safetensors"  # of a checkpoint; a large one's are in several files
Normalize = Literal["cosine"] | None


def method_scores(study: Study, method: Method) -> np.ndarray:
    """(Q, N) scores of a method: rows as data/test.parquet, columns as data/train.parquet.

    The larger, the more the training example is to lower the test example's loss. Gradients are
    those of the full model, all heads, as collected.

    tracin: as the run's influence is, metric and all; tracin-dot, tracin-cosine: inner products, or
        cosines, of plain gradients, whatever the run has.
    adam, ekfac: tracin-dot in the metric of Adam's steps, or of the curvature at each checkpoint.
    ekfac-last: the same of the last checkpoint alone, which is what influence functions are.
    bm25: over both texts of an example. embedding: cosine of mean last hidden states, last
        checkpoint. Neither knows labels. random: no knowledge at all.
    """
    train, test = study.table("train"), study.table("test")
    match method:
        case "tracin":
            return study.dense_scores(study.normalize).numpy()
        case "tracin-dot":
            return _plain_scores(study, None)
        case "tracin-cosine":
            return _plain_scores(study, "cosine")
        case "adam" | "ekfac":
            return _kept_scores(study, method, study.checkpoints("full"), None)
        case "ekfac-last":
            return _kept_scores(study, "ekfac", study.checkpoints("full")[-1:], None)
        case "bm25":
            return bm25_scores(_texts(test), _texts(train))
        case "embedding":
            return _embedding(study, test, train)
        case "random":
            return random_scores(len(test), len(train), study.config.seed)


def methods_of(config: RunConfig) -> list[Method]:
    """Those that are asked for; else all, but for what is tracin by another name."""
    assert config.retrain is not None
    kind, cosine = config.collect.preconditioner, config.influence.normalize == "cosine"
    if kind == "none":
        twins = ["tracin-cosine" if cosine else "tracin-dot"]
    else:
        twins = [] if cosine else [kind]
    return config.retrain.methods or [name for name in METHODS if name not in twins]


def _plain_scores(study: Study, normalize: Normalize) -> np.ndarray:
    """(Q, N) scores of plain gradients: from the stores, unless those are in a metric."""
    if study.config.collect.preconditioner == "none":
        return study.dense_scores(normalize).numpy()
    return _kept_scores(study, "none", study.checkpoints("full"), normalize)


def _kept_scores(
    study: Study, kind: MetricKind, checkpoints: Sequence[Checkpoint], normalize: Normalize
) -> np.ndarray:
    """(Q, N) scores in a metric, from features of their own; in retraining/scores/."""
    collect, weights = study.config.collect, study.weights(list(checkpoints))
    identity = {
        "kind": kind,
        "normalize": normalize,
        "weights": weights,
        "collect": collect.model_dump(
            mode="json", exclude={"features", "store_dtype", "preconditioner"}
        ),
        "max_length": study.config.model.max_length,
        "checkpoints": [
            file_sha256(file) for one in checkpoints for file in sorted(one.path.glob(WEIGHTS))
        ],
        **{split: file_sha256(study.run.data(split)) for split in ("train", "test")},
    }
    file = study.run.retraining / "scores" / f"{sha256(canonical_json(identity))[:32]}.safetensors"
    try:
        kept = read_tensors(file, identity)
    except ValueError:  # damaged: made again
        kept = None
    if kept is None:
        if kind == "adam":
            checkpoints = _with_moments(study, checkpoints)
        scores: Tensor | float = 0.0
        with study.bar(f"scores {kind}", len(checkpoints), "checkpoint") as bar:
            for place, checkpoint in enumerate(checkpoints):
                queries, trains = _features_in(study, kind, checkpoint)
                weight = None if weights is None else [weights[place]]
                scores = scores + influence_scores(queries, trains, weight, normalize)
                bar.update()
        kept = {"scores": torch.as_tensor(scores)}
        write_tensors(file, kept, identity)
    return kept["scores"].numpy()


def _with_moments(study: Study, checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """These, where they hold Adam's second moment; else those of the same training again."""
    if all((one.path / SECOND_MOMENT).is_file() for one in checkpoints):
        return list(checkpoints)
    folder = study.run.retraining / "with-second-moment"
    train, seed = study.table("train"), study.config.seed
    study.fine_tuned(train, seed, folder, "for Adam's second moment", "all", second_moment=True)
    return [replace(one, path=folder / one.path.name) for one in checkpoints]


def _features_in(study: Study, kind: MetricKind, checkpoint: Checkpoint) -> tuple[Tensor, Tensor]:
    """Features of the test and of the training examples at a checkpoint, in a metric."""
    model, tokenizer = study.load(checkpoint)
    metric = None
    if kind != "none":
        metric = study.metric(kind, "full", checkpoint, model, tokenizer)
    collector = study.collector(model, None, metric)
    with frozen(model):
        test, train = (
            collector.collect(as_examples(study.encode(tokenizer, study.table(split), model)))
            for split in ("test", "train")
        )
    return test.cpu(), train.cpu()


def _texts(table: pa.Table) -> list[str]:
    pairs = zip(table["text_a"].to_pylist(), table["text_b"].to_pylist(), strict=True)
    return [" ".join(text for text in pair if text) for pair in pairs]


def _embedding(study: Study, test: pa.Table, train: pa.Table) -> np.ndarray:
    model, tokenizer = load_model(study.checkpoints("full")[-1].path)
    to_device(model, study.device)
    length = study.config.model.max_length
    return embedding_scores(
        model, encode(tokenizer, test, length), encode(tokenizer, train, length)
    )


# --- what is trained ------------------------------------------------------------------------


@dataclass(frozen=True)
class Design:
    """What a run's trainings leave out, and what the methods say of it.

    Attributes:
        asked: the config's section.
        sets: name of a set -> rows of the training examples that are left out.
        results: name of a set, seed -> name of the result of this training.
        summed: method -> what its scores say.
        removed: how many are left out of a removal; 0: there are none.
    """

    asked: RetrainConfig
    sets: dict[str, np.ndarray]
    results: dict[tuple[str, int], str]
    summed: dict[str, Summed]
    removed: int


def counted(config: RunConfig, train: pa.Table) -> list[tuple[str, int, int]]:
    """(what, trainings, training examples left out of them all), at most: some may be the same."""
    asked, task = config.retrain, config.task
    assert asked is not None
    total, seeds = len(train), asked.seeds
    of_subset, removed = total - round(asked.fraction * total), round(asked.removed * total)
    kinds = [("on subsets", seeds * asked.subsets, seeds * asked.subsets * of_subset)]
    if "adam" in methods_of(config) and config.collect.preconditioner != "adam":
        kinds.append(("for Adam's second moment", 1, 0))
    if removed:
        methods = len([method for method in methods_of(config) if method != "random"])
        sets = asked.random_removals + 2 * methods * len(task.languages)
        kinds.append(("of removals", seeds * sets, seeds * sets * removed))
    if asked.leave_one_out:
        languages = len(set(train["language"].to_pylist()))
        kinds.append(("without a language", seeds * languages, seeds * total))
    if removed or asked.leave_one_out:
        kinds.append(("on all examples", seeds, 0))
    return kinds


def check_subsets(config: RunConfig, train: pa.Table) -> np.ndarray:
    """(S, N) the subsets; ValueError where one lacks a language."""
    asked = config.retrain
    assert asked is not None
    languages = train["language"].to_pylist()
    return draw_subsets(languages, asked.subsets, asked.fraction, config.seed)


def design_of(study: Study) -> Design:
    """What is left out; the scores of every method are computed, one after the other.

    Raises:
        ValueError: a method's scores take more than `influence.memory`.
    """
    config, asked = study.config, study.config.retrain
    assert asked is not None
    train, test = study.table("train"), study.table("test")
    members_SN = check_subsets(config, train)
    check_memory(config, len(train), len(test))
    test_languages = test["language"].to_pylist()
    summed: dict[str, Summed] = {
        method: Summed.of(method_scores(study, method), members_SN, test_languages)
        for method in methods_of(config)
    }
    removed = round(asked.removed * len(train))
    sets = subsets_left_out(members_SN)
    if removed or asked.leave_one_out:
        sets[ALL] = np.array([], dtype=np.int64)
    if asked.leave_one_out:
        sets |= languages_left_out(train["language"].to_pylist())
    if removed:
        languages = list(dict.fromkeys(test_languages))
        sets |= removals_left_out(summed, languages, removed, asked.random_removals, config.seed)
    return Design(asked, sets, _results(study, sets), summed, removed)


def check_memory(config: RunConfig, num_train: int, num_test: int) -> None:
    """Scores of one method, summed up, and from all features of one checkpoint, normalized too."""
    features = 2 * (num_train + num_test) * config.collect.projection_dim
    needed, memory = 4 * (2 * num_train * num_test + features), config.influence.memory
    if needed > memory:
        raise ValueError(
            f"influence.memory: to retrain, expected room for the scores of {num_test:,} test x "
            f"{num_train:,} training examples, {needed / 1e9:.1f} GB, got {memory / 1e9:.1f} GB; "
            f"use --memory, or fewer examples"
        )


def begin(study: Study, design: Design) -> list[tuple[str, int, str]]:
    """Write retraining/left_out.parquet; the arguments of `train_without` for what is missing.

    Sets that leave out the same examples are trained once.
    """
    ids = study.table("train")["id"]
    left_out = pa.table(
        {
            "set": np.repeat(list(design.sets), [len(rows) for rows in design.sets.values()]),
            "train_id": ids.take(np.concatenate(list(design.sets.values()))),
        }
    )
    write_parquet(study.run.retraining / "left_out.parquet", left_out)
    missing: dict[str, tuple[str, int, str]] = {}
    for (name, seed), result in design.results.items():
        if not _result_file(study, result).is_file():
            missing.setdefault(result, (name, seed, result))
    return list(missing.values())


def _results(study: Study, sets: dict[str, np.ndarray]) -> dict[tuple[str, int], str]:
    """Digests of all that a training and its losses depend on: what is there is still right."""
    config = study.config
    assert config.retrain is not None
    common = {
        "initial": config.seed,
        "model": config.model.model_dump(mode="json"),
        "finetune": config.finetune.model_dump(mode="json", exclude={"save_seconds"}),
        **{split: file_sha256(study.run.data(split)) for split in ("train", "test")},
    }
    results = {}
    for name, rows in sets.items():
        left_out = sha256(rows.astype("<i8").tobytes())
        for seed in range(config.seed, config.seed + config.retrain.seeds):
            identity = {**common, "left_out": left_out, "seed": seed}
            results[name, seed] = sha256(canonical_json(identity))[:32]
    return results


def _result_file(study: Study, name: str) -> Path:
    return study.run.retraining / "results" / f"{name}.parquet"


def train_without(study: Study, left_out: str, seed: int, result: str) -> None:
    """One training, and the loss of every test example after it: retraining/results/.

    Written whole at the end; the model, from which it goes on when it was stopped, is then deleted.
    """
    file, train, test = _result_file(study, result), study.table("train"), study.table("test")
    sets = pq.read_table(
        study.run.retraining / "left_out.parquet", filters=[("set", "==", left_out)]
    )
    out = set(sets["train_id"].to_pylist())
    kept = train.filter(pa.array([name not in out for name in train["id"].to_pylist()]))
    folder = study.run.retraining / "models" / result
    model, tokenizer = study.fine_tuned(kept, seed, folder, f"{left_out}, seed {seed}")
    labels = int(model.config.num_labels or 0)
    logits = predict(
        model, encode(tokenizer, test, study.config.model.max_length, num_labels=labels)
    )
    labels_Q = torch.tensor(test["label"].to_pylist())
    losses_Q = per_example_loss(logits, labels_Q)
    right_Q = logits.argmax(dim=1) == labels_Q
    write_parquet(file, pa.table({"loss": losses_Q.numpy(), "correct": right_Q.numpy()}))
    shutil.rmtree(folder)


# --- what it says ---------------------------------------------------------------------------


def finish(study: Study, design: Design) -> None:
    """Tables and summary.json from the results: see `validation.retraining`."""
    run, folder = RunResults(study.run.path), study.run.retraining
    # Of trainings that are not asked for now, or that have served.
    for name in ("models", "with-second-moment"):
        shutil.rmtree(folder / name, ignore_errors=True)
    losses = _losses_table(study, design)
    retrained = _retrained(losses, design)
    train_languages, test_languages = (
        study.table(split)["language"].to_pylist() for split in ("train", "test")
    )
    settings, summed = study.resampling, design.summed
    common = (test_languages, run.clusters, settings)
    tables = {"lds": subset_lds(summed, retrained, *common)}
    summary: dict[str, Any] = {
        "settings": design.asked.model_dump(mode="json", exclude={"methods"}),
        "methods": list(summed),
        "preconditioner": study.config.collect.preconditioner,
        "trainings": len(set(design.results.values())),
        "num_train": len(train_languages),
        "in_subset": round(design.asked.fraction * len(train_languages)),
        "removed": design.removed,
        "confidence": settings.confidence,
        "leave_one_out": [],
    }
    if design.removed:
        tables["removal"] = removal_table(
            list(summed), retrained, design.removed, design.asked.random_removals, *common
        )
    if design.asked.leave_one_out:
        table = leave_one_out_table(summed, retrained, train_languages, *common)
        tables["leave_one_out"] = table
        summary["leave_one_out"] = leave_one_out_tests(table, settings)
    write_parquet(folder / "losses.parquet", losses)
    for name in ("lds", "removal", "leave_one_out"):
        for suffix, write in (("parquet", write_parquet), ("csv", write_csv)):
            file = folder / f"{name}.{suffix}"
            if name in tables:
                write(file, tables[name])
            else:
                file.unlink(missing_ok=True)
    write_json(folder / "summary.json", summary)


def _losses_table(study: Study, design: Design) -> pa.Table:
    """`losses.parquet`: a row per set, seed and test example."""
    test = study.table("test")
    parts = []
    for (name, seed), result in design.results.items():
        found = pq.read_table(_result_file(study, result))
        columns = {
            "set": pa.array([name] * len(test)),
            "seed": pa.array([seed] * len(test), pa.int64()),
            "test_id": test["id"],
            "test_language": test["language"],
            "loss": found["loss"],
            "correct": found["correct"],
        }
        parts.append(pa.table(columns))
    return pa.concat_tables(parts)


def _retrained(losses: pa.Table, design: Design) -> Retrained:
    shape = (len(design.sets), design.asked.seeds, -1)
    by_set = (
        dict(zip(design.sets, values.astype(np.float64).reshape(shape), strict=True))
        for values in (losses["loss"].to_numpy(), losses["correct"].to_numpy())
    )
    return Retrained(*by_set)
