"""Attention heads: masks over them, what belongs to one, and how important each is.

Shape suffixes: B examples of a batch, S tokens, I inputs of a layer, L layers, H heads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from tracmod.files.durable import write_file
from tracmod.models.architecture import AttentionLayer, attention_layers


class HeadMask:
    """Which attention heads take part: 1 kept, 0 masked, for every layer and head.

    A masked head's output is multiplied by 0 before the attention output projection, which is
    the same as setting the head's columns of that projection's weight to zero, or as taking the
    head out of the model.

    Attributes:
        array: (L, H) int8 of 0 and 1, read-only.
    """

    def __init__(self, mask_LH: ArrayLike) -> None:
        given = np.asarray(mask_LH)
        if given.ndim != 2 or 0 in given.shape:
            raise ValueError(f"head mask: expected (layers, heads), got shape {given.shape}")
        if not np.isin(given, (0, 1)).all():
            raise ValueError("head mask: expected only 0 and 1")
        self.array: NDArray[np.int8] = given.astype(np.int8)
        self.array.flags.writeable = False

    @classmethod
    def from_array(cls, mask_LH: ArrayLike) -> HeadMask:
        """Make a mask from (L, H) zeros and ones (or booleans) of any kind."""
        return cls(mask_LH)

    @classmethod
    def full(cls, num_layers: int, num_heads: int) -> HeadMask:
        """The mask that keeps every head."""
        return cls(np.ones((num_layers, num_heads), dtype=np.int8))

    @classmethod
    def random(cls, num_layers: int, num_heads: int, size: int, seed: int) -> HeadMask:
        """Keep `size` heads drawn uniformly without replacement; a function of `seed` alone.

        Raises:
            ValueError: `size` is not between 0 and the number of heads.
        """
        total = num_layers * num_heads
        if not 0 <= size <= total:
            raise ValueError(f"random head mask: expected a size from 0 to {total}, got {size}")
        flat = np.zeros(total, dtype=np.int8)
        flat[np.random.default_rng(seed).permutation(total)[:size]] = 1
        return cls(flat.reshape(num_layers, num_heads))

    @classmethod
    def load(cls, path: str | Path) -> HeadMask:
        """Read a mask that `save` wrote; what else the file says is left out.

        Raises:
            ValueError: no such file, or it holds no mask of the size it states.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"head mask {path}: no such file")
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(tree, dict):
                raise ValueError(f"got a bare {type(tree).__name__}")
            mask = cls(tree["mask"])
            stated = (tree["num_layers"], tree["num_heads"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"head mask {path}: expected num_layers, num_heads and mask: {error}"
            ) from None
        if mask.array.shape != stated:
            raise ValueError(
                f"head mask {path}: expected a mask of shape {stated}, got {mask.array.shape}"
            )
        return mask

    def save(self, path: str | Path, **fields: Any) -> None:
        """Write the mask as JSON, atomically.

        Args:
            path: the file; its folder is made.
            **fields: what else to say: language, score, full_score, threshold, seeds, ...
        """
        path = Path(path)
        num_layers, num_heads = self.array.shape
        tree = {
            **{name: value for name, value in fields.items() if name == "language"},
            "num_layers": num_layers,
            "num_heads": num_heads,
            "mask": self.array.tolist(),
            **fields,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, (json.dumps(tree) + "\n").encode())

    @property
    def size(self) -> int:
        """Number of heads kept."""
        return int(self.array.sum())

    def similarity(self, other: HeadMask) -> float:
        """Jaccard similarity, from 0 to 1: heads kept by both over heads kept by either.

        1 where neither keeps any. Large masks are alike by chance: `analysis.mask_similarity` has
        other measures, and what chance gives.
        """
        if self.array.shape != other.array.shape:
            raise ValueError(
                f"head masks: expected the same shape, got {self.array.shape} and "
                f"{other.array.shape}"
            )
        either = int((self.array | other.array).sum())
        return int((self.array & other.array).sum()) / either if either else 1.0

    def digest(self) -> str:
        """SHA-256 over shape and entries."""
        content = f"{self.array.shape}".encode() + self.array.tobytes()
        return hashlib.sha256(content).hexdigest()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, HeadMask):
            return NotImplemented
        return np.array_equal(self.array, other.array)

    def __hash__(self) -> int:
        return hash(self.digest())

    def __repr__(self) -> str:
        num_layers, num_heads = self.array.shape
        return f"HeadMask({self.size} of {num_layers}x{num_heads} heads kept)"

    @contextmanager
    def apply(self, model: nn.Module) -> Iterator[None]:
        """Mask the model's heads within the context, in every forward pass.

        The hooks go before any other on the attention output projections, so that whatever else
        reads a projection's input sees it masked. Nested contexts keep the heads that all of
        them keep. Layers with no masked head are not touched.

        Raises:
            ValueError: the mask's shape is not the model's (layers, heads).
        """
        layers = matching_layers(model, self)
        with ExitStack() as hooks:
            for layer, kept_H in zip(layers, self.array, strict=True):
                if not kept_H.all():
                    hooks.callback(_scale_heads(layer, torch.from_numpy(kept_H.copy())))
            yield


def _scale_heads(layer: AttentionLayer, kept_H: Tensor) -> Callable[[], None]:
    kept_I = kept_H.repeat_interleave(layer.head_dim)
    # Copied once to each device and dtype: a copy in every pass would wait for the GPU.
    copies: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def scale(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x_BSI = inputs[0]
        place = (x_BSI.device, x_BSI.dtype)
        if place not in copies:
            with torch.inference_mode(False):  # so that a later pass may record it
                copies[place] = kept_I.to(*place)
        return (x_BSI * copies[place], *inputs[1:])

    return layer.output.register_forward_pre_hook(scale, prepend=True).remove


def matching_layers(model: nn.Module, mask: HeadMask) -> list[AttentionLayer]:
    """The model's attention layers, after a check that `mask` has a row and entries for each.

    Raises:
        ValueError: the mask's shape is not the model's (layers, heads), or layers of the model have
            lost heads (`tracmod.load_pruned`).
    """
    layers = attention_layers(model)
    expected = [layer.num_heads for layer in layers]
    if len(set(expected)) > 1:
        raise ValueError(
            f"head mask: expected a model with as many heads in every layer, got {expected}: heads "
            f"have been taken out of it; mask the model that still has them"
        )
    if expected != [mask.array.shape[1]] * mask.array.shape[0]:
        raise ValueError(
            f"head mask: expected {len(layers)} layers of {expected[0]} heads, as the model has, "
            f"got shape {mask.array.shape}"
        )
    return layers


# --- what belongs to a head -----------------------------------------------------------------


@dataclass(frozen=True)
class HeadSlice:
    """The part of one parameter that belongs to one head: `parameter[index]`."""

    name: str
    parameter: Tensor
    layer: int
    head: int
    index: tuple[slice, ...]


def head_slices(model: nn.Module, mask: HeadMask | None = None) -> list[HeadSlice]:
    """List what belongs to each masked head of `mask`, or to every head without a mask.

    A head owns its rows of query, key and value (weight and bias) and its columns of the
    attention output projection's weight; that projection's bias belongs to no head.

    Returns:
        By layer, then parameter, then head.
    """
    layers = attention_layers(model) if mask is None else matching_layers(model, mask)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    slices = []
    for number, layer in enumerate(layers):
        for parameter, axis in head_parameters(layer):
            for head in range(layer.num_heads):
                if mask is not None and mask.array[number, head]:
                    continue
                own = slice(head * layer.head_dim, (head + 1) * layer.head_dim)
                index = (own,) if axis == 0 else (slice(None), own)
                slices.append(HeadSlice(names[id(parameter)], parameter, number, head, index))
    return slices


def head_parameters(layer: AttentionLayer) -> list[tuple[Tensor, int]]:
    """The parameters that heads divide, each with the axis they divide it along."""
    linears = (layer.query, layer.key, layer.value)
    parameters = [parameter for linear in linears for parameter in linear.parameters()]
    return [*((parameter, 0) for parameter in parameters), (layer.output.weight, 1)]


def kept_columns(layer: AttentionLayer, kept_H: Tensor) -> Tensor:
    """What is left along these axes without the heads that `kept_H` masks, int64.

    Attention needs a head: where none is kept, the first one's columns stay, and it is for the
    caller to see that they count nothing.
    """
    heads = kept_H.nonzero().flatten()
    if len(heads) == 0:
        heads = torch.zeros(1, dtype=torch.int64)
    columns = (heads[:, None] * layer.head_dim + torch.arange(layer.head_dim)).flatten()
    return columns.to(layer.query.weight.device)


# --- importance -----------------------------------------------------------------------------


def masked(model: PreTrainedModel, head_mask: HeadMask | None) -> Any:
    """The mask's context, or one that does nothing."""
    return nullcontext() if head_mask is None else head_mask.apply(model)
