"""The stage `retrain`: models trained without some examples, compared with scores; retraining/.

Every training begins with the run's own initial weights and tokenizer (which was made from all
training texts) and has the settings of `finetune`; only the examples differ, and the seed of their
order and of dropout. With `batches: new`, the number of epochs is the same, so fewer examples mean
fewer steps, as in the literature on linear datamodeling scores. With `batches: same`, examples that
are left out have weight 0 in the batches of the training on all examples.

1. Compute the scores of every method (`tracmod.study.retrain_scores`), and from them the sets of
   examples that are left out: random subsets, proponents and opponents of each language, languages.
2. Train without each set, with every seed: one result file each, in retraining/results/.
3. Compare scores with results (`tracmod.validation.retraining`): tables and summary.json.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from tracmod.analysis.results import RunResults
from tracmod.analysis.statistics import Resampling
from tracmod.choices import Denominator
from tracmod.config import RetrainConfig, RunConfig
from tracmod.files import progress
from tracmod.files.durable import canonical_json, sha256, write_csv, write_json, write_parquet
from tracmod.models.loss import per_example_loss
from tracmod.models.plain_pass import predict
from tracmod.study.context import RunContext
from tracmod.study.forecast import Estimate, Forecast
from tracmod.study.retrain_scores import method_scores, methods_of, preconditioned_passes
from tracmod.study.run_training import fine_tune_on
from tracmod.study.worker import Advance, run_tasks
from tracmod.training.batch_mean import WeightedMean
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


def run(context: RunContext) -> None:
    """Train without each set of examples, and compare."""
    design = _design(context)
    missing = _write_sets(context, design)
    with progress.bar("retrain", len(missing), "training") as bar:
        # Never twice at a time: a training keeps the state it resumes from in its folder.
        run_tasks(context, missing, bar.update, twice=False)
    _compare(context, design)


# --- what is left out -----------------------------------------------------------------------


@dataclass(frozen=True)
class Design:
    """The trainings of a run, and what the methods predict of them.

    Attributes:
        config: The section `retrain` of the run's config.
        sets: Name of a set -> rows of the training examples that it leaves out.
        results: (Name of a set, seed) -> name of the result of this training.
        summed: Method -> its scores, summed as the comparisons need them.
        removed: The number of examples that a removal leaves out; 0 if there are no removals.
    """

    config: RetrainConfig
    sets: dict[str, np.ndarray]
    results: dict[tuple[str, int], str]
    summed: dict[str, Summed]
    removed: int


def draw_subsets_of(config: RunConfig, train: pa.Table) -> np.ndarray:
    """Return the (S, N) membership of the random subsets, those of `fraction` first.

    Raises:
        ValueError: A subset lacks a language.
    """
    languages = train["language"].to_pylist()
    members = [
        draw_subsets(languages, number, fraction, config.seed)
        for fraction, number in _subset_counts(config).items()
    ]
    return np.concatenate(members)


def _subset_counts(config: RunConfig) -> dict[float, int]:
    """Return the number of random subsets of each share of the training examples."""
    retrain = config.retrain
    assert retrain is not None
    return {retrain.fraction: retrain.subsets, **retrain.other_fractions}


def _design(context: RunContext) -> Design:
    """Compute the scores of every method, one after the other, and the sets that are left out.

    Raises:
        ValueError: The scores of a method take more than `influence.memory`.
    """
    config, retrain = context.config, context.config.retrain
    assert retrain is not None
    train, test = context.table("train"), context.table("test")
    members_SN = draw_subsets_of(config, train)
    _check_memory(config, len(train), len(test))
    test_languages = test["language"].to_pylist()
    summed: dict[str, Summed] = {
        method: Summed.of(method_scores(context, method), members_SN, test_languages)
        for method in methods_of(config)
    }
    removed = round(retrain.removed * len(train))
    sets = subsets_left_out(members_SN)
    if removed or retrain.leave_one_out:
        sets[ALL] = np.array([], dtype=np.int64)
    if retrain.leave_one_out:
        sets |= languages_left_out(train["language"].to_pylist())
    if removed:
        languages = list(dict.fromkeys(test_languages))
        sets |= removals_left_out(summed, languages, removed, retrain.random_removals, config.seed)
    return Design(retrain, sets, _result_names(context, sets), summed, removed)


def _check_memory(config: RunConfig, num_train: int, num_test: int) -> None:
    """Check room for the scores of one method, their sum, and one checkpoint's features, twice."""
    features = 2 * (num_train + num_test) * config.collect.projection_dim
    needed, memory = 4 * (2 * num_train * num_test + features), config.influence.memory
    if needed > memory:
        raise ValueError(
            f"influence.memory: to retrain, expected room for the scores of {num_test:,} test x "
            f"{num_train:,} training examples, {needed / 1e9:.1f} GB, got {memory / 1e9:.1f} GB; "
            f"use --memory, or fewer examples"
        )


def _result_names(
    context: RunContext, sets: Mapping[str, np.ndarray]
) -> dict[tuple[str, int], str]:
    """Digest all that a training and its losses depend on, so that old results stay right."""
    config = context.config
    assert config.retrain is not None
    common = {
        "initial": config.seed,
        "model": config.model.model_dump(mode="json"),
        "finetune": config.finetune.model_dump(mode="json", exclude={"save_seconds"}),
        **{split: context.data_digest(split) for split in ("train", "test")},
    }
    if config.retrain.batches == "same":
        common["denominator"] = _denominator(config)
    results = {}
    for name, rows in sets.items():
        left_out = sha256(rows.astype("<i8").tobytes())
        for seed in range(config.seed, config.seed + config.retrain.seeds):
            identity = {**common, "left_out": left_out, "seed": seed}
            results[name, seed] = sha256(canonical_json(identity))[:32]
    return results


def _denominator(config: RunConfig) -> Denominator:
    """Return what happens to the mean over a batch without an example, with `batches: same`."""
    return "fixed" if config.metagradient is None else config.metagradient.denominator


# --- trainings ------------------------------------------------------------------------------


def _write_sets(context: RunContext, design: Design) -> list[RetrainWithout]:
    """Write retraining/left_out.parquet; return the trainings whose results are missing.

    Sets that leave out the same examples are trained once.
    """
    ids, sizes = context.table("train")["id"], [len(rows) for rows in design.sets.values()]
    left_out = pa.table(
        {
            "set": np.repeat(list(design.sets), sizes),
            "train_id": ids.take(np.concatenate(list(design.sets.values()))),
        }
    )
    write_parquet(_sets_file(context), left_out)
    missing: dict[str, RetrainWithout] = {}
    for (name, seed), result in design.results.items():
        if not _result_file(context, result).is_file():
            missing.setdefault(result, RetrainWithout(name, seed, result))
    return list(missing.values())


def _sets_file(context: RunContext) -> Path:
    return context.run.retraining / "left_out.parquet"


def _result_file(context: RunContext, name: str) -> Path:
    return context.run.retraining / "results" / f"{name}.parquet"


@dataclass(frozen=True)
class RetrainWithout:
    """A task: one training, and the loss of every test example after it.

    Attributes:
        left_out: The name of the set of examples that are left out.
        seed: The seed of the training.
        result: The name of the result.
    """

    left_out: str
    seed: int
    result: str

    def run(self, context: RunContext, advance: Advance) -> None:
        """Train, and write retraining/results/<result>.parquet, whole or not at all.

        The model, from which an interrupted training resumes, is deleted when that is done.
        """
        train, test = context.table("train"), context.table("test")
        sets = pq.read_table(_sets_file(context), filters=[("set", "==", self.left_out)])
        left_out = set(sets["train_id"].to_pylist())
        is_left_out = [name in left_out for name in train["id"].to_pylist()]
        folder = context.run.retraining / "models" / self.result
        description, batch_mean = f"{self.left_out}, seed {self.seed}", None
        assert context.config.retrain is not None
        if context.config.retrain.batches == "same":
            weights_N = -torch.tensor(is_left_out, dtype=torch.float32)
            batch_mean = WeightedMean(weights_N, _denominator(context.config))
        else:
            train = train.filter(pc.invert(pa.array(is_left_out)))
        model, tokenizer = fine_tune_on(
            context, train, self.seed, folder, description, batch_mean=batch_mean
        )
        logits_QC = predict(model, context.encode(tokenizer, test, model))
        labels_Q = torch.tensor(test["label"].to_pylist())
        losses_Q = per_example_loss(logits_QC, labels_Q)
        correct_Q = logits_QC.argmax(dim=1) == labels_Q
        result = pa.table({"loss": losses_Q.numpy(), "correct": correct_Q.numpy()})
        write_parquet(_result_file(context, self.result), result)
        shutil.rmtree(folder)
        advance(1)


# --- comparison -----------------------------------------------------------------------------


def _compare(context: RunContext, design: Design) -> None:
    """Write tables and summary.json from the results."""
    folder = context.run.retraining
    for name in ("models", "with-second-moment"):  # left by trainings of another config, or used up
        shutil.rmtree(folder / name, ignore_errors=True)
    losses = _losses(context, design)
    retrained = _retrained(losses, design)
    train_languages, test_languages = (
        context.table(split)["language"].to_pylist() for split in ("train", "test")
    )
    summed, resampling = design.summed, context.resampling
    common = (test_languages, RunResults(context.run.path).clusters, resampling)
    by_fraction = dict(_lds_by_fraction(context.config, summed, retrained, *common))
    tables = {"lds": by_fraction[design.config.fraction]}
    if len(by_fraction) > 1:
        tables["fractions"] = pa.concat_tables(
            table.add_column(0, "fraction", pa.array([fraction] * len(table)))
            for fraction, table in by_fraction.items()
        )
    summary: dict[str, Any] = {
        "settings": design.config.model_dump(mode="json", exclude={"methods"}),
        "methods": list(summed),
        "preconditioner": context.config.collect.preconditioner,
        "trainings": len(set(design.results.values())),
        "num_train": len(train_languages),
        "in_subset": round(design.config.fraction * len(train_languages)),
        "removed": design.removed,
        "confidence": resampling.confidence,
        "leave_one_out": [],
    }
    if design.removed:
        tables["removal"] = removal_table(
            list(summed), retrained, design.removed, design.config.random_removals, *common
        )
    if design.config.leave_one_out:
        table = leave_one_out_table(summed, retrained, train_languages, *common)
        tables["leave_one_out"] = table
        summary["leave_one_out"] = leave_one_out_tests(table, resampling)
    write_parquet(folder / "losses.parquet", losses)
    for name in ("lds", "fractions", "removal", "leave_one_out"):
        for suffix, write in (("parquet", write_parquet), ("csv", write_csv)):
            file = folder / f"{name}.{suffix}"
            if name in tables:
                write(file, tables[name])
            else:
                file.unlink(missing_ok=True)
    write_json(folder / "summary.json", summary)


def _lds_by_fraction(
    config: RunConfig,
    summed: Mapping[str, Summed],
    retrained: Retrained,
    test_languages: Sequence[str],
    clusters: Sequence[Any] | np.ndarray,
    resampling: Resampling,
) -> Iterator[tuple[float, pa.Table]]:
    """Yield each share of the training examples, and `lds_table` of the subsets of this share."""
    first = 0
    for fraction, number in _subset_counts(config).items():
        subsets = range(first, first + number)
        yield (
            fraction,
            subset_lds(summed, retrained, test_languages, clusters, resampling, subsets),
        )
        first += number


def _losses(context: RunContext, design: Design) -> pa.Table:
    """Read all results as one table, with a row per set, seed and test example."""
    test = context.table("test")
    parts = []
    for (name, seed), result in design.results.items():
        measured = pq.read_table(_result_file(context, result))
        columns = {
            "set": pa.array([name] * len(test)),
            "seed": pa.array([seed] * len(test), pa.int64()),
            "test_id": test["id"],
            "test_language": test["language"],
            "loss": measured["loss"],
            "correct": measured["correct"],
        }
        parts.append(pa.table(columns))
    return pa.concat_tables(parts)


def _retrained(losses: pa.Table, design: Design) -> Retrained:
    shape = (len(design.sets), design.config.seeds, -1)
    by_set = (
        dict(zip(design.sets, values.astype(np.float64).reshape(shape), strict=True))
        for values in (losses["loss"].to_numpy(), losses["correct"].to_numpy())
    )
    return Retrained(*by_set)


# --- estimate -------------------------------------------------------------------------------


def count_trainings(config: RunConfig, train: pa.Table) -> list[tuple[str, int, int]]:
    """Return (purpose, trainings, training examples left out of all of them) for each purpose.

    These are upper bounds: sets that leave out the same examples are trained once.
    """
    retrain, languages = config.retrain, config.task.languages
    assert retrain is not None
    total, seeds, methods = len(train), retrain.seeds, methods_of(config)
    removed = round(retrain.removed * total)
    subsets = _subset_counts(config)
    left_out = sum(number * (total - round(share * total)) for share, number in subsets.items())
    counts = [("on subsets", seeds * sum(subsets.values()), seeds * left_out)]
    if "adam" in methods and config.collect.preconditioner != "adam":
        counts.append(("for Adam's second moment", 1, 0))
    if removed:
        num_methods = len([method for method in methods if method != "random"])
        sets = retrain.random_removals + 2 * num_methods * len(languages)
        counts.append(("of removals", seeds * sets, seeds * sets * removed))
    if retrain.leave_one_out:
        num_languages = len(set(train["language"].to_pylist()))
        counts.append(("without a language", seeds * num_languages, seeds * total))
    if removed or retrain.leave_one_out:
        counts.append(("on all examples", seeds, 0))
    if retrain.batches == "same":  # what is left out is computed, and multiplied by 0
        counts = [(purpose, number, 0) for purpose, number, _ in counts]
    return counts


def estimate(forecast: Forecast) -> Estimate:
    """Count the trainings, and the passes for features with another preconditioner."""
    config, rates = forecast.config, forecast.rates
    num_train, num_test = forecast.count("train"), forecast.count("test")
    counts = count_trainings(config, forecast.tables["train"])
    draw_subsets_of(config, forecast.tables["train"])
    if not forecast.run.is_done("retrain"):
        _check_memory(config, num_train, num_test)
    trainings = sum(number for _, number, _ in counts)
    trained = trainings * num_train - sum(left_out for _, _, left_out in counts)
    steps = config.finetune.epochs * trained / config.finetune.batch_size
    seconds = steps * rates.step + trainings * num_test * rates.forward
    parts = ", ".join(f"{number} {purpose}" for purpose, number, _ in counts)
    work, num_bytes = f"at most {trainings} trainings: {parts}", forecast.checkpoint_bytes
    passes = preconditioned_passes(config, forecast.checkpoints_of("full"))
    seconds += sum(n * (num_train + num_test) * rates.features[kind] for kind, n in passes)
    # The method with EK-FAC at all checkpoints fits the preconditioner of `ekfac-last` too.
    fitted = max((n for kind, n in passes if kind == "ekfac"), default=0)
    if fitted and forecast.preconditioner != "ekfac":
        fits = forecast.ekfac_fits(fitted)
        work, num_bytes = f"{work}; {fits.work}", num_bytes + fits.num_bytes
        seconds += fits.seconds or 0.0
    return Estimate(work, seconds, num_bytes)
