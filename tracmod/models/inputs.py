"""Model inputs: encoding, checking and batching of examples, the loss, predictions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tracmod.models.architecture import embeddings_module

TOKEN_COLUMNS = ("input_ids", "attention_mask", "token_type_ids")


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


Example = dict[str, Any]


# Tokens of padding in a batch. About what starting another batch costs on a CPU; few examples of
# many lengths would otherwise be a third padding.
MAX_PADDING = 512


def encode(
    tokenizer: PreTrainedTokenizerBase,
    table: Any,
    max_length: int,
    *,
    num_labels: int | None = None,
) -> list[Example]:
    """Tokenize a table of examples, rows in table order, without padding.

    Pairs are cut longest text first. BERT's kind of tokenizer adds `token_type_ids`.

    Args:
        tokenizer: the model's.
        table: `pyarrow.Table` with id, text_a, text_b (nullable), label.
        max_length: tokens, special ones included.
        num_labels: the model's; given, labels are checked against it (1: regression, no check).

    Returns:
        Dicts of `input_ids`, `attention_mask` (lists of int) and `labels` (int).

    Raises:
        ValueError: `max_length` is more than the tokenizer's model takes or leaves no token of a
            pair, or a label is outside the model's range (the example's id is named).
    """
    special = tokenizer.num_special_tokens_to_add(pair=True)
    if max_length <= special:
        raise ValueError(
            f"max_length: expected more than the {special} special tokens of a pair, got "
            f"{max_length}"
        )
    if max_length > tokenizer.model_max_length:
        raise ValueError(
            f"max_length {max_length} is more than the model takes ({tokenizer.model_max_length})"
        )
    ids, labels = table.column("id").to_pylist(), table.column("label").to_pylist()
    if num_labels is not None and num_labels > 1:
        _check_labels(ids, labels, num_labels)
    first, second = table.column("text_a").to_pylist(), table.column("text_b").to_pylist()
    examples: list[Example] = [{} for _ in ids]
    for is_pair in (False, True):
        rows = [row for row, text in enumerate(second) if (text is not None) == is_pair]
        if not rows:
            continue
        pair = [second[row] for row in rows] if is_pair else None
        encoded = tokenizer(
            [first[row] for row in rows], pair, truncation="longest_first", max_length=max_length
        )
        for place, row in enumerate(rows):
            examples[row] = {name: column[place] for name, column in encoded.items()}
            examples[row]["labels"] = labels[row]
    return examples


def _check_labels(ids: list[str], labels: list[int], num_labels: int) -> None:
    for example_id, label in zip(ids, labels, strict=True):
        if not 0 <= label < num_labels:
            raise ValueError(
                f"example {example_id}: expected a label from 0 to {num_labels - 1}, got {label}"
            )


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group examples into batches of like length, bounded in tokens, padding included.

    Examples are taken longest first (equal lengths in the order given), so that a batch that
    does not fit in memory shows at once. A batch holds `longest * count <= batch_tokens` tokens, at
    most 512 of them padding, or a single example.

    Returns:
        Lists of positions in `lengths`; each position is in exactly one.
    """
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens: expected at least 1, got {batch_tokens}")
    order = sorted(range(len(lengths)), key=lambda position: -lengths[position])
    batches: list[list[int]] = []
    longest = padding = 0
    for position in order:
        padding += longest - lengths[position]
        full = not batches or longest * (len(batches[-1]) + 1) > batch_tokens
        if full or padding > MAX_PADDING:
            batches.append([])
            longest, padding = lengths[position], 0
        batches[-1].append(position)
    return batches


def collate(
    examples: Sequence[Mapping[str, Any]], pad_id: int, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Pad examples on the right into one batch.

    Args:
        examples: dicts with `input_ids`, `attention_mask`, `labels`, maybe `token_type_ids`.
        pad_id: the tokenizer's; `attention_mask` and `token_type_ids` are padded with 0.
        device: where the tensors go.

    Returns:
        `input_ids`, `attention_mask` (and `token_type_ids`) (B, S) int64; `labels` (B,) int64, or
        float32 where they are floats.
    """
    longest = max(len(example["input_ids"]) for example in examples)
    batch: dict[str, Tensor] = {}
    for name, padding in (("input_ids", pad_id), ("attention_mask", 0), ("token_type_ids", 0)):
        if name not in examples[0]:
            continue
        rows = [list(example[name]) for example in examples]
        padded = [row + [padding] * (longest - len(row)) for row in rows]
        batch[name] = send(torch.tensor(padded, dtype=torch.int64), device)
    batch["labels"] = send(torch.tensor([example["labels"] for example in examples]), device)
    return batch


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A CPU tensor on `device`; by way of pinned memory, so that no GPU is waited for."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def pad_token_id(model: PreTrainedModel) -> int:
    """The id that `collate` pads with for this model; 0 where its config names none."""
    pad_id = model.config.pad_token_id
    return 0 if pad_id is None else int(pad_id)


def per_example_loss(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Loss of each example on its own, no mean over the batch, in float32 (float64 stays).

    `-log softmax(logits)[label]`, or `(logit - label)^2` for a model with one output.

    Args:
        logits_BC: (B, C).
        labels_B: (B,) class indices, or targets where C is 1.

    Returns:
        (B,).
    """
    if logits_BC.dtype != torch.float64:
        logits_BC = logits_BC.float()
    if logits_BC.shape[-1] == 1:
        return (logits_BC.squeeze(-1) - labels_B.to(logits_BC.dtype)).square()
    return nn.functional.cross_entropy(logits_BC, labels_B, reduction="none")


@torch.no_grad()
def predict(
    model: PreTrainedModel, examples: Sequence[Mapping[str, Any]], *, batch_tokens: int = 8192
) -> Tensor:
    """Logits of every example, in the order given, dropout off.

    Args:
        model: on any device; left in the mode it was in.
        examples: as `encode` returns them.
        batch_tokens: largest batch, in tokens.

    Returns:
        (N, C) on the CPU, in the model's dtype.
    """
    was_training = model.training
    model.eval()
    try:
        num_labels = int(model.config.num_labels or 0)
        logits_NC = torch.empty(len(examples), num_labels, dtype=model.dtype)
        for batch in plan_batches([len(e["input_ids"]) for e in examples], batch_tokens):
            inputs = collate([examples[i] for i in batch], pad_token_id(model), model.device)
            inputs.pop("labels")
            logits_NC[batch] = model(**inputs).logits.cpu()
        return logits_NC
    finally:
        model.train(was_training)


def accuracy(logits_NC: Tensor, labels_N: Sequence[int]) -> float:
    """Share of examples whose largest logit is at the label.

    Raises:
        ValueError: there are no examples, or the model has one output and so no classes.
    """
    if logits_NC.shape[0] == 0 or logits_NC.shape[1] == 1:
        raise ValueError(
            "accuracy: expected at least 1 example and 2 classes, "
            f"got logits of shape {tuple(logits_NC.shape)}"
        )
    return float((logits_NC.argmax(1) == torch.as_tensor(labels_N)).double().mean())
