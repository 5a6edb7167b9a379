"""Comparison of checkpoints by the bytes of their tensors, without building models."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from tracmod.files.durable import read_json
from tracmod.models.adapters import ADAPTER_WEIGHTS, is_adapter_folder, plain_parameter_name
from tracmod.models.loading import WEIGHTS_FILES


def tensor_digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every tensor in a folder's safetensors files, by name.

    A tensor whose numbers are all the same has the digest "constant": it may be one that no
    training has moved yet, such as a new bias, at checkpoints that have nothing in common.

    Raises:
        ValueError: a file is missing or damaged.
    """
    digests = {}
    for file in _weights_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (it is no dict)
                    tensor = tensors.get_tensor(name)
                    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
                    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
                    digest.update(memoryview(flat.numpy()))
                    name = plain_parameter_name(name)
                    digests[name] = "constant" if _is_constant(tensor) else digest.hexdigest()
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{file}: expected weights that were copied whole, got a damaged or missing file: "
                f"{error}"
            ) from None
    return digests


def _is_constant(tensor: torch.Tensor) -> bool:
    numbers = tensor.flatten()
    return all(bool((part == numbers[:1]).all()) for part in (numbers[:99], numbers))


def _weights_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder, those of its index if it has shards."""
    if is_adapter_folder(folder):
        return [folder / ADAPTER_WEIGHTS]
    single, index = (folder / name for name in WEIGHTS_FILES)
    if single.is_file() or not index.is_file():
        return [single]
    tree = read_json(index)
    shards = tree.get("weight_map", {}) if isinstance(tree, dict) else {}
    return [folder / name for name in sorted(set(shards.values()))]


def equal_pairs(digests: Sequence[dict[str, str]]) -> list[tuple[int, int]]:
    """Return the pairs of checkpoints with the same tensors, by their positions."""
    count = len(digests)
    return [
        (first, second)
        for first in range(count)
        for second in range(first + 1, count)
        if digests[first] == digests[second]
    ]


def unmoved(digests: Sequence[dict[str, str]]) -> list[str]:
    """Return the names of tensors that are the same at all checkpoints while others differ."""
    first, *others = digests
    same = {name for name in first if all(other.get(name) == first[name] for other in others)}
    if not others or len(same) == len(first):
        return []
    return sorted(name for name in same if first[name] != "constant")
