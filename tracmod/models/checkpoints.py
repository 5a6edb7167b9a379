"""Checkpoints: where a trainer left them, their learning rates and second moments."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
)

from tracmod.files.durable import read_json
from tracmod.models.loading import WEIGHTS_FILES, check_source, first_line, names_in_order


@dataclass(frozen=True)
class Checkpoint:
    """A model saved during training.

    Attributes:
        path: the transformers folder.
        epoch: epochs done, from 1.
        step: optimizer steps done.
        learning_rate: mean learning rate of the steps since the checkpoint before, or None.
    """

    path: Path
    epoch: int
    step: int
    learning_rate: float | None


def check_checkpoint(path: Path, config: Any) -> None:
    """Refuse a checkpoint that is not of the model with this config, without reading its weights.

    Raises:
        ValueError: no config or weights in the folder, other classes, or another shape.
    """
    check_source(path)
    if not any((path / file).is_file() for file in WEIGHTS_FILES):
        raise ValueError(f"{path}: no weights in the folder, expected {WEIGHTS_FILES[0]}")
    try:
        own = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (KeyError, OSError, ValueError) as error:
        raise ValueError(f"{path}: its config cannot be read: {first_line(error)}") from None
    expected, got = names_in_order(config), names_in_order(own)
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


def load_checkpoints(paths: Iterable[str | Path]) -> list[Checkpoint]:
    """Read epoch (rounded), step and learning rate of checkpoint folders, in the order given.

    They come from `tracmod.json`; else from `trainer_state.json`, where the learning rate is the
    mean of those logged in the steps after the nearest earlier checkpoint given, or, if none was
    logged there, the last one logged before. A folder with neither file has learning rate None,
    its place in the list as epoch, and step 0.

    Raises:
        ValueError: a folder does not exist, or one of the two files is malformed.
    """
    folders = [Path(path) for path in paths]
    states = [_training_state(folder) for folder in folders]
    steps = sorted({int(state["step"]) for state in states})
    checkpoints = []
    for place, (folder, state) in enumerate(zip(folders, states, strict=True), start=1):
        step = int(state["step"])
        before = max((earlier for earlier in steps if earlier < step), default=0)
        rate = state["learning_rate"]
        if rate is None:
            rate = _logged_rate(state["log"], before, step)
        checkpoints.append(Checkpoint(folder, int(state["epoch"] or place), step, rate))
    return checkpoints


def checkpoint_folders(folder: Path) -> list[Path]:
    """Every `checkpoint-<number>/` in the output folder of a training, in order of the numbers.

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


def _training_state(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ValueError(f"checkpoint {folder}: no such folder")
    ours, theirs = folder / "tracmod.json", folder / "trainer_state.json"
    if ours.is_file():
        return _our_state(ours)
    if theirs.is_file():
        return _trainer_state(theirs)
    return {"epoch": 0, "step": 0, "learning_rate": None, "log": []}


def _our_state(file: Path) -> dict[str, Any]:
    tree = _read_object(file)
    if not {"epoch", "step", "learning_rate"} <= tree.keys():
        raise ValueError(f"{file}: expected epoch, step and learning_rate, got {sorted(tree)}")
    rate = tree["learning_rate"]
    return {
        "epoch": int(_number(file, tree, "epoch")),
        "step": int(_number(file, tree, "step")),
        "learning_rate": None if rate is None else _number(file, tree, "learning_rate"),
        "log": [],
    }


def _trainer_state(file: Path) -> dict[str, Any]:
    tree = {"epoch": 0, "global_step": 0, "log_history": []} | _read_object(file)
    log = tree["log_history"]
    if not isinstance(log, list) or not all(isinstance(row, dict) for row in log):
        raise ValueError(f"{file}: expected log_history to be a list of objects")
    rows = [row for row in log if "learning_rate" in row]
    return {
        "epoch": round(_number(file, tree, "epoch")),
        "step": int(_number(file, tree, "global_step")),
        "learning_rate": None,
        "log": [
            (int(_number(file, row, "step")), _number(file, row, "learning_rate")) for row in rows
        ],
    }


def _number(file: Path, tree: dict[str, Any], name: str) -> float:
    value = tree.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{file}: expected {name} to be a number, got {json.dumps(value)}")
    return float(value)


def _logged_rate(log: list[tuple[int, float]], before: int, step: int) -> float | None:
    since = [rate for at, rate in log if before < at <= step]
    if since:
        return sum(since) / len(since)
    earlier = [rate for at, rate in log if at <= step]
    return earlier[-1] if earlier else None


def _read_object(path: Path) -> dict[str, Any]:
    tree = read_json(path)
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(tree).__name__}")
    return tree


# In a checkpoint's folder: Adam's second moment after its bias correction, by parameter name.
SECOND_MOMENT = "second_moment.safetensors"


def load_second_moment(folder: str | Path) -> dict[str, Tensor]:
    """Adam's second moment by parameter name, as the folder of a checkpoint holds it.

    Raises:
        ValueError: there is none, or it is damaged.
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
