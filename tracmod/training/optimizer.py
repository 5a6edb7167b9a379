"""AdamW in which every attention head is a parameter of its own, so that it can sit a step out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tracmod.subnetworks.head_mask import HeadMask, head_slices


@dataclass(frozen=True)
class _Unit:
    """What AdamW sees as one parameter: a whole parameter, or a head's part of one."""

    name: str
    tensor: Tensor  # the parameter itself, or a view of its part
    parameter: Tensor
    index: tuple[slice, ...] | None
    head: tuple[int, int] | None  # (layer, head)
    decays: bool


class HeadwiseAdamW:
    """`torch.optim.AdamW` over a model's parameters, optionally with each head's part on its own.

    With `split_heads` a head's rows of query, key and value and columns of the attention output
    projection are views given to AdamW as parameters of their own. A head masked in a step gets
    no gradient, and AdamW leaves a parameter without gradient alone: weights, both moments and
    the step count of the bias correction stay bitwise as they are, weight decay included. A head
    is thus updated as by an AdamW that has only ever seen the batches the head took part in.

    Biases and LayerNorm weights do not decay.
    """

    def __init__(self, model: nn.Module, *, weight_decay: float, split_heads: bool) -> None:
        self._units = _units(model, split_heads)
        # The fused kernel is several times faster but wrong on strided views (torch 2.13, CPU).
        fused = next(model.parameters()).device.type in ("cpu", "cuda")
        groups: list[dict[str, Any]] = []
        for whole in (True, False):
            for decays in (True, False):
                tensors = [
                    unit.tensor
                    for unit in self._units
                    if (unit.index is None) == whole and unit.decays == decays
                ]
                kernel = {"fused": True} if whole and fused else {"foreach": True}
                decay = weight_decay if decays else 0.0
                if tensors:
                    groups.append({"params": tensors, "weight_decay": decay, **kernel})
        self._adamw = torch.optim.AdamW(groups)

    def step(self, learning_rate: float, mask: HeadMask | None = None) -> None:
        """Update from the parameters' gradients; heads that `mask` masks do not move.

        Args:
            learning_rate: of this step.
            mask: only with `split_heads`; None: every head moves.
        """
        parts = [unit for unit in self._units if unit.index is not None]
        assert mask is None or parts, "a mask needs split_heads"
        for unit in parts:
            gradient, kept = unit.parameter.grad, mask is None or mask.array[unit.head]
            unit.tensor.grad = gradient[unit.index] if gradient is not None and kept else None
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        for unit in parts:
            unit.tensor.grad = None

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts by name, for safetensors; empty for what never had a gradient."""
        return {
            f"{key}:{unit.name}": value.contiguous()
            for unit in self._units
            for key, value in self._adamw.state.get(unit.tensor, {}).items()
        }

    def second_moment(self) -> dict[str, Tensor]:
        """Adam's second moment by parameter, after its bias correction; 0 without any gradient.

        `v / (1 - beta2^t)`, t the steps that the parameter, or the head's part of it, has taken.
        """
        beta2 = self._adamw.defaults["betas"][1]
        moments: dict[str, Tensor] = {}
        for unit in self._units:
            name = unit.name if unit.index is None else unit.name[: unit.name.rindex("[")]
            whole = moments.setdefault(name, torch.zeros_like(unit.parameter))
            own = self._adamw.state.get(unit.tensor)
            if own:
                place = whole if unit.index is None else whole[unit.index]
                place.copy_(own["exp_avg_sq"] / (1 - beta2 ** float(own["step"])))
        return {name: moment.contiguous() for name, moment in moments.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` gave; the next steps are bitwise those of that optimizer."""
        known = {f"{key}:{unit.name}" for unit in self._units for key in _STATE}
        if not state.keys() <= known:
            raise ValueError(f"optimizer state: unexpected {min(state.keys() - known)}")
        for unit in self._units:
            own = {key: state[f"{key}:{unit.name}"] for key in _STATE if _has(state, key, unit)}
            if own:
                self._adamw.state[unit.tensor] = {
                    "step": own["step"].to(unit.tensor.device if unit.index is None else "cpu"),
                    "exp_avg": _like(unit.tensor, own["exp_avg"]),
                    "exp_avg_sq": _like(unit.tensor, own["exp_avg_sq"]),
                }


_STATE = ("step", "exp_avg", "exp_avg_sq")


def _has(state: dict[str, Tensor], key: str, unit: _Unit) -> bool:
    return f"{key}:{unit.name}" in state


def _like(tensor: Tensor, values: Tensor) -> Tensor:
    """`values` in the memory layout AdamW itself gives the moments of `tensor`."""
    return torch.zeros_like(tensor, memory_format=torch.preserve_format).copy_(values)


def _units(model: nn.Module, split_heads: bool) -> list[_Unit]:
    decaying = _decaying(model)
    parts: dict[str, list[_Unit]] = {}
    for part in head_slices(model) if split_heads else []:
        parts.setdefault(part.name, []).append(
            _Unit(
                f"{part.name}[{part.head}]",
                part.parameter.detach()[part.index],
                part.parameter,
                part.index,
                (part.layer, part.head),
                part.name in decaying,
            )
        )
    units = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            whole = _Unit(name, parameter, parameter, None, None, name in decaying)
            units += parts.get(name, [whole])
    return units


def _decaying(model: nn.Module) -> set[str]:
    return {
        f"{module_name}.{name}" if module_name else name
        for module_name, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
        if name != "bias" and not isinstance(module, nn.LayerNorm)
    }
