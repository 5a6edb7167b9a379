"""A model's own forward pass: its logits and predictions, and whether they depend on padding.

Shape suffixes: B examples of a batch, S tokens, N examples, C classes, T labelled tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tracmod.models.architecture import answers_questions, max_positions
from tracmod.models.inputs import collate, example_length, pad_token_id, plan_batches
from tracmod.models.language_adapters import LANGUAGE_COLUMN
from tracmod.models.loss import UNLABELLED
from tracmod.models.modes import ModelState, evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batch = dict[str, Tensor]


def model_logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Compute a batch's logits (B, C), (B, S, C) of a token classifier, or (B, 2, S) of spans.

    Also for a model whose config has `return_dict=False`.
    """
    output = model(**{n: value for n, value in inputs.items() if n != "labels"})
    return logits_of(model, output, inputs.get("attention_mask"))


def logits_of(model: nn.Module, output: Any, mask: Tensor | None) -> Tensor:
    """Return the logits in the output of a classifier that was given no labels.

    Of a model for question answering, (B, 2, S): how much each token is the first, and the last, of
    the answer. Padding is minus infinity there, so that the loss of an example does not depend on
    the batch that it is in.

    Args:
        model: the model.
        output: what it returned.
        mask: its attention mask, (B, S) or (B, 1, S, S); None without padding.
    """
    if not answers_questions(model):
        return output[0] if isinstance(output, tuple) else output.logits
    first, last = (
        output[:2] if isinstance(output, tuple) else (output.start_logits, output.end_logits)
    )
    logits_B2S = torch.stack([first, last], dim=1)
    if mask is None:
        return logits_B2S
    is_token_BS = mask.ne(0) if mask.dim() == 2 else mask[:, 0, 0].ne(0)
    return logits_B2S.masked_fill(~is_token_BS[:, None], -math.inf)


def labelled_logits(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    """Return the logits that a batch's loss reads as rows, example by example.

    (B, C), or (T, C) of the labelled tokens; of question answering (2 T, 1) of the T tokens.
    """
    if answers_questions(model):
        return logits[logits != -math.inf][:, None]
    return logits if logits.dim() == 2 else logits[labels.ne(UNLABELLED)]


def logits_agree(logits: Tensor, expected: Tensor, tolerance: float | None = None) -> bool:
    """Return whether logits are equal up to rounding.

    The tolerance is relative to the largest expected logit. By default it is the square root of the
    dtype's machine epsilon: far above rounding, far below the effect of a missing head. NaN and
    infinity never agree.
    """
    if logits.shape != expected.shape:
        return False
    if tolerance is None:
        tolerance = math.sqrt(torch.finfo(expected.dtype).eps)
    return bool((logits - expected).abs().max() <= tolerance * expected.abs().max())


def given_batch(model: PreTrainedModel, example: Mapping[str, Any]) -> Batch:
    """Return a batch of one example as it was given, its own padding included.

    Padding is cut only where the model has no positions for it.
    """
    longest = int(min(len(example["input_ids"]), max_positions(model)))
    device = next(model.parameters()).device
    return collate([example], pad_token_id(model), device, longest=longest)


def batches(
    model: PreTrainedModel,
    examples: Sequence[Mapping[str, Any]],
    batch_tokens: int,
    alone: bool = False,
) -> Iterator[tuple[list[int], Batch]]:
    """Yield the row numbers and inputs of padded batches of examples of similar length.

    A batch has examples of one language adapter only: a layer of an adapter is called with those of
    its language.

    Args:
        model: the classifier.
        examples: checked examples.
        batch_tokens: largest batch, in tokens.
        alone: whether every example is a batch by itself, as it was given.
    """
    device = next(model.parameters()).device
    rows_of: dict[Any, list[int]] = {}
    for row, example in enumerate(examples):
        rows_of.setdefault(example.get(LANGUAGE_COLUMN), []).append(row)
    for own in rows_of.values():
        for batch in plan_batches([example_length(examples[row]) for row in own], batch_tokens):
            rows = [own[position] for position in batch]
            if alone:
                for row in rows:
                    yield [row], given_batch(model, examples[row])
            else:
                chosen = [examples[row] for row in rows]
                yield rows, collate(chosen, pad_token_id(model), device)


def probe_rows(examples: Sequence[Mapping[str, Any]]) -> list[int]:
    """Choose the examples on which a way to pass batches through a model is tried.

    Returns:
        The rows of the longest and the shortest example and, if there are any, of the first one
        with padding at its end and of the first one with another gap in its mask; all of one
        language adapter.
    """
    lengths = [example_length(example) for example in examples]
    language = examples[0].get(LANGUAGE_COLUMN) if examples else None
    own = [row for row, e in enumerate(examples) if e.get(LANGUAGE_COLUMN) == language]
    order = sorted(own, key=lambda row: -lengths[row])
    rows = [*order[:1], *order[-1:]]
    padded = (row for row in own if len(examples[row]["input_ids"]) > lengths[row])
    rows += [row for row in [next(padded, None)] if row is not None]
    for row in own:
        mask = examples[row].get("attention_mask")
        if mask is not None and not all(mask[: lengths[row]]):
            rows.append(row)
            break
    return list(dict.fromkeys(rows))


@torch.no_grad()
def depends_on_padding(
    model: PreTrainedModel, examples: Sequence[Mapping[str, Any]], state: ModelState
) -> bool:
    """Return whether logits of a padded batch differ from those of its examples by themselves.

    Tried with the examples of `probe_rows`.

    Args:
        model: classifier within `evaluating`.
        examples: encoded examples.
        state: what `evaluating` has yielded.
    """
    chosen = [examples[row] for row in probe_rows(examples)]
    if len({len(e["input_ids"]) for e in chosen} | {example_length(e) for e in chosen}) < 2:
        return False  # no batch has padding
    inputs = [collate(chosen, pad_token_id(model), next(model.parameters()).device)]
    inputs += [given_batch(model, example) for example in chosen]
    logits = []
    for batch in inputs:
        logits.append(labelled_logits(model, model_logits(model, batch), batch["labels"]))
        state.restore()
    return not logits_agree(logits[0], torch.cat(logits[1:]))


@torch.no_grad()
def predict(
    model: PreTrainedModel, examples: Sequence[Mapping[str, Any]], *, batch_tokens: int = 8192
) -> Tensor:
    """Compute the logits of every example, in the order given and without dropout.

    Examples of a model whose logits depend on padding are passed one by one. A token classifier has
    logits of tokens (`predict_tokens`).

    Args:
        model: classifier on any device; it is restored.
        examples: examples from `encode`.
        batch_tokens: largest batch, in tokens.

    Returns:
        (N, C) on the CPU, in the model's dtype.
    """
    num_labels = int(model.config.num_labels or 0)
    logits_NC = torch.empty(len(examples), num_labels, dtype=model.dtype)
    for rows, logits_BC, _ in _passes(model, examples, batch_tokens):
        logits_NC[rows] = logits_BC
    return logits_NC


@torch.no_grad()
def predict_tokens(
    model: PreTrainedModel, examples: Sequence[Mapping[str, Any]], *, batch_tokens: int = 8192
) -> list[Tensor]:
    """Compute the logits of every example's labelled tokens, as `predict` does those of texts.

    Args:
        model: token classifier, or model for question answering, on any device; it is restored.
        examples: examples from `encode`.
        batch_tokens: largest batch, in tokens.

    Returns:
        For each example (T, C) on the CPU, in the model's dtype; (2, S) of question answering, for
        its first and its last token.
    """
    logits_of_row: dict[int, Tensor] = {}
    for rows, logits_BSC, labels_BS in _passes(model, examples, batch_tokens):
        parts = zip(rows, logits_BSC, labels_BS.ne(UNLABELLED), strict=True)
        logits_of_row |= {row: logits_SC[labelled_S] for row, logits_SC, labelled_S in parts}
    if answers_questions(model):  # without the padding of a batch
        lengths = map(example_length, examples)
        return [logits_of_row[row][:, :length] for row, length in enumerate(lengths)]
    return [logits_of_row[row] for row in range(len(examples))]


def _passes(
    model: PreTrainedModel, examples: Sequence[Mapping[str, Any]], batch_tokens: int
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Yield the row numbers, logits and labels of batches, on the CPU."""
    with evaluating(model) as state:
        alone = depends_on_padding(model, examples, state)
        for rows, batch in batches(model, examples, batch_tokens, alone):
            logits = model_logits(model, batch).cpu()
            state.restore()
            yield rows, logits, batch["labels"].cpu()
