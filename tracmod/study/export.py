"""A run's model in one of its subnetworks, or under any mask, as a model of its own."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from tracmod.models.loading import load_model
from tracmod.study.pipeline import MODELS, Study
from tracmod.study.run_folder import RunFolder
from tracmod.subnetworks.head_mask import HeadMask, matching_layers
from tracmod.subnetworks.pruned_model import save_masked, save_pruned
from tracmod.training.folder import epoch_masks

FORMS = ("masked", "pruned")


@dataclass(frozen=True)
class Exported:
    """What `export_subnetwork` wrote.

    Attributes:
        mask: the heads that are kept.
        num_bytes: size of the weights on disk.
        loader: the function that loads the folder.
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

    Args:
        run_dir: a run folder with the model fine-tuned.
        out: a folder that does not exist yet, or an empty one.
        language: take the subnetwork of this language, of the sparse model the one that it was last
            trained through; or
        mask: take the mask of this JSON file.
        model: `full` or `sparse`.
        form: `masked` (see `save_masked`) or `pruned` (see `save_pruned`).

    Raises:
        ValueError: not exactly one of language and mask, a language without a subnetwork, a mask of
            another shape than the model's, an unknown model or form, no such run or checkpoint, or
            something at `out`.
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
    kept = _mask(run, language, mask)
    checkpoint = Study(run).checkpoints(model)[-1]
    if model == "sparse" and language is not None:  # masks may have been re-estimated since
        kept = epoch_masks(run.model(model), checkpoint.epoch, {language: kept})[language]
    network, tokenizer = load_model(checkpoint.path)
    matching_layers(network, kept)
    save = save_masked if form == "masked" else save_pruned
    made_from = {"model": model, "epoch": checkpoint.epoch, "form": form}
    if language is not None:
        made_from["language"] = language
    aside = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        save(network, kept, aside, tokenizer, made_from)
        os.replace(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    num_bytes = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    loader = "tracmod.load_pruned" if form == "pruned" else "from_pretrained of transformers"
    return Exported(kept, num_bytes, loader)


def _mask(run: RunFolder, language: str | None, file: str | Path | None) -> HeadMask:
    if (language is None) == (file is None):
        raise ValueError("export: expected either a language or a mask file")
    if file is not None:
        return HeadMask.load(file)
    assert language is not None
    path = run.subnetwork(language)
    if not path.is_file():
        found = sorted(one.stem for one in path.parent.glob("*.json"))
        raise ValueError(
            f"{run.path}: expected a language with a subnetwork, {', '.join(found) or 'none yet'}, "
            f"got {language}"
        )
    return HeadMask.load(path)
