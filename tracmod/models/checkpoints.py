"""Checkpoints of a training: their folders, epochs, learning rates and second moments."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tracmod.choices import ADAM_EPSILON
from tracmod.files.durable import read_json
from tracmod.models.adapters import is_adapter_folder, number_of_classes
from tracmod.models.loading import (
    check_model_source,
    config_class_names,
    first_line_of,
)
from tracmod.models.loss import ExampleLoss, check_unit, described_loss, own_loss

HOW_TO_STATE = (
    "--loss, --label-smoothing or --class-weights; a function of your own as `loss` of "
    "tracmod.collect_features or tracmod.exact_influence"
)

# File of a checkpoint's folder: Adam's second moment after its bias correction, by parameter name.
SECOND_MOMENT = "second_moment.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A model saved during training.

    Attributes:
        path: its transformers folder.
        epoch: number of epochs finished, from 1.
        step: number of optimizer steps taken.
        learning_rate: mean learning rate of the steps since the previous checkpoint, or None if it
            is unknown.
        rate_source: a phrase that says where the learning rate comes from.
        is_guess: whether the learning rate may differ from the mean of those that were used.
        frozen: full names of the parameters that these steps did not train.
        loss: the loss of the training, as `ExampleLoss.to_json` returns it; `{"kind": "unknown"}`
            if it was seen to be none that was stated, None if it was not recorded.
    """

    path: Path
    epoch: int
    step: int
    learning_rate: float | None
    rate_source: str = "no learning rate is recorded or logged"
    is_guess: bool = False
    frozen: tuple[str, ...] = ()
    loss: Mapping[str, Any] | None = None


def load_checkpoints(paths: Iterable[str | Path]) -> list[Checkpoint]:
    """Read what checkpoint folders record of their training, in the order given.

    A folder that tracmod or `TracInCallback` wrote has them in `tracmod.json`. Otherwise they come
    from the Trainer's `trainer_state.json`, where the epoch is rounded and the learning rate is the
    mean of the rates logged after the nearest earlier checkpoint given; if none was logged there,
    the last rate logged before. A folder with neither file has its position in the list as epoch,
    step 0 and no learning rate.

    An entry of the Trainer's log has the rate of the step that it is made at, so the mean is exact
    if every step is logged. Before version 4.51 it had the rate of the step after, so the mean was
    off by one step.

    Raises:
        ValueError: a folder does not exist or is given twice, or one of the two files is malformed.

    Source: transformers#36973 (which step's rate is logged).
    """
    folders = [Path(path) for path in paths]
    _check_different(folders)
    records = [_training_record(folder) for folder in folders]
    steps = sorted({record.step for record in records})
    checkpoints = []
    for position, (folder, record) in enumerate(zip(folders, records, strict=True), start=1):
        previous = max((step for step in steps if step < record.step), default=0)
        rate = record.learning_rate_since(previous)
        checkpoints.append(
            Checkpoint(
                folder, record.epoch or position, record.step, *rate, record.frozen, record.loss
            )
        )
    return checkpoints


def _check_different(folders: Sequence[Path]) -> None:
    """Refuse a folder that is given twice, also under another name or through a link."""
    first_of: dict[Path, Path] = {}
    for folder in folders:
        first = first_of.setdefault(folder.resolve(), folder)
        if first is not folder:
            also = "" if first == folder else f", also as {first}"
            raise ValueError(
                f"checkpoint {folder}: expected every checkpoint once, got it twice{also}: its "
                f"steps would count twice"
            )


def training_conflicts(paths: Sequence[Path]) -> list[str]:
    """Return a sentence for each sign that checkpoints are not of one training, in its order.

    A later checkpoint's log has all that an earlier one of the same training has, and the number of
    steps per epoch is the same at all of them.

    Args:
        paths: checkpoint folders, in the order given.
    """
    all_records = [(path, _training_record(path)) for path in paths]
    records = [(path, record) for path, record in all_records if record.step > 0]
    conflicts = []
    for (path, record), (later_path, later) in pairwise(records):
        if later.step < record.step:
            conflicts.append(
                f"{later_path.name} (step {later.step}) is given after {path.name} (step "
                f"{record.step}): the last checkpoint given makes the predictions"
            )
    ordered = sorted(records, key=lambda pair: pair[1].step)
    for (path, record), (later_path, later) in pairwise(ordered):
        names = f"{path} and {later_path} are not of one training"
        if record.step == later.step:
            conflicts.append(f"{names}, or one is a copy: both are of step {record.step}")
        elif record.log and later.log and not record.log <= later.log:
            conflicts.append(f"{names}: the logs of their Trainer differ")
    # epoch = round(step / steps per epoch), so each checkpoint bounds the steps per epoch.
    known = [record for _, record in records if record.epoch > 0]
    least = max((record.step / (record.epoch + 0.5) for record in known), default=0)
    most = min((record.step / (record.epoch - 0.5) for record in known), default=0)
    if not conflicts and least > most:
        epochs = ", ".join(f"{record.epoch} at step {record.step}" for record in known)
        conflicts.append(f"the checkpoints are not of one training: their epochs are {epochs}")
    return conflicts


def checkpoint_folders(folder: Path) -> list[Path]:
    """Return every `checkpoint-<number>/` in the output folder of a training, by number.

    Raises:
        ValueError: there is none.
    """
    numbered = [
        (int(path.name.removeprefix("checkpoint-")), path)
        for path in folder.glob("checkpoint-*")
        if path.is_dir() and path.name.removeprefix("checkpoint-").isdecimal()
    ]
    if not numbered:
        raise ValueError(
            f"{folder}: expected checkpoint-<number> folders in it, as a training saves them, "
            f"found none"
        )
    return [path for _, path in sorted(numbered)]


def recorded_loss(folder: str | Path) -> Mapping[str, Any] | None:
    """Return the loss that the `tracmod.json` of a model's folder records; None without one.

    Raises:
        ValueError: the file is malformed.
    """
    file = Path(folder) / "tracmod.json"
    return _loss(file, _read_object(file)) if file.is_file() else None


def loss_of_checkpoints(
    checkpoints: Sequence[Checkpoint], model: Any, stated: ExampleLoss | None = None
) -> ExampleLoss:
    """Return the loss that checkpoints were trained with.

    Args:
        checkpoints: the checkpoints of one training.
        model: the model, whose class and config decide where nothing is recorded.
        stated: the loss that the user states.

    Raises:
        ValueError: the checkpoints record different losses, or one that is not the stated one; or
            they record one that only Python has or that is unknown, and none is stated.
    """
    own = own_loss(model).to_json()
    first = checkpoints[0].loss or own
    for checkpoint in checkpoints:
        loss = checkpoint.loss or own
        is_known = loss["kind"] not in ("unknown", "function")
        if stated is None and not is_known:
            raise ValueError(
                f"{checkpoint.path}: expected a known loss, got {described_loss(loss)} in "
                f"tracmod.json: the training used a loss of its own; state it ({HOW_TO_STATE})"
            )
        if stated is None and loss != first:
            raise ValueError(
                f"{checkpoint.path}: expected the loss of {checkpoints[0].path}, "
                f"{described_loss(first)}, got {described_loss(loss)}; checkpoints of one training "
                f"have one loss"
            )
        if stated is not None and checkpoint.loss and is_known and loss != stated.to_json():
            raise ValueError(
                f"{checkpoint.path}: expected the loss that tracmod.json records, "
                f"{described_loss(loss)}, got {stated}"
            )
    chosen = ExampleLoss.from_json(first) if stated is None else stated
    check_unit(model, chosen)
    chosen.check_outputs(int(model.config.num_labels or 0))
    return chosen


def check_checkpoint(path: Path, config: Any) -> None:
    """Check that a checkpoint is of the model with this config, without reading its weights.

    Raises:
        ValueError: the folder has no config or no weights, or the checkpoint's model has other
            classes or another shape.
    """
    from transformers import AutoConfig

    check_model_source(path)
    if is_adapter_folder(Path(path)):  # its base is loaded with it, and refused if it has no place
        num_classes, expected_classes = number_of_classes(Path(path)), len(config.id2label)
        if num_classes not in (None, expected_classes):
            raise ValueError(
                f"{path}: expected the model's {expected_classes} classes, got {num_classes}"
            )
        return
    try:
        own = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers raises anything here, from KeyError to its own
        raise ValueError(f"{path}: its config cannot be read: {first_line_of(error)}") from None
    expected, got = config_class_names(config), config_class_names(own)
    if got != expected:
        raise ValueError(
            f"{path}: expected the model's classes, {', '.join(expected)}, got {', '.join(got)}"
        )
    for name in ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size"):
        if getattr(own, name) != getattr(config, name):
            raise ValueError(
                f"{path}: expected the model's {name}, {getattr(config, name)}, "
                f"got {getattr(own, name)}"
            )


def recorded_frozen(source: str | Path) -> tuple[str, ...]:
    """Return the frozen parameters that a folder's `tracmod.json` names; none without the file."""
    folder = Path(source)
    return _training_record(folder).frozen if (folder / "tracmod.json").is_file() else ()


def freeze(model: nn.Module, names: Iterable[str], source: str | Path) -> None:
    """Set `requires_grad=False` for the parameters of a model that its training did not move.

    Raises:
        ValueError: the model has no such parameter.
    """
    parameters = dict(model.named_parameters())
    for name in names:
        if name not in parameters:
            raise ValueError(
                f"{source}: expected frozen_parameters in tracmod.json to name parameters of the "
                f"model, got {name}"
            )
        parameters[name].requires_grad_(False)


def save_second_moment(second_moment: Mapping[str, Tensor], epsilon: float, folder: Path) -> None:
    """Save Adam's second moment by parameter name, and Adam's epsilon, in a checkpoint's folder."""
    save_file(dict(second_moment), folder / SECOND_MOMENT, {"epsilon": repr(epsilon)})


def load_second_moment(folder: str | Path) -> tuple[dict[str, Tensor], float]:
    """Load Adam's second moment by parameter name, and epsilon, from a checkpoint's folder.

    Files of earlier versions have no epsilon, and the trainings of them had AdamW's default.

    Raises:
        ValueError: the folder has none, or the file is damaged.
    """
    file = Path(folder) / SECOND_MOMENT
    if not file.is_file():
        raise ValueError(
            f"{folder}: expected {SECOND_MOMENT}, Adam's second moment, found none; train with "
            f"`collect.preconditioner: adam`, or a Trainer with TracInCallback(second_moment=True)"
        )
    try:
        with safe_open(file, "pt") as opened:
            epsilon = (opened.metadata() or {}).get("epsilon", ADAM_EPSILON)
        return load_file(file), float(epsilon)
    except SafetensorError as error:
        raise ValueError(f"{file}: expected a safetensors file, it is damaged: {error}") from None


class _Rate(NamedTuple):
    """The learning rate of a checkpoint; see `Checkpoint`."""

    learning_rate: float | None
    rate_source: str
    is_guess: bool


class _TrainingRecord(NamedTuple):
    """State of the training when a checkpoint was saved, as read from its folder.

    Attributes:
        epoch, step, learning_rate, frozen: as for `Checkpoint`; 0, None or () where unknown.
        num_steps: number of steps that `learning_rate` is the mean of, or None if unknown.
        logged_rates: step -> the rate that the Trainer logged at it.
        log: the entries of the Trainer's log, as JSON.
        logged_late: whether the version of transformers logged the rate of the step after.
    """

    epoch: int = 0
    step: int = 0
    learning_rate: float | None = None
    num_steps: int | None = None
    frozen: tuple[str, ...] = ()
    logged_rates: Mapping[int, float] = MappingProxyType({})
    log: frozenset[str] = frozenset()
    logged_late: bool = False
    loss: Mapping[str, Any] | None = None

    def learning_rate_since(self, previous: int) -> _Rate:
        """Return the mean rate of the steps after step `previous`, and where it comes from."""
        num_steps = self.step - previous
        if self.learning_rate is not None:
            source, is_guess = "the mean rate of its steps is recorded", False
            if self.num_steps not in (None, num_steps):
                source = (
                    f"the mean rate of {self.num_steps} steps is recorded for {num_steps} steps"
                )
                is_guess = True
            return _Rate(self.learning_rate, source, is_guess)
        until_now = {step: rate for step, rate in self.logged_rates.items() if step <= self.step}
        since = [rate for step, rate in until_now.items() if step > previous]
        late = ", each with the rate of the step after" if self.logged_late else ""
        if since:
            source = f"rates of {len(since)} of {num_steps} steps are logged{late}"
            is_guess = len(since) < num_steps or self.logged_late
            return _Rate(sum(since) / len(since), source, is_guess)
        if until_now:
            last = max(until_now)
            source = f"rates of 0 of {num_steps} steps are logged; that of step {last} is used"
            return _Rate(until_now[last], source + late, is_guess=True)
        return _Rate(None, "no learning rate is recorded or logged", is_guess=True)


def _training_record(folder: Path) -> _TrainingRecord:
    if not folder.is_dir():
        raise ValueError(f"checkpoint {folder}: no such folder")
    ours, theirs = folder / "tracmod.json", folder / "trainer_state.json"
    if ours.is_file():
        tree = _read_object(ours)
        if not {"epoch", "step", "learning_rate"} <= tree.keys():
            raise ValueError(f"{ours}: expected epoch, step and learning_rate, got {sorted(tree)}")
        epoch, step = int(_number(ours, tree, "epoch")), int(_number(ours, tree, "step"))
        known = tree["learning_rate"] is not None
        return _TrainingRecord(
            epoch,
            step,
            _number(ours, tree, "learning_rate") if known else None,
            int(_number(ours, tree, "steps")) if "steps" in tree else None,
            _names(ours, tree, "frozen_parameters"),
            loss=_loss(ours, tree),
        )
    if theirs.is_file():
        tree = {"epoch": 0, "global_step": 0, "log_history": []} | _read_object(theirs)
        log = tree["log_history"]
        if not isinstance(log, list) or not all(isinstance(row, dict) for row in log):
            raise ValueError(f"{theirs}: expected log_history to be a list of objects")
        return _TrainingRecord(
            round(_number(theirs, tree, "epoch")),
            int(_number(theirs, tree, "global_step")),
            logged_rates={
                int(_number(theirs, row, "step")): _number(theirs, row, "learning_rate")
                for row in log
                if "learning_rate" in row
            },
            log=frozenset(json.dumps(row, sort_keys=True) for row in log),
            logged_late=_transformers_version(folder) < (4, 51),
        )
    return _TrainingRecord()


def _transformers_version(folder: Path) -> tuple[int, ...]:
    """Return the version that saved a folder's model, or infinity if the config has none."""
    file = folder / "config.json"
    version = str(_read_object(file).get("transformers_version")) if file.is_file() else ""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (sys.maxsize,) if match is None else tuple(map(int, match.groups()))


def _names(file: Path, tree: dict[str, Any], name: str) -> tuple[str, ...]:
    values = tree.get(name, [])
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{file}: expected {name} to be a list of names, got {json.dumps(values)}")
    return tuple(values)


def _loss(file: Path, tree: dict[str, Any]) -> Mapping[str, Any] | None:
    loss = tree.get("loss")
    if loss is not None and not (isinstance(loss, dict) and isinstance(loss.get("kind"), str)):
        raise ValueError(f"{file}: expected loss to be an object with its kind, got {loss!r}")
    return loss


def _read_object(path: Path) -> dict[str, Any]:
    tree = read_json(path)
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(tree).__name__}")
    return tree


def _number(file: Path, tree: dict[str, Any], name: str) -> float:
    value = tree.get(name)
    # JSON has NaN, and whole numbers that no float can hold.
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not abs(value) <= sys.float_info.max
    ):
        raise ValueError(f"{file}: expected {name} to be a number, got {json.dumps(value)}")
    return float(value)
