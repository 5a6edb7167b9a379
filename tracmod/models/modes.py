"""Device and evaluation mode of a model, changed for a while and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from transformers import (
    PreTrainedModel,
)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no weight gradients; both are put back afterwards.

    Within it autograd records, also inside `torch.no_grad()` or `torch.inference_mode()`.
    """
    training = [(module, module.training) for module in model.modules()]
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, mode in training:
            module.training = mode
        for parameter, require in required:
            parameter.requires_grad_(require)


def on_device(model: PreTrainedModel, device: torch.device | str | None) -> ExitStack:
    """Move the model to a device and, on leaving the context, back."""
    stack = ExitStack()
    before = next(model.parameters()).device
    if device is not None and torch.device(device) != before:
        to_device(model, device)
        stack.callback(to_device, model, before)
    return stack


def resolve_device(text: str | None) -> str:
    """The device to compute on; None or "auto" is a GPU if there is one.

    Raises:
        ValueError: not a name of a CPU or GPU, or that GPU is not there.
    """
    if text is None or text == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu, cuda, cuda:1, ..., got {text}")
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise ValueError(f"device: got {text}, but torch finds {gpus or 'no'} GPUs here")
    return text


def to_device(model: PreTrainedModel, device: torch.device | str) -> PreTrainedModel:
    """Move a model in place. (`PreTrainedModel.to` is wrapped in a way that hides its types.)"""
    nn.Module.to(model, torch.device(device))
    return model
