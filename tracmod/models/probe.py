"""Whether two models, or two passes of one model, give the same logits on a small probe."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tracmod.models.architecture import answers_questions
from tracmod.models.inputs import collate, pad_token_id
from tracmod.models.modes import ModelState
from tracmod.models.plain_pass import logits_agree, model_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def same_logits(model: PreTrainedModel, reference: PreTrainedModel) -> bool:
    """Return whether two models with one vocabulary agree on the probe, up to rounding.

    A model that fails on the probe does not agree: an attention layer that cannot work with the
    heads it has left usually fails on a shape.
    """
    probe = probe_inputs(reference)
    with suppress(RuntimeError, ValueError):
        return logits_agree(probe_logits(model, probe), probe_logits(reference, probe))
    return False


def probe_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Build a batch of two examples of four and two tokens, so that one is padded."""
    pad_id, vocabulary = pad_token_id(model), int(model.config.vocab_size)
    ids = [(pad_id + 1 + offset) % vocabulary for offset in range(4)]
    rows = [{"input_ids": ids[:n], "attention_mask": [1] * n, "labels": 0} for n in (4, 2)]
    batch = collate(rows, pad_id, next(model.parameters()).device)
    batch.pop("labels")
    return batch


@torch.no_grad()
def probe_logits(model: PreTrainedModel, probe: Mapping[str, Tensor]) -> Tensor:
    """Compute the logits of a batch, in the mode the model is in; the model is left as it was.

    Those of question answering without padding, whose logits are minus infinity.
    """
    state = ModelState(model)
    try:
        logits = model_logits(model, probe)
        return logits[logits != -math.inf] if answers_questions(model) else logits
    finally:
        state.restore()
