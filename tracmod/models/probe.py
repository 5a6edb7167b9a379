"""Whether two passes of a model give the same logits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tracmod.models.inputs import collate, pad_token_id


def probe_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Eight tokens in two examples, one of them padded."""
    pad_id, vocabulary = pad_token_id(model), int(model.config.vocab_size)
    ids = [(pad_id + 1 + place) % vocabulary for place in range(4)]
    rows = [{"input_ids": ids[:n], "attention_mask": [1] * n, "labels": 0} for n in (4, 2)]
    batch = collate(rows, pad_id, next(model.parameters()).device)
    batch.pop("labels")
    return batch


@torch.no_grad()
def probe_logits(model: PreTrainedModel, probe: Mapping[str, Tensor]) -> Tensor:
    return model(**probe).logits


def same_logits(found: PreTrainedModel, expected: PreTrainedModel) -> bool:
    """Whether two models of one vocabulary, as they are now, agree on eight tokens up to rounding.

    A model that fails at them does not agree.
    """
    probe = probe_inputs(expected)
    with suppress(RuntimeError, ValueError):
        return logits_agree(probe_logits(found, probe), probe_logits(expected, probe))
    return False


def logits_agree(found: Tensor, expected: Tensor) -> bool:
    """Equal up to rounding; never with NaN or infinity in either."""
    if found.shape != expected.shape:
        return False
    tolerance = math.sqrt(torch.finfo(expected.dtype).eps)
    scale = expected.abs().max()
    return bool((found - expected).abs().max() <= tolerance * scale)
