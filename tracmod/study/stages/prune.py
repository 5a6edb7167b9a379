"""The stage `prune`: one subnetwork of attention heads per language, into subnetworks/.

1. For every seed but the run's own (and for every language, if models are monolingual) fine-tune a
   model to prune, from the run's initial weights.
2. Prune each of them for each language, along one course that yields the masks of all thresholds:
   subnetworks/seeds/<seed>/<language>.json.
3. Combine the masks of the seeds: subnetworks/<language>.json, and thresholds/ beside it.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from tracmod.files import progress
from tracmod.study.context import RunContext
from tracmod.study.forecast import Estimate, Forecast
from tracmod.study.run_training import fine_tune_on
from tracmod.study.worker import Advance, run_tasks
from tracmod.subnetworks.head_mask import HeadMask
from tracmod.subnetworks.importance import masked_accuracy
from tracmod.subnetworks.pruning import PruneResult, combine_masks, prune

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def run(context: RunContext) -> None:
    """Prune every seed and language, then combine the seeds."""
    missing = [
        PruneLanguage(seed, language)
        for seed in prune_seeds(context)
        for language in context.languages
        if not _holds_mask(context.run.subnetwork(language, seed))
    ]
    models = dict.fromkeys((task.seed, _model_language(context, task.language)) for task in missing)
    to_train = [FineTuneToPrune(*model) for model in models if model != (context.config.seed, None)]
    with progress.bar("prune", len(to_train) + len(missing), "subnetwork") as bar:
        # Never twice at a time: a training keeps the state it resumes from in its folder.
        run_tasks(context, to_train, bar.update, twice=False)
        run_tasks(context, missing, bar.update, twice=False)
    for language in context.languages:
        files = [
            context.run.subnetwork(language, None, threshold)
            for threshold in (None, *context.config.prune.other_thresholds)
        ]
        if not all(map(_holds_mask, files)):
            _combine_seeds(context, language)
    context.forget("model to prune")


@dataclass(frozen=True)
class FineTuneToPrune:
    """A task: the model that subnetworks of a seed are pruned from.

    Attributes:
        seed: The seed of the training.
        language: The only language that it is trained on; None for all.
    """

    seed: int
    language: str | None

    def run(self, context: RunContext, advance: Advance) -> None:
        """Fine-tune; the last checkpoint stays in subnetworks/models/."""
        _fine_tune_to_prune(context, self.seed, self.language)
        advance(1)


@dataclass(frozen=True)
class PruneLanguage:
    """A task: the subnetwork of one language and seed."""

    seed: int
    language: str

    def run(self, context: RunContext, advance: Advance) -> None:
        """Prune, and write subnetworks/seeds/<seed>/<language>.json."""
        config = context.config.prune
        result = prune(
            *_model_and_dev(context, self.seed, self.language),
            threshold=config.threshold,
            step=config.step,
            lowest=min([config.threshold, *config.other_thresholds]),
            description=f"prune {self.language}, seed {self.seed}",
        )
        if not result.pruned:
            tqdm.write(
                f"tracmod: prune {self.language}, seed {self.seed}: the first step already falls "
                f"below {config.threshold:.0%} of the full score, so every head is kept; a smaller "
                f"prune.step prunes fewer heads at a time",
                file=sys.stderr,
            )
        file = context.run.subnetwork(self.language, self.seed)
        result.save(file, self.language, [self.seed])
        advance(1)


def prune_seeds(context: RunContext) -> list[int]:
    """Return the seeds of the models that are pruned; the first is the run's own."""
    return [context.config.seed + number for number in range(context.config.prune.seeds)]


def _model_language(context: RunContext, language: str) -> str | None:
    """Return the only language of the model that a language is pruned from; None for all."""
    return language if context.config.prune.model == "monolingual" else None


def _model_and_dev(
    context: RunContext, seed: int, language: str
) -> tuple[PreTrainedModel, list[dict[str, Any]]]:
    """Return the model that a language's subnetwork is pruned from, and its dev examples.

    That is the run's own model where it has this seed and these languages, otherwise one that is
    fine-tuned from the same initial weights.
    """
    own_language = _model_language(context, language)

    def load() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        if own_language is None and seed == context.config.seed:
            return context.load(context.checkpoints("full")[-1])
        return _fine_tune_to_prune(context, seed, own_language)

    model, tokenizer = context.latest("model to prune", (seed, own_language), load)
    return model, context.encode(tokenizer, context.table_of("dev", language), model)


def _fine_tune_to_prune(
    context: RunContext, seed: int, language: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    train = context.table("train") if language is None else context.table_of("train", language)
    folder = context.run.pruned_model(seed, language)
    return fine_tune_on(context, train, seed, folder, f"fine-tune {language or 'all'}, seed {seed}")


def _combine_seeds(context: RunContext, language: str) -> None:
    """Write a language's subnetwork at every threshold, of one seed or of several combined."""
    config, seeds = context.config.prune, prune_seeds(context)
    courses = [PruneResult.load(context.run.subnetwork(language, seed)) for seed in seeds]
    for threshold in (config.threshold, *config.other_thresholds):
        results = [course.at(threshold) for course in courses]
        combined = results[0]
        if len(seeds) > 1 and config.combine != "first":
            mask = combine_masks([result.mask for result in results], config.combine)
            model, dev = _model_and_dev(context, seeds[0], language)
            combined = replace(combined, mask=mask, score=masked_accuracy(model, dev, mask))
        named = None if threshold == config.threshold else threshold
        file = context.run.subnetwork(language, None, named)
        combined.save(file, language, seeds, model=config.model, combine=config.combine)


def _holds_mask(path: Path) -> bool:
    """Return False for a file that is missing or broken."""
    try:
        HeadMask.load(path)
    except ValueError:
        return False
    return True


def estimate(forecast: Forecast) -> Estimate:
    """Count the pruning courses at their longest, and the models that are trained for them."""
    config, finetune = forecast.config.prune, forecast.config.finetune
    heads, languages = forecast.all_heads.size, forecast.config.task.languages
    rounds = math.ceil((heads - 1) / max(1, round(config.step * heads)))
    rates = forecast.rates
    per_example = rounds * (rates.importance + rates.forward) + rates.forward
    seconds = config.seeds * forecast.count("dev") * per_example
    monolingual = config.model == "monolingual"
    models = config.seeds * len(languages) if monolingual else config.seeds - 1
    trained = forecast.count("train") * (config.seeds if monolingual else config.seeds - 1)
    seconds += finetune.epochs * trained / finetune.batch_size * rates.step
    work = f"{config.seeds * len(languages)} courses of at most {rounds} rounds"
    if models:
        work += f", {models} more models fine-tuned"
    return Estimate(work, seconds, models * forecast.checkpoint_bytes)
