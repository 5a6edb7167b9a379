"""The folder of a training: its identity, checkpoints, metrics, and the state to resume from.

A process may be killed at any moment, and the machine may lose power. Nothing is therefore written
where it is read. A file is written aside and renamed (`tracmod.files.durable`). A folder is written
under a temporary name; its files are flushed to disk, then the folder itself, and only then does it
get its name (`_publish`). A rename is atomic and comes last, so a reader finds the old content, the
new content or none, but never half of it. What an interrupted write leaves behind has a
temporary name, is never read, and is removed by the next write.

Two folders of one name cannot be exchanged atomically: an old checkpoint is removed before the new
one gets its name. That is safe, because a checkpoint is only replaced while the state to resume
from still lies before it; a training killed in between writes the checkpoint again. States have a
name of their own, the step, and an old state is removed after the new one is published.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from tracmod.choices import ADAM_EPSILON
from tracmod.files.durable import read_json, sync_folder, write_json
from tracmod.models.adapters import adapter_parameters, save_adapter
from tracmod.models.checkpoints import Checkpoint, load_checkpoints, save_second_moment
from tracmod.models.loading import class_names, quiet_transformers
from tracmod.subnetworks.head_mask import HeadMask
from tracmod.training.optimizer import HeadwiseAdamW

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class TrainingFolder:
    """The folder of one training.

    ```
    training.json          settings and digests of what is trained on what
    checkpoint-<epoch>/    transformers format (or PEFT's, of an adapter), tokenizer, tracmod.json
                           {epoch, step, learning_rate, loss}, perhaps second_moment.safetensors
    metrics.json           [{epoch, step, learning_rate, train_loss, accuracy: {language: share}}]
    masks/epoch-<epoch>/   <language>.json, the head masks of the epoch; only for dynamic masks
    resume/<step>/         model.safetensors, optimizer.safetensors, state.json; removed at the end
    ```
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def claim(self, identity: dict[str, Any], defaults: Mapping[str, Any]) -> None:
        """Record what this training is, or check that the folder holds the same training.

        Args:
            identity: everything that the training depends on.
            defaults: values of keys that an older `training.json` lacks, because the setting was
                added later.

        Raises:
            ValueError: the folder holds another training; the message names what differs.
        """
        file = self.path / "training.json"
        if not file.is_file():
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(file, identity)
            return
        recorded = {**defaults, **read_json(file)}
        keys = sorted(identity.keys() | recorded.keys())
        different = [key for key in keys if identity.get(key) != recorded.get(key)]
        if different:
            raise ValueError(
                f"{self.path}: holds a training with another {', '.join(different)}; "
                "remove the folder or train into another"
            )

    def is_complete(self, epochs: int, kept: Iterable[int]) -> bool:
        """Return whether the folder has the metrics of all epochs and the kept checkpoints."""
        return len(self._metrics()) == epochs and all(map(self.has_checkpoint, kept))

    def has_checkpoint(self, epoch: int) -> bool:
        """Return whether the checkpoint of an epoch has been written."""
        return self._checkpoint(epoch).is_dir()

    def checkpoints(self, epochs: Iterable[int]) -> list[Checkpoint]:
        """Return the checkpoints of these epochs, in the order given."""
        return load_checkpoints(self._checkpoint(epoch) for epoch in epochs)

    def write_checkpoint(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        epoch: int,
        step: int,
        learning_rate: float,
        second_moment: Mapping[str, Tensor] | None = None,
        epsilon: float = ADAM_EPSILON,
    ) -> None:
        """Write `checkpoint-<epoch>/`, replacing an earlier one."""
        temporary = self.path / f"checkpoint-{epoch}.tmp"
        _make_empty(temporary)
        is_adapted = bool(adapter_parameters(model))
        with quiet_transformers():
            if is_adapted:
                save_adapter(model, temporary)
            else:
                model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        record: dict[str, Any] = {
            "epoch": epoch,
            "step": step,
            "learning_rate": learning_rate,
            "loss": {"kind": "cross_entropy"},
        }
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        if frozen:
            record["frozen_parameters"] = frozen
        if is_adapted:
            record["class_names"] = class_names(model)
        write_json(temporary / "tracmod.json", record)
        if second_moment is not None:
            save_second_moment(second_moment, epsilon, temporary)
        _publish(temporary, self._checkpoint(epoch))

    def write_metrics(self, row: dict[str, Any]) -> None:
        """Add an epoch's row to `metrics.json`, after the rows of earlier epochs."""
        rows = [earlier for earlier in self._metrics() if earlier["epoch"] < row["epoch"]]
        write_json(self.path / "metrics.json", [*rows, row])

    def write_masks(self, epoch: int, masks: Mapping[str, HeadMask]) -> None:
        """Write the head masks of an epoch, replacing earlier ones."""
        for language, mask in masks.items():
            mask.save(self._mask(epoch, language), language=language, epoch=epoch)

    def masks(self, epoch: int, languages: Iterable[str]) -> dict[str, HeadMask]:
        """Load the head masks of an epoch by language.

        Raises:
            ValueError: a mask is missing or malformed.
        """
        return {language: HeadMask.load(self._mask(epoch, language)) for language in languages}

    def save_state(
        self, model: PreTrainedModel, optimizer: HeadwiseAdamW, step: int, loss_sum: float
    ) -> None:
        """Save the state after `step` steps, then remove earlier states."""
        temporary, published = self.path / "resume" / "tmp", self.path / "resume" / str(step)
        _make_empty(temporary)
        weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file(weights, temporary / "model.safetensors")
        save_file(optimizer.state(), temporary / "optimizer.safetensors")
        write_json(temporary / "state.json", {"step": step, "loss_sum": loss_sum})
        _publish(temporary, published)
        for earlier in self._saved_steps()[:-1]:
            shutil.rmtree(self.path / "resume" / str(earlier))

    def load_state(self, model: PreTrainedModel, optimizer: HeadwiseAdamW) -> tuple[int, float]:
        """Load the latest state into model and optimizer.

        Returns:
            The steps done, and the sum of the losses of the epoch's steps so far; (0, 0.0) if there
            is no state.
        """
        steps = self._saved_steps()
        if not steps:
            return 0, 0.0
        folder = self.path / "resume" / str(steps[-1])
        model.load_state_dict(load_file(folder / "model.safetensors"))
        optimizer.load_state(load_file(folder / "optimizer.safetensors"))
        state = read_json(folder / "state.json")
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

    def _saved_steps(self) -> list[int]:
        """Return the steps of the states on disk, earliest first."""
        folders = (self.path / "resume").glob("*/")
        return sorted(int(folder.name) for folder in folders if folder.name.isdecimal())


def epoch_masks(
    folder: str | Path, epoch: int, static: Mapping[str, HeadMask]
) -> dict[str, HeadMask]:
    """Return the head mask that each language was trained through in an epoch.

    Args:
        folder: folder of a sparse fine-tuning, such as `models/sparse` of a run folder.
        epoch: epoch from 1; the checkpoint with that number is the model at its end.
        static: the masks that the training was given, by language.

    Returns:
        Masks by language: `static`, or those of the epoch if the training has dynamic masks.

    Raises:
        ValueError: the folder holds no training, or its dynamic masks lack this epoch or a
            language.
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


def _publish(temporary: Path, published: Path) -> None:
    """Flush a folder to disk and give it its name, replacing an earlier folder of that name.

    The order matters: were the rename on disk before the files, a power failure could leave a
    published folder of empty files.
    """
    for file in temporary.iterdir():
        with open(file, "rb") as written:
            os.fsync(written.fileno())
    sync_folder(temporary)
    shutil.rmtree(published, ignore_errors=True)
    os.replace(temporary, published)
    sync_folder(published.parent)
