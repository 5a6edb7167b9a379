"""Take the steps of a finished fine-tuning again, from its start or from any saved state.

The steps are taken by the code of `fine_tune` itself, so the same machine with the same number of
threads gives the same bits. `Replay.verify` compares them with the checkpoints that the fine-tuning
left, and stops where they differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tracmod.models.adapters import adapter_parameters, adapter_tensors
from tracmod.models.loading import quiet_transformers
from tracmod.subnetworks.head_mask import HeadMask
from tracmod.training.batch_mean import WeightedMean
from tracmod.training.fine_tune import (
    Masks,
    TrainingSettings,
    _BatchPlan,
    _check_inputs,
    _identity,
    _Training,
    scheduled_rate,
    trainable,
)
from tracmod.training.folder import TrainingFolder
from tracmod.training.optimizer import HeadwiseAdamW

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# State of a training between two steps: `weight:<name>` of every trained parameter, and the entries
# of `HeadwiseAdamW.state`.
State = dict[str, Tensor]


class Replay:
    """The steps of one fine-tuning. Made by `open_replay`, and only usable within its context.

    Attributes:
        model: the model, with the weights after the last step taken.
        settings: settings of the training.
        folder: its folder.
        num_examples: number of its training examples.
        total_steps: number of its steps.
        batch_mean: the mean over the losses of a batch, if its examples have weights.
        parameters: the trained parameters by name.
    """

    def __init__(self, training: _Training, optimizer: Callable[[], HeadwiseAdamW]) -> None:
        self._training, self._new_optimizer = training, optimizer
        self.model, self.settings = training.model, training.settings
        self.folder, self.num_examples = training.folder.path, len(training.examples)
        self.total_steps = training.plan.total_steps
        self.batch_mean = training.batch_mean
        self.parameters = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }
        self._epoch_batches = lru_cache(maxsize=2)(training.plan.epoch)
        self._initial = self.state()

    @property
    def optimizer(self) -> HeadwiseAdamW:
        """The optimizer, with the state after the last step taken."""
        return self._training.optimizer

    @property
    def state_bytes(self) -> int:
        """The size of a state once every parameter has moments, without a few bytes per entry."""
        return 3 * sum(p.numel() * p.element_size() for p in self.parameters.values())

    def state(self) -> State:
        """Copy the state after the last step taken."""
        weights = {f"weight:{name}": p.detach() for name, p in self.parameters.items()}
        return {name: t.clone() for name, t in {**weights, **self.optimizer.state()}.items()}

    def load(self, state: State) -> None:
        """Continue from a state that `state` returned."""
        self.load_weights(state)
        # A new optimizer: heads that had no moments at that step must have none now.
        self._training.optimizer = self._new_optimizer()
        moments = {n: t.clone() for n, t in state.items() if not n.startswith("weight:")}
        self.optimizer.load_state(moments)

    def load_weights(self, state: State) -> None:
        """Give the model the weights of a state, without the optimizer."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state[f"weight:{name}"])

    def restart(self) -> None:
        """Go back to the state before the first step."""
        self.load(self._initial)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, from 0."""
        return scheduled_rate(step, self.total_steps, self.settings)

    def batch(self, step: int) -> tuple[list[int], HeadMask | None]:
        """Return the rows of the examples of a step, and the mask that it goes through."""
        epoch, position = divmod(step, self._training.plan.steps_per_epoch)
        rows = self._epoch_batches(epoch + 1)[position]
        masks = self._epoch_masks(epoch + 1)
        return rows, None if masks is None else masks[self._training.languages[rows[0]]]

    def advance(self, step: int) -> None:
        """Take a step, given the state before it."""
        epoch, position = divmod(step, self._training.plan.steps_per_epoch)
        rows = self._epoch_batches(epoch + 1)[position]
        self.model.train(self.settings.dropout)
        self._training._step(step, rows, self._epoch_masks(epoch + 1))

    def losses(self, step: int) -> Tensor:
        """Compute the (B,) losses of a step for autograd, with the training's dropout.

        The model must have the weights before the step, and its mask must be applied until the last
        backward pass. The pass is in the precision of the weights, also where the training ran in
        bfloat16.
        """
        self.model.train(self.settings.dropout)
        rows, _ = self.batch(step)
        return self._training.losses(step, rows, autocast=False)

    def verify(self, step: int) -> None:
        """Compare the model after `step` steps with the checkpoint of an epoch that ends there.

        With a `batch_mean`, the training is another one, and there is nothing to compare with.

        Raises:
            ValueError: a weight differs from the checkpoint's in any bit.
        """
        epoch, within = divmod(step, self._training.plan.steps_per_epoch)
        if self.batch_mean or within or epoch not in self.settings.kept_epochs:
            return
        path = self.folder / f"checkpoint-{epoch}"
        adapter = adapter_parameters(self.model)
        if adapter:
            saved = adapter_tensors(path)
        else:
            with quiet_transformers():
                saved = type(self.model).from_pretrained(path, dtype="auto").state_dict()
        for name, tensor in (adapter or self.model.state_dict()).items():
            if not torch.equal(tensor.cpu(), saved[name]):
                raise ValueError(
                    f"{path}: expected the weights that the same training gives here, got another "
                    f"{name}; the metagradient needs the machine, number of threads and versions "
                    f"of the fine-tuning, or train again here"
                )

    def _epoch_masks(self, epoch: int) -> Masks | None:
        training = self._training
        if training.masks is None or self.settings.reestimate_every is None:
            return training.masks
        return training.folder.masks(epoch, training.masks)


@contextmanager
def open_replay(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Mapping[str, Any]],
    languages: Sequence[str],
    folder: str | Path,
    settings: TrainingSettings,
    *,
    masks: Masks | None = None,
    dev: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    device: torch.device | str | None = None,
    batch_mean: WeightedMean | None = None,
) -> Iterator[Replay]:
    """Open a finished fine-tuning to take its steps again.

    Args:
        model: the model that the fine-tuning began with; changed in place.
        tokenizer, examples, languages, settings, masks, dev, device: those of `fine_tune`.
        folder: the folder of the fine-tuning.
        batch_mean: replaces the mean over the losses of a batch, for trainings with other weights.

    Raises:
        ValueError: the folder holds no training, or another one.
    """
    _check_inputs(model, examples, languages, settings, masks, dev)
    training_folder = TrainingFolder(folder)
    if not (training_folder.path / "training.json").is_file():
        raise ValueError(f"{folder}: expected a finished fine-tuning, found no training.json")
    identity = _identity(model, examples, languages, settings, masks, dev)
    training_folder.claim(identity, defaults=asdict(TrainingSettings()))
    if not training_folder.is_complete(settings.epochs, settings.kept_epochs):
        raise ValueError(f"{folder}: expected a finished fine-tuning, got an interrupted one")
    module: torch.nn.Module = model
    module.to(model.device if device is None else device)
    on_gpu = [model.device] if model.device.type == "cuda" else []

    def new_optimizer() -> HeadwiseAdamW:
        return HeadwiseAdamW(
            model,
            weight_decay=settings.weight_decay,
            epsilon=settings.adam_epsilon,
            split_heads=masks is not None,
        )

    with trainable(model, settings), torch.random.fork_rng(devices=on_gpu):
        training = _Training(
            model=model,
            tokenizer=tokenizer,
            examples=examples,
            languages=languages,
            ids=[str(row) for row in range(len(examples))],
            settings=settings,
            masks=masks,
            dev=dev,
            folder=training_folder,
            plan=_BatchPlan(languages, settings, by_language=masks is not None),
            optimizer=new_optimizer(),
            second_moment=False,
            batch_mean=batch_mean,
        )
        yield Replay(training, new_optimizer)
