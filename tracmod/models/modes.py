"""Device, evaluation mode and frozen weights of a model, changed for a while and restored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from operator import eq, is_
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ModelState:
    """Everything of a model that a forward pass may change, remembered in order to be restored.

    Some models change themselves in a forward pass: BigBird exchanges its attention modules for
    good when it meets a short text, others count calls or keep caches. Gradients are those of the
    model as it was given, for each example, so this is undone after every pass. Weights are not
    copied; no forward pass writes to them, or `check_classifier` refuses the model.

    Restoring compares by identity, which takes well below a millisecond for a large encoder.
    """

    def __init__(self, model: nn.Module) -> None:
        from transformers import PreTrainedConfig  # whoever has a model has imported it already

        owners: dict[int, dict[str, Any]] = {}
        for module in model.modules():
            attributes = vars(module)
            owners[id(attributes)] = attributes
            for value in attributes.values():
                if isinstance(value, PreTrainedConfig):
                    owners[id(vars(value))] = vars(value)
        self._mappings: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._others: list[tuple[list[Any] | set[Any], list[Any]]] = []
        for attributes in owners.values():
            self._mappings.append((attributes, dict(attributes)))
            for value in attributes.values():
                if isinstance(value, dict):
                    self._mappings.append((value, dict(value) if value else {}))
                elif isinstance(value, list | set):
                    self._others.append((value, list(value)))
        # `persistent` or not: an attribute of a module that is a tensor counts as a buffer, too.
        tensors = {
            id(value): value
            for _, saved in self._mappings
            for value in saved.values()
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
        }
        self._tensors = [
            (tensor, tensor._version, tensor.detach().clone())
            for tensor in tensors.values()
            if not tensor.is_inference() and not tensor.is_meta
        ]

    @torch.no_grad()
    def restore(self) -> bool:
        """Undo what has changed since, and return whether anything had."""
        changed = False
        for mapping, saved in self._mappings:
            if not _same_items(mapping, saved):
                mapping.clear()
                mapping.update(saved)
                changed = True
        for values, saved_values in self._others:
            if len(values) != len(saved_values) or not all(map(is_, values, saved_values)):
                values.clear()
                add = values.extend if isinstance(values, list) else values.update
                add(saved_values)
                changed = True
        for position, (tensor, version, content) in enumerate(self._tensors):
            if tensor._version != version:
                tensor.copy_(content)
                self._tensors[position] = (tensor, tensor._version, content)
                changed = True
        return changed


def _same_items(mapping: dict[Any, Any], saved: dict[Any, Any]) -> bool:
    """Return whether two dicts have the same keys and the very same objects, in the same order."""
    if not mapping and not saved:
        return True
    return (
        len(mapping) == len(saved)
        and all(map(is_, mapping.values(), saved.values()))
        and all(map(eq, mapping, saved))
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[ModelState]:
    """Put the model into evaluation mode; restore all that passes have changed afterwards.

    A model that was compiled in place (`model.compile()`) runs uncompiled within the context.

    Yields:
        The state of the model within the context, to be restored between passes.
    """
    modes = [
        (module, module.training, getattr(module, "_compiled_call_impl", None))
        for module in model.modules()
    ]
    try:
        model.eval()
        for module, _, compiled in modes:
            if compiled is not None:
                module._compiled_call_impl = None
        state = ModelState(model)
        try:
            yield state
        finally:
            state.restore()
    finally:
        for module, training, compiled in modes:
            module.training = training
            if compiled is not None:
                module._compiled_call_impl = compiled


@contextmanager
def in_float64(model: nn.Module) -> Iterator[None]:
    """Compute with a model in float64 for a while; its weights come back bit for bit.

    Unlike a copy, this holds for hooks and forward passes that refer to the model's own modules.
    """
    state = ModelState(model)
    weights = [(parameter, parameter.data) for parameter in model.parameters()]
    try:
        for parameter, data in weights:
            parameter.data = data.double()
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_floating_point():
                    setattr(module, name, buffer.double())
        yield
    finally:
        for parameter, data in weights:
            parameter.data = data
        state.restore()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode without weight gradients; restore both afterwards.

    Autograd records within the context, also when the caller is inside `torch.no_grad()` or
    `torch.inference_mode()`: gradients with respect to hidden states are needed. An autocast of the
    caller does not apply.
    """
    outermost = model not in _trained_names
    if outermost:
        _trained_names[model] = trained_names(model)
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with evaluating(model):
        model.requires_grad_(False)
        try:
            with (
                torch.inference_mode(False),
                torch.enable_grad(),
                torch.autocast("cpu", enabled=False),
                torch.autocast("cuda", enabled=False),
            ):
                yield
        finally:
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

    Raises:
        ValueError: `device` is no device, or this machine has no such GPU.

    Returns:
        A context manager. The model is already on `device` when this function returns.
    """
    stack = ExitStack()
    original = next(model.parameters()).device
    if device is not None:
        device = checked_device(device)
    if device is not None and device != original:
        to_device(model, device)
        stack.callback(to_device, model, original)
    return stack


def checked_device(device: torch.device | str) -> torch.device:
    """Return a device that torch knows and, if it is a GPU, that this machine has.

    Raises:
        ValueError: it is none.
    """
    try:
        checked = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        raise ValueError(f"device: expected cpu, cuda, cuda:1, ..., got {device!r}") from None
    if checked.type in ("cpu", "cuda", "meta"):
        resolve_device(str(checked))
    return checked


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


def device_of_worker(device: str, number: int) -> str:
    """Return the device of a worker: of several GPUs of a machine, each worker has its own.

    Args:
        device: the device that was chosen for the work.
        number: number of the worker, from 0.
    """
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    return f"cuda:{number % gpus}" if gpus > 1 else device


def to_device(model: PreTrainedModel, device: torch.device | str) -> PreTrainedModel:
    """Move a model in place and return it.

    `PreTrainedModel.to` does the same, but is wrapped in a way that hides its types.
    """
    nn.Module.to(model, torch.device(device))
    return model
