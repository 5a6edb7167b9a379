"""Tensors kept on disk between two tries of a long job: whole or absent, with what made them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tracmod.files.durable import identity_differences, sha256, this_process, write_file


def write_tensors(file: Path, tensors: Mapping[str, Tensor], identity: dict[str, Any]) -> None:
    """Write tensors as safetensors, their identity and SHA-256 in its metadata."""
    file.parent.mkdir(parents=True, exist_ok=True)
    kept = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    # One entry: safetensors writes several in no fixed order.
    made_from = json.dumps({"identity": identity, "sha256": _digest(kept)}, sort_keys=True)
    # Another worker may be making the same.
    write_file(file, save(kept, {"made_from": made_from}), this_process())


def read_tensors(file: Path, identity: dict[str, Any]) -> dict[str, Tensor] | None:
    """The tensors that `write_tensors` wrote with this identity; None where there is no file.

    Raises:
        ValueError: they are of another identity (the sentence says in what), or damaged.
    """
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            made_from = json.loads(opened.metadata()["made_from"])
            kept = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        stored, digest = made_from["identity"], made_from["sha256"]
    except (KeyError, TypeError, ValueError, SafetensorError):
        raise ValueError(f"{file} is damaged: remove it and it is made again") from None
    if digest != _digest(kept):
        raise ValueError(f"{file} is damaged: remove it and it is made again")
    differing = identity_differences(identity, stored)
    if differing:
        raise ValueError(
            f"{file} was made otherwise than is asked for: {'; '.join(differing)}; take another "
            f"folder or remove this one"
        )
    return kept


def _digest(tensors: Mapping[str, Tensor]) -> str:
    return sha256(b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors)))
