"""Training in a run: the initial model, and models fine-tuned from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pyarrow as pa

from tracmod.config import FinetuneConfig
from tracmod.gradients.capture import select_layers
from tracmod.models.adapters import add_lora, is_adapter_folder
from tracmod.models.loading import (
    create_from_config,
    create_model,
    has_tokenizer,
    has_weights,
    load_model,
    load_tokenizer,
)
from tracmod.models.tokenizer import read_sentencepiece, train_tokenizer
from tracmod.study.context import RunContext
from tracmod.training.batch_mean import WeightedMean
from tracmod.training.fine_tune import TrainingSettings, check_adapters, fine_tune, trainable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def initial_model(context: RunContext) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model and tokenizer that every fine-tuning of the run begins with.

    The weights are the same each time: those of the pretrained model with a classifier (and a LoRA
    adapter, if there is one) drawn from the run's seed, or all drawn from it, if the model is a
    folder without weights or is not named.
    A tokenizer of the run's own is trained on all its training texts.
    """
    shape, labels = context.config.model, context.class_names
    unit, seed = context.unit, context.config.seed
    folder = None if shape.name is None else Path(shape.name)
    is_shape_only = (
        folder is not None and (folder / "config.json").is_file() and not has_weights(folder)
    )
    if folder is not None and is_adapter_folder(folder):
        raise ValueError(
            f"model.name: expected a whole model, got the adapter {folder}; merge it into its base "
            f"(PEFT's merge_and_unload) and train a new one (model.lora)"
        )
    tokenizer: PreTrainedTokenizerBase
    if shape.name is not None and not is_shape_only:
        model, tokenizer = load_model(
            shape.name, labels, unit=unit, pooling=shape.pooling, seed=seed
        )
        if shape.lora is not None:
            # A folder's checkpoints name it, and are read from anywhere.
            base = str(folder.resolve()) if folder is not None and folder.is_dir() else shape.name
            model = add_lora(model, base, **shape.lora.model_dump(), seed=seed)
        return model, tokenizer
    if shape.lora is not None:
        raise ValueError(f"model.lora: expected a pretrained model, {folder} has no weights")
    if folder is not None and has_tokenizer(folder):
        tokenizer = load_tokenizer(str(folder))
    elif shape.sentencepiece is not None:
        tokenizer = read_sentencepiece(shape.sentencepiece, shape.max_length)
    else:
        train = context.table("train")
        texts = train.column("text_a").to_pylist() + train.column("text_b").to_pylist()
        texts = [text for text in texts if text is not None]
        tokenizer = train_tokenizer(texts, shape.vocabulary, shape.max_length)
    if folder is not None:
        model = create_from_config(
            folder, tokenizer, labels, unit=unit, pooling=shape.pooling, seed=seed
        )
        return model, tokenizer
    model = create_model(
        tokenizer,
        labels,
        unit=unit,
        layers=shape.layers,
        hidden=shape.hidden,
        heads=shape.heads,
        intermediate=shape.intermediate,
        dropout=shape.dropout,
        max_length=shape.max_length,
        pooling=shape.pooling,
        seed=seed,
    )
    return model, tokenizer


def training_settings(config: FinetuneConfig, seed: int) -> TrainingSettings:
    """Return the settings of `fine_tune` for a section of the config."""
    return TrainingSettings(seed=seed, **config.model_dump(exclude={"save_seconds", "masks"}))


def check_trained(context: RunContext, model: PreTrainedModel) -> None:
    """Refuse settings of either fine-tuning that do not fit the model, before both.

    Raises:
        ValueError: the model lacks the layers to train, or nothing that is trained is selected for
            influence.
    """
    config = context.config
    for section, settings in (("finetune", config.finetune), ("sparse_finetune", config.sparse)):
        try:
            training = training_settings(settings, config.seed)
            check_adapters(model, training)
            with trainable(model, training):
                select_layers(model, config.collect.parameters)
        except ValueError as error:
            raise ValueError(f"{section}: {error}") from None


def fine_tune_on(
    context: RunContext,
    train: pa.Table,
    seed: int,
    folder: Path,
    description: str,
    keep: Literal["all", "last"] = "last",
    second_moment: bool = False,
    batch_mean: WeightedMean | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Fine-tune as for the run's `full` model, on other examples or with another seed.

    The initial weights and the tokenizer are those of the run. The number of epochs is the same, so
    fewer examples mean fewer steps.

    Args:
        context: The run.
        train: The training examples.
        seed: The seed of the order of examples and of dropout.
        folder: Where checkpoints are kept; a training that was interrupted continues from there.
        description: The label of the progress bar.
        keep: Which checkpoints are kept.
        second_moment: Whether checkpoints include Adam's second moment.
        batch_mean: The mean loss of a batch whose examples have weights; None for equal weights.

    Returns:
        The model of the last checkpoint, on the device, and the tokenizer.
    """
    model, tokenizer = initial_model(context)
    config = context.config.finetune
    checkpoints = fine_tune(
        model,
        tokenizer,
        context.encode(tokenizer, train, model),
        train.column("language").to_pylist(),
        folder,
        replace(training_settings(config, seed), keep=keep),
        device=context.device,
        save_seconds=config.save_seconds,
        ids=train.column("id").to_pylist(),
        description=description,
        second_moment=second_moment,
        batch_mean=batch_mean,
    )
    return context.load(checkpoints[-1])
