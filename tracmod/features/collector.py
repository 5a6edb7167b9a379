"""Collect features: randomly projected per-example gradients, `Projection.dim` numbers each.

Inner products of features estimate inner products of gradients: over the seed of the projection,
E <f(z), f(z')> = <grad L(z), grad L(z')>. A batch takes one forward and one backward pass. During
the backward pass, `capture` passes on the inputs and output gradients of each layer, and a kernel
adds their projection to the layer's slot of the rows.

Shape suffixes: B examples of a batch, b some of them, N examples, K projection_dim, S tokens, O, I
rows and columns of a formed gradient (of LayerNorm 1 + bias and D).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tracmod import kernels
from tracmod.choices import ParameterSelection, instance, whole_number
from tracmod.features.projection import Projection, Slot, projection_keys
from tracmod.features.store import FeatureStore
from tracmod.gradients.capture import (
    Captured,
    Layer,
    ModelPass,
    capture,
    select_layers,
    warn_of_frozen,
)
from tracmod.gradients.preconditioner import Preconditioner
from tracmod.gradients.verified_pass import verified_pass
from tracmod.models.inputs import (
    as_examples,
    check_examples,
    send,
    unwrapped,
)
from tracmod.models.loss import ExampleLoss, LossFunction, as_loss
from tracmod.models.modes import frozen, on_device
from tracmod.subnetworks.head_mask import HeadMask

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Shards per task when several workers share a store, at most, and fewer where a worker would
# otherwise have fewer tasks than this.
SHARDS_PER_TASK, TASKS_PER_WORKER = 4, 4


@dataclass
class Collector:
    """Collects features of one model with fixed layers, slots, mask and precision.

    To be used within `models.modes.frozen(model)`.

    Attributes:
        model: The classifier.
        projection, parameters, batch_tokens, dtype, head_mask, preconditioner, include_frozen: As
            for `collect_features`.
        layers: The layers whose parameters are selected.
        slots: Each layer's slot of the feature row, by the layer's name.
    """

    model: PreTrainedModel
    projection: Projection
    parameters: ParameterSelection = "encoder"
    batch_tokens: int = 8192
    dtype: torch.dtype | None = None
    head_mask: HeadMask | None = None
    preconditioner: Preconditioner | None = None
    include_frozen: bool = False
    loss: ExampleLoss | None = None
    layers: list[Layer] = field(init=False)
    slots: dict[str, Slot] = field(init=False)

    def __post_init__(self) -> None:
        instance("projection", self.projection, Projection)
        instance("preconditioner", self.preconditioner, Preconditioner, optional=True)
        self.batch_tokens = whole_number("batch_tokens", self.batch_tokens)
        if self.dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(
                f"dtype: expected None, torch.float32, torch.bfloat16 or torch.float16, "
                f"got {self.dtype}"
            )
        if self.dtype is torch.float32:
            self.dtype = None
        self.layers = select_layers(self.model, self.parameters, self.include_frozen)
        self.slots = self.projection.slots(self.layers)
        if self.preconditioner is not None:
            self.preconditioner.check(self.layers)

    def collect(
        self, examples: Sequence[Mapping[str, Any]], advance: Callable[[int], Any] | None = None
    ) -> Tensor:
        """Return features (N, K) float32 in the order of the examples, on the model's device.

        The caller checks whether they are finite, since it can name the example that is not.

        Args:
            examples: Checked examples with `input_ids`, `labels` and possibly more columns.
            advance: Called after each batch with its number of examples.
        """
        with self.verified(examples) as model_pass:
            return self.collect_verified(examples, model_pass, advance)

    def verified(self, examples: Sequence[Mapping[str, Any]]) -> AbstractContextManager[ModelPass]:
        """Return the context in which all of the examples may be collected, in parts."""
        return verified_pass(self.model, examples, self.layers, self.head_mask, self.dtype)

    def collect_verified(
        self,
        examples: Sequence[Mapping[str, Any]],
        model_pass: ModelPass,
        advance: Callable[[int], Any] | None = None,
    ) -> Tensor:
        """Like `collect`, for callers already inside `verified`. Never waits for the GPU."""
        device = next(self.model.parameters()).device
        if self.preconditioner is not None:
            self.preconditioner = self.preconditioner.to(device)
        features = torch.zeros(
            len(examples), self.projection.dim, dtype=torch.float32, device=device
        )
        for rows, batch in model_pass.batches(self.model, examples, self.batch_tokens):
            features.index_copy_(
                0, send(torch.tensor(rows), device), self._batch(batch, model_pass)
            )
            if advance is not None:
                advance(len(rows))
        return features

    def _batch(self, batch: Mapping[str, Tensor], model_pass: ModelPass) -> Tensor:
        out_BK = torch.zeros(
            len(batch["labels"]),
            self.projection.dim,
            dtype=torch.float32,
            device=batch["labels"].device,
        )

        def project(captured: Captured) -> None:
            if self.preconditioner is not None:
                self._project_preconditioned(captured, self.preconditioner, out_BK)
                return
            for part, slot in self._by_slot(captured):
                self._project(part, slot, out_BK)

        capture(self.model, self.layers, batch, project, self.dtype, model_pass, loss=self.loss)
        return out_BK

    def _by_slot(self, captured: Captured) -> Iterator[tuple[Captured, Slot]]:
        """Yield the parts that are projected together: layers whose x and slot are the same.

        An exact slot has a number for every parameter, so left-out columns are filled with zeros.
        """
        slots = [self.slots[layer.name] for layer in captured.layers]
        for slot in dict.fromkeys(slots):
            positions = [position for position, own in enumerate(slots) if own == slot]
            whole = slot.kind in ("identity", "sketch") and slot.rows == 0
            for part in [[position] for position in positions] if whole else [positions]:
                chosen = captured.of(part)
                yield (chosen.with_all_columns() if slot.kind == "identity" else chosen), slot

    def _project_preconditioned(
        self, captured: Captured, preconditioner: Preconditioner, out_BK: Tensor
    ) -> None:
        """Form gradients in the metric and add their count sketch to the slots.

        We sketch a gradient as an embedding's: row r is the output gradient of a token with id r.
        """
        for position, layer in enumerate(captured.layers):
            slot, captured_layer = self.slots[layer.name], captured.of([position])
            output_key = projection_keys(layer).output
            if layer.kind == "embedding":
                self._project(preconditioner.scaled(captured_layer), slot, out_BK)
                continue
            for chosen, gradients_bOI in preconditioner.gradients(captured_layer):
                out_bK = out_BK[chosen]  # a view of out_BK, because `chosen` is a slice
                if slot.kind == "identity":
                    size = slot.k_out * slot.k_in
                    out_bK[:, slot.offset : slot.offset + size] += gradients_bOI.flatten(1)
                    continue
                count, num_rows, _ = gradients_bOI.shape
                ids_bO = torch.arange(num_rows, device=out_bK.device).expand(count, num_rows)
                kernels.project_gradients(
                    ids_bO.contiguous(), gradients_bOI, out_bK, layer="embedding",
                    kind=slot.kind, offset=slot.offset, k_out=slot.k_out, k_in=slot.k_in,
                    seed=self.projection.seed, input_key=0, output_key=output_key,
                )  # fmt: skip

    def _project(self, captured: Captured, slot: Slot, out_BK: Tensor) -> None:
        """Add the projection of layers that share input and slot to the rows."""
        layer = captured.layers[0]
        bias = layer.bias and layer.kind != "embedding"
        input_columns = captured.input_columns
        if input_columns is not None and not bias:  # the bias, the last column, is not selected
            input_columns = input_columns[: captured.x.shape[-1]]
        keys = [projection_keys(layer) for layer in captured.layers]
        kernels.project_gradients(
            captured.x,
            captured.g,
            out_BK,
            lengths=captured.lengths,
            layer=layer.kind,
            bias=bias,
            kind=slot.kind,
            offset=slot.offset,
            k_out=slot.k_out,
            k_in=slot.k_in,
            rows=slot.rows,
            seed=self.projection.seed,
            input_key=keys[0].input,
            output_key=[key.output for key in keys],
            input_columns=input_columns,
            output_columns=captured.output_columns,
        )


def collect_features(
    model: PreTrainedModel,
    dataset: Iterable[Mapping[str, Any]],
    projection: Projection,
    parameters: ParameterSelection = "encoder",
    head_mask: HeadMask | None = None,
    batch_tokens: int = 8192,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    preconditioner: Preconditioner | None = None,
    *,
    include_frozen: bool = False,
    loss: ExampleLoss | LossFunction | None = None,
) -> Tensor:
    """Collect the projected per-example gradients of a dataset, in one pass over it.

    `f(z) = [exact small layers | sum over layers of sketch(R_out G_l(z))]`, where G_l(z) is the
    gradient of the loss of example z alone (without dropout) with respect to layer l; `Projection`
    says what the sketch and R_out are. Inner
    products of the rows of train and query examples estimate influence; pass them to
    `influence_scores` or `top_influences`.

    Args:
        model: BERT-family sequence classifier in float32, bfloat16, float16 or float64. Its
            weights, mode and device are restored afterwards.
        dataset: `datasets.Dataset`, or a sequence of dicts with `input_ids`, `labels` and, if there
            is padding, `attention_mask` (and `token_type_ids` if the model uses them). A label is
            a class, or a list of C numbers for a model with several labels per text or with several
            targets.
        projection: Kind, size and seed of the projection.
        parameters: `encoder` (all but the embeddings module), `all`, `attention`, `classifier` or
            `adapter` (LoRA's matrices, or X-MOD's language adapters); a list of patterns of the
            names of parameters or modules (`["*.query", "*.value.weight"]`, as in `fnmatch`); or a
            function that returns whether a parameter of this name counts.
        head_mask: A head mask that is applied in the forward pass.
        batch_tokens: Upper bound on the number of examples in a batch times their longest length.
        device: Where to compute; by default, where the model is.
        dtype: torch.bfloat16 or torch.float16 for a pass under autocast; None or torch.float32 for
            the dtype of the model. Sums over tokens are float32 in any case, since bfloat16 would
            round them to 8 bits.
        preconditioner: A metric for the inner products (`fit_ekfac`, `adam_preconditioner`), which
            must be the same for train and query examples. G_l(z) is then formed, multiplied by the
            square root of the metric, and projected by a count sketch.
        include_frozen: Whether parameters with `requires_grad=False` count, too. Training does not
            move them, so by default they are left out, with a warning.
        loss: The loss that the model was trained with, if it is not the one that transformers
            chooses by the model's config: an `ExampleLoss`, or a function of logits (B, C) and
            labels (B, ...) that returns a loss per example, (B,).

    Returns:
        (N, K) float32 on `device`, rows in the order of the dataset.

    Raises:
        ValueError: An example is invalid or its gradient is not finite (the message names its row),
            `parameters` is unknown, matches nothing or is all frozen, the mask's shape does not
            match the model, or the loss does not fit the model and its labels.

    Examples:
        >>> import tracmod as tm
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(
        ...     vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        ...     intermediate_size=32
        ... )
        >>> model = BertForSequenceClassification(config)
        >>> train = [{"input_ids": [5, 6, 7], "labels": 1}, {"input_ids": [8, 9], "labels": 0}]
        >>> query = [{"input_ids": [5, 6, 9], "labels": 1}]
        >>> projection = tm.Projection(dim=512)
        >>> train_features = tm.collect_features(model, train, projection)
        >>> query_features = tm.collect_features(model, query, projection)
        >>> tm.influence_scores(query_features, train_features).shape
        torch.Size([1, 2])

    Source: Pruthi et al. 2020, arXiv 2002.08484 (TracIn); Choe et al. 2024 (LoGra), arXiv
        2405.13954, section 3 (projection from both sides).
    """
    model = unwrapped(model)
    examples = as_examples(dataset, "dataset", model)
    loss = check_examples(model, examples, loss=as_loss(loss))
    warn_of_frozen(model, parameters, include_frozen)
    collector = Collector(
        model,
        projection,
        parameters,
        batch_tokens,
        dtype,
        head_mask,
        preconditioner,
        include_frozen,
        loss,
    )
    with frozen(model), on_device(model, device):
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
    """Compute and write shards of a store: the given ones, or all that are missing.

    A thread writes a shard while the next one is computed. Shards are divided into batches
    separately, so the content of a shard does not depend on which others were there before, and an
    interrupted collection that is resumed gives the same bytes.

    Args:
        collector: Computes the features.
        examples: The examples of all rows of the store.
        store: The store, open for writing.
        advance: Called after each batch with its number of examples.
        shards: The numbers of the shards, or None for all that are missing.

    Raises:
        ValueError: A gradient is not finite; the message names the id of the example.
        OSError: The disk is full; what was written before remains in the store.
    """
    shards = store.missing_shards() if shards is None else shards
    if not shards:
        return
    with (
        collector.verified(examples) as model_pass,
        ThreadPoolExecutor(max_workers=1) as writer,
    ):
        written: Future[None] | None = None
        for shard in shards:
            rows = store.shard_range(shard)
            shard_examples = examples[rows.start : rows.stop]
            features = collector.collect_verified(shard_examples, model_pass, advance)
            if written is not None:
                written.result()  # at most one shard waits in memory; errors are raised here
            written = writer.submit(_write_shard, store, shard, *_to_host(features))
        if written is not None:
            written.result()


def divide_shards(missing: Sequence[int], workers: int) -> list[tuple[int, ...]]:
    """Divide shards of a store that are to be computed into tasks for several workers.

    A single worker is given all of them, because every task begins with a verification of the pass.

    Args:
        missing: The numbers of the shards.
        workers: The number of workers.
    """
    size = len(missing)
    if workers > 1:
        size = min(SHARDS_PER_TASK, size // (TASKS_PER_WORKER * workers))
    size = max(1, size)
    return [tuple(missing[first : first + size]) for first in range(0, len(missing), size)]


def _to_host(features: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Start a copy to (pinned) memory; return it and the event that signals its end on a GPU."""
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
