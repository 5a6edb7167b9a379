"""Random projection of per-example gradients: its settings, and where each layer lands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tracmod.choices import ProjectionKind, ProjectionLayers
from tracmod.gradients.capture import Layer

# Share of the row that exact blocks may take. The output layer of the classifier holds most of the
# gradient's norm (85% on a 4-layer, 256-wide XLM-R), so keeping it exactly removes most of the
# error; past this share the rest of the gradient is squeezed into too small a grid.
EXACT_SHARE = 0.8


# Independent projections of a pooled layer (pooler, classifier). Its gradient is one product g x^T,
# and both factors lie near a direction that all examples share: a grid of k x k scales what they
# have in common by a random factor, 1 +- sqrt(4 / k), the same for all pairs, and these layers hold
# most of the norm that is not kept exactly. So many draws, averaged, cost next to nothing there. A
# square of a power of two: dividing by its root rounds nothing, in bfloat16 either.
POOLED_DRAWS = 4


@dataclass(frozen=True)
class Projection:
    """How per-example gradients become rows of `dim` numbers.

    A linear layer's gradient G (O, I + 1; the bias is the last column) becomes
    `vec(R_out G R_in^T)` with `R_out` (k_out, O) and `R_in` (k_in, I + 1), computed from the
    layer's input and output gradient without ever forming G (LoGra, arXiv 2405.13954). Of
    layers beyond the encoder (pooler, classifier) several such draws are added up, over the root of
    their number. LayerNorm and embedding gradients go through a count sketch into a grid of the
    same size.

    Attributes:
        dim: K, numbers per example, exact blocks included.
        kind: `rademacher` (dense random signs) or `sjlt` (one non-zero per column: its cost does
            not grow with `dim`).
        seed: of all random entries; they are a stateless function of (seed, layer, row, column),
            the same on every device and for every batch size.
        layers: `accumulate` sums the projections of all layers, each with its own signs, into one
            grid, beside the exact gradients of linear layers that are small enough (the
            classifier's output); `concatenate` gives each layer its own part of the row.

    Raises:
        ValueError: unknown kind or layers, dim below 1, or negative seed.
    """

    dim: int
    kind: ProjectionKind = "rademacher"
    seed: int = 0
    layers: ProjectionLayers = "accumulate"

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ValueError(f"Projection: dim: expected at least 1, got {self.dim}")
        if self.kind not in ("rademacher", "sjlt"):
            raise ValueError(f"Projection: kind: expected rademacher or sjlt, got {self.kind!r}")
        if self.seed < 0:
            raise ValueError(f"Projection: seed: expected 0 or more, got {self.seed}")
        if self.layers not in ("accumulate", "concatenate"):
            raise ValueError(
                f"Projection: layers: expected accumulate or concatenate, got {self.layers!r}"
            )

    def slots(self, layers: Sequence[Layer]) -> dict[str, Slot]:
        """Where in the row each layer's projection goes, by layer name.

        Raises:
            ValueError: `concatenate` with more layers than numbers.
        """
        if self.layers == "concatenate":
            return self._concatenated(layers)
        return self._accumulated(layers)

    def _accumulated(self, layers: Sequence[Layer]) -> dict[str, Slot]:
        slots = {}
        offset = 0
        for layer in sorted(layers, key=_exact_size):
            size = _exact_size(layer)
            if layer.kind == "linear" and offset + size <= EXACT_SHARE * self.dim:
                slots[layer.name] = _exact_slot(layer, offset)
                offset += size
        grid = _grid(self.dim - offset)
        for layer in layers:
            slots.setdefault(layer.name, Slot(self.kind, offset, *grid, _draws(layer)))
        return slots

    def _concatenated(self, layers: Sequence[Layer]) -> dict[str, Slot]:
        if self.dim < len(layers):
            raise ValueError(
                f"Projection: dim: expected at least {len(layers)}, one per layer, to concatenate, "
                f"got {self.dim}"
            )
        slots = {}
        share = self.dim // len(layers)
        for rank, layer in enumerate(layers):
            if layer.kind != "embedding" and _exact_size(layer) <= share:
                slots[layer.name] = _exact_slot(layer, rank * share)
            else:
                slots[layer.name] = Slot(self.kind, rank * share, *_grid(share), _draws(layer))
        return slots


@dataclass(frozen=True)
class Slot:
    """One layer's part of the feature row: `k_out * k_in` numbers from `offset` on.

    With several draws, that many independent projections P_t of the layer are added into it:
    `sum_t P_t(G) / sqrt(draws)`.
    """

    kind: Literal["rademacher", "sjlt", "identity"]
    offset: int
    k_out: int
    k_in: int
    draws: int = 1


def _exact_size(layer: Layer) -> int:
    if layer.kind == "linear":
        return layer.out_features * (layer.in_features + layer.bias)
    if layer.kind == "elementwise":
        return layer.in_features * (1 + layer.bias)
    return layer.in_features * layer.out_features


def _exact_slot(layer: Layer, offset: int) -> Slot:
    if layer.kind == "linear":
        return Slot("identity", offset, layer.out_features, layer.in_features + layer.bias)
    return Slot("identity", offset, 1 + layer.bias, layer.in_features)


def _draws(layer: Layer) -> int:
    return POOLED_DRAWS if layer.pooled else 1


def projection_keys(layer: Layer, draw: int) -> tuple[int, int]:
    """`input_key` and `output_key` of one draw of a layer's projection."""
    return 2 * layer.input_position + (draw << 32), 2 * layer.position + 1 + (draw << 32)


def _grid(size: int) -> tuple[int, int]:
    k_in = math.isqrt(size)
    return size // k_in, k_in
