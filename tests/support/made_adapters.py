"""Folders of LoRA adapters for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tracmod.models.adapters import add_lora, save_adapter


def changed_adapter(model: Any, base: Path, folder: Path) -> Any:
    """Put an adapter on a model, change all that it trains, write its folder, and return it.

    Args:
        model: the model; it is changed.
        base: its folder, which the adapter's names.
        folder: folder to make.
    """
    adapted = add_lora(model, str(base), rank=2, alpha=4)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    folder.mkdir()
    save_adapter(adapted, folder)
    return adapted
