"""A callback for the Trainer of transformers: its checkpoints keep what influence needs of them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from tracmod.files.durable import write_json
from tracmod.models.architecture import attention_layers
from tracmod.models.checkpoints import SECOND_MOMENT, check_checkpoint
from tracmod.models.loading import has_tokenizer


class TracInCallback(TrainerCallback):
    """Makes every checkpoint of a training one that `tracmod attribute --checkpoints` can weigh.

        trainer = Trainer(model, arguments, ..., callbacks=[tm.TracInCallback(tokenizer, "epoch")])

    TracIn sums over checkpoints c with the rates eta_c at which the training stepped. Beside each
    checkpoint that the Trainer saves, this writes `tracmod.json`: {epoch, step, learning_rate},
    the mean rate of the optimizer steps since the checkpoint before. (`trainer_state.json` has the
    rates of the logged steps only.) Steps are the optimizer's, with gradient accumulation too.

    A training resumed from a checkpoint gives the same rates as an undisturbed one: the sum over
    the steps begins anew at each checkpoint, so there is nothing to carry over.

    With several parameter groups, eta is the rate of the first, which is also what the Trainer
    logs. Groups that share a schedule differ by a factor that is the same at all checkpoints.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        every: Literal["epoch"] | None = None,
        second_moment: bool = False,
    ) -> None:
        """Say what to add to the Trainer's own checkpoints.

        Args:
            tokenizer: saved with the checkpoints into which the Trainer puts none (it does when it
                has a `processing_class`).
            every: "epoch" has a checkpoint saved at the end of every epoch, whatever
                `save_strategy` says; None leaves it at that.
            second_moment: whether each checkpoint also gets `second_moment.safetensors`, Adam's
                second moment by parameter name, for `--preconditioner adam` (as many bytes again
                as the weights have).
        """
        if every not in (None, "epoch"):
            raise ValueError(f"every: expected None or 'epoch', got {every!r}")
        self.tokenizer = tokenizer
        self.every = every
        self.second_moment = second_moment
        self._rate_sum = 0.0
        self._steps = 0  # since the checkpoint before
        self._warned: set[str] = set()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Check the training and begin to count.

        Raises:
            ValueError: not an encoder of the BERT family, a search of hyperparameters, or a
                `save_strategy` that would undo `every`.
        """
        self._rate_sum, self._steps = 0.0, 0  # left from a training of this object that failed
        attention_layers(kwargs["model"])
        if state.is_hyper_param_search:
            raise ValueError("TracInCallback: expected one training, got a hyperparameter search")
        if self.every and args.save_strategy == "best":
            raise ValueError(
                f"TracInCallback(every={self.every!r}): expected save_strategy no, steps or epoch, "
                f"got best, which saves no other checkpoint"
            )
        if args.save_total_limit:
            self._warn(
                state,
                f"save_total_limit={args.save_total_limit}: the Trainer removes the checkpoints "
                f"before the last ones, and influence needs them all; leave it unset",
            )

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Count the rate of the step to come: the scheduler moves it right after the step."""
        rates = [float(group["lr"]) for group in kwargs["optimizer"].param_groups]
        if len(set(rates)) > 1:
            self._warn(
                state,
                "the parameter groups have different learning rates; influence weighs the "
                "gradients of all with the first group's",
            )
        self._rate_sum += rates[0]
        self._steps += 1

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for a checkpoint, unless the one of this step is there already."""
        if self.every == "epoch" and self._steps:
            control.should_save = True

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Complete the checkpoint just saved; of several processes the first alone writes.

        Raises:
            ValueError: the checkpoint is not a whole model in safetensors (shards of FSDP are not),
                or the optimizer keeps no second moment.
        """
        rate_sum, steps = self._rate_sum, self._steps
        self._rate_sum, self._steps = 0.0, 0
        if not steps or not state.is_world_process_zero:  # no steps: saved again after the same
            return
        assert args.output_dir is not None  # the Trainer has saved there
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        check_checkpoint(folder, kwargs["model"].config)
        if self.tokenizer is not None and not has_tokenizer(folder):
            self.tokenizer.save_pretrained(folder)
        if not has_tokenizer(folder):
            self._warn(
                state,
                "the checkpoints have no tokenizer; pass TracInCallback(tokenizer), or give "
                "`tracmod attribute` a --model that has it",
            )
        mean = {"epoch": round(state.epoch), "step": state.global_step}
        if self.second_moment:
            moments = _second_moment(kwargs["model"], kwargs["optimizer"])
            save_file(moments, folder / SECOND_MOMENT)
        write_json(folder / "tracmod.json", mean | {"learning_rate": rate_sum / steps})

    def _warn(self, state: TrainerState, sentence: str) -> None:
        """Once, and from one process."""
        if state.is_world_process_zero and sentence not in self._warned:
            self._warned.add(sentence)
            warnings.warn(sentence, stacklevel=3)


def _second_moment(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Adam's second moment after its bias correction, by parameter name.

    Found by the parameter itself, not by its number in the optimizer: that counts through the
    groups (with decay, without), in another order than the model's.
    """
    moments = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if state and "exp_avg_sq" not in state:
                raise ValueError(
                    f"TracInCallback(second_moment=True): expected an Adam optimizer, got "
                    f"{type(optimizer).__name__}, which keeps {', '.join(state)}"
                )
            if state:
                correction = 1 - group["betas"][1] ** float(state["step"])
                moments[parameter] = state["exp_avg_sq"].float() / correction
    return {
        name: moments.get(parameter, torch.zeros_like(parameter)).detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
    }
