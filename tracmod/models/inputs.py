"""Encode, check and batch examples; compute a classifier's loss, predictions and accuracy.

Shape suffixes: B examples of a batch, S tokens, N examples, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tracmod.models.architecture import embeddings_module, max_positions

Example = dict[str, Any]  # input_ids, attention_mask, labels and perhaps token_type_ids

TOKEN_COLUMNS = ("input_ids", "attention_mask", "token_type_ids")
# Inputs of some models that the engine does not pass on. Without them the model would compute
# something else than the user's, so a dataset that has them is refused.
OTHER_INPUTS = (
    "position_ids",
    "inputs_embeds",
    "bbox",
    "lang_ids",
    "langs",
    "entity_ids",
    "entity_attention_mask",
    "entity_position_ids",
    "global_attention_mask",
    "visual_embeds",
    "pixel_values",
)

# Fixed cost of a batch, in tokens: what starting another batch takes (every layer is called once
# more, and its weights are read once more), as long as computing this many tokens takes. On one
# CPU thread, 64 was fastest for a model of 4 layers of 256 (32 took 1% longer), and 8 to 32 for the
# shape of XLM-R base (64 took 4% longer).
BATCH_COST = 32


def encode(
    tokenizer: PreTrainedTokenizerBase,
    table: Any,
    max_length: int,
    *,
    num_labels: int | None = None,
) -> list[Example]:
    """Tokenize a table of examples, in table order and without padding.

    A pair that is too long loses tokens from its longer text first. BERT's kind of tokenizer adds
    `token_type_ids`.

    Args:
        tokenizer: the model's tokenizer.
        table: `pyarrow.Table` with the columns id, text_a, text_b (nullable) and label.
        max_length: largest number of tokens, special tokens included.
        num_labels: number of the model's outputs. If given, labels are checked against it (not for
            1, a regression).

    Returns:
        Dicts of `input_ids` and `attention_mask` (lists of int) and `labels` (int).

    Raises:
        ValueError: `max_length` is more than the tokenizer's model takes, or leaves no room for a
            token of a pair; or a label is outside the model's range (the message has the example's
            id).
    """
    special = tokenizer.num_special_tokens_to_add(pair=True)
    if max_length <= special:
        raise ValueError(
            f"max_length: expected more than the {special} special tokens of a pair, got "
            f"{max_length}"
        )
    if max_length > tokenizer.model_max_length:
        raise ValueError(
            f"max_length: expected at most the {tokenizer.model_max_length} tokens that the model "
            f"takes, got {max_length}"
        )
    ids, labels = table.column("id").to_pylist(), table.column("label").to_pylist()
    if num_labels is not None and num_labels > 1:
        for example_id, label in zip(ids, labels, strict=True):
            if not 0 <= label < num_labels:
                raise ValueError(
                    f"example {example_id}: expected a label from 0 to {num_labels - 1}, "
                    f"got {label}"
                )
    first, second = table.column("text_a").to_pylist(), table.column("text_b").to_pylist()
    examples: list[Example] = [{} for _ in ids]
    # Single texts and pairs are tokenized apart: an empty second text is a pair, a missing one not.
    for is_pair in (False, True):
        rows = [row for row, text in enumerate(second) if (text is not None) == is_pair]
        if not rows:
            continue
        pairs = [second[row] for row in rows] if is_pair else None
        encoded = tokenizer(
            [first[row] for row in rows], pairs, truncation="longest_first", max_length=max_length
        )
        for position, row in enumerate(rows):
            examples[row] = {name: column[position] for name, column in encoded.items()}
            examples[row]["labels"] = labels[row]
    return examples


def as_examples(
    dataset: Iterable[Mapping[str, Any]], name: str = "dataset"
) -> list[dict[str, Any]]:
    """Convert the rows of a dataset to dicts of plain lists, without trailing padding.

    Args:
        dataset: rows of lists, arrays or tensors.
        name: name of the dataset in error messages.

    Raises:
        ValueError: the dataset is a dict of columns, a row is no dict, has no input_ids, no labels
            or no tokens, has an input that is not passed to the model, such as position_ids, or its
            mask or token types have another length than its input_ids.
    """
    if isinstance(dataset, Mapping):
        raise ValueError(
            f"{name}: expected a sequence of rows, got a {type(dataset).__name__} of columns "
            f"({', '.join(map(str, dataset))}); `datasets.Dataset.from_dict` makes rows of it"
        )
    examples = []
    for row, example in enumerate(dataset):
        if not isinstance(example, Mapping):
            raise ValueError(
                f"{name}: row {row}: expected a dict with input_ids and labels, got "
                f"{type(example).__name__}"
            )
        plain = {
            column: value.tolist() if hasattr(value, "tolist") else value
            for column, value in example.items()
            if value is not None
        }
        problem = _column_problem(plain)
        if problem:
            raise ValueError(f"{name}: row {row}: expected {problem}")
        length = example_length(plain)
        tokens = {"attention_mask": [1] * length} | {
            column: plain[column][:length] for column in TOKEN_COLUMNS if column in plain
        }
        examples.append({**tokens, "labels": plain["labels"]})
    return examples


def _column_problem(example: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a row, to follow "expected" in a message, or None."""
    for column in OTHER_INPUTS:
        if column in example:
            return (
                f"none of the inputs {', '.join(OTHER_INPUTS)}, which are not passed, got {column}"
            )
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


def example_length(example: Mapping[str, Any]) -> int:
    """Return the number of an example's tokens without trailing padding."""
    mask = example.get("attention_mask")
    if mask is None:
        return len(example["input_ids"])
    length = len(mask)
    while length > 1 and not mask[length - 1]:
        length -= 1
    return length


def check_examples(
    model: PreTrainedModel, examples: Sequence[Mapping[str, Any]], name: str = "dataset"
) -> None:
    """Raise an error at the first example that the model cannot take.

    An id outside an embedding table would otherwise be an error without an example's name on the
    CPU, and an assertion that ends the process on a GPU.

    Args:
        model: the classifier.
        examples: examples from `as_examples`.
        name: name of the dataset in error messages.

    Raises:
        ValueError: an id is outside the vocabulary, an example has more tokens than the model has
            positions, a label is not a class (not a finite number, for a model with one output),
            token types are in some rows only or unknown to the model, or the model has several
            labels per text.
    """
    check_classifier(model)
    if model.config.problem_type == "multi_label_classification":
        raise ValueError(
            f"{type(model).__name__}: expected a model with one label per text, "
            f"got problem_type multi_label_classification"
        )
    embeddings: Any = embeddings_module(model)
    table_sizes = {"input_ids": embeddings.word_embeddings.num_embeddings}
    if getattr(embeddings, "token_type_embeddings", None) is not None:
        table_sizes["token_type_ids"] = embeddings.token_type_embeddings.num_embeddings
    longest, num_labels = max_positions(model), int(model.config.num_labels or 0)
    columns = examples[0].keys() if examples else ()
    for row, example in enumerate(examples):
        problem = _label_problem(example["labels"], num_labels)
        if len(example["input_ids"]) > longest:
            problem = f"at most {longest} tokens, got {len(example['input_ids'])}"
        for column, size in table_sizes.items():
            problem = problem or _id_problem(column, example.get(column, [0]), size)
        if example.keys() != columns:
            problem = "token_type_ids in all rows or in none, got them in some"
        if problem:
            raise ValueError(f"{name}: row {row}: expected {problem}")


def check_classifier(model: PreTrainedModel) -> None:
    """Raise an error for a model of transformers that is no sequence classifier.

    A class from elsewhere is not judged by its name.

    Raises:
        ValueError: it is a bare encoder, or has the head of another task.
    """
    kind = type(model)
    expected: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(model.config), None)
    if kind.__module__.startswith("transformers.") and kind is not expected:
        name = expected.__name__ if expected else "a sequence classifier"
        raise ValueError(f"model: expected {name}, got {kind.__name__}")


def _label_problem(label: Any, num_labels: int) -> str | None:
    if num_labels == 1:
        valid = isinstance(label, int | float) and math.isfinite(label)
        return None if valid else f"a number as its label, got {label!r}"
    if type(label) is int and 0 <= label < num_labels:
        return None
    return f"an integer label from 0 to {num_labels - 1}, got {label!r}"


def _id_problem(column: str, ids: Sequence[Any], size: int) -> str | None:
    for token_id in ids:
        if not isinstance(token_id, Integral) or not 0 <= int(token_id) < size:
            return f"{column} from 0 to {size - 1}, got {token_id!r}"
    return None


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group examples into batches of similar length that cost the least in total.

    A batch costs `longest * count` tokens, padding included, plus `BATCH_COST`. Among all ways to
    cut the examples, sorted by length, into batches, the cheapest is chosen; none that mixes
    lengths in another order is cheaper. A batch is cut where that saves more than it costs, so at
    most `BATCH_COST * (1 + log(count))` of its tokens are padding.

    Examples are taken longest first (equal lengths in the order given), so that a batch that does
    not fit in memory fails at once and not after an hour.

    Args:
        lengths: tokens of each example.
        batch_tokens: largest `longest * count` of a batch, padding included. A longer example is a
            batch by itself.

    Returns:
        Lists of positions in `lengths`; each position is in exactly one list.

    Raises:
        ValueError: `batch_tokens` is less than 1.
    """
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens: expected at least 1, got {batch_tokens}")
    order = sorted(range(len(lengths)), key=lambda position: -lengths[position])
    # least[n]: lowest cost of the first n examples; starts[n]: where the last batch of them starts.
    least = np.full(len(order) + 1, np.iinfo(np.int64).max)
    starts = np.zeros(len(order) + 1, dtype=np.int64)
    least[0] = 0
    for start, position in enumerate(order):
        longest = max(1, lengths[position])
        counts = np.arange(1, max(1, min(batch_tokens // longest, len(order) - start)) + 1)
        costs = least[start] + BATCH_COST + longest * counts
        ends = slice(start + 1, start + 1 + len(counts))
        starts[ends] = np.where(costs < least[ends], start, starts[ends])
        least[ends] = np.minimum(costs, least[ends])
    batches: list[list[int]] = []
    end = len(order)
    while end:
        batches.append(order[starts[end] : end])
        end = int(starts[end])
    return batches[::-1]


def collate(
    examples: Sequence[Mapping[str, Any]], pad_id: int, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Pad examples on the right and stack them into one batch.

    Args:
        examples: dicts with `input_ids`, `attention_mask`, `labels` and perhaps `token_type_ids`.
        pad_id: id that pads `input_ids`; the other columns are padded with 0.
        device: device of the tensors returned.

    Returns:
        `input_ids`, `attention_mask` and, if the examples have them, `token_type_ids`: (B, S)
        int64. `labels`: (B,) int64, or float32 if the labels are floats.
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
    """Copy a CPU tensor to `device`.

    A copy to a GPU goes through pinned memory, so that it runs beside the GPU's work instead of
    waiting for it.
    """
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def pad_token_id(model: PreTrainedModel) -> int:
    """Return the id that `collate` pads with for this model, 0 if its config has none."""
    pad_id = model.config.pad_token_id
    return 0 if pad_id is None else int(pad_id)


def per_example_loss(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Compute the loss of each example, without a mean over the batch.

    `-log softmax(logits)[label]`, or `(logit - label)^2` for a model with one output. Logits of
    lower precision are widened to float32 first; float64 stays float64.

    Args:
        logits_BC: (B, C).
        labels_B: (B,) class indices, or targets if C is 1.

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
    """Compute the logits of every example, in the order given and without dropout.

    Args:
        model: classifier on any device; its training mode is restored.
        examples: examples from `encode`.
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
    """Return the share of examples whose largest logit is at the label.

    Raises:
        ValueError: there are no examples, or the model has one output and therefore no classes.
    """
    if logits_NC.shape[0] == 0 or logits_NC.shape[1] == 1:
        raise ValueError(
            "accuracy: expected at least 1 example and 2 classes, "
            f"got logits of shape {tuple(logits_NC.shape)}"
        )
    return float((logits_NC.argmax(1) == torch.as_tensor(labels_N)).double().mean())
