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
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tracmod import kernels
from tracmod.features.projection import Projection, Slot, projection_keys
from tracmod.features.store import FeatureStore
from tracmod.gradients.capture import Captured, Layer, capture, select_layers
from tracmod.gradients.lean_pass import Kept, lean
from tracmod.gradients.preconditioner import Preconditioner
from tracmod.models.inputs import (
    as_examples,
    check_examples,
    collate,
    example_length,
    pad_token_id,
    plan_batches,
    send,
)
from tracmod.models.modes import frozen, on_device
from tracmod.subnetworks.head_mask import HeadMask


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
