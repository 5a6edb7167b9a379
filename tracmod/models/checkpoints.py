"""Checkpoints of a training: their folders, epochs, learning rates and second moments."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from tracmod.files.durable import read_json
from tracmod.models.loading import (
    WEIGHTS_FILES,
    check_model_source,
    config_class_names,
    first_line_of,
)
from tracmod.models.loss import ExampleLoss, described_loss, own_loss

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
        loss: the loss of the training, as `ExampleLoss.to_json` returns it; `{"kind": "unknown"}`
            if it was seen to be none that was stated, None if it was not recorded.
    """

    path: Path
    epoch: int
    step: int
    learning_rate: float | None
    loss: Mapping[str, Any] | None = None


def load_checkpoints(paths: Iterable[str | Path]) -> list[Checkpoint]:
    """Read epoch, step, learning rate and loss of checkpoint folders, in the order given.

    A folder that tracmod or `TracInCallback` wrote has them in `tracmod.json`. Otherwise they come
    from the Trainer's `trainer_state.json`, where the epoch is rounded and the learning rate is the
    mean of the rates logged after the nearest earlier checkpoint given; if none was logged there,
    the last rate logged before. A folder with neither file has its position in the list as epoch,
    step 0 and no learning rate.

    Raises:
        ValueError: a folder does not exist, or one of the two files is malformed.
    """
    folders = [Path(path) for path in paths]
    records = [_training_record(folder) for folder in folders]
    steps = sorted({record.step for record in records})
    checkpoints = []
    for position, (folder, record) in enumerate(zip(folders, records, strict=True), start=1):
        rate = record.learning_rate
        if rate is None:
            previous = max((step for step in steps if step < record.step), default=0)
            rate = _mean_logged_rate(record.logged_rates, previous, record.step)
        checkpoints.append(
            Checkpoint(folder, record.epoch or position, record.step, rate, record.loss)
        )
    return checkpoints


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
    checkpoints: Sequence[Checkpoint], config: Any, stated: ExampleLoss | None = None
) -> ExampleLoss:
    """Return the loss that checkpoints were trained with.

    Args:
        checkpoints: the checkpoints of one training.
        config: the model's config, which decides where nothing is recorded.
        stated: the loss that the user states.

    Raises:
        ValueError: the checkpoints record different losses, or one that is not the stated one; or
            they record one that only Python has or that is unknown, and none is stated.
    """
    own = own_loss(config).to_json()
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
    chosen.check_outputs(int(config.num_labels or 0))
    return chosen


def check_checkpoint(path: Path, config: Any) -> None:
    """Check that a checkpoint is of the model with this config, without reading its weights.

    Raises:
        ValueError: the folder has no config or no weights, or the checkpoint's model has other
            classes or another shape.
    """
    check_model_source(path)
    if not any((path / file).is_file() for file in WEIGHTS_FILES):
        raise ValueError(f"{path}: no weights in the folder, expected {WEIGHTS_FILES[0]}")
    try:
        own = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (KeyError, OSError, ValueError) as error:
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


def load_second_moment(folder: str | Path) -> dict[str, Tensor]:
    """Load Adam's second moment by parameter name from a checkpoint's folder.

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
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: expected a safetensors file, it is damaged: {error}") from None


class _TrainingRecord(NamedTuple):
    """State of the training when a checkpoint was saved, as read from its folder."""

    epoch: int = 0
    step: int = 0
    learning_rate: float | None = None
    logged_rates: tuple[tuple[int, float], ...] = ()  # (step, rate), in the order logged
    loss: Mapping[str, Any] | None = None


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
        rate = _number(ours, tree, "learning_rate") if known else None
        return _TrainingRecord(epoch, step, rate, loss=_loss(ours, tree))
    if theirs.is_file():
        tree = {"epoch": 0, "global_step": 0, "log_history": []} | _read_object(theirs)
        log = tree["log_history"]
        if not isinstance(log, list) or not all(isinstance(row, dict) for row in log):
            raise ValueError(f"{theirs}: expected log_history to be a list of objects")
        return _TrainingRecord(
            round(_number(theirs, tree, "epoch")),
            int(_number(theirs, tree, "global_step")),
            logged_rates=tuple(
                (int(_number(theirs, row, "step")), _number(theirs, row, "learning_rate"))
                for row in log
                if "learning_rate" in row
            ),
        )
    return _TrainingRecord()


def _mean_logged_rate(
    logged_rates: Iterable[tuple[int, float]], previous: int, step: int
) -> float | None:
    """Return the mean rate logged in steps (previous, step], or the last one logged before."""
    until_now = [(logged, rate) for logged, rate in logged_rates if logged <= step]
    since = [rate for logged, rate in until_now if logged > previous]
    if since:
        return sum(since) / len(since)
    return until_now[-1][1] if until_now else None


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
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{file}: expected {name} to be a number, got {json.dumps(value)}")
    return float(value)
