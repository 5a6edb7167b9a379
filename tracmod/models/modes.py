"""Device, evaluation mode and frozen weights of a model, changed for a while and restored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode without weight gradients; restore both afterwards.

    Autograd records within the context, also when the caller is inside `torch.no_grad()` or
    `torch.inference_mode()`: gradients with respect to hidden states are needed.
    """
    outermost = model not in _trained_names
    if outermost:
        _trained_names[model] = trained_names(model)
    training = [(module, module.training) for module in model.modules()]
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, mode in training:
            module.training = mode
        for parameter, requires_grad in required:
            parameter.requires_grad_(requires_grad)
        if outermost:
            del _trained_names[model]


# The parameters that required a gradient when a model entered `frozen`.
_trained_names: WeakKeyDictionary[nn.Module, frozenset[str]] = WeakKeyDictionary()


def trained_names(model: nn.Module) -> frozenset[str]:
    """Return the names of the parameters that require a gradient, or did outside of `frozen`."""
    if model in _trained_names:
        return _trained_names[model]
    return frozenset(
        name for name, parameter in model.named_parameters() if parameter.requires_grad
    )


def on_device(model: PreTrainedModel, device: torch.device | str | None) -> ExitStack:
    """Move the model to a device, and back to its own when the returned context is left.

    Args:
        model: model to move, in place.
        device: where to; None leaves the model where it is.

    Returns:
        A context manager. The model is already on `device` when this function returns.
    """
    stack = ExitStack()
    original = next(model.parameters()).device
    if device is not None and torch.device(device) != original:
        to_device(model, device)
        stack.callback(to_device, model, original)
    return stack


def resolve_device(text: str | None) -> str:
    """Return the name of the device to compute on.

    Args:
        text: `cpu`, `cuda`, `cuda:1`, ...; None or "auto" is a GPU if there is one.

    Raises:
        ValueError: `text` is not the name of a CPU or GPU, or this machine has no such GPU.
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
    """Move a model in place and return it.

    `PreTrainedModel.to` does the same, but is wrapped in a way that hides its types.
    """
    nn.Module.to(model, torch.device(device))
    return model
