"""Full and sparse fine-tuning: a checkpoint per epoch, resumable at any moment, bitwise the same.

Everything random is a function of the seed and of where the training is: an epoch's examples and
their order of (seed, epoch), dropout of (seed, step). So model, optimizer and step are the whole
state, and with dynamic masks those of the epoch.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tracmod.choices import Sampling, SharedParameters
from tracmod.models.checkpoints import Checkpoint
from tracmod.models.digests import model_digest
from tracmod.models.inputs import collate, pad_token_id, per_example_loss
from tracmod.subnetworks.head_mask import HeadMask, head_slices, matching_layers
from tracmod.subnetworks.importance import head_importance, mask_least_important, masked_accuracy
from tracmod.training.folder import TrainingFolder
from tracmod.training.optimizer import HeadwiseAdamW

Masks = Mapping[str, HeadMask]  # by language
Evaluate = Callable[[PreTrainedModel, Masks | None], Mapping[str, float]]


@dataclass(frozen=True)
class TrainingSettings:
    """What a training depends on, beside model, examples and masks.

    Attributes:
        epochs: passes over the examples; a checkpoint after each.
        batch_size: examples per step; the last batches of an epoch may be smaller.
        learning_rate: the highest, reached after the warm-up.
        weight_decay: AdamW's, not on biases and LayerNorm.
        warmup: share of all steps (rounded down) over which the learning rate rises from 0.
        max_grad_norm: the gradient of what is trained is scaled down to this L2 norm.
        seed: of sampling, order and dropout.
        sampling: what an epoch's N examples of the G languages trained on are. `proportional`:
            every example once. `uniform`: ceil(N / G) of every language, hence equally many
            batches where a batch is of one language; a smaller language goes round again in a new
            order, of a larger one every epoch takes others. Either way the steps per epoch are the
            same but for less than G.
        shared: only with masks: what is trained of the parameters that belong to no head (see
            `head_slices`; the bias of the attention output projection is among them). `trained`:
            all of it, by every language's batches. `classifier`: what is outside the base model, so
            of BERT's pooler nothing. `frozen`: nothing. What is not trained stays bitwise as it is:
            no gradient (nor part in its norm), no decay, no optimizer state. A classifier that is
            new is then a random one.
        reestimate_every: only with masks, in epochs: dynamic masks, see `fine_tune`; None: static.
        keep: `all`: a checkpoint of every epoch; `last`: only the last one's.
    """

    epochs: int = 3
    batch_size: int = 32
    learning_rate: float = 2e-5
    weight_decay: float = 0.01
    warmup: float = 0.1
    max_grad_norm: float = 1.0
    seed: int = 0
    sampling: Sampling = "proportional"
    shared: SharedParameters = "trained"
    reestimate_every: int | None = None
    keep: Literal["all", "last"] = "all"

    @property
    def kept_epochs(self) -> range:
        """The epochs whose checkpoints are kept."""
        return range(1 if self.keep == "all" else self.epochs, self.epochs + 1)


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Mapping[str, Any]],
    languages: Sequence[str],
    out_dir: str | Path,
    settings: TrainingSettings,
    *,
    masks: Masks | None = None,
    dev: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    evaluate: Evaluate | None = None,
    device: torch.device | str | None = None,
    save_seconds: float = 300.0,
    ids: Sequence[str] | None = None,
    description: str = "fine-tune",
    second_moment: bool = False,
) -> list[Checkpoint]:
    """Fine-tune a classifier, all languages together, or each through its own head mask.

    Full (no masks): shuffled batches over all languages. Sparse (masks): every batch is of one
    language; forward and backward pass go through that language's mask, and what belongs to its
    masked heads stays bitwise as it is, optimizer state included (see `HeadwiseAdamW`).

    Dynamic masks (`settings.reestimate_every` = r): epoch 1 has `masks`; at the start of epochs
    1 + r, 1 + 2r, ... every language gets a new mask of the same size, the heads most important on
    its `dev` examples: by `head_importance` at the full mask of the model as it is then, ties as in
    pruning. `epoch_masks` gives the masks of an epoch.

    Written to `out_dir`: `checkpoint-<epoch>/` (transformers format, tokenizer, `tracmod.json`),
    `metrics.json` (a row per epoch), `training.json` (what was trained on what), with dynamic masks
    `masks/epoch-<epoch>/<language>.json`, and while it runs `resume/`. Called again after an
    interruption it goes on where it was, with the same result bit for bit (CPU, same number of
    threads); called again when complete it does nothing.

    The learning rate in `tracmod.json` is the mean over the steps since the checkpoint before: in
    TracIn over checkpoints eta stands for all of them, and the rate at the very end of a linear
    decay is 0.

    Args:
        model: the model to start from; changed in place. Load the checkpoints to use them.
        tokenizer: saved with every checkpoint.
        examples: as `encode` returns them.
        languages: of each example.
        out_dir: folder of this training.
        settings: epochs, batch size, learning rate, ...
        masks: a mask for every language; None: full fine-tuning.
        dev: only for dynamic masks: examples by language, of every language of `masks`.
        evaluate: called with the model and the epoch's masks after every epoch; returns accuracy
            by language.
        device: where to train; None: where the model is.
        save_seconds: how often the state is written within an epoch, in seconds.
        ids: of each example, to name those of a failing batch; None: their positions.
        description: of the progress bar.
        second_moment: whether every checkpoint is to hold AdamW's second moment, which
            `adam_preconditioner` reads.

    Returns:
        The checkpoints kept, first epoch first.

    Raises:
        ValueError: inputs that do not fit each other, or `out_dir` holds another training.
        RuntimeError: loss or gradient is not finite; names the step and the batch's examples.
    """
    _check_inputs(model, examples, languages, settings, masks, dev)
    folder = TrainingFolder(out_dir)
    identity = _identity(model, examples, languages, settings, masks, dev)
    folder.claim(identity, defaults=asdict(TrainingSettings()))
    if not folder.is_complete(settings.epochs, settings.kept_epochs):
        module: torch.nn.Module = model
        module.to(model.device if device is None else device)
        on_gpu = [model.device] if model.device.type == "cuda" else []
        with _trainable(model, settings.shared), torch.random.fork_rng(devices=on_gpu):
            training = _Training(
                model,
                tokenizer,
                examples,
                languages,
                [str(row) for row in range(len(examples))] if ids is None else ids,
                settings,
                masks,
                dev,
                folder,
                _Plan(languages, settings, by_language=masks is not None),
                HeadwiseAdamW(
                    model, weight_decay=settings.weight_decay, split_heads=masks is not None
                ),
                second_moment,
            )
            training.run(evaluate, save_seconds, description)
    folder.clear_state()
    return folder.checkpoints(settings.kept_epochs)


def accuracy_by_language(
    model: PreTrainedModel,
    examples: Sequence[Mapping[str, Any]],
    languages: Sequence[str],
    masks: Masks | None = None,
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


def scheduled_rate(step: int, total: int, settings: TrainingSettings) -> float:
    """Learning rate of a step (from 0): linear from 0 over the warm-up, then linear towards 0.

    The same as transformers' `get_linear_schedule_with_warmup`, whose first step of a warm-up has
    rate 0.
    """
    warmup = int(settings.warmup * total)
    if step < warmup:
        return settings.learning_rate * step / warmup
    return settings.learning_rate * (total - step) / (total - warmup)


# --- the batches ----------------------------------------------------------------------------


class _Plan:
    """Which examples each step of each epoch takes; a function of (seed, epoch) alone."""

    def __init__(
        self, languages: Sequence[str], settings: TrainingSettings, *, by_language: bool
    ) -> None:
        uniform = settings.sampling == "uniform"
        pools: dict[str, list[int]] = {}
        for row, language in enumerate(languages):
            pools.setdefault(language if by_language or uniform else "", []).append(row)
        self._pools = list(pools.values())
        share = math.ceil(len(languages) / len(pools))
        self._counts = [share if uniform else len(rows) for rows in self._pools]
        self._by_language = by_language
        self._size = settings.batch_size
        self._seed = settings.seed
        queues = self._counts if by_language else [sum(self._counts)]
        self.steps_per_epoch = sum(math.ceil(count / self._size) for count in queues)
        self.total_steps = self.steps_per_epoch * settings.epochs

    def epoch(self, epoch: int) -> list[list[int]]:
        """Batches of positions."""
        generator = torch.Generator().manual_seed(_derived_seed(self._seed, "order", epoch))
        drawn = [
            _draw(rows, count, generator)
            for rows, count in zip(self._pools, self._counts, strict=True)
        ]
        if self._by_language:
            batches = [batch for rows in drawn for batch in self._split(rows)]
            return _shuffled(batches, generator) if len(drawn) > 1 else batches
        rows = [row for own in drawn for row in own]
        return self._split(_shuffled(rows, generator) if len(drawn) > 1 else rows)

    def _split(self, rows: list[int]) -> list[list[int]]:
        return [rows[start : start + self._size] for start in range(0, len(rows), self._size)]


def _draw(rows: list[int], count: int, generator: torch.Generator) -> list[int]:
    """`count` of the rows in random order: all of them before any of them comes again."""
    drawn: list[int] = []
    while len(drawn) < count:
        drawn += _shuffled(rows, generator)
    return drawn[:count]


def _shuffled(items: list[Any], generator: torch.Generator) -> list[Any]:
    return [items[place] for place in torch.randperm(len(items), generator=generator).tolist()]


def _derived_seed(seed: int, what: str, number: int) -> int:
    content = f"{seed} {what} {number}".encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") >> 1


# --- what is trained, and through which heads -----------------------------------------------


@contextmanager
def _trainable(model: PreTrainedModel, shared: str) -> Iterator[None]:
    """Freeze what `TrainingSettings.shared` does not train; thaw it afterwards."""
    heads = {part.name for part in head_slices(model)}  # together they are all of each parameter
    base = set(model.base_model.parameters())
    left_out = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name not in heads
        if shared == "frozen" or (shared == "classifier" and parameter in base)
    ]
    for parameter in left_out:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in left_out:
            parameter.requires_grad_(True)


def _most_important(
    model: PreTrainedModel, examples: Sequence[Mapping[str, Any]], size: int
) -> HeadMask:
    """The `size` heads most important on the examples, at the full mask of the model as it is."""
    importance_LH = head_importance(model, examples)
    full = HeadMask.full(*importance_LH.shape)
    return mask_least_important(full, importance_LH, full.size - size)


# --- the loop -------------------------------------------------------------------------------


@dataclass
class _Training:
    """One training: runs the steps; writes checkpoints, metrics and the state to resume from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    examples: Sequence[Mapping[str, Any]]
    languages: Sequence[str]
    ids: Sequence[str]
    settings: TrainingSettings
    masks: Masks | None
    dev: Mapping[str, Sequence[Mapping[str, Any]]] | None
    folder: TrainingFolder
    plan: _Plan
    optimizer: HeadwiseAdamW
    second_moment: bool

    def run(self, evaluate: Evaluate | None, save_seconds: float, description: str) -> None:
        """Go on from the state on disk, or from the start, to the end."""
        plan = self.plan
        step, loss_sum = self.folder.load_state(self.model, self.optimizer)
        saved = time.monotonic()
        with tqdm(
            total=plan.total_steps, initial=step, desc=description, unit="step", disable=None
        ) as bar:
            for epoch in range(step // plan.steps_per_epoch + 1, self.settings.epochs + 1):
                done = step % plan.steps_per_epoch
                masks = self._epoch_masks(epoch, begun=done > 0)
                self.model.train()
                for batch in plan.epoch(epoch)[done:]:
                    loss_sum += self._step(step, batch, masks)
                    step += 1
                    bar.update()
                    within = step % plan.steps_per_epoch != 0  # the end of an epoch is below
                    if within and time.monotonic() - saved >= save_seconds:
                        self.folder.save_state(self.model, self.optimizer, step, loss_sum)
                        saved = time.monotonic()
                train_loss = loss_sum / plan.steps_per_epoch
                self._finish_epoch(epoch, step, train_loss, masks, evaluate)
                loss_sum = 0.0
                self.folder.save_state(self.model, self.optimizer, step, loss_sum)
                saved = time.monotonic()

    def _epoch_masks(self, epoch: int, *, begun: bool) -> Masks | None:
        """The epoch's masks; dynamic ones are on disk before the epoch's first step."""
        every = self.settings.reestimate_every
        if self.masks is None or every is None:
            return self.masks
        if begun:
            return self.folder.masks(epoch, self.masks)
        if epoch == 1:
            masks = self.masks
        elif (epoch - 1) % every:
            masks = self.folder.masks(epoch - 1, self.masks)
        else:
            assert self.dev is not None
            masks = {
                language: _most_important(self.model, self.dev[language], mask.size)
                for language, mask in self.masks.items()
            }
        self.folder.write_masks(epoch, masks)
        return masks

    def _step(self, step: int, batch: list[int], masks: Masks | None) -> float:
        """One optimizer step; returns the batch's mean loss."""
        torch.manual_seed(_derived_seed(self.settings.seed, "dropout", step))
        mask = None if masks is None else masks[self.languages[batch[0]]]
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
        self,
        epoch: int,
        step: int,
        train_loss: float,
        masks: Masks | None,
        evaluate: Evaluate | None,
    ) -> None:
        row: dict[str, Any] = {
            "epoch": epoch,
            "step": step,
            "learning_rate": self._mean_rate(step - self.plan.steps_per_epoch, step),
            "train_loss": train_loss,
        }
        self.model.eval()
        if evaluate is not None:
            row["accuracy"] = dict(evaluate(self.model, masks))
        self.folder.write_metrics(row)
        if epoch in self.settings.kept_epochs:
            before = 0 if self.settings.keep == "last" else step - self.plan.steps_per_epoch
            rate = self._mean_rate(before, step)
            moment = self.optimizer.second_moment() if self.second_moment else None
            self.folder.write_checkpoint(self.model, self.tokenizer, epoch, step, rate, moment)

    def _mean_rate(self, first: int, end: int) -> float:
        """Mean learning rate of the steps from `first` to before `end`."""
        steps = range(first, end)
        rates = [scheduled_rate(step, self.plan.total_steps, self.settings) for step in steps]
        return sum(rates) / len(rates)


# --- checks and identity --------------------------------------------------------------------


def _check_inputs(
    model: PreTrainedModel,
    examples: Sequence[Mapping[str, Any]],
    languages: Sequence[str],
    settings: TrainingSettings,
    masks: Masks | None,
    dev: Mapping[str, Sequence[Mapping[str, Any]]] | None,
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
        _check_masks(model, set(languages), settings, masks, dev or {})
    elif settings.shared != "trained" or settings.reestimate_every is not None:
        raise ValueError(
            "fine-tuning without masks: expected shared `trained` and reestimate_every None, got "
            f"`{settings.shared}` and {settings.reestimate_every}"
        )


def _check_masks(
    model: PreTrainedModel,
    languages: set[str],
    settings: TrainingSettings,
    masks: Masks,
    dev: Mapping[str, Sequence[Mapping[str, Any]]],
) -> None:
    missing = sorted(languages - masks.keys())
    if missing:
        raise ValueError(f"sparse fine-tuning: no head mask for {', '.join(missing)}")
    for mask in masks.values():
        matching_layers(model, mask)
    if settings.reestimate_every is None:
        return
    if not 1 <= settings.reestimate_every < settings.epochs:
        raise ValueError(
            "sparse fine-tuning: expected reestimate_every of at least 1 and fewer than epochs, "
            f"got {settings.reestimate_every} and {settings.epochs}"
        )
    without = sorted(language for language in masks if not dev.get(language))
    if without:
        raise ValueError(
            "sparse fine-tuning: dynamic masks are estimated on dev examples, got none of "
            f"{', '.join(without)}"
        )


def _identity(
    model: PreTrainedModel,
    examples: Sequence[Mapping[str, Any]],
    languages: Sequence[str],
    settings: TrainingSettings,
    masks: Masks | None,
    dev: Mapping[str, Sequence[Mapping[str, Any]]] | None,
) -> dict[str, Any]:
    identity = {
        **asdict(settings),
        "model": model_digest(model),
        "examples": _examples_digest(examples, languages),
        "masks": None if masks is None else {key: masks[key].digest() for key in sorted(masks)},
    }
    if settings.reestimate_every is not None and dev is not None:
        identity["dev"] = {key: _examples_digest(dev[key], [key] * len(dev[key])) for key in dev}
    return identity


def _examples_digest(examples: Sequence[Mapping[str, Any]], languages: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for example, language in zip(examples, languages, strict=True):
        content = {name: list(v) if name != "labels" else v for name, v in example.items()}
        digest.update(json.dumps([language, content], sort_keys=True).encode())
    return digest.hexdigest()
