"""The stage `finetune`: fine-tune on all languages together, into models/full/."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tracmod.config import FinetuneConfig
from tracmod.study.context import RunContext
from tracmod.study.forecast import Estimate, Forecast
from tracmod.study.run_training import check_trained, initial_model, training_settings
from tracmod.subnetworks.head_mask import HeadMask
from tracmod.training.fine_tune import Masks, accuracy_by_language, fine_tune

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def run(context: RunContext) -> None:
    """Fine-tune on all languages."""
    fine_tune_model(context, "full", context.config.finetune, None)


def estimate(forecast: Forecast) -> Estimate:
    """Count the steps."""
    return estimate_training(forecast, forecast.config.finetune, by_language=False)


def fine_tune_model(
    context: RunContext, name: str, config: FinetuneConfig, masks: dict[str, HeadMask] | None
) -> None:
    """Fine-tune one of the run's two models, with its accuracy by language after every epoch.

    Args:
        context: The run.
        name: `full` or `sparse`.
        config: The settings of the training.
        masks: The subnetwork through which each language is trained; None to train all heads.
    """
    model, tokenizer = initial_model(context)
    check_trained(context, model)
    train, test = context.table("train"), context.table("test")
    test_examples = context.encode(tokenizer, test, model)
    test_languages = test.column("language").to_pylist()
    dev = {
        language: context.encode(tokenizer, context.table_of("dev", language), model)
        for language in masks or {}
    }

    def evaluate(model: PreTrainedModel, masks: Masks | None) -> dict[str, float]:
        return accuracy_by_language(model, test_examples, test_languages, masks)

    fine_tune(
        model,
        tokenizer,
        context.encode(tokenizer, train, model),
        train.column("language").to_pylist(),
        context.run.model(name),
        training_settings(config, context.config.seed),
        masks=masks,
        dev=dev,
        evaluate=evaluate,
        device=context.device,
        save_seconds=config.save_seconds,
        ids=train.column("id").to_pylist(),
        description=f"fine-tune {name}",
        second_moment=context.config.collect.preconditioner == "adam",
    )


def estimate_training(forecast: Forecast, config: FinetuneConfig, *, by_language: bool) -> Estimate:
    """Count the steps of a fine-tuning, whose batches are each in one language or mixed."""
    languages = forecast.config.task.trained_languages
    counts = [forecast.count("train", language) for language in languages]
    if config.sampling == "uniform":
        counts = [math.ceil(forecast.count("train") / len(languages))] * len(languages)
    if not by_language:
        counts = [sum(counts)]
    steps = config.epochs * sum(math.ceil(count / config.batch_size) for count in counts)
    seconds = steps * forecast.rates.step
    seconds += config.epochs * forecast.count("test") * forecast.rates.forward
    work = f"{steps} steps of {config.batch_size}, {config.epochs} checkpoints"
    checkpoint_bytes = forecast.checkpoint_bytes
    if forecast.preconditioner == "adam":
        work += " with Adam's second moment"
        checkpoint_bytes += forecast.second_moment_bytes
    return Estimate(work, seconds, config.epochs * checkpoint_bytes)
