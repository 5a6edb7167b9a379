"""The recipe of features: all that decides what a feature row is, apart from model and example.

A run, `tracmod attribute` and `tracmod query` each make features of the same kind again and again.
The recipe gives them the collector that does it and the identity that a feature store carries, so
that features made in two ways are never compared.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from tracmod.choices import ParameterSelection, selection_record
from tracmod.features.collector import Collector
from tracmod.features.projection import Projection
from tracmod.files.durable import canonical_json, sha256
from tracmod.gradients.preconditioner import Preconditioner
from tracmod.models.digests import model_digest
from tracmod.models.loss import ExampleLoss
from tracmod.models.modes import trained_names
from tracmod.subnetworks.head_mask import HeadMask

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class FeatureRecipe:
    """Settings that features depend on.

    Attributes:
        projection: The kind, size and seed of the random projection.
        parameters: Whose gradients: `encoder`, `all`, `attention`, `classifier` or `adapter`, or
            patterns of names.
        dtype: The precision of the forward and backward pass, `float32` or `bfloat16`.
        batch_tokens: The bound on the tokens of a batch.
        max_length: The number of tokens at which texts are cut.
        head_mask: The mask that is applied in both passes, or None for all heads.
        include_frozen: Whether parameters that training does not move count, too.
        loss: The loss that the model was trained with; None for the one that transformers chooses.
    """

    projection: Projection
    parameters: ParameterSelection
    dtype: str
    batch_tokens: int
    max_length: int
    head_mask: HeadMask | None = None
    include_frozen: bool = False
    loss: ExampleLoss | None = None

    def under(self, head_mask: HeadMask | None) -> FeatureRecipe:
        """Return the same recipe under another mask."""
        return replace(self, head_mask=head_mask)

    def collector(
        self,
        model: PreTrainedModel,
        preconditioner: Preconditioner | None = None,
        *,
        measured: bool = False,
    ) -> Collector:
        """Return the collector that turns examples into features of one checkpoint.

        Args:
            model: The checkpoint's model.
            preconditioner: The checkpoint's preconditioner, or None for plain gradients.
            measured: Whether the examples are queries, whose loss is `ExampleLoss.measured`.
        """
        loss = self.loss.measured if measured and self.loss is not None else self.loss
        return Collector(
            model,
            self.projection,
            self.parameters,
            self.batch_tokens,
            getattr(torch, self.dtype),
            self.head_mask,
            preconditioner,
            self.include_frozen,
            loss,
        )

    def identity(self, **digests: str) -> dict[str, Any]:
        """Return what features depend on, as a store's manifest carries it.

        Args:
            digests: The digests of one checkpoint (see `checkpoint_digests`) and, where a store
                does not digest its examples itself, of the data.
        """
        loss = None if self.loss is None else self.loss.identity
        return {
            "projection": self.projection.identity,
            "parameters": selection_record(self.parameters),
            "head_mask": None if self.head_mask is None else self.head_mask.digest(),
            "pass_dtype": self.dtype,
            "max_length": str(self.max_length),
            "batch_tokens": str(self.batch_tokens),
            **({} if loss is None else {"loss": loss}),
            **digests,
        }


def checkpoint_digests(
    model: PreTrainedModel,
    tokenizer_digest: str,
    preconditioner: Preconditioner | None,
    include_frozen: bool = False,
) -> dict[str, str]:
    """Return the digests of all that features depend on at one checkpoint.

    Args:
        model: The checkpoint's model.
        tokenizer_digest: The digest of its tokenizer.
        preconditioner: Its preconditioner, if there is one.
        include_frozen: Whether frozen parameters count, too.
    """
    digests = {"model": model_digest(model), "tokenizer": tokenizer_digest}
    trained = trained_names(model)
    left_out = sorted(name for name, _ in model.named_parameters() if name not in trained)
    if left_out and not include_frozen:
        digests["frozen"] = sha256(canonical_json(left_out))
    if preconditioner is not None:
        digests["preconditioner"] = preconditioner.digest
    return digests
