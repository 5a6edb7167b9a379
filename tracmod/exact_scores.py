"""The exact scores of one checkpoint as a file: whole or absent, with what they were made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tracmod.durable import sha256, write_file
from tracmod.store import identity_differences


def write_scores(file: Path, scores_QN: Tensor, identity: dict[str, Any]) -> None:
    """Write (Q, N) float32 scores as safetensors, their identity and SHA-256 in its metadata."""
    file.parent.mkdir(parents=True, exist_ok=True)
    scores_QN = scores_QN.contiguous()
    # One entry: safetensors writes several in no fixed order.
    made_from = json.dumps({"identity": identity, "sha256": _digest(scores_QN)}, sort_keys=True)
    write_file(file, save({"scores": scores_QN}, {"made_from": made_from}))


def read_scores(file: Path, identity: dict[str, Any]) -> Tensor | None:
    """The scores that `write_scores` wrote with this identity; None where there is no file.

    Raises:
        ValueError: the scores are of another identity (the sentence says in what), or damaged.
    """
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            made_from = json.loads(opened.metadata()["made_from"])
            scores_QN = opened.get_tensor("scores")
        stored, digest = made_from["identity"], made_from["sha256"]
    except (KeyError, TypeError, ValueError, SafetensorError):
        raise ValueError(f"{file} is damaged: remove it and it is made again") from None
    if digest != _digest(scores_QN):
        raise ValueError(f"{file} is damaged: remove it and it is made again")
    differing = identity_differences(identity, stored)
    if differing:
        raise ValueError(
            f"{file} holds other scores than these: {'; '.join(differing)}; take another folder or "
            f"remove this one"
        )
    return scores_QN


def _digest(scores_QN: Tensor) -> str:
    return sha256(scores_QN.numpy().tobytes())
