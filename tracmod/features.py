"""Features: a checkpoint, examples and a head mask become projected per-example gradients.

The feature of an example is a random projection of its gradient in K = `Projection.dim` numbers,
such that inner products of features are, in expectation over the projection's seed, inner products
of gradients: E <f(z), f(z')> = <grad L(z), grad L(z')>.

Shapes: B examples of a batch, N examples, K projection_dim, I in, O out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tracmod import kernels
from tracmod.capture import Captured, Layer, capture, frozen, select_layers
from tracmod.heads import HeadMask
from tracmod.lean import Kept, lean
from tracmod.model import (
    collate,
    embeddings_module,
    pad_token_id,
    plan_batches,
    send,
    to_device,
)
from tracmod.preconditioner import Preconditioner
from tracmod.store import FeatureStore

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
TOKEN_COLUMNS = ("input_ids", "attention_mask", "token_type_ids")


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
    kind: Literal["rademacher", "sjlt"] = "rademacher"
    seed: int = 0
    layers: Literal["accumulate", "concatenate"] = "accumulate"

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


@dataclass
class Collector:
    """Features of batches of one model: layers, slots, mask and precision fixed once.

    Used within `capture.frozen(model)`.
    """

    model: PreTrainedModel
    projection: Projection
    parameters: str = "encoder"
    batch_tokens: int = 8192
    dtype: torch.dtype | None = None
    head_mask: HeadMask | None = None
    preconditioner: Preconditioner | None = None
    layers: list[Layer] = field(init=False)
    slots: dict[str, Slot] = field(init=False)

    def __post_init__(self) -> None:
        if self.batch_tokens < 1:
            raise ValueError(f"batch_tokens: expected at least 1, got {self.batch_tokens}")
        if self.dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(
                f"dtype: expected None, torch.float32, torch.bfloat16 or torch.float16, "
                f"got {self.dtype}"
            )
        if self.dtype is torch.float32:
            self.dtype = None
        self.layers = select_layers(self.model, self.parameters)
        self.slots = self.projection.slots(self.layers)
        if self.preconditioner is not None:
            self.preconditioner.check(self.layers)
            self.preconditioner = self.preconditioner.to(self.model.device)

    def collect(
        self, examples: Sequence[Mapping[str, Any]], advance: Callable[[int], Any] | None = None
    ) -> Tensor:
        """Features (N, K) float32 in the order of the examples, on the model's device.

        Whether they are finite is for the caller to check, who knows the examples' names.
        """
        with lean(self.model, self.head_mask, self.dtype) as kept:
            return self.collect_lean(examples, kept, advance)

    def collect_lean(
        self,
        examples: Sequence[Mapping[str, Any]],
        kept: Kept,
        advance: Callable[[int], Any] | None = None,
    ) -> Tensor:
        """`collect` within `lean`'s context, of which `kept` comes; never waits for a GPU."""
        device = next(self.model.parameters()).device
        features = torch.zeros(len(examples), self.projection.dim, device=device)
        lengths = [example_length(example) for example in examples]
        for rows in plan_batches(lengths, self.batch_tokens):
            batch = collate([examples[row] for row in rows], pad_token_id(self.model), device)
            features.index_copy_(0, send(torch.tensor(rows), device), self._batch(batch, kept))
            if advance is not None:
                advance(len(rows))
        return features

    def _batch(self, batch: Mapping[str, Tensor], kept: Kept) -> Tensor:
        out_BK = torch.zeros(
            len(batch["labels"]), self.projection.dim, device=batch["labels"].device
        )

        def project(captured: Captured) -> None:
            if self.preconditioner is not None:
                self._project_preconditioned(captured, self.preconditioner, out_BK)
                return
            for part, slot in self._by_slot(captured):
                self._project(part, slot, out_BK)

        capture(self.model, self.layers, batch, project, self.dtype, kept)
        return out_BK

    def _by_slot(self, captured: Captured) -> Iterator[tuple[Captured, Slot]]:
        """Layers that share input and grid together, the others one by one."""
        slots = [self.slots[layer.name] for layer in captured.layers]
        for slot in dict.fromkeys(slots):
            part = captured.of([place for place, one in enumerate(slots) if one == slot])
            yield (part.with_all_columns() if slot.kind == "identity" else part), slot

    def _project_preconditioned(
        self, captured: Captured, preconditioner: Preconditioner, out_BK: Tensor
    ) -> None:
        """A whole gradient is projected as an embedding's is: row r of it belongs to id r."""
        for place, layer in enumerate(captured.layers):
            slot, one = self.slots[layer.name], captured.of([place])
            if layer.kind == "embedding":
                self._project(preconditioner.scaled(one), slot, out_BK)
                continue
            for rows, gradients_bRC in preconditioner.gradients(one):
                out_bK = out_BK[rows]
                if slot.kind == "identity":
                    size = slot.k_out * slot.k_in
                    out_bK[:, slot.offset : slot.offset + size] += gradients_bRC.flatten(1)
                    continue
                kernels.project_gradients(
                    whole_rows(gradients_bRC), gradients_bRC, out_bK, layer="embedding",
                    kind=slot.kind, offset=slot.offset, k_out=slot.k_out, k_in=slot.k_in,
                    seed=self.projection.seed, input_key=0, output_key=projection_keys(layer, 0)[1],
                )  # fmt: skip

    def _project(self, captured: Captured, slot: Slot, out_BK: Tensor) -> None:
        g = captured.g
        if slot.draws > 1:
            g = tuple(one / math.sqrt(slot.draws) for one in g)
        for draw in range(slot.draws):
            keys = [projection_keys(layer, draw) for layer in captured.layers]
            self._project_once(captured, g, slot, keys, out_BK)

    def _project_once(
        self,
        captured: Captured,
        g: tuple[Tensor, ...],
        slot: Slot,
        keys: list[tuple[int, int]],
        out_BK: Tensor,
    ) -> None:
        layer = captured.layers[0]
        bias = layer.bias and layer.kind != "embedding"
        input_columns = captured.input_columns
        if input_columns is not None and not bias:  # the bias's column of ones is not selected
            input_columns = input_columns[: captured.x.shape[-1]]
        kernels.project_gradients(
            captured.x,
            g,
            out_BK,
            lengths=captured.lengths,
            layer=layer.kind,
            bias=bias,
            kind=slot.kind,
            offset=slot.offset,
            k_out=slot.k_out,
            k_in=slot.k_in,
            seed=self.projection.seed,
            input_key=keys[0][0],
            output_key=[output_key for _, output_key in keys],
            input_columns=input_columns,
            output_columns=captured.output_columns,
        )


def example_length(example: Mapping[str, Any]) -> int:
    """Tokens of an example, trailing padding left out."""
    mask = example.get("attention_mask")
    if mask is None:
        return len(example["input_ids"])
    length = len(mask)
    while length > 1 and not mask[length - 1]:
        length -= 1
    return length


def as_examples(
    dataset: Iterable[Mapping[str, Any]], name: str = "dataset"
) -> list[dict[str, Any]]:
    """Rows of a dataset as plain dicts of lists, without trailing padding.

    Args:
        dataset: rows.
        name: what messages call it.

    Raises:
        ValueError: a row without input_ids or labels, with no tokens, or with a mask or token types
            of another length.
    """
    examples = []
    for row, example in enumerate(dataset):
        plain = {
            column: value.tolist() if hasattr(value, "tolist") else value
            for column, value in example.items()
            if value is not None
        }
        wrong = _missing(plain)
        if wrong:
            raise ValueError(f"{name}: row {row}: expected {wrong}")
        length = example_length(plain)
        tokens = {"attention_mask": [1] * length} | {
            column: plain[column][:length] for column in TOKEN_COLUMNS if column in plain
        }
        examples.append({**tokens, "labels": plain["labels"]})
    return examples


def _missing(example: Mapping[str, Any]) -> str | None:
    for column in ("input_ids", "labels"):
        if column not in example:
            return f"{column}, got only {', '.join(example)}"
    if not example["input_ids"] or not any(example.get("attention_mask", [1])):
        return "at least one token, got none"
    expected = len(example["input_ids"])
    for column in TOKEN_COLUMNS:
        if len(example.get(column, example["input_ids"])) != expected:
            return f"{column} of {expected} tokens as in input_ids, got {len(example[column])}"
    return None


def check_examples(
    model: PreTrainedModel, examples: Sequence[Mapping[str, Any]], name: str = "dataset"
) -> None:
    """Stop at the first example that the model cannot take.

    Args:
        model: the classifier.
        examples: from `as_examples`.
        name: what messages call them.

    Raises:
        ValueError: ids outside the vocabulary, more tokens than positions, labels that are no class
            (finite numbers for a model with one output), token types in some rows only or unknown
            to the model, or a model with several labels per text.
    """
    if model.config.problem_type == "multi_label_classification":
        raise ValueError(
            f"{type(model).__name__}: expected a model with one label per text, "
            f"got problem_type multi_label_classification"
        )
    sizes, num_positions = _table_sizes(model)
    num_labels = int(model.config.num_labels or 0)
    columns = examples[0].keys() if examples else ()
    for row, example in enumerate(examples):
        wrong = _wrong_label(example["labels"], num_labels)
        if len(example["input_ids"]) > num_positions:
            wrong = f"at most {num_positions} tokens, got {len(example['input_ids'])}"
        for column, size in sizes.items():
            wrong = wrong or _wrong_id(column, example.get(column, [0]), size)
        if example.keys() != columns:
            wrong = "token_type_ids in all rows or in none, got them in some"
        if wrong:
            raise ValueError(f"{name}: row {row}: expected {wrong}")


def _table_sizes(model: PreTrainedModel) -> tuple[dict[str, int], float]:
    """Rows of the embedding tables by column, and the longest text."""
    embeddings = embeddings_module(model)
    words: Any = embeddings.get_submodule("word_embeddings")
    sizes: dict[str, int] = {"input_ids": words.num_embeddings}
    types: Any = getattr(embeddings, "token_type_embeddings", None)
    if types is not None:
        sizes["token_type_ids"] = types.num_embeddings
    positions: Any = getattr(embeddings, "position_embeddings", None)
    if positions is None:
        return sizes, math.inf
    # RoBERTa counts positions from padding_idx + 1 on; BERT's table has no padding_idx.
    taken = 0 if positions.padding_idx is None else positions.padding_idx + 1
    return sizes, positions.num_embeddings - taken


def _wrong_label(label: Any, num_labels: int) -> str | None:
    if num_labels == 1:
        right = isinstance(label, int | float) and math.isfinite(label)
        return None if right else f"a number as its label, got {label!r}"
    if type(label) is int and 0 <= label < num_labels:
        return None
    return f"an integer label from 0 to {num_labels - 1}, got {label!r}"


def _wrong_id(column: str, ids: Sequence[Any], size: int) -> str | None:
    for one in ids:
        if not isinstance(one, Integral) or not 0 <= int(one) < size:
            return f"{column} from 0 to {size - 1}, got {one!r}"
    return None


def collect_features(
    model: PreTrainedModel,
    dataset: Iterable[Mapping[str, Any]],
    projection: Projection,
    parameters: str = "encoder",
    head_mask: HeadMask | None = None,
    batch_tokens: int = 8192,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    preconditioner: Preconditioner | None = None,
) -> Tensor:
    """Projected per-example gradients of a dataset: one forward and one backward pass.

    `f(z) = [exact small layers | sum over layers of vec(R_out G_l(z) R_in^T)]`, with G_l(z) the
    gradient of z's own loss (cross entropy, dropout off) with respect to layer l.

    Args:
        model: BERT-family sequence classifier; its weights, mode and device are left as they were.
            float32, bfloat16, float16 or float64; sums over tokens are float32 in any case.
        dataset: `datasets.Dataset` or sequence of dicts with `input_ids`, `labels` and, where there
            is padding, `attention_mask` (and `token_type_ids`, if the model uses them).
        projection: kind, size and seed of the projection.
        parameters: `encoder` (all but the embeddings module), `all`, `attention` or `classifier`.
        head_mask: applied in the forward pass.
        batch_tokens: bound on examples x longest length of a batch.
        device: where to compute; None for where the model is.
        dtype: torch.bfloat16 or torch.float16 for an autocast pass; None or torch.float32 for none.
        preconditioner: a metric for the inner products (`fit_ekfac`, `adam_preconditioner`), the
            same for train and query. G_l(z) is then formed, multiplied by the metric's root, and
            projected by a count sketch.

    Returns:
        (N, K) float32, rows in dataset order, on `device`.

    Raises:
        ValueError: bad rows (see `check_examples`), unknown parameters, a mask of another shape, or
            gradients that are not finite (the row is named).

    Source: Pruthi et al. 2020 (TracIn); LoGra, arXiv 2405.13954, section 3 (two-sided projection).
    """
    examples = as_examples(dataset)
    check_examples(model, examples)
    with frozen(model), on_device(model, device):
        collector = Collector(
            model, projection, parameters, batch_tokens, dtype, head_mask, preconditioner
        )
        features = collector.collect(examples)
    finite_N = torch.isfinite(features).all(dim=1)
    if not bool(finite_N.all()):
        row = int(finite_N.logical_not().nonzero()[0])
        raise ValueError(f"dataset: row {row}: expected a finite gradient, got NaN or infinity")
    return features


def collect_to_store(
    collector: Collector,
    examples: Sequence[Mapping[str, Any]],
    store: FeatureStore,
    advance: Callable[[int], Any] | None = None,
    shards: Sequence[int] | None = None,
) -> None:
    """Compute and write shards: those asked for, or every one that the store still lacks.

    A shard is written by a thread while the next is computed. It is batched by itself, so its
    contents do not depend on which shards were there before.

    Raises:
        ValueError: a gradient that is not finite; the example's id is named.
        OSError: the disk is full; the store keeps what was written before.
    """
    with ThreadPoolExecutor(max_workers=1) as writer:
        written: Future[None] | None = None
        for shard in store.missing_shards() if shards is None else shards:
            rows = store.shard_range(shard)
            features = collector.collect(examples[rows.start : rows.stop], advance)
            if written is not None:
                written.result()  # no more than one shard waits in memory
            written = writer.submit(_write_shard, store, shard, *_to_host(features))
        if written is not None:
            written.result()


def _to_host(features: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """The features in (pinned) memory, and what says when they have come there from a GPU."""
    if features.device.type != "cuda":
        return features, None
    pinned = torch.empty(features.shape, dtype=features.dtype, pin_memory=True)
    pinned.copy_(features, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(features.device))
    return pinned, copied


def _write_shard(
    store: FeatureStore, shard: int, features: Tensor, copied: torch.cuda.Event | None
) -> None:
    if copied is not None:
        copied.synchronize()
    store.write_shard(shard, features)


def whole_rows(gradients_bRC: Tensor) -> Tensor:
    """(b, R) int64: each row of a whole gradient as an id, to take it for an embedding's."""
    batch, rows, _ = gradients_bRC.shape
    return torch.arange(rows, device=gradients_bRC.device).expand(batch, rows).contiguous()


def feature_identity(
    projection: Projection, parameters: str, head_mask: HeadMask | None, dtype: str, **digests: str
) -> dict[str, Any]:
    """What features depend on: written to a store's manifest, compared when it is opened again."""
    return {
        "projection": asdict(projection),
        "parameters": parameters,
        "head_mask": None if head_mask is None else head_mask.digest(),
        "pass_dtype": dtype,
        **digests,
    }


def masked(model: PreTrainedModel, head_mask: HeadMask | None) -> Any:
    """The mask's context, or one that does nothing."""
    return nullcontext() if head_mask is None else head_mask.apply(model)


def on_device(model: PreTrainedModel, device: torch.device | str | None) -> ExitStack:
    """Move the model to a device and, on leaving the context, back."""
    stack = ExitStack()
    before = next(model.parameters()).device
    if device is not None and torch.device(device) != before:
        to_device(model, device)
        stack.callback(to_device, model, before)
    return stack
