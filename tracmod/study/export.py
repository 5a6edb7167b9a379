"""Export of a run's model under one head mask, as a model of its own."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from tracmod.models.adapters import merge_adapters
from tracmod.models.loading import load_model
from tracmod.study.context import MODELS, RunContext
from tracmod.study.run_folder import RunFolder
from tracmod.subnetworks.head_mask import HeadMask, matching_layers
from tracmod.subnetworks.pruned_model import save_masked, save_pruned
from tracmod.training.folder import epoch_masks

FORMS = ("masked", "pruned")


@dataclass(frozen=True)
class Exported:
    """The result of `export_subnetwork`.

    Attributes:
        mask: The heads that are left.
        num_bytes: The size of the weights on disk.
        loader: The function that loads the folder.
    """

    mask: HeadMask
    num_bytes: int
    loader: str


def export_subnetwork(
    run_dir: str | Path,
    out: str | Path,
    *,
    language: str | None = None,
    mask: str | Path | None = None,
    model: str = "full",
    form: str = "masked",
) -> Exported:
    """Write the last checkpoint of a run's model without the heads of a mask, whole or not at all.

    A LoRA adapter is merged into its base model first.

    Args:
        run_dir: A run folder in which the model is fine-tuned.
        out: A folder that does not exist yet, or an empty one.
        language: The language whose subnetwork is taken; of the sparse model that is the one it was
            last trained through.
        mask: A JSON file with a mask, in place of a language.
        model: `full` or `sparse`.
        form: `masked` (see `save_masked`) or `pruned` (see `save_pruned`).

    Raises:
        ValueError: Both or neither of language and mask are given, the language has no subnetwork,
            the mask does not fit the model, the model or form is unknown, there is no such run or
            checkpoint, or something is at `out`.
    """
    out = Path(out)
    if model not in MODELS or form not in FORMS:
        raise ValueError(
            f"export: expected a model of {', '.join(MODELS)} and a form of {', '.join(FORMS)}, "
            f"got {model} and {form}"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: expected a folder that is empty or not there yet")
    run = RunFolder(run_dir)
    head_mask = _given_mask(run, language, mask)
    checkpoint = RunContext(run).checkpoints(model)[-1]
    if model == "sparse" and language is not None:  # masks may have been re-estimated since pruning
        masks = epoch_masks(run.model(model), checkpoint.epoch, {language: head_mask})
        head_mask = masks[language]
    network, tokenizer = load_model(checkpoint.path)
    merge_adapters(network)
    matching_layers(network, head_mask)
    save = save_masked if form == "masked" else save_pruned
    made_from = {"model": model, "epoch": checkpoint.epoch, "form": form}
    if language is not None:
        made_from["language"] = language
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        save(network, head_mask, temporary, tokenizer, made_from)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    num_bytes = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    loader = "tracmod.load_pruned" if form == "pruned" else "from_pretrained of transformers"
    return Exported(head_mask, num_bytes, loader)


def _given_mask(run: RunFolder, language: str | None, file: str | Path | None) -> HeadMask:
    if (language is None) == (file is None):
        raise ValueError("export: expected either a language or a mask file")
    if file is not None:
        return HeadMask.load(file)
    assert language is not None
    path = run.subnetwork(language)
    if not path.is_file():
        languages = sorted(subnetwork.stem for subnetwork in path.parent.glob("*.json"))
        raise ValueError(
            f"{run.path}: expected a language with a subnetwork, "
            f"{', '.join(languages) or 'none yet'}, got {language}"
        )
    return HeadMask.load(path)
