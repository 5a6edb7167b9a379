"""The mean loss of a batch in a training whose examples have weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tracmod.choices import Denominator
from tracmod.files.durable import sha256


@dataclass(frozen=True)
class WeightedMean:
    """The mean loss of a batch of B examples, of which example i has the weight `1 + w_i`.

    With `fixed`, it is `sum_i (1 + w_i) l_i / B`: leaving an example out (w_i = -1) leaves the
    others with the weight that they had. With `weighted`, it is
    `sum_i (1 + w_i) l_i / sum_i (1 + w_i)`: the others of the batch then share its weight.

    Attributes:
        weights_N: (N,) the weights w_i of all training examples; 0 is the usual weight.
        denominator: `fixed` or `weighted`.
    """

    weights_N: Tensor
    denominator: Denominator = "fixed"

    def __call__(self, losses_B: Tensor, rows: list[int]) -> Tensor:
        """Return the mean loss of the batch with these rows of the training examples."""
        return mean_loss(losses_B, 1 + self.weights_N[rows].to(losses_B), self.denominator)

    def identity(self) -> dict[str, Any]:
        """Return what distinguishes the training from others."""
        weights = self.weights_N.double().numpy().astype("<f8").tobytes()
        return {"weights": sha256(weights), "denominator": self.denominator}


def mean_loss(losses_B: Tensor, scale_B: Tensor, denominator: Denominator) -> Tensor:
    """Return the mean of losses, each multiplied by its entry of `scale_B`."""
    total = (losses_B * scale_B).sum()
    if denominator == "fixed":
        return total / len(losses_B)
    # A batch without weight has no loss; its gradient is 0, and AdamW still moves by its moments.
    return total / scale_B.sum().clamp(min=torch.finfo(scale_B.dtype).tiny)
