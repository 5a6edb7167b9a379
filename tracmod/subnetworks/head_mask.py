"""Masks over attention heads, and the slices of the parameters that belong to one head.

Self-attention with H heads of width D computes, for a sequence x and head h with the rows
`h * D : (h + 1) * D` of the query, key and value projections,

    q_h = x W_q[h]^T + b_q[h]    (k_h and v_h likewise)
    o_h = softmax(q_h k_h^T / sqrt(D)) v_h
    y   = sum_h o_h W_o[:, h]^T + b_o

A head thus reaches the rest of the model through its own columns of W_o alone. Multiplying o_h by
0, setting these columns to zero and taking the head out of the model give the same y. The rows
W_q[h], W_k[h], W_v[h], their biases and the columns W_o[:, h] belong to head h; b_o is added once
for all heads and belongs to none. While a head is masked, the gradients of all that belongs to it
are exactly zero, because o_h is multiplied by 0 on its way to the loss.

Where several heads share keys and values (grouped heads), a head owns its queries and its columns
of W_o; keys and values belong to none.

Shape suffixes: B examples of a batch, S tokens, I inputs of a layer, L layers, H heads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from tracmod.choices import instance, whole_number
from tracmod.files.durable import write_file
from tracmod.models.adapters import AdaptedLinear
from tracmod.models.architecture import AttentionLayer, attention_layers

MOST_HEADS = 2**15  # of a layer, and layers: far beyond any model


class HeadMask:
    """Which attention heads take part in a forward pass: 1 kept, 0 masked.

    Masks are values: they cannot be changed, and equal masks are `==` and have the same hash.

    Attributes:
        array: (L, H) int8 of 0 and 1, read-only.

    Examples:
        >>> import tracmod as tm
        >>> mask = tm.HeadMask([[1, 0, 1], [1, 1, 1]])
        >>> mask
        HeadMask(5 of 2x3 heads kept)
        >>> mask == tm.HeadMask.from_array([[True, False, True], [True, True, True]])
        True
    """

    def __init__(self, mask_LH: ArrayLike) -> None:
        try:
            given = np.asarray(mask_LH)
        except ValueError:
            raise ValueError(
                f"head mask: expected as many heads in every layer, got {mask_LH!r}"
            ) from None
        if given.ndim != 2 or 0 in given.shape:
            raise ValueError(f"head mask: expected (layers, heads), got shape {given.shape}")
        if not np.isin(given, (0, 1)).all():
            raise ValueError("head mask: expected only 0 and 1")
        self.array: NDArray[np.int8] = given.astype(np.int8)
        self.array.flags.writeable = False

    @classmethod
    def from_array(cls, mask_LH: ArrayLike) -> HeadMask:
        """Create a mask from an array or nested lists; the same as the constructor.

        Args:
            mask_LH: (L, H) zeros and ones, or booleans, of any dtype.

        Raises:
            ValueError: another number of dimensions, no heads, or other values.

        Examples:
            >>> import tracmod as tm
            >>> tm.HeadMask.from_array([[1, 0], [0, 1]]).size
            2
        """
        return cls(mask_LH)

    @classmethod
    def full(cls, num_layers: int, num_heads: int) -> HeadMask:
        """Create the mask that keeps every head.

        Examples:
            >>> import tracmod as tm
            >>> tm.HeadMask.full(12, 12)
            HeadMask(144 of 12x12 heads kept)
        """
        return cls(np.ones(_shape(num_layers, num_heads), dtype=np.int8))

    @classmethod
    def random(cls, num_layers: int, num_heads: int, size: int, seed: int) -> HeadMask:
        """Create a mask that keeps `size` heads, drawn uniformly without replacement.

        Args:
            num_layers, num_heads: shape of the mask.
            size: number of heads to keep.
            seed: the mask is a function of the seed; no global generator is used.

        Raises:
            ValueError: `size` is not between 0 and the number of heads, or another argument is out
                of range.

        Examples:
            >>> import tracmod as tm
            >>> mask = tm.HeadMask.random(2, 4, size=5, seed=0)
            >>> mask.size, mask == tm.HeadMask.random(2, 4, size=5, seed=0)
            (5, True)
        """
        shape = _shape(num_layers, num_heads)
        total = shape[0] * shape[1]
        size = whole_number("random head mask: size", size, 0, total)
        seed = whole_number("random head mask: seed", seed, 0)
        flat = np.zeros(total, dtype=np.int8)
        flat[np.random.default_rng(seed).permutation(total)[:size]] = 1
        return cls(flat.reshape(shape))

    @classmethod
    def load(cls, path: str | Path) -> HeadMask:
        """Load a mask from a file that `save` wrote, without the file's other fields.

        Raises:
            ValueError: the file does not exist, or holds no mask of the shape that it states.

        Examples:
            >>> import tempfile
            >>> import tracmod as tm
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     tm.HeadMask([[1, 0], [1, 1]]).save(f"{folder}/en.json", language="en")
            ...     tm.HeadMask.load(f"{folder}/en.json")
            HeadMask(3 of 2x2 heads kept)
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
        """Write the mask as JSON, atomically: num_layers, num_heads, mask and `fields`.

        Args:
            path: file to write; its folder is created.
            **fields: further entries of the file, such as language, score, full_score, threshold
                or seeds. `language` is written first.

        Examples:
            >>> import pathlib, tempfile
            >>> import tracmod as tm
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     path = pathlib.Path(folder, "en.json")
            ...     tm.HeadMask([[1, 0], [1, 1]]).save(path, language="en")
            ...     print(path.read_text().strip())
            {"language": "en", "num_layers": 2, "num_heads": 2, "mask": [[1, 0], [1, 1]]}
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
        """Number of heads kept.

        Examples:
            >>> import tracmod as tm
            >>> tm.HeadMask([[1, 0], [1, 1]]).size
            3
        """
        return int(self.array.sum())

    def similarity(self, other: HeadMask) -> float:
        """Compute the Jaccard similarity: heads kept by both over heads kept by either.

        From 0 to 1, and 1 if neither mask keeps a head. Masks that keep most heads are similar by
        chance: `analysis.similarity.mask_similarity` has other measures and what chance gives.

        Raises:
            ValueError: the masks have different shapes.

        Examples:
            >>> import tracmod as tm
            >>> tm.HeadMask([[1, 1, 0, 1]]).similarity(tm.HeadMask([[1, 0, 0, 1]]))
            0.6666666666666666
        """
        if self.array.shape != other.array.shape:
            raise ValueError(
                f"head masks: expected the same shape, got {self.array.shape} and "
                f"{other.array.shape}"
            )
        either = int((self.array | other.array).sum())
        return int((self.array & other.array).sum()) / either if either else 1.0

    def digest(self) -> str:
        """Compute the SHA-256 digest of shape and entries, as 64 hexadecimal digits.

        Examples:
            >>> import tracmod as tm
            >>> tm.HeadMask([[1, 0]]).digest() == tm.HeadMask([[1], [0]]).digest()
            False
        """
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
        """Mask the model's heads in every forward pass within the context.

        Nested contexts keep the heads that all of their masks keep. Layers without a masked head
        are not touched, so that the full mask changes no bit.

        Args:
            model: a classifier of a supported family; its weights are not changed.

        Raises:
            ValueError: the mask's shape is not the model's (layers, heads).

        Examples:
            >>> import torch
            >>> from transformers import BertConfig, BertForSequenceClassification
            >>> import tracmod as tm
            >>> config = BertConfig(
            ...     vocab_size=50, hidden_size=16, intermediate_size=32,
            ...     num_hidden_layers=2, num_attention_heads=4,
            ... )
            >>> model = BertForSequenceClassification(config).eval()
            >>> input_ids = torch.tensor([[5, 6, 7]])
            >>> with tm.HeadMask.random(2, 4, size=5, seed=0).apply(model):
            ...     masked = model(input_ids).logits
            >>> torch.equal(masked, model(input_ids).logits)
            False
        """
        layers = matching_layers(model, self)
        with ExitStack() as hooks:
            for layer, kept_H in zip(layers, self.array, strict=True):
                if not kept_H.all():
                    hooks.callback(_scale_heads(layer, torch.from_numpy(kept_H.copy())))
            yield


def _scale_heads(layer: AttentionLayer, kept_H: Tensor) -> Callable[[], None]:
    """Multiply the heads' outputs by 0 or 1 in every forward pass; return what undoes it."""
    kept_I = kept_H.repeat_interleave(layer.head_dim)
    # One copy for each device and dtype: a copy in every pass would make the CPU wait for the GPU.
    copies: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def scale(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x_BSI = inputs[0]
        key = (x_BSI.device, x_BSI.dtype)
        if key not in copies:
            # Not an inference tensor, even if this pass is in inference mode: autograd could not
            # save it in a later pass that is recorded.
            with torch.inference_mode(False):
                copies[key] = kept_I.to(*key)
        return (x_BSI * copies[key], *inputs[1:])

    # Before any other hook, so that whatever else reads the projection's input sees it masked:
    # gradient capture must see zeros there, or it would give the masked columns a gradient.
    return layer.output.register_forward_pre_hook(scale, prepend=True).remove


def masked(model: nn.Module, mask: HeadMask | None) -> AbstractContextManager[None]:
    """Return the context of `mask.apply(model)`, or one that does nothing for no mask."""
    instance("head_mask", mask, HeadMask, optional=True)
    return nullcontext() if mask is None else mask.apply(model)


def matching_layers(model: nn.Module, mask: HeadMask) -> list[AttentionLayer]:
    """Return the model's attention layers, after checking that the mask has their shape.

    Raises:
        ValueError: the mask's shape is not the model's (layers, heads), or the model's layers have
            lost heads (`tracmod.load_pruned`).
    """
    instance("mask", mask, HeadMask)
    instance("model", model, nn.Module)
    layers = attention_layers(model)
    heads = [layer.num_heads for layer in layers]
    if len(set(heads)) > 1:
        raise ValueError(
            f"head mask: expected a model with as many heads in every layer, got {heads}: heads "
            f"have been taken out of it; mask the model that still has them"
        )
    if heads != [mask.array.shape[1]] * mask.array.shape[0]:
        raise ValueError(
            f"head mask: expected {len(layers)} layers of {heads[0]} heads, as the model has, "
            f"got shape {mask.array.shape}"
        )
    return layers


@dataclass(frozen=True)
class HeadSlice:
    """The part of one parameter that belongs to one head.

    Attributes:
        name: name of the parameter in the model.
        parameter: the whole parameter.
        layer, head: position of the head.
        index: `parameter[index]` is the head's part, a view.
        part: number of this part, where a head has several of one parameter (query, key and value
            of a fused projection).
    """

    name: str
    parameter: Tensor
    layer: int
    head: int
    index: tuple[slice, ...]
    part: int = 0


def head_slices(model: nn.Module, mask: HeadMask | None = None) -> list[HeadSlice]:
    """List the slices that belong to heads: rows of query, key and value, columns of the output.

    Args:
        model: a classifier of a supported family.
        mask: if given, list the slices of the heads that it masks; None lists those of all heads.

    Returns:
        Seven slices for each head of BERT, ordered by layer, then parameter, then head. A fused
        projection has three of them in one parameter; grouped heads own no keys and values; an
        adapted projection has one more.

    Raises:
        ValueError: the mask does not fit the model.
    """
    layers = attention_layers(model) if mask is None else matching_layers(model, mask)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    slices = []
    for layer_index, layer in enumerate(layers):
        for parameter, axis, starts in head_parameters(layer):
            for head in range(layer.num_heads):
                if mask is not None and mask.array[layer_index, head]:
                    continue
                for part, start in enumerate(starts):
                    first = start + head * layer.head_dim
                    own = slice(first, first + layer.head_dim)
                    index = (own,) if axis == 0 else (slice(None), own)
                    name = names[id(parameter)]
                    slices.append(HeadSlice(name, parameter, layer_index, head, index, part))
    return slices


def _shape(num_layers: Any, num_heads: Any) -> tuple[int, int]:
    """Return the shape of a mask, after checking it."""
    return (
        whole_number("head mask: num_layers", num_layers, most=MOST_HEADS),
        whole_number("head mask: num_heads", num_heads, most=MOST_HEADS),
    )


def head_parameters(layer: AttentionLayer) -> list[tuple[Tensor, int, list[int]]]:
    """List the parameters that the heads divide.

    Returns:
        Each parameter with the axis that the heads divide it along, and the positions on this axis
        at which the heads begin: several if the parameter is a fused projection.
    """
    divided: list[tuple[Tensor, int, list[int]]] = []
    for linear, starts in layer.first_rows.items():
        divided += [(parameter, 0, starts) for parameter in linear.parameters(recurse=False)]
        if isinstance(linear, AdaptedLinear):
            divided.append((linear.lora_B.weight, 0, starts))
    divided.append((layer.output.weight, 1, [0]))
    if isinstance(layer.output, AdaptedLinear):
        divided.append((layer.output.lora_A.weight, 1, [0]))
    return divided


def kept_columns(layer: AttentionLayer, kept_H: Tensor, starts: Sequence[int] = (0,)) -> Tensor:
    """Return the positions of the kept heads along an axis of `head_parameters`.

    Attention cannot work without any head: if none is kept, the columns of the first head are
    returned, and the caller has to make sure that they contribute nothing.

    Args:
        layer: the attention layer.
        kept_H: (H,) 1 for heads to keep.
        starts: the positions at which the heads begin.

    Returns:
        int64, on the layer's device.
    """
    heads = kept_H.nonzero().flatten()
    if len(heads) == 0:
        heads = torch.zeros(1, dtype=torch.int64)
    columns = (heads[:, None] * layer.head_dim + torch.arange(layer.head_dim)).flatten()
    all_columns = torch.cat([start + columns for start in starts])
    return all_columns.to(layer.query.weight.device)
