"""Random projection of per-example gradients: its settings, and each layer's slot in the row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from tracmod import kernels
from tracmod.choices import ProjectionKind, ProjectionLayers, whole_number
from tracmod.gradients.capture import Layer

# Share of the row that exact gradients may take. The output layer of the classifier has most of the
# gradient's norm (85% on a 4-layer, 256-wide XLM-R), so storing it exactly removes most of the
# error. With a larger share, the grid that is left for the other layers would be too small.
EXACT_SHARE = 0.8
# Least number of rows to which the output side of a layer of many tokens is reduced; see
# `Projection`. The time of a pass hardly depends on it below 64, a register's worth of signs.
LEAST_ROWS = 64
# Version of the definition of features. Features of different versions must not be compared, so it
# is part of the identity of a store. 2: gradients are formed, or reduced on one side, and sketched.
VERSION = 2


@dataclass(frozen=True)
class Projection:
    """Settings of the random projection that turns a per-example gradient into `dim` numbers.

    The gradient G (O, I + 1) of a linear layer, whose last column is the bias, becomes::

        sketch(G)                  where an example usually has a single token
        sketch(R_out G)            elsewhere, with random signs R_out (k, O), k = 64 or more
        vec(R_out G R_in^T)        elsewhere for kind sjlt, on a grid of k x k numbers

    The sketch adds each element, with a random sign, to one of the K numbers. The expectation of
    `<f, f'>` over seeds is `<G, G'>`.

    All examples share most of the directions of g and x. A random matrix of k rows scales what they
    share by 1 +- sqrt(2 / k), which is the same for all pairs of examples, and so changes how much
    a layer counts; a sketch scales it by 1 +- sqrt(2 / K). Forming R_out G takes as much time as
    projecting x, and forming G itself takes none to speak of in the layers with a single token
    (`Layer.few_tokens`: pooler, classifier, most of the last encoder layer). Gradients of LayerNorm
    and embeddings go through a count sketch, too.

    Attributes:
        dim: K, the numbers per example, including those of layers that are stored exactly.
        kind: `rademacher` (dense random signs on one side, then a sketch) or `sjlt` (matrices with
            one nonzero entry per column on both sides: faster, with a larger error).
        seed: Seed of all random entries. They are a stateless function of (seed, layer, row,
            column): the same on every device and for every batch.
        layers: `accumulate` adds the projections of all layers, each with its own signs, in one
            slot, next to the exact gradients of linear layers that are small enough (usually the
            output layer of the classifier). `concatenate` gives every layer its own slot.

    Raises:
        ValueError: `kind` or `layers` is unknown, `dim` is below 1, or `seed` is negative.

    Examples:
        >>> import tracmod as tm
        >>> tm.Projection(dim=4096, kind="sjlt", seed=1)
        Projection(dim=4096, kind='sjlt', seed=1, layers='accumulate')

    Source: Choe et al. 2024 (LoGra), arXiv 2405.13954.
    """

    dim: int
    kind: ProjectionKind = "rademacher"
    seed: int = 0
    layers: ProjectionLayers = "accumulate"

    def __post_init__(self) -> None:
        object.__setattr__(self, "dim", whole_number("Projection: dim", self.dim))
        if self.kind not in ("rademacher", "sjlt"):
            raise ValueError(f"Projection: kind: expected rademacher or sjlt, got {self.kind!r}")
        object.__setattr__(self, "seed", whole_number("Projection: seed", self.seed, 0))
        if self.layers not in ("accumulate", "concatenate"):
            raise ValueError(
                f"Projection: layers: expected accumulate or concatenate, got {self.layers!r}"
            )

    @property
    def identity(self) -> dict[str, Any]:
        """The settings and the version of the definition, which features depend on."""
        return {**asdict(self), "version": VERSION}

    def slots(self, layers: Sequence[Layer]) -> dict[str, Slot]:
        """Return the slot of each layer, by the layer's name.

        Raises:
            ValueError: `layers` is `concatenate`, and there are more layers than numbers.
        """
        if self.layers == "concatenate":
            return self._concatenated(layers)
        return self._accumulated(layers)

    def _accumulated(self, layers: Sequence[Layer]) -> dict[str, Slot]:
        """Store the smallest linear layers exactly, in a share of the row; add up the others."""
        slots = {}
        offset = 0
        for layer in sorted(layers, key=_exact_size):
            size = _exact_size(layer)
            if layer.kind == "linear" and offset + size <= EXACT_SHARE * self.dim:
                slots[layer.name] = _exact_slot(layer, offset)
                offset += size
        for layer in layers:
            slots.setdefault(layer.name, self._random_slot(layer, offset, self.dim - offset))
        return slots

    def _concatenated(self, layers: Sequence[Layer]) -> dict[str, Slot]:
        """Give every layer an equal share of the row; store it exactly if it fits."""
        if self.dim < len(layers):
            raise ValueError(
                f"Projection: dim: expected at least one per layer, {len(layers)}, to concatenate "
                f"them, got {self.dim}"
            )
        slots = {}
        share = self.dim // len(layers)
        for rank, layer in enumerate(layers):
            if layer.kind != "embedding" and _exact_size(layer) <= share:
                slots[layer.name] = _exact_slot(layer, rank * share)
            else:
                slots[layer.name] = self._random_slot(layer, rank * share, share)
        return slots

    def _random_slot(self, layer: Layer, offset: int, size: int) -> Slot:
        """Return a slot of at most `size` numbers for a layer that is not stored exactly."""
        k_in = math.isqrt(size)
        if layer.few_tokens:
            return Slot("sketch", offset, 1, size)
        if self.kind == "rademacher" and layer.kind == "linear":
            # With half the rows of a square grid, one side errs no more than the two sides of it.
            return Slot("sketch", offset, 1, size, rows=max(LEAST_ROWS, k_in // 2))
        return Slot(self.kind, offset, size // k_in, k_in)  # an almost square grid


@dataclass(frozen=True)
class Slot:
    """A layer's part of the feature row: `k_out * k_in` numbers from column `offset`.

    `kind` and `rows` are those of `kernels.project_gradients`; a sketch has `k_out` 1.
    """

    kind: kernels.Kind
    offset: int
    k_out: int
    k_in: int
    rows: int = 0


def _exact_size(layer: Layer) -> int:
    """Return the number of parameters of a layer."""
    if layer.kind == "linear":
        return layer.out_features * (layer.in_features + layer.bias)
    if layer.kind == "elementwise":
        return layer.in_features * (1 + layer.bias)
    return layer.in_features * layer.out_features


def _exact_slot(layer: Layer, offset: int) -> Slot:
    if layer.kind == "linear":
        return Slot("identity", offset, layer.out_features, layer.in_features + layer.bias)
    return Slot("identity", offset, 1 + layer.bias, layer.in_features)


class ProjectionKeys(NamedTuple):
    """The keys of a layer's random matrices, as for `kernels.project_gradients`."""

    input: int
    output: int


def projection_keys(layer: Layer) -> ProjectionKeys:
    """Return the keys of a layer's projection.

    Input keys are even and output keys odd, so no two are equal.
    """
    return ProjectionKeys(2 * layer.input_position, 2 * layer.position + 1)
