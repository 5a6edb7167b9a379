"""Full and sparse fine-tuning: a checkpoint per epoch, resumable at any moment, bitwise the same.

Everything random is a function of the seed and of where the training is: the order of the batches
of (seed, epoch), dropout of (seed, step). So model, optimizer and step are the whole state.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tracmod.heads import HeadMask, masked_accuracy, matching_layers
from tracmod.model import Checkpoint, collate, model_digest, pad_token_id, per_example_loss
from tracmod.optimizer import HeadwiseAdamW
from tracmod.training_folder import TrainingFolder

Evaluate = Callable[[PreTrainedModel], Mapping[str, float]]


@dataclass(frozen=True)
class Settings:
    """What a training depends on, beside model, examples and masks.

    Attributes:
        epochs: passes over the examples; a checkpoint after each.
        batch_size: examples per step; the last batches of an epoch may be smaller.
        learning_rate: the highest, reached after the warm-up.
        weight_decay: AdamW's, not on biases and LayerNorm.
        warmup: share of all steps (rounded down) over which the learning rate rises from 0.
        max_grad_norm: the gradient is scaled down to this L2 norm.
        seed: of order and dropout.
    """

    epochs: int = 3
    batch_size: int = 32
    learning_rate: float = 2e-5
    weight_decay: float = 0.01
    warmup: float = 0.1
    max_grad_norm: float = 1.0
    seed: int = 0


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Mapping[str, Any]],
    languages: Sequence[str],
    out_dir: str | Path,
    settings: Settings,
    *,
    masks: Mapping[str, HeadMask] | None = None,
    evaluate: Evaluate | None = None,
    device: torch.device | str | None = None,
    save_seconds: float = 300.0,
    ids: Sequence[str] | None = None,
    description: str = "fine-tune",
) -> list[Checkpoint]:
    """Fine-tune a classifier, all languages together, or each through its own head mask.

    Full (no masks): shuffled batches over all languages. Sparse (masks): every batch is of one
    language; forward and backward pass go through that language's mask, and what belongs to its
    masked heads stays bitwise as it is, optimizer state included (see `HeadwiseAdamW`).

    Written to `out_dir`: `checkpoint-<epoch>/` (transformers format, tokenizer, `tracmod.json`),
    `metrics.json` (a row per epoch), `training.json` (what was trained on what), and while it
    runs `resume/`. Called again after an interruption it goes on where it was, with the same
    result bit for bit (CPU, same number of threads); called again when complete it does nothing.

    The learning rate in `tracmod.json` is the mean over the epoch's steps: in TracIn over
    checkpoints eta stands for all the steps since the checkpoint before, and the rate at the very
    end of a linear decay is 0.

    Args:
        model: the model to start from; changed in place. Load the checkpoints to use them.
        tokenizer: saved with every checkpoint.
        examples: as `encode` returns them.
        languages: of each example.
        out_dir: folder of this training.
        settings: epochs, batch size, learning rate, ...
        masks: a mask for every language; None: full fine-tuning.
        evaluate: called with the model after every epoch; returns accuracy by language.
        device: where to train; None: where the model is.
        save_seconds: how often the state is written within an epoch, in seconds.
        ids: of each example, to name those of a failing batch; None: their positions.
        description: of the progress bar.

    Returns:
        One checkpoint per epoch.

    Raises:
        ValueError: inputs that do not fit each other, or `out_dir` holds another training.
        RuntimeError: loss or gradient is not finite; names the step and the batch's examples.
    """
    _check_inputs(model, examples, languages, settings, masks)
    folder = TrainingFolder(out_dir)
    folder.claim(_identity(model, examples, languages, settings, masks))
    if not folder.is_complete(settings.epochs):
        module: torch.nn.Module = model
        module.to(model.device if device is None else device)
        sparse = masks is not None
        training = _Training(
            model,
            tokenizer,
            examples,
            languages,
            [str(row) for row in range(len(examples))] if ids is None else ids,
            settings,
            masks,
            folder,
            _Plan(languages, settings, by_language=sparse),
            HeadwiseAdamW(model, weight_decay=settings.weight_decay, split_heads=sparse),
        )
        on_gpu = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=on_gpu):
            training.run(evaluate, save_seconds, description)
    folder.clear_state()
    return folder.checkpoints(settings.epochs)


def accuracy_by_language(
    model: PreTrainedModel,
    examples: Sequence[Mapping[str, Any]],
    languages: Sequence[str],
    masks: Mapping[str, HeadMask] | None = None,
    *,
    batch_tokens: int = 8192,
) -> dict[str, float]:
    """Accuracy on each language's examples, under the language's mask where masks are given."""
    scores = {}
    for language in dict.fromkeys(languages):
        own = [e for e, of in zip(examples, languages, strict=True) if of == language]
        mask = None if masks is None else masks[language]
        scores[language] = masked_accuracy(model, own, mask, batch_tokens)
    return scores


def scheduled_rate(step: int, total: int, settings: Settings) -> float:
    """Learning rate of a step (from 0): linear from 0 over the warm-up, then linear towards 0.

    The same as transformers' `get_linear_schedule_with_warmup`, whose first step of a warm-up has
    rate 0.
    """
    warmup = int(settings.warmup * total)
    if step < warmup:
        return settings.learning_rate * step / warmup
    return settings.learning_rate * (total - step) / (total - warmup)


# --- the order of the batches ---------------------------------------------------------------


class _Plan:
    """Which examples each step of each epoch takes; a function of (seed, epoch) alone."""

    def __init__(self, languages: Sequence[str], settings: Settings, *, by_language: bool) -> None:
        groups: dict[str, list[int]] = {}
        for row, language in enumerate(languages):
            groups.setdefault(language if by_language else "", []).append(row)
        self._groups = list(groups.values())
        self._size = settings.batch_size
        self._seed = settings.seed
        self.steps_per_epoch = sum(math.ceil(len(rows) / self._size) for rows in self._groups)
        self.total_steps = self.steps_per_epoch * settings.epochs

    def epoch(self, epoch: int) -> list[list[int]]:
        """Batches of positions; every example is in exactly one."""
        generator = torch.Generator().manual_seed(_derived_seed(self._seed, "order", epoch))
        batches = []
        for rows in self._groups:
            order = torch.randperm(len(rows), generator=generator).tolist()
            shuffled = [rows[place] for place in order]
            batches += [
                shuffled[start : start + self._size] for start in range(0, len(rows), self._size)
            ]
        # With one group the batches are in random order already, the short one last.
        if len(self._groups) > 1:
            order = torch.randperm(len(batches), generator=generator).tolist()
            batches = [batches[place] for place in order]
        return batches


def _derived_seed(seed: int, what: str, number: int) -> int:
    content = f"{seed} {what} {number}".encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") >> 1


# --- the loop -------------------------------------------------------------------------------


@dataclass
class _Training:
    """One training: runs the steps; writes checkpoints, metrics and the state to resume from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    examples: Sequence[Mapping[str, Any]]
    languages: Sequence[str]
    ids: Sequence[str]
    settings: Settings
    masks: Mapping[str, HeadMask] | None
    folder: TrainingFolder
    plan: _Plan
    optimizer: HeadwiseAdamW

    def run(self, evaluate: Evaluate | None, save_seconds: float, description: str) -> None:
        """Go on from the state on disk, or from the start, to the end."""
        plan = self.plan
        step, loss_sum = self.folder.load_state(self.model, self.optimizer)
        saved = time.monotonic()
        with tqdm(
            total=plan.total_steps, initial=step, desc=description, unit="step", disable=None
        ) as bar:
            for epoch in range(step // plan.steps_per_epoch + 1, self.settings.epochs + 1):
                self.model.train()
                for batch in plan.epoch(epoch)[step % plan.steps_per_epoch :]:
                    loss_sum += self._step(step, batch)
                    step += 1
                    bar.update()
                    within = step % plan.steps_per_epoch != 0  # the end of an epoch is below
                    if within and time.monotonic() - saved >= save_seconds:
                        self.folder.save_state(self.model, self.optimizer, step, loss_sum)
                        saved = time.monotonic()
                self._finish_epoch(epoch, step, loss_sum / plan.steps_per_epoch, evaluate)
                loss_sum = 0.0
                self.folder.save_state(self.model, self.optimizer, step, loss_sum)
                saved = time.monotonic()

    def _step(self, step: int, batch: list[int]) -> float:
        """One optimizer step; returns the batch's mean loss."""
        torch.manual_seed(_derived_seed(self.settings.seed, "dropout", step))
        mask = None if self.masks is None else self.masks[self.languages[batch[0]]]
        examples = [self.examples[row] for row in batch]
        inputs = collate(examples, pad_token_id(self.model), self.model.device)
        labels_B = inputs.pop("labels")
        with nullcontext() if mask is None else mask.apply(self.model):
            loss = per_example_loss(self.model(**inputs).logits, labels_B).mean()
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm)
        if not (loss.isfinite() and norm.isfinite()):
            names = ", ".join(str(self.ids[row]) for row in batch)
            raise RuntimeError(
                f"training stopped at step {step + 1}: loss {loss.item()}, gradient norm "
                f"{float(norm)}, in the batch of examples {names}"
            )
        self.optimizer.step(scheduled_rate(step, self.plan.total_steps, self.settings), mask)
        self.model.zero_grad(set_to_none=True)
        return loss.item()

    def _finish_epoch(
        self, epoch: int, step: int, train_loss: float, evaluate: Evaluate | None
    ) -> None:
        steps = range(step - self.plan.steps_per_epoch, step)
        rates = [scheduled_rate(s, self.plan.total_steps, self.settings) for s in steps]
        learning_rate = sum(rates) / len(rates)
        self.model.eval()
        row: dict[str, Any] = {
            "epoch": epoch,
            "step": step,
            "learning_rate": learning_rate,
            "train_loss": train_loss,
        }
        if evaluate is not None:
            row["accuracy"] = dict(evaluate(self.model))
        self.folder.write_metrics(row)
        self.folder.write_checkpoint(self.model, self.tokenizer, epoch, step, learning_rate)


# --- checks and identity --------------------------------------------------------------------


def _check_inputs(
    model: PreTrainedModel,
    examples: Sequence[Mapping[str, Any]],
    languages: Sequence[str],
    settings: Settings,
    masks: Mapping[str, HeadMask] | None,
) -> None:
    if not examples:
        raise ValueError("fine-tuning: expected training examples, got none")
    if len(languages) != len(examples):
        raise ValueError(
            f"fine-tuning: expected a language per example, got {len(languages)} languages for "
            f"{len(examples)} examples"
        )
    if settings.epochs < 1 or settings.batch_size < 1:
        raise ValueError(
            "fine-tuning: expected epochs and batch_size of at least 1, got "
            f"{settings.epochs} and {settings.batch_size}"
        )
    if masks is not None:
        missing = sorted(set(languages) - masks.keys())
        if missing:
            raise ValueError(f"sparse fine-tuning: no head mask for {', '.join(missing)}")
        for mask in masks.values():
            matching_layers(model, mask)


def _identity(
    model: PreTrainedModel,
    examples: Sequence[Mapping[str, Any]],
    languages: Sequence[str],
    settings: Settings,
    masks: Mapping[str, HeadMask] | None,
) -> dict[str, Any]:
    digest = hashlib.sha256()
    for example, language in zip(examples, languages, strict=True):
        content = {name: list(v) if name != "labels" else v for name, v in example.items()}
        digest.update(json.dumps([language, content], sort_keys=True).encode())
    return {
        **asdict(settings),
        "model": model_digest(model),
        "examples": digest.hexdigest(),
        "masks": None if masks is None else {key: masks[key].digest() for key in sorted(masks)},
    }
