"""Full and sparse fine-tuning: a checkpoint per epoch, resumable at any moment to the same bits.

A training that was stopped and started again leaves the same bytes as one that was not. Everything
random is therefore a function of the seed and of the position in the training, and not of a
generator that would have to be saved: the examples of an epoch and their order come from (seed,
epoch), dropout comes from (seed, step). What is left to save is the model, the optimizer, the step
and, for the metrics, the sum of the epoch's losses; with dynamic masks also the masks of the epoch.

The order of writing decides what a killed process finds. Dynamic masks are on disk before the
epoch's first step, because they depend on the model at that moment. At the end of an epoch come
metrics, checkpoint and state, in this order: a state after the last step of an epoch means that the
other two are there. A process killed before it repeats the steps since the earlier state, and
replaces metrics and checkpoint by the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tracmod.choices import ADAM_EPSILON, PassDtype, Sampling, SharedParameters
from tracmod.files import progress
from tracmod.models.adapters import AdaptedLinear
from tracmod.models.architecture import embeddings_module, parameters_below
from tracmod.models.checkpoints import Checkpoint
from tracmod.models.digests import model_digest
from tracmod.models.inputs import TOKEN_COLUMNS, collate, pad_token_id
from tracmod.models.loss import per_example_loss
from tracmod.models.plain_pass import model_logits
from tracmod.subnetworks.head_mask import HeadMask, head_slices, masked, matching_layers
from tracmod.subnetworks.importance import head_importance, mask_least_important, masked_accuracy
from tracmod.training.batch_mean import WeightedMean
from tracmod.training.folder import TrainingFolder
from tracmod.training.optimizer import HeadwiseAdamW

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Masks = Mapping[str, HeadMask]  # by language
# Returns the accuracy by language. The model's class is text: it is imported with the model.
Evaluate = Callable[["PreTrainedModel", Masks | None], Mapping[str, float]]


@dataclass(frozen=True)
class TrainingSettings:
    """Everything that a training depends on, apart from model, examples and masks.

    Attributes:
        epochs: passes over the examples, with a checkpoint after each.
        batch_size: examples per step; the last batches of an epoch may be smaller.
        learning_rate: the highest rate, reached after the warm-up.
        weight_decay: AdamW's weight decay, not applied to biases and LayerNorm.
        warmup: share of all steps (rounded down) in which the learning rate rises from 0.
        max_grad_norm: the gradient of all trained parameters is scaled down to this L2 norm.
        seed: seed of sampling, order and dropout.
        sampling: which examples an epoch has. `proportional`: every example once. `uniform`:
            ceil(N / G) of each of the G languages, and so equally many batches per language where a
            batch has one language. A smaller language is repeated, in a new order each time; of a
            larger one every epoch takes others. Both have the same number of steps per epoch, up to
            a difference of less than G.
        shared: only with masks: which of the parameters that belong to no head are trained (see
            `head_slices`; the bias of the attention output projection is one). `trained`: all of
            them, by every language's batches. `classifier`: those outside the base model, and so
            nothing of BERT's pooler. `frozen`: none. What is not trained stays bitwise as it was:
            it has no gradient (and no part in the gradient's norm), no decay and no optimizer
            state. With `frozen`, a new classifier stays random.
        reestimate_every: only with masks: epochs between two estimates of dynamic masks, see
            `fine_tune`; None for static masks.
        keep: `all` keeps the checkpoint of every epoch, `last` that of the last epoch.
        dtype: `bfloat16` runs the passes under autocast. Weights, gradients and optimizer state are
            float32 in either case.
        adam_epsilon: AdamW's epsilon. Below it, updates no longer depend on the size of a gradient
            alone but shrink with it. A larger one makes training smoother, see `differentiate`.
        dropout: whether the training has the model's dropout; if not, the model is in evaluation
            mode.
        train_embeddings: whether the embeddings are trained. If not, they stay bitwise as they
            were, with no optimizer state. AdamW updates every row of a table of embeddings in every
            step, whichever of them the batch has, so a large vocabulary costs much time on a CPU.
        train_layers: number of the highest layers that are trained, with what comes after them;
            the layers below, the embeddings and what all layers share (tables of relative
            positions) stay bitwise as they were. None: all layers.
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
    dtype: PassDtype = "float32"
    adam_epsilon: float = ADAM_EPSILON
    dropout: bool = True
    train_embeddings: bool = True
    train_layers: int | None = None

    @property
    def kept_epochs(self) -> range:
        """Epochs whose checkpoints are kept."""
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
    batch_mean: WeightedMean | None = None,
) -> list[Checkpoint]:
    """Fine-tune a classifier on all languages together, or on each through its own head mask.

    Full fine-tuning (no masks): shuffled batches over all languages. Sparse fine-tuning (masks):
    every batch has one language; forward and backward pass go through that language's mask, and
    what belongs to its masked heads stays bitwise as it was, optimizer state included (see
    `HeadwiseAdamW`).

    Dynamic masks (`settings.reestimate_every` = r): epoch 1 has `masks`. At the start of epochs
    1 + r, 1 + 2r, ... every language gets a new mask of the same size with the heads that are most
    important on its `dev` examples, by the `head_importance` of the model at that moment, at the
    full mask, with ties as in pruning. `epoch_masks` returns the masks of an epoch.

    `out_dir` gets `checkpoint-<epoch>/` (transformers format, tokenizer, `tracmod.json`),
    `metrics.json` (a row per epoch), `training.json` (what was trained on what), with dynamic masks
    `masks/epoch-<epoch>/<language>.json`, and `resume/` while the training runs. If `out_dir` holds
    an interrupted training, it is continued, with the same result bit for bit (on a CPU with the
    same number of threads); if it holds the complete training, nothing is done.

    The learning rate in `tracmod.json` is the mean over the steps since the previous checkpoint. In
    TracIn over checkpoints it stands for all of these steps; the rate at the moment of saving would
    not, and is 0 at the end of a linear decay.

    Args:
        model: model to start from; changed in place. Load the checkpoints to use them.
        tokenizer: saved with every checkpoint.
        examples: examples from `encode`.
        languages: language of each example.
        out_dir: folder of this training.
        settings: epochs, batch size, learning rate, ...
        masks: a mask for every language; None for full fine-tuning.
        dev: only for dynamic masks: examples by language, for every language of `masks`.
        evaluate: called with the model and the epoch's masks after every epoch; returns the
            accuracy by language for `metrics.json`.
        device: device to train on; None is where the model is.
        save_seconds: seconds between two states written within an epoch.
        ids: id of each example, to name those of a failing batch; None for their positions.
        description: label of the progress bar.
        second_moment: whether every checkpoint gets AdamW's second moment, which
            `adam_preconditioner` reads.
        batch_mean: the mean loss of a batch whose examples have weights; None for equal weights.

    Returns:
        The checkpoints kept, first epoch first.

    Raises:
        ValueError: the inputs do not fit each other, or `out_dir` holds another training.
        RuntimeError: a loss or gradient is not finite; the message has the step and the examples.
    """
    _check_inputs(model, examples, languages, settings, masks, dev)
    check_adapters(model, settings)
    plan = _BatchPlan(languages, settings, by_language=masks is not None)
    first_steps = range(min(2, plan.total_steps))
    if not any(scheduled_rate(step, plan.total_steps, settings) for step in first_steps):
        raise ValueError(
            f"fine-tuning: expected a learning rate above 0 at one step or more, got 0 at all "
            f"{plan.total_steps} (warmup {settings.warmup}, learning_rate {settings.learning_rate})"
        )
    folder = TrainingFolder(out_dir)
    identity = _identity(model, examples, languages, settings, masks, dev)
    if batch_mean is not None:
        identity |= batch_mean.identity()
    folder.claim(identity, defaults=asdict(TrainingSettings()))
    if not folder.is_complete(settings.epochs, settings.kept_epochs):
        module: torch.nn.Module = model
        module.to(model.device if device is None else device)
        on_gpu = [model.device] if model.device.type == "cuda" else []
        with trainable(model, settings), torch.random.fork_rng(devices=on_gpu):
            training = _Training(
                model=model,
                tokenizer=tokenizer,
                examples=examples,
                languages=languages,
                ids=[str(row) for row in range(len(examples))] if ids is None else ids,
                settings=settings,
                masks=masks,
                dev=dev,
                folder=folder,
                plan=plan,
                optimizer=HeadwiseAdamW(
                    model,
                    weight_decay=settings.weight_decay,
                    epsilon=settings.adam_epsilon,
                    split_heads=masks is not None,
                ),
                second_moment=second_moment,
                batch_mean=batch_mean,
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
    """Compute the accuracy on each language's examples, under the language's mask if given."""
    examples_of: dict[str, list[Mapping[str, Any]]] = {}
    for example, language in zip(examples, languages, strict=True):
        examples_of.setdefault(language, []).append(example)
    scores = {}
    for language, own in examples_of.items():
        mask = None if masks is None else masks[language]
        scores[language] = masked_accuracy(model, own, mask, batch_tokens)
    return scores


def scheduled_rate(step: int, total: int, settings: TrainingSettings) -> float:
    """Return the learning rate of a step: linear from 0 during the warm-up, then linear towards 0.

    The first step of a warm-up has rate 0, as in transformers' `get_linear_schedule_with_warmup`.
    That schedule is not used because it differs from this one in the last bit of a quarter of the
    rates (it multiplies by a quotient), and a resumed training has to continue with the same bits.

    Args:
        step: number of the step, from 0.
        total: number of steps of the training.
        settings: gives the highest rate and the share of the warm-up.
    """
    warmup = int(settings.warmup * total)
    if step < warmup:
        return settings.learning_rate * step / warmup
    return settings.learning_rate * (total - step) / (total - warmup)


class _BatchPlan:
    """Which examples each step of each epoch takes, as a function of (seed, epoch) alone.

    Examples are drawn from pools: one per language if batches or sampling go by language, otherwise
    one of all examples. `by_language` makes every batch one of a single pool.
    """

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
        batched_together = self._counts if by_language else [sum(self._counts)]
        self.steps_per_epoch = sum(math.ceil(count / self._size) for count in batched_together)
        self.total_steps = self.steps_per_epoch * settings.epochs

    def epoch(self, epoch: int) -> list[list[int]]:
        """Return the batches of an epoch, as positions of their examples."""
        generator = torch.Generator().manual_seed(_derived_seed(self._seed, "order", epoch))
        drawn = [
            _draw(rows, count, generator)
            for rows, count in zip(self._pools, self._counts, strict=True)
        ]
        # A single pool is in random order already.
        if self._by_language:
            batches = [batch for rows in drawn for batch in self._split(rows)]
            return _shuffled(batches, generator) if len(drawn) > 1 else batches
        rows = [row for pool in drawn for row in pool]
        return self._split(_shuffled(rows, generator) if len(drawn) > 1 else rows)

    def _split(self, rows: list[int]) -> list[list[int]]:
        return [rows[start : start + self._size] for start in range(0, len(rows), self._size)]


def _draw(rows: list[int], count: int, generator: torch.Generator) -> list[int]:
    """Draw `count` rows in random order, all of them before any is repeated."""
    drawn: list[int] = []
    while len(drawn) < count:
        drawn += _shuffled(rows, generator)
    return drawn[:count]


def _shuffled(items: list[Any], generator: torch.Generator) -> list[Any]:
    return [items[index] for index in torch.randperm(len(items), generator=generator).tolist()]


def _derived_seed(seed: int, purpose: str, number: int) -> int:
    """Derive an independent seed for each purpose and number, from 0 to 2^63 - 1."""
    content = f"{seed} {purpose} {number}".encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") >> 1


@contextmanager
def trainable(model: PreTrainedModel, settings: TrainingSettings) -> Iterator[None]:
    """Freeze within the context what the settings do not train."""
    frozen = untrained_parameters(model, settings)
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def untrained_parameters(
    model: PreTrainedModel, settings: TrainingSettings
) -> list[torch.nn.Parameter]:
    """Return the parameters that the settings do not train, of those that need a gradient.

    Raises:
        ValueError: the model does not have the layers of `train_layers`.
    """
    shared, upper = settings.shared, settings.train_layers
    fixed: set[torch.nn.Parameter] = set()
    if not settings.train_embeddings:
        fixed.update(embeddings_module(model).parameters())
    if upper is not None:
        fixed |= parameters_below(model, upper)
    of_heads = {part.name for part in head_slices(model)}  # heads divide these without remainder
    base = set(model.base_model.parameters())
    return [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        if parameter in fixed
        or (shared == "frozen" and name not in of_heads)
        or (shared == "classifier" and parameter in base and name not in of_heads)
    ]


def _most_important_heads(
    model: PreTrainedModel, examples: Sequence[Mapping[str, Any]], size: int
) -> HeadMask:
    """Return the mask of the `size` heads that are most important at the full mask."""
    importance_LH = head_importance(model, examples)
    full = HeadMask.full(*importance_LH.shape)
    return mask_least_important(full, importance_LH, full.size - size)


@dataclass
class _Training:
    """The loop of one training: its steps, and what is written into the folder between them."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    examples: Sequence[Mapping[str, Any]]
    languages: Sequence[str]
    ids: Sequence[str]
    settings: TrainingSettings
    masks: Masks | None
    dev: Mapping[str, Sequence[Mapping[str, Any]]] | None
    folder: TrainingFolder
    plan: _BatchPlan
    optimizer: HeadwiseAdamW
    second_moment: bool
    batch_mean: WeightedMean | None = None  # None: the mean of the losses

    def run(self, evaluate: Evaluate | None, save_seconds: float, description: str) -> None:
        """Train from the state on disk, or from the start, to the end."""
        plan = self.plan
        step, loss_sum = self.folder.load_state(self.model, self.optimizer)
        saved, accuracy = time.monotonic(), ""
        with progress.bar(description, plan.total_steps, "step", initial=step) as bar:
            for epoch in range(step // plan.steps_per_epoch + 1, self.settings.epochs + 1):
                done = step % plan.steps_per_epoch
                masks = self._epoch_masks(epoch, started=done > 0)
                self.model.train(self.settings.dropout)
                for batch in plan.epoch(epoch)[done:]:
                    loss = self._step(step, batch, masks)
                    loss_sum += loss
                    step += 1
                    bar.note = f"epoch {epoch} of {self.settings.epochs}, loss {loss:.3g}{accuracy}"
                    bar.update()
                    within = step % plan.steps_per_epoch != 0  # the end of an epoch is saved below
                    if within and time.monotonic() - saved >= save_seconds:
                        self.folder.save_state(self.model, self.optimizer, step, loss_sum)
                        saved = time.monotonic()
                mean_loss = loss_sum / plan.steps_per_epoch
                scores = self._finish_epoch(epoch, step, mean_loss, masks, evaluate)
                if scores:
                    mean = sum(scores.values()) / len(scores)
                    accuracy = f", accuracy {mean:.3f} after epoch {epoch}"
                loss_sum = 0.0
                self.folder.save_state(self.model, self.optimizer, step, loss_sum)
                saved = time.monotonic()

    def _epoch_masks(self, epoch: int, *, started: bool) -> Masks | None:
        """Return the epoch's masks, after writing dynamic masks to disk.

        An epoch that had started before an interruption reads its masks back: the model has moved
        since they were estimated.
        """
        every = self.settings.reestimate_every
        if self.masks is None or every is None:
            return self.masks
        if started:
            return self.folder.masks(epoch, self.masks)
        if epoch == 1:
            masks = self.masks
        elif (epoch - 1) % every:
            masks = self.folder.masks(epoch - 1, self.masks)
        else:
            assert self.dev is not None
            masks = {
                language: _most_important_heads(self.model, self.dev[language], mask.size)
                for language, mask in self.masks.items()
            }
        self.folder.write_masks(epoch, masks)
        return masks

    def losses(self, step: int, batch: list[int], *, autocast: bool = True) -> Tensor:
        """Compute the (B,) losses of a step's batch, with the step's dropout."""
        torch.manual_seed(_derived_seed(self.settings.seed, "dropout", step))
        examples = [self.examples[row] for row in batch]
        inputs = collate(examples, pad_token_id(self.model), self.model.device)
        labels_B = inputs.pop("labels")
        dtype = getattr(torch, self.settings.dtype)
        enabled = autocast and dtype != torch.float32
        with torch.autocast(labels_B.device.type, dtype, enabled=enabled):
            logits_BC = model_logits(self.model, inputs)
        return per_example_loss(logits_BC, labels_B)

    def _step(self, step: int, batch: list[int], masks: Masks | None) -> float:
        """Take one optimizer step and return the batch's mean loss."""
        mask = None if masks is None else masks[self.languages[batch[0]]]
        with masked(self.model, mask):
            losses_B = self.losses(step, batch)
            loss = losses_B.mean() if self.batch_mean is None else self.batch_mean(losses_B, batch)
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm)
        # Checked before the update: a loss or gradient that is not finite must not reach a state.
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
    ) -> Mapping[str, float] | None:
        """Evaluate the epoch; write its metrics, then its checkpoint; return the accuracies."""
        start = step - self.plan.steps_per_epoch
        row: dict[str, Any] = {
            "epoch": epoch,
            "step": step,
            "learning_rate": self._mean_rate(start, step),
            "train_loss": train_loss,
        }
        self.model.eval()
        if evaluate is not None:
            row["accuracy"] = dict(evaluate(self.model, masks))
        self.folder.write_metrics(row)
        if epoch in self.settings.kept_epochs:
            rate = self._mean_rate(0 if self.settings.keep == "last" else start, step)
            moment = self.optimizer.second_moment() if self.second_moment else None
            self.folder.write_checkpoint(
                self.model, self.tokenizer, epoch, step, rate, moment, self.settings.adam_epsilon
            )
        return row.get("accuracy")

    def _mean_rate(self, start: int, end: int) -> float:
        """Return the mean learning rate of the steps [start, end)."""
        steps = range(start, end)
        rates = [scheduled_rate(step, self.plan.total_steps, self.settings) for step in steps]
        return sum(rates) / len(rates)


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


def check_adapters(model: PreTrainedModel, settings: TrainingSettings) -> None:
    """Refuse to train one matrix of an adapter while the other is frozen at 0."""
    untrained = set(untrained_parameters(model, settings))
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear) and module.lora_A.weight not in untrained:
            second = module.lora_B.weight
            if second in untrained and not bool(second.any()):
                raise ValueError(
                    f"shared: expected `trained` for LoRA on {name}, whose second matrix is 0 and "
                    f"belongs to no head, got `{settings.shared}`: nothing would be trained there"
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
        content = {
            name: list(example[name]) if name in TOKEN_COLUMNS else example[name]
            for name in example
        }
        digest.update(json.dumps([language, content], sort_keys=True).encode())
    return digest.hexdigest()
