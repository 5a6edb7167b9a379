"""A callback that makes the Trainer's checkpoints record what influence needs of them.

TracIn sums over checkpoints c, each weighted by the learning rate eta_c of the steps that it stands
for, and over the parameters that these steps moved. The Trainer does not record these rates: its
`trainer_state.json` has those of the logged steps only, a few out of hundreds by default, and the
rate at the moment of saving says little (at the end of a linear schedule it is 0). Its
`optimizer.pt` has the second moment by a parameter's number, not by name, and in a format that is
not safe to load. A saved model does not say which of its parameters were frozen. The callback
therefore watches every optimizer step and writes all this into the checkpoint folder, in files that
`tracmod.models.checkpoints` reads.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from tracmod.choices import instance, switch
from tracmod.files.durable import write_json
from tracmod.models.adapters import is_peft_model, plain_parameter_name
from tracmod.models.architecture import attention_layers
from tracmod.models.checkpoints import check_checkpoint, save_second_moment
from tracmod.models.inputs import unwrapped
from tracmod.models.loading import config_class_names, has_tokenizer
from tracmod.models.loss import ExampleLoss, LossFunction, as_loss, own_loss
from tracmod.training.loss_watch import LossWatch


class TracInCallback(TrainerCallback):
    """Makes every checkpoint of a Trainer one that `tracmod attribute --checkpoints` can weight.

    Beside each checkpoint that the Trainer saves, the callback writes `tracmod.json`: {epoch, step,
    learning_rate, steps, loss, loss_verified}, where learning_rate is the mean rate of the
    optimizer steps since the previous checkpoint, and steps their number. Steps are the
    optimizer's, also with gradient accumulation. If these steps trained only some parameters,
    `frozen_parameters` names the others: those with `requires_grad=False`, in no parameter group,
    or in groups whose rate was 0.

    The loss is that of the Trainer: transformers' own, with its `label_smoothing_factor`. Class
    weights and functions of your own are stated as `loss`. In the first steps, the gradients that
    arrive at the logits are compared with those of this loss. If they differ (`compute_loss` or
    `compute_loss_func` computes another one), a warning says so, and the loss is recorded as
    unknown, which `tracmod attribute` and `tracmod check` refuse. Parts of a loss that do not pass
    through the logits are not seen, nor is a loss that changes later in the training.

    A training resumed from a checkpoint records the same rates as an uninterrupted one: the sum
    over the steps starts anew at each checkpoint, so there is nothing to carry over.

    With several parameter groups, the rate is that of the first group whose rate is not 0. If all
    groups share a schedule, their rates differ from it by a factor that is the same at all
    checkpoints.

    Examples:
        >>> import json, pathlib, tempfile
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from transformers import Trainer, TrainingArguments
        >>> import tracmod as tm
        >>> config = BertConfig(
        ...     vocab_size=50, hidden_size=16, intermediate_size=32,
        ...     num_hidden_layers=1, num_attention_heads=4,
        ... )
        >>> rows = [{"input_ids": [5, 6, 7], "labels": label} for label in (0, 1, 1, 0)]
        >>> with tempfile.TemporaryDirectory() as folder:  # doctest: +ELLIPSIS
        ...     trainer = Trainer(
        ...         BertForSequenceClassification(config),
        ...         TrainingArguments(
        ...             folder, num_train_epochs=2, per_device_train_batch_size=2,
        ...             learning_rate=0.004, use_cpu=True, report_to=[], disable_tqdm=True,
        ...         ),
        ...         train_dataset=rows,
        ...         callbacks=[tm.TracInCallback(every="epoch")],
        ...     )
        ...     _ = trainer.train()
        ...     json.loads(pathlib.Path(folder, "checkpoint-2", "tracmod.json").read_text())
        {'train_runtime': ...}
        {'epoch': 1, 'step': 2, 'learning_rate': 0.0035, 'steps': 2, 'loss': ...}
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        every: Literal["epoch"] | None = None,
        second_moment: bool = False,
        *,
        loss: ExampleLoss | LossFunction | None = None,
    ) -> None:
        """Choose what to add to the Trainer's own checkpoints.

        Args:
            tokenizer: saved with each checkpoint that has none. The Trainer saves its own if it has
                a `processing_class`.
            every: "epoch" saves a checkpoint at the end of every epoch, whatever `save_strategy`
                says; None leaves saving to `save_strategy`.
            second_moment: whether each checkpoint also gets `second_moment.safetensors`, Adam's
                second moment by parameter name, for `--preconditioner adam`. It is as large as the
                weights.
            loss: the loss of an example, if `compute_loss` or `compute_loss_func` computes another
                one than transformers: an `ExampleLoss`, such as one with class weights, or a
                function of logits (B, C) and labels (B, ...) that returns a loss per example.

        Raises:
            ValueError: another value of `every` or `second_moment`, or `tokenizer` is no tokenizer
                or `loss` no loss.
        """
        if every not in (None, "epoch"):
            raise ValueError(f"every: expected None or 'epoch', got {every!r}")
        instance("tokenizer", tokenizer, PreTrainedTokenizerBase, optional=True)
        self.tokenizer = tokenizer
        self.every = every
        self.second_moment = switch("second_moment", second_moment)
        self.loss = as_loss(loss)
        self._watch: LossWatch | None = None
        # Sum of the learning rates and number of optimizer steps since the previous checkpoint.
        self._rate_sum = 0.0
        self._steps = 0
        # Names of the parameters that these steps moved, and of those that they would have moved if
        # no rate had been 0.
        self._moved: set[str] = set()
        self._trainable: set[str] = set()
        self._warned: set[str] = set()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Check that influence can use this training, before its first step.

        Raises:
            ValueError: the model is not an encoder of the BERT family, the training is part of a
                hyperparameter search, or `save_strategy` would undo `every`.
        """
        self._begin_checkpoint()  # an earlier training of this object may have failed
        attention_layers(unwrapped(kwargs["model"]))
        if is_peft_model(kwargs["model"]):
            _check_base(kwargs["model"])
        if self.loss is not None:
            self.loss.check_outputs(int(kwargs["model"].config.num_labels or 0))
        self._watch_loss(args, kwargs["model"])
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
                f"save_total_limit={args.save_total_limit}: the Trainer removes all checkpoints "
                f"but the last ones, and influence needs all of them; leave it unset",
            )

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Add the learning rate of the coming step to the sum.

        Before the step, because the scheduler sets the next step's rate right after it; later
        events no longer see the rate that was used.
        """
        if self._watch is not None and self._watch.is_watching:
            self._watch.end_step()
            if self._watch.differs:
                self._warn(
                    state,
                    f"the training's loss is not {self._loss(args, kwargs['model'])}: its "
                    f"gradients at the logits differ. Checkpoints record an unknown loss, which "
                    f"`tracmod attribute` refuses; state the loss, "
                    f"TracInCallback(loss=tracmod.ExampleLoss(...)) or a function per example",
                )
        rates = [float(group["lr"]) for group in kwargs["optimizer"].param_groups]
        if len(set(rates)) > 1:
            self._warn(
                state,
                "the parameter groups have different learning rates; influence weights all "
                "gradients with the first group's rate",
            )
        self._rate_sum += next((rate for rate in rates if rate), 0.0)
        self._steps += 1
        trainable = _trainable(kwargs["model"], kwargs["optimizer"])
        self._trainable |= trainable.keys()
        self._moved |= {name for name, rate in trainable.items() if rate}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop watching the loss, after a training of few steps."""
        if self._watch is not None:
            self._watch.stop()

    def _watch_loss(self, args: TrainingArguments, model: nn.Module) -> None:
        """Watch the first steps, unless hooks would become part of a compiled model."""
        if self._watch is not None:
            self._watch.stop()  # of a training that failed
        self._watch = None
        is_compiled = getattr(model, "_compiled_call_impl", None) is not None
        if args.torch_compile or is_compiled:
            return

        def loss_of(labels: Tensor | None) -> ExampleLoss:
            float_vectors = labels is not None and labels.dim() > 1 and labels.is_floating_point()
            return self._loss(args, model, float_vectors=float_vectors)

        one_factor = not args.fp16 and args.gradient_accumulation_steps == 1
        self._watch = LossWatch(model, loss_of, one_factor=one_factor)

    def _loss(
        self, args: TrainingArguments, model: Any, *, float_vectors: bool = False
    ) -> ExampleLoss:
        """Return the loss that was stated, or else the Trainer's."""
        if self.loss is not None:
            return self.loss
        own = own_loss(model, float_vectors=float_vectors)
        # The Trainer does not smooth several labels per text.
        if own.kind in ("cross_entropy", "token_cross_entropy") and args.label_smoothing_factor:
            return ExampleLoss(own.kind, label_smoothing=args.label_smoothing_factor)
        return own

    def _loss_record(
        self, args: TrainingArguments, state: TrainerState, model: nn.Module
    ) -> dict[str, Any]:
        """Return what a checkpoint records of its loss."""
        watch, loss = self._watch, self._loss(args, model)
        if watch is not None and watch.differs:
            return {"loss": {"kind": "unknown"}, "loss_verified": False}
        verified = watch is not None and watch.matched
        if not verified:
            self._warn(
                state,
                f"the loss could not be verified (a compiled model, or labels that the model is "
                f"not given): the checkpoints record {loss}; TracInCallback(loss=...) states it",
            )
        return {"loss": loss.to_json(), "loss_verified": verified}

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Request a checkpoint, unless the last step already has one."""
        if self.every == "epoch" and self._steps:
            control.should_save = True

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Add the record, and a tokenizer or second moment if wanted, to the checkpoint just saved.

        Raises:
            ValueError: the checkpoint is not a whole model in safetensors (shards of FSDP are not),
                or the optimizer has no second moment.
        """
        rate_sum, steps, trained = self._rate_sum, self._steps, self._moved or self._trainable
        self._begin_checkpoint()
        # Without a step in between, the Trainer has saved the same step again: its record is there.
        # Every process of a distributed training gets this event; the first one writes.
        if not steps or not state.is_world_process_zero:
            return
        assert args.output_dir is not None  # the Trainer has just saved there
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        model = kwargs["model"]
        check_checkpoint(folder, model.config)
        if self.tokenizer is not None and not has_tokenizer(folder):
            self.tokenizer.save_pretrained(folder)
        if not has_tokenizer(folder):
            self._warn(
                state,
                "the checkpoints have no tokenizer; pass TracInCallback(tokenizer), or give "
                "`tracmod attribute` a --model that has it",
            )
        if self.second_moment:
            optimizer = kwargs["optimizer"]
            moments = _second_moment(model, optimizer)
            save_second_moment(moments, _epsilon(optimizer), folder)
        record: dict[str, Any] = {
            "epoch": round(state.epoch),
            "step": state.global_step,
            "learning_rate": rate_sum / steps,
            "steps": steps,
            **self._loss_record(args, state, kwargs["model"]),
        }
        frozen = sorted({name for name, _ in _named_parameters(model)} - trained)
        if frozen:
            record["frozen_parameters"] = frozen
        if is_peft_model(model):  # its folder has no config
            record["class_names"] = config_class_names(model.config)
        write_json(folder / "tracmod.json", record)

    def _begin_checkpoint(self) -> None:
        """Forget the steps before a checkpoint."""
        self._rate_sum, self._steps = 0.0, 0
        self._moved, self._trainable = set(), set()

    def _warn(self, state: TrainerState, sentence: str) -> None:
        """Warn once, and from the first process only."""
        if state.is_world_process_zero and sentence not in self._warned:
            self._warned.add(sentence)
            warnings.warn(sentence, stacklevel=3)


def _trainable(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return the learning rate of every parameter that the optimizer trains, by name.

    An optimizer that has none of the model's parameters trains copies of them (as DeepSpeed does);
    which, nothing says, so all that require a gradient count as trained.
    """
    rate_of = {
        id(parameter): float(group["lr"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    trainable = [(name, p) for name, p in _named_parameters(model) if p.requires_grad]
    if not any(id(parameter) in rate_of for _, parameter in trainable):
        return {name: 1.0 for name, _ in trainable}
    return {
        name: rate_of[id(parameter)] for name, parameter in trainable if id(parameter) in rate_of
    }


def _named_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters with their names in the model without wrappers, also of PEFT.

    Modules that PEFT trains whole have a copy as they were before, which the model does not use.
    """
    return [
        (plain_parameter_name(re.sub(r"^((_orig_mod|module)\.)+", "", name)), parameter)
        for name, parameter in model.named_parameters()
        if ".original_module." not in name
    ]


def _check_base(model: Any) -> None:
    """Refuse a PEFT model whose checkpoints would not say which model they belong to."""
    config = model.active_peft_config
    if not config.base_model_name_or_path:
        raise ValueError(
            "TracInCallback: expected an adapter on a model from a folder or the Hub, got one on a "
            "model without a name: its checkpoints could not be loaded; save the base model and "
            "load it with from_pretrained"
        )


def _epsilon(optimizer: torch.optim.Optimizer) -> float:
    """Return Adam's epsilon, which all groups of parameters must share."""
    epsilons = sorted({group["eps"] for group in optimizer.param_groups})
    if len(epsilons) > 1:
        raise ValueError(
            f"TracInCallback(second_moment=True): expected one eps for all groups of parameters, "
            f"got {', '.join(map(str, epsilons))}"
        )
    return epsilons[0]


def _second_moment(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Compute Adam's second moment after its bias correction, by parameter name.

    Moments are matched to names by the parameter itself. An optimizer's numbering counts through
    its groups (with decay, then without), which is another order than the model's.
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
        for name, parameter in _named_parameters(model)
    }
