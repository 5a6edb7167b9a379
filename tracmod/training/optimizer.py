"""AdamW in which every attention head is a parameter of its own and can be left out of a step.

In sparse fine-tuning, a batch must not move the heads that its mask leaves out. A masked head's
gradient is zero, but a zero gradient is not enough: AdamW would still move the weights along the
decaying first moment and shrink them by weight decay, and the second moment and the step count of
the bias correction would change with every batch that the head has no part in.

AdamW does skip a parameter whose gradient is None, and leaves its weights and state alone. But a
gradient is None for a whole parameter only, and all heads of a layer share theirs. Each head's rows
of query, key and value and columns of the output projection are therefore given to AdamW as
parameters of their own: views that share their memory with the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tracmod.choices import ADAM_EPSILON
from tracmod.models.architecture.family import is_rms_norm
from tracmod.subnetworks.head_mask import HeadMask, head_slices

STATE_KEYS = ("step", "exp_avg", "exp_avg_sq")  # of AdamW, for each parameter


class HeadwiseAdamW:
    """`torch.optim.AdamW` over a model's parameters, optionally with each head by itself.

    With `split_heads`, weights, both moments and step count of a head that is masked in a step stay
    bitwise as they were. A head is thus updated as by an AdamW that has only ever seen the batches
    in which the head took part, with a bias correction that counts only those.

    Args:
        model: model to train. Parameters that need no gradient are left out.
        weight_decay: decoupled weight decay. Biases and weights of norms do not decay.
        split_heads: whether steps can leave heads out.
        epsilon: what is added to the root of the second moment.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        weight_decay: float,
        split_heads: bool,
        epsilon: float = ADAM_EPSILON,
    ) -> None:
        self._units, self._split_heads = _units(model, split_heads), split_heads
        # AdamW's fused kernel is several times faster than the foreach one, but wrong on strided
        # views, which columns of a matrix are (torch 2.13, CPU): heads go without it.
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
        self._adamw = torch.optim.AdamW(groups, eps=epsilon)

    def step(self, learning_rate: float, mask: HeadMask | None = None) -> None:
        """Update the parameters from their gradients, except the heads that `mask` masks.

        Args:
            learning_rate: learning rate of this step.
            mask: heads to update; only with `split_heads`. None updates every head.
        """
        head_units = [unit for unit in self._units if unit.index is not None]
        assert mask is None or self._split_heads, "a mask needs split_heads"
        # The backward pass gave the whole parameters their gradients; a head gets its part of them.
        for unit in head_units:
            gradient, kept = unit.parameter.grad, mask is None or mask.array[unit.head]
            unit.tensor.grad = gradient[unit.index] if gradient is not None and kept else None
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        for unit in head_units:
            unit.tensor.grad = None

    @property
    def constants(self) -> tuple[float, float, float]:
        """AdamW's beta1, beta2 and epsilon."""
        defaults = self._adamw.defaults
        return *defaults["betas"], defaults["eps"]

    def updated(self, mask: HeadMask | None = None) -> list[Unit]:
        """Return what a step with this mask updates, of the parameters that have a gradient."""
        return [
            unit
            for unit in self._units
            if unit.head is None or mask is None or mask.array[unit.head]
        ]

    def state(self) -> dict[str, Tensor]:
        """Return moments and step counts as `<key>:<name>`, for a safetensors file.

        A parameter, or a head's part of one, that never had a gradient has no entries.
        """
        return {
            f"{key}:{unit.name}": value.contiguous()
            for unit in self._units
            for key, value in self._adamw.state.get(unit.tensor, {}).items()
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Load what `state` returned; the next steps are bitwise those of that optimizer.

        Raises:
            ValueError: an entry belongs to no parameter of the model.
        """
        known = {f"{key}:{unit.name}" for unit in self._units for key in STATE_KEYS}
        if not state.keys() <= known:
            raise ValueError(f"optimizer state: unexpected {min(state.keys() - known)}")
        for unit in self._units:
            if f"step:{unit.name}" not in state:
                continue
            step, *moments = (state[f"{key}:{unit.name}"] for key in STATE_KEYS)
            # As AdamW creates them: the fused kernel has the step on the parameter's device, the
            # other on the CPU; the moments of a strided view have the view's layout.
            first, second = (
                torch.zeros_like(unit.tensor, memory_format=torch.preserve_format).copy_(moment)
                for moment in moments
            )
            self._adamw.state[unit.tensor] = {
                "step": step.to(unit.tensor.device if unit.index is None else "cpu"),
                "exp_avg": first,
                "exp_avg_sq": second,
            }

    def second_moment(self) -> dict[str, Tensor]:
        """Return Adam's second moment by parameter name, after its bias correction.

        `v / (1 - beta2^t)`, where t counts the steps that the parameter, or the head's part of it,
        has taken. The entries of what never had a gradient are 0.
        """
        beta2 = self._adamw.defaults["betas"][1]
        moments: dict[str, Tensor] = {}
        for unit in self._units:
            moment = moments.setdefault(unit.parameter_name, torch.zeros_like(unit.parameter))
            state = self._adamw.state.get(unit.tensor)
            if state:
                part = moment if unit.index is None else moment[unit.index]
                part.copy_(state["exp_avg_sq"] / (1 - beta2 ** float(state["step"])))
        return {name: moment.contiguous() for name, moment in moments.items()}


@dataclass(frozen=True)
class Unit:
    """One parameter as AdamW sees it: a whole parameter of the model, or a head's part of one.

    Attributes:
        parameter_name, parameter: the whole parameter.
        tensor: what AdamW updates: the parameter itself, or a view of the head's part.
        decays: whether weight decay applies.
        index: `parameter[index]` is the head's part; None for a whole parameter.
        head: (layer, head), or None for a whole parameter.
        part: as in `HeadSlice`.
    """

    parameter_name: str
    parameter: Tensor
    tensor: Tensor
    decays: bool
    index: tuple[slice, ...] | None = None
    head: tuple[int, int] | None = None
    part: int = 0

    @property
    def name(self) -> str:
        """Name in the optimizer's state; the layer is part of the parameter's name."""
        return (
            self.parameter_name
            if self.head is None
            else f"{self.parameter_name}[{self.head[1]}]" + (f".{self.part}" if self.part else "")
        )


def _units(model: nn.Module, split_heads: bool) -> list[Unit]:
    """List the parameters that need a gradient, in the model's order, split by head if asked to."""
    decaying = {
        f"{module_name}.{name}" if module_name else name
        for module_name, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
        if name != "bias" and not (isinstance(module, nn.LayerNorm) or is_rms_norm(module))
    }
    slices = head_slices(model) if split_heads else []
    split = {part.name for part in slices}
    units = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name not in split:
            units.append(Unit(name, parameter, parameter, name in decaying))
        for part in slices:
            if part.name == name:
                view = parameter.detach()[part.index]
                head = (part.layer, part.head)
                decays = name in decaying
                units.append(Unit(name, parameter, view, decays, part.index, head, part.part))
    return units
