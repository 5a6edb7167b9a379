"""What a training keeps on disk: its identity, checkpoints, metrics and the state to resume from.

Everything is written beside its place and then renamed, so that a process killed at any moment
leaves the old or the new, never half of it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tracmod.files.durable import read_json, sync_folder, write_json
from tracmod.models.checkpoints import SECOND_MOMENT, Checkpoint, load_checkpoints
from tracmod.models.loading import quiet_transformers
from tracmod.subnetworks.head_mask import HeadMask
from tracmod.training.optimizer import HeadwiseAdamW


class TrainingFolder:
    """The folder of one training.

    ```
    training.json          what is trained on what
    checkpoint-<epoch>/    transformers format, tokenizer, tracmod.json {epoch, step, learning_rate}
                           second_moment.safetensors where it is asked for
    metrics.json           [{epoch, step, learning_rate, train_loss, accuracy: {language: share}}]
    masks/epoch-<epoch>/   <language>.json, the head masks of the epoch; dynamic masks only
    resume/<step>/         model.safetensors, optimizer.safetensors, state.json; gone when complete
    ```
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def claim(self, identity: dict[str, Any], defaults: Mapping[str, Any]) -> None:
        """State what this training is, or check that it is what the folder already holds.

        Args:
            identity: everything the training depends on.
            defaults: what a key stands for that `training.json` lacks, because the setting is newer
                than the file.

        Raises:
            ValueError: the folder holds a training of something else.
        """
        file = self.path / "training.json"
        if not file.is_file():
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(file, identity)
            return
        found = {**defaults, **read_json(file)}
        keys = sorted(identity.keys() | found.keys())
        other = [key for key in keys if identity.get(key) != found.get(key)]
        if other:
            raise ValueError(
                f"{self.path}: holds a training with another {', '.join(other)}; "
                "remove the folder or train into another"
            )

    def is_complete(self, epochs: int, kept: Iterable[int]) -> bool:
        """Whether the metrics of all epochs and the checkpoints of those kept are there."""
        return len(self._metrics()) == epochs and all(
            self._checkpoint(epoch).is_dir() for epoch in kept
        )

    def checkpoints(self, kept: Iterable[int]) -> list[Checkpoint]:
        """The checkpoints of these epochs, in their order."""
        return load_checkpoints(self._checkpoint(epoch) for epoch in kept)

    def write_checkpoint(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        epoch: int,
        step: int,
        learning_rate: float,
        second_moment: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write `checkpoint-<epoch>/`, in place of one that is there."""
        aside = self.path / f"checkpoint-{epoch}.tmp"
        _make_empty(aside)
        with quiet_transformers():
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
        tree = {"epoch": epoch, "step": step, "learning_rate": learning_rate}
        write_json(aside / "tracmod.json", tree)
        if second_moment is not None:
            save_file(dict(second_moment), aside / SECOND_MOMENT)
        _publish(aside, self._checkpoint(epoch))

    def write_metrics(self, row: dict[str, Any]) -> None:
        """Put an epoch's row into `metrics.json`, after those of earlier epochs."""
        rows = [earlier for earlier in self._metrics() if earlier["epoch"] < row["epoch"]]
        write_json(self.path / "metrics.json", [*rows, row])

    def write_masks(self, epoch: int, masks: Mapping[str, HeadMask]) -> None:
        """Write the head masks of an epoch, in place of those that are there."""
        for language, mask in masks.items():
            mask.save(self._mask(epoch, language), language=language, epoch=epoch)

    def masks(self, epoch: int, languages: Iterable[str]) -> dict[str, HeadMask]:
        """The head masks of an epoch by language.

        Raises:
            ValueError: one is not there or broken.
        """
        return {language: HeadMask.load(self._mask(epoch, language)) for language in languages}

    def save_state(
        self, model: PreTrainedModel, optimizer: HeadwiseAdamW, step: int, loss_sum: float
    ) -> None:
        """Write the state after `step` steps; earlier states are removed once it is there."""
        aside, place = self.path / "resume" / "tmp", self.path / "resume" / str(step)
        _make_empty(aside)
        weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file(weights, aside / "model.safetensors")
        save_file(optimizer.state(), aside / "optimizer.safetensors")
        write_json(aside / "state.json", {"step": step, "loss_sum": loss_sum})
        _publish(aside, place)
        for earlier in self._states()[:-1]:
            shutil.rmtree(self.path / "resume" / str(earlier))

    def load_state(self, model: PreTrainedModel, optimizer: HeadwiseAdamW) -> tuple[int, float]:
        """Put the latest state into model and optimizer.

        Returns:
            Steps done and the sum of the losses of the epoch's steps; (0, 0.0) without a state.
        """
        states = self._states()
        if not states:
            return 0, 0.0
        place = self.path / "resume" / str(states[-1])
        model.load_state_dict(load_file(place / "model.safetensors"))
        optimizer.load_state(load_file(place / "optimizer.safetensors"))
        state = read_json(place / "state.json")
        return int(state["step"]), float(state["loss_sum"])

    def clear_state(self) -> None:
        """Remove `resume/`."""
        shutil.rmtree(self.path / "resume", ignore_errors=True)

    def _checkpoint(self, epoch: int) -> Path:
        return self.path / f"checkpoint-{epoch}"

    def _mask(self, epoch: int, language: str) -> Path:
        return self.path / "masks" / f"epoch-{epoch}" / f"{language}.json"

    def _metrics(self) -> list[dict[str, Any]]:
        file = self.path / "metrics.json"
        return read_json(file) if file.is_file() else []

    def _states(self) -> list[int]:
        """Steps of the states on disk, earliest first."""
        folders = (self.path / "resume").glob("*/")
        return sorted(int(folder.name) for folder in folders if folder.name.isdecimal())


def epoch_masks(
    folder: str | Path, epoch: int, static: Mapping[str, HeadMask]
) -> dict[str, HeadMask]:
    """The head mask that each language was trained through in an epoch of a sparse fine-tuning.

    Args:
        folder: of the training, such as `models/sparse` of a run folder.
        epoch: from 1; the checkpoint of that number is the model at its end.
        static: the masks the training was given, by language.

    Returns:
        By language: `static`, or where masks were dynamic those of the epoch.

    Raises:
        ValueError: no training there, or it has dynamic masks, but not of this epoch and language.
    """
    training = TrainingFolder(folder)
    file = training.path / "training.json"
    if not file.is_file():
        raise ValueError(f"{training.path}: expected a fine-tuning, found no training.json")
    if read_json(file).get("reestimate_every") is None:
        return dict(static)
    return training.masks(epoch, static)


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _publish(aside: Path, place: Path) -> None:
    """Flush a folder that was written aside to disk and give it its name."""
    for file in aside.iterdir():
        with open(file, "rb") as written:
            os.fsync(written.fileno())
    sync_folder(aside)
    shutil.rmtree(place, ignore_errors=True)
    os.replace(aside, place)
    sync_folder(place.parent)
