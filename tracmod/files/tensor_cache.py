"""Cache tensors on disk, with the identity of what they were made from, to resume long jobs."""

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
    """Write tensors as safetensors, with their identity and SHA-256 in its metadata."""
    file.parent.mkdir(parents=True, exist_ok=True)
    on_cpu: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        on_cpu[name] = tensor.cpu().contiguous()
        # safetensors takes no tensor twice, such as what query, key and value have in common.
        if any(on_cpu[name].data_ptr() == on_cpu[other].data_ptr() for other in list(on_cpu)[:-1]):
            on_cpu[name] = on_cpu[name].clone()
    # A single metadata entry, because safetensors does not fix the order of several.
    made_from = json.dumps({"identity": identity, "sha256": _digest(on_cpu)}, sort_keys=True)
    # Another worker may be writing the same file, so the temporary name is that of this process.
    write_file(file, save(on_cpu, {"made_from": made_from}), this_process())


def read_tensors(file: Path, identity: dict[str, Any]) -> dict[str, Tensor] | None:
    """Read the tensors that `write_tensors` wrote with this identity; None if there is no file.

    Raises:
        ValueError: Their identity differs (the message says in what), or the file is damaged.
    """
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            made_from = json.loads(opened.metadata()["made_from"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        stored, digest = made_from["identity"], made_from["sha256"]
    except (KeyError, TypeError, ValueError, SafetensorError):
        raise ValueError(f"{file} is damaged: remove it to compute it again") from None
    if digest != _digest(tensors):
        raise ValueError(f"{file} is damaged: remove it to compute it again")
    differing = identity_differences(identity, stored)
    if differing:
        raise ValueError(
            f"{file} was made with other settings: {'; '.join(differing)}; use another folder or "
            f"remove this one"
        )
    return tensors


def _digest(tensors: Mapping[str, Tensor]) -> str:
    return sha256(b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors)))
