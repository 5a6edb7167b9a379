"""Encode, check and batch examples; compute a classifier's accuracy.

Shape suffixes: B examples of a batch, S tokens, N examples, C classes.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from tracmod.choices import whole_number
from tracmod.models.adapters import adapted_model, is_peft_model
from tracmod.models.architecture import (
    answers_questions,
    embeddings_module,
    is_token_classifier,
    max_positions,
    word_embeddings,
)
from tracmod.models.language_adapters import LANGUAGE_COLUMN, has_language_adapters
from tracmod.models.loss import UNLABELLED, ExampleLoss, check_unit, loss_of_examples
from tracmod.models.questions import encode_questions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# input_ids, attention_mask, labels, and perhaps token_type_ids and lang_ids
Example = dict[str, Any]


class TokenLabels(list[int]):
    """The labels of an example's tokens, which are padded as its tokens are.

    A list of the several labels of one text has a label per class and is not padded.
    """


TOKEN_COLUMNS = ("input_ids", "attention_mask", "token_type_ids")
# Names of the label that transformers' data collators take, the first that is there counting.
LABEL_COLUMNS = ("labels", "label", "label_ids")
# The label of question answering, as transformers' models take it.
SPAN_COLUMNS = ("start_positions", "end_positions")
# Inputs of some models that the engine does not pass on, for models whose forward pass does not
# name its inputs (`other_inputs`).
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

    A table with the column `tokens` has sentences for a token classifier, and one with `answer`
    has questions (`encode_questions`).

    Args:
        tokenizer: the model's tokenizer.
        table: `pyarrow.Table` with the columns id, text_a, text_b (nullable) and label (a number,
            or a list of them).
        max_length: largest number of tokens, special tokens included.
        num_labels: number of the model's outputs. If given, labels are checked against it (not for
            1, a regression).

    Returns:
        Dicts of `input_ids` and `attention_mask` (lists of int) and `labels` (int, or the list).

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
    if "tokens" in table.column_names:
        return _encode_words(tokenizer, table, max_length)
    if "answer" in table.column_names:
        return encode_questions(tokenizer, table, max_length)
    ids, labels = table.column("id").to_pylist(), table.column("label").to_pylist()
    if num_labels is not None and num_labels > 1 and not any(isinstance(n, list) for n in labels):
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


def _encode_words(tokenizer: PreTrainedTokenizerBase, table: Any, max_length: int) -> list[Example]:
    """Tokenize a table of sentences of words with tags.

    The first token of a word has the tag of the word. Other tokens of it, and special tokens, have
    no label.
    """
    encoded = _word_tokens(tokenizer, table, max_length)
    examples = []
    ids, labels = table.column("id").to_pylist(), table.column("tags").to_pylist()
    for row, (example_id, tags) in enumerate(zip(ids, labels, strict=True)):
        token_labels, previous = TokenLabels(), None
        for word in encoded.word_ids(row):
            token_labels.append(UNLABELLED if word in (None, previous) else tags[word])
            previous = word
        if all(label == UNLABELLED for label in token_labels):
            raise ValueError(
                f"example {example_id}: expected a word with a tag within {max_length} tokens, got "
                f"none"
            )
        example: Example = {name: column[row] for name, column in encoded.items()}
        examples.append(example | {"labels": token_labels})
    return examples


def tags_of_words(
    tokenizer: PreTrainedTokenizerBase, table: Any, max_length: int, logits: Sequence[Tensor]
) -> list[list[int]]:
    """Return the predicted tag of every word of a table's sentences.

    Args:
        tokenizer, table, max_length: as for `encode`.
        logits: for each sentence (T, C) logits of its labelled tokens, as `predict_tokens` returns
            them.

    Returns:
        For each sentence a number per word; -100 for words that have no label or were cut off.
    """
    predicted = []
    labelled = labelled_words(tokenizer, table, max_length)
    for tags, words, logits_TC in zip(
        table.column("tags").to_pylist(), labelled, logits, strict=True
    ):
        own = [UNLABELLED] * len(tags)
        for word, tag in zip(words, logits_TC.argmax(dim=1).tolist(), strict=True):
            own[word] = tag
        predicted.append(own)
    return predicted


def labelled_words(
    tokenizer: PreTrainedTokenizerBase, table: Any, max_length: int
) -> list[list[int]]:
    """Return which words of a table's sentences have a label and were not cut off.

    Args:
        tokenizer, table, max_length: as for `encode`.

    Returns:
        For each sentence the numbers of the words, ascending, from 0.
    """
    encoded = _word_tokens(tokenizer, table, max_length)
    labelled = []
    for row, tags in enumerate(table.column("tags").to_pylist()):
        seen = dict.fromkeys(word for word in encoded.word_ids(row) if word is not None)
        labelled.append([word for word in seen if tags[word] != UNLABELLED])
    return labelled


def _word_tokens(tokenizer: PreTrainedTokenizerBase, table: Any, max_length: int | None) -> Any:
    """Tokenize the words of a table's sentences; the result has `word_ids` of each row.

    Raises:
        ValueError: the tokenizer does not say of which word a token is.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path}: expected a fast one, which says of which word a "
            f"token is, got {type(tokenizer).__name__}"
        )
    # verbose=False: no warning about a sentence that is too long for the model.
    return tokenizer(
        table.column("tokens").to_pylist(),
        is_split_into_words=True,
        truncation=max_length is not None,
        max_length=max_length,
        verbose=False,
    )


def other_inputs(model: Any) -> frozenset[str]:
    """Return the inputs that a model takes and that the engine does not pass on.

    They are the parameters of its forward pass, as the Trainer selects columns by them. Without
    them, the model would compute something else than the user's, so data that has them is refused.

    Args:
        model: the classifier. `OTHER_INPUTS` stand for those of a wrapper that takes anything.
    """
    forward = getattr(model, "forward", None)
    parameters = inspect.signature(forward).parameters.values() if callable(forward) else ()
    named = {
        parameter.name
        for parameter in parameters
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    if "input_ids" not in named:
        return frozenset(OTHER_INPUTS)
    switches = {name for name in named if name.startswith(("output_", "return_", "use_"))}
    passed = {*TOKEN_COLUMNS, *LABEL_COLUMNS}
    if answers_questions(model):
        passed.update(SPAN_COLUMNS)
    if has_language_adapters(getattr(model, "config", None)):
        passed.add(LANGUAGE_COLUMN)
    return frozenset(named - switches - passed)


def num_cut(tokenizer: PreTrainedTokenizerBase, table: Any, max_length: int) -> int:
    """Return how many examples of a table have more than `max_length` tokens.

    Of sentences of words with tags, the number of words that have no token before that.
    """
    if "tokens" in table.column_names:
        whole = _word_tokens(tokenizer, table, None)
        cut = _word_tokens(tokenizer, table, max_length)
        return sum(
            len(set(whole.word_ids(row)) - set(cut.word_ids(row))) for row in range(len(table))
        )
    # Of a question, the context is longer than one window.
    texts = zip(table["text_a"].to_pylist(), table["text_b"].to_pylist(), strict=True)
    # verbose=False: no warning about a text that is too long for the model, since none is given it.
    return sum(
        len(tokenizer(text_a, text_b, truncation=False, verbose=False)["input_ids"]) > max_length
        for text_a, text_b in texts
    )


def as_examples(
    dataset: Iterable[Mapping[str, Any]], name: str = "dataset", model: Any = None
) -> list[dict[str, Any]]:
    """Convert the rows of a dataset to dicts of plain lists.

    Args:
        dataset: rows of lists, arrays or tensors. The label may be called label or label_ids, as
            transformers' data collators take it.
        name: name of the dataset in error messages.
        model: the classifier, whose forward pass says which columns are inputs, and whose classes
            may have other numbers than those of a `datasets.Dataset`.

    Raises:
        ValueError: the dataset is a dict of columns, a row is no dict, has no input_ids, no labels
            or no tokens, has an input that is not passed to the model, such as position_ids, has
            two labels, or its mask or token types have another length than its input_ids; or the
            dataset gives a class another number than the model does.
    """
    if isinstance(dataset, Mapping):
        raise ValueError(
            f"{name}: expected a sequence of rows, got a {type(dataset).__name__} of columns "
            f"({', '.join(map(str, dataset))}); `datasets.Dataset.from_dict` makes rows of it"
        )
    if model is not None:
        _check_class_numbers(dataset, name, model)
    refused = frozenset(OTHER_INPUTS) if model is None else other_inputs(model)
    of_tokens, of_spans = is_token_classifier(model), answers_questions(model)
    try:
        rows = iter(dataset)
    except TypeError:
        kind = type(dataset).__name__
        raise ValueError(f"{name}: expected a sequence of rows, got {kind}") from None
    examples = []
    for row, example in enumerate(rows):
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
        if of_spans and all(column in plain for column in SPAN_COLUMNS):
            plain.setdefault("labels", [plain[column] for column in SPAN_COLUMNS])
        labels = [plain[column] for column in LABEL_COLUMNS if column in plain]
        if labels:  # in words beside its number, it was numbered by the user
            plain["labels"] = next(
                (label for label in labels if not isinstance(label, str)), labels[0]
            )
        if of_tokens and isinstance(plain.get("labels"), list | tuple):
            plain["labels"] = TokenLabels(plain["labels"])
        problem = _column_problem(plain, refused)
        if problem:
            raise ValueError(f"{name}: row {row}: expected {problem}")
        tokens = {"attention_mask": [1] * len(plain["input_ids"])} | {
            column: plain[column] for column in TOKEN_COLUMNS if column in plain
        }
        language = {column: plain[column] for column in (LANGUAGE_COLUMN,) if column in plain}
        examples.append({**tokens, **language, "labels": plain["labels"]})
    return examples


def _column_problem(example: Mapping[str, Any], refused: frozenset[str]) -> str | None:
    """Return what is wrong with a row, to follow "expected" in a message, or None."""
    for column in example:
        if column in refused:
            inputs = ", ".join(sorted(refused))
            return f"none of the inputs {inputs}, which are not passed, got {column}"
    for column in ("input_ids", "labels"):
        if column not in example:
            return f"{column}, got only {', '.join(example)}"
    for column in TOKEN_COLUMNS:
        values = example.get(column, [])
        if not isinstance(values, list | tuple):
            return f"a list of {column}, got {type(values).__name__}"
        if values and isinstance(values[0], list | tuple):
            return f"one list of {column}, got lists within it, as of a batch"
    if not example["input_ids"] or not any(example.get("attention_mask", [1])):
        return "at least one token, got none"
    other_values = [value for value in example.get("attention_mask", ()) if value not in (0, 1)]
    if other_values:
        return f"an attention_mask of 0 and 1, got {other_values[0]!r}"
    for column in LABEL_COLUMNS:
        label, other = example["labels"], example.get(column, example["labels"])
        if other is not label and not isinstance(other, str) and other != label:
            return f"one label, got labels {label!r} and {column} {other!r}"
    expected = len(example["input_ids"])
    for column in TOKEN_COLUMNS:
        if len(example.get(column, example["input_ids"])) != expected:
            return f"{column} of {expected} tokens as in input_ids, got {len(example[column])}"
    return None


def _check_class_numbers(dataset: Any, name: str, model: Any) -> None:
    """Refuse a `datasets.Dataset` that numbers a class of the model otherwise than the model does.

    The numbers that its feature `ClassLabel` gives to names would be taken for the model's.
    """
    features = getattr(dataset, "features", None)
    if not isinstance(features, Mapping):
        return
    column = next((column for column in LABEL_COLUMNS if column in features), None)
    feature = None if column is None else features[column]
    stated = getattr(getattr(feature, "feature", feature), "names", None) or []
    stated = [str(label).casefold() for label in stated]
    if stated == [str(number) for number in range(len(stated))]:
        return  # no names
    own = {str(label).casefold(): int(n) for n, label in (model.config.id2label or {}).items()}
    for number, label in enumerate(stated):
        if own.get(label, number) != number:
            raise ValueError(
                f"{name}: {column}: expected {label} to be class {own[label]} as in the model's "
                f"id2label, got class {number} in the features of the dataset"
            )


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
    model: PreTrainedModel,
    examples: Sequence[Mapping[str, Any]],
    name: str = "dataset",
    loss: ExampleLoss | None = None,
) -> ExampleLoss:
    """Raise an error at the first example that the model or its loss cannot take.

    An id outside an embedding table would otherwise be an error without an example's name on the
    CPU, and an assertion that ends the process on a GPU.

    Args:
        model: the classifier.
        examples: examples from `as_examples`.
        name: name of the dataset in error messages.
        loss: the loss; None for the one that transformers chooses for the model and these labels.

    Returns:
        The loss.

    Raises:
        ValueError: an id is outside the vocabulary, an example has more tokens than the model has
            positions, a label is not one of the loss (a class; a number for each output; 0 to 1 for
            each of several labels; classes of tokens, at least one), token types are in some rows
            only or unknown to the model, or the loss is not one of the model.
    """
    check_classifier(model)
    loss = loss_of_examples(model, examples, loss)
    check_unit(model, loss)
    embeddings: Any = embeddings_module(model)
    table_sizes = {"input_ids": word_embeddings(model).num_embeddings}
    if getattr(embeddings, "token_type_embeddings", None) is not None:
        table_sizes["token_type_ids"] = embeddings.token_type_embeddings.num_embeddings
    columns = examples[0].keys() if examples else ()
    if has_language_adapters(model.config):
        table_sizes[LANGUAGE_COLUMN] = len(model.config.languages)
        if examples and LANGUAGE_COLUMN not in columns and model.config.default_language is None:
            raise ValueError(
                f"{name}: row 0: expected {LANGUAGE_COLUMN}, the number of the language among the "
                f"model's adapters, or a default_language in its config, got neither"
            )
    longest, num_labels = max_positions(model), int(model.config.num_labels or 0)
    loss.check_outputs(num_labels)
    for row, example in enumerate(examples):
        problem = loss.label_problem(example["labels"], num_labels)
        if loss.kind == "token_cross_entropy":
            problem = problem or _token_labels_problem(example)
        if loss.kind == "span_cross_entropy":
            problem = problem or _span_place_problem(example)
        if example_length(example) > longest:
            problem = f"at most {longest} tokens, got {example_length(example)}"
        for column, size in table_sizes.items():
            ids = example.get(column, [0])
            ids = ids if isinstance(ids, list | tuple) else [ids]
            problem = problem or _id_problem(column, ids, size)
        if loss.function is not None and _label_form(example) != _label_form(examples[0]):
            problem = problem or "a label of the same form as in row 0, got another one"
        if example.keys() != columns:
            (differing, *_) = sorted(example.keys() ^ columns)
            problem = f"{differing} in all rows or in none, got them in some"
        if problem:
            raise ValueError(f"{name}: row {row}: expected {problem}")
    if loss.function is not None and examples:
        loss.check_function(
            torch.tensor([example["labels"] for example in examples[:3]]), num_labels
        )
    return loss


def _token_labels_problem(example: Mapping[str, Any]) -> str | None:
    """Return how the labels of tokens do not fit the tokens, to follow "expected", or None."""
    labels, mask = example["labels"], example.get("attention_mask")
    if len(labels) != len(example["input_ids"]):
        return f"labels of {len(example['input_ids'])} tokens as in input_ids, got {len(labels)}"
    for position, (label, attended) in enumerate(zip(labels, mask or labels, strict=True)):
        if mask and not attended and label != UNLABELLED:
            return f"the label -100 at padding, got {label} at token {position}"
    return None


def _span_place_problem(example: Mapping[str, Any]) -> str | None:
    """Return how an answer's positions do not fit the tokens, to follow "expected", or None."""
    mask = example.get("attention_mask", [1] * len(example["input_ids"]))
    for position in example["labels"]:
        if position >= len(mask) or not mask[position]:
            return f"positions of its {sum(mask)} tokens, got {position}"
    return None


def check_classifier(model: PreTrainedModel) -> None:
    """Raise an error for a model of transformers that is no classifier, or cannot run.

    A classifier of texts or of tokens, or a model for question answering.

    A class from elsewhere is not judged by its name.

    Raises:
        ValueError: it is a bare encoder, has the head of another task, is wrapped or compiled, or
            its weights are quantized, not in memory or on several devices.
    """
    # Whoever has a model has imported this already.
    from transformers import (
        MODEL_FOR_QUESTION_ANSWERING_MAPPING,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    )

    kind = type(model)
    missing = [name for name in ("config", "base_model", "dtype") if not hasattr(model, name)]
    if missing or kind.__module__.partition(".")[0] == "peft":
        raise ValueError(
            f"model: expected a transformers model without a wrapper, got {kind.__name__}"
        )
    expected: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(model.config), None)
    of_tokens: Any = MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING.get(type(model.config), None)
    of_spans: Any = MODEL_FOR_QUESTION_ANSWERING_MAPPING.get(type(model.config), None)
    if kind.__module__.startswith("transformers.") and kind not in (expected, of_tokens, of_spans):
        name = expected.__name__ if expected else "a sequence classifier"
        raise ValueError(f"model: expected {name}, got {kind.__name__}")
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod"):
            raise ValueError(f"model: expected no compiled parts, got {name} by torch.compile")
        if getattr(module, "max_norm", None) is not None:  # rows are written in forward passes
            raise ValueError(f"{name}: expected an embedding without max_norm")
    device = next(model.parameters()).device
    for name, parameter in model.named_parameters():
        problem = None
        if parameter.is_inference():
            problem = "weights that were not made within torch.inference_mode()"
        elif not parameter.is_floating_point():
            problem = f"floating-point weights, got {parameter.dtype}"
        elif parameter.is_meta or parameter.device != device:
            problem = f"all weights on one device, got {parameter.device} beside {device}"
        if problem:
            raise ValueError(f"{name}: expected {problem}")
    if model.dtype in (torch.bfloat16, torch.float16):
        warnings.warn(
            f"model: its weights are {model.dtype}, and so are its passes: scores agree to two or "
            f"three digits with those in float32, which model.float() gives",
            stacklevel=4,
        )


def unwrapped(model: Any) -> Any:
    """Return the model inside DataParallel, DistributedDataParallel, torch.compile or PEFT.

    The wrappers compute what the model inside computes. A LoRA model of PEFT becomes one of
    transformers with the same parameters (`adapted_model`).

    Raises:
        ValueError: the model has an adapter of another kind.
    """
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        elif is_peft_model(model):
            model = adapted_model(model)
        else:
            return model


def _label_form(example: Mapping[str, Any]) -> int | None:
    """Return the number of a label's values, or None if it is a single number and no list."""
    label = example["labels"]
    return len(label) if isinstance(label, list | tuple) else None


def _id_problem(column: str, ids: Sequence[Any], size: int) -> str | None:
    for token_id in ids:
        is_number = isinstance(token_id, Integral) and not isinstance(token_id, bool)
        if not is_number or not 0 <= int(token_id) < size:
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
    batch_tokens = whole_number("batch_tokens", batch_tokens)
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
    examples: Sequence[Mapping[str, Any]],
    pad_id: int,
    device: torch.device | str = "cpu",
    *,
    longest: int | None = None,
) -> dict[str, Tensor]:
    """Pad examples on the right and stack them into one batch.

    Padding at the end of an example is cut first.

    Args:
        examples: dicts with `input_ids`, `attention_mask`, `labels` and perhaps `token_type_ids`
            and `lang_ids`.
        pad_id: id that pads `input_ids`; the other columns are padded with 0.
        device: device of the tensors returned.
        longest: S, if it is not that of the longest example; the examples' own padding is then
            kept up to this length.

    Returns:
        `input_ids`, `attention_mask` and, if the examples have them, `token_type_ids`: (B, S)
        int64. `labels`: (B,), or (B, C) if labels are lists; int64, or float32 if they are floats.
        `TokenLabels` become (B, S), padded with -100; the answers of questions are (B, 2).
        `lang_ids`, if the examples have them: (B,).
    """
    lengths = [longest or example_length(example) for example in examples]
    batch: dict[str, Tensor] = {}
    paddings = {"input_ids": pad_id, "attention_mask": 0, "token_type_ids": 0}
    if isinstance(examples[0]["labels"], TokenLabels):
        paddings["labels"] = UNLABELLED
    for name, padding in paddings.items():
        if name not in examples[0]:
            continue
        rows = [
            list(example[name])[:length] for example, length in zip(examples, lengths, strict=True)
        ]
        padded = [row + [padding] * (max(lengths) - len(row)) for row in rows]
        batch[name] = send(torch.tensor(padded, dtype=torch.int64), device)
    if "labels" not in batch:
        batch["labels"] = send(torch.tensor([example["labels"] for example in examples]), device)
    if LANGUAGE_COLUMN in examples[0]:
        numbers = [example[LANGUAGE_COLUMN] for example in examples]
        batch[LANGUAGE_COLUMN] = send(torch.tensor(numbers), device)
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
