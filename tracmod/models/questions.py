"""Questions and contexts as models for question answering take them, and their answers.

A context that is too long is cut into windows that overlap by `STRIDE` tokens, as transformers'
scripts do. An example is the first window that has the whole answer: where the answer is unknown or
there is none, the first window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STRIDE = 128  # tokens that neighbouring windows share, if they are more than twice as long
LONGEST_ANSWER = 30  # tokens of a predicted answer


class Window(NamedTuple):
    """A question and a part of its context.

    Attributes:
        inputs: `input_ids`, `attention_mask` and perhaps `token_type_ids`.
        characters: for each token, where it begins and ends in the context; None for other tokens.
        span: the positions of the answer's first and last token; of the first token twice, for a
            question without an answer.
    """

    inputs: dict[str, list[int]]
    characters: list[tuple[int, int] | None]
    span: tuple[int, int]


def question_windows(
    tokenizer: PreTrainedTokenizerBase, table: Any, max_length: int
) -> list[Window]:
    """Tokenize a table of questions, and choose a window of each context.

    Args:
        tokenizer: the model's tokenizer.
        table: the columns id, text_a (question), text_b (context), answer and answer_start.
        max_length: largest number of tokens of a question and a window together.

    Raises:
        ValueError: the tokenizer does not say where a token is in the text, a question leaves no
            room for its context, no window has the whole answer, or there is no answer and the
            first token is none that could stand for that.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path}: expected a fast one, which says where a token is "
            f"in the text, got {type(tokenizer).__name__}"
        )
    columns = ("id", "text_a", "text_b", "answer", "answer_start")
    rows = zip(*(table.column(name).to_pylist() for name in columns), strict=True)
    return [_window(tokenizer, max_length, *row) for row in rows]


def _window(
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    example_id: str,
    question: str,
    context: str,
    answer: str,
    start: int,
) -> Window:
    """Return the first window that has the answer."""
    asked = len(tokenizer(question, "", verbose=False)["input_ids"])
    room = max_length - asked
    if room < 1:
        raise ValueError(
            f"example {example_id}: expected a question that leaves room for its context within "
            f"{max_length} tokens, got {asked} tokens"
        )
    windows = tokenizer(
        question,
        context,
        truncation="only_second",
        max_length=max_length,
        stride=min(STRIDE, room // 2),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    if not answer and windows["input_ids"][0][0] not in tokenizer.all_special_ids:
        raise ValueError(
            f"example {example_id}: expected an answer, because the tokenizer begins no text with "
            f"a token that could stand for none, got none"
        )
    names = [name for name in tokenizer.model_input_names if name in windows]
    last_window = len(windows["input_ids"]) - 1
    for number in range(last_window + 1):
        characters = [
            tuple(place) if part == 1 and place[0] < place[1] else None
            for part, place in zip(
                windows.sequence_ids(number), windows["offset_mapping"][number], strict=True
            )
        ]
        places = [place for place in characters if place is not None]
        begins = places[0][0] if number and places else 0
        ends = places[-1][1] if number < last_window and places else len(context)
        span = (0, 0) if not answer else None
        if answer and begins <= start and start + len(answer) <= ends:
            span = _span(characters, start, start + len(answer))
        if span is not None:
            return Window({name: windows[name][number] for name in names}, characters, span)
    raise ValueError(
        f"example {example_id}: expected an answer that is in one window of {max_length} tokens, "
        f"got {answer!r}"
    )


def _span(
    characters: Sequence[tuple[int, int] | None], start: int, end: int
) -> tuple[int, int] | None:
    """Return the first and last token that have some of the characters from start to end."""
    inside = [
        position
        for position, place in enumerate(characters)
        if place is not None and place[0] < end and place[1] > start
    ]
    return (inside[0], inside[-1]) if inside else None


def encode_questions(
    tokenizer: PreTrainedTokenizerBase, table: Any, max_length: int
) -> list[dict[str, Any]]:
    """Return the examples of a table of questions; a label is the answer's first and last token."""
    return [
        window.inputs | {"labels": list(window.span)}
        for window in question_windows(tokenizer, table, max_length)
    ]


def best_span(logits_2S: Tensor, allowed_S: Tensor | None = None) -> tuple[int, int]:
    """Return the first and last token whose two logits have the largest sum.

    Args:
        logits_2S: logits of the first and of the last token.
        allowed_S: which tokens may be part of a span of at most `LONGEST_ANSWER`; None for all.
    """
    first_S, last_S = logits_2S.double()
    sums_SS = first_S[:, None] + last_S[None, :]
    in_order_SS = torch.ones_like(sums_SS, dtype=torch.bool).triu().tril(LONGEST_ANSWER - 1)
    if allowed_S is not None:
        in_order_SS &= allowed_S[:, None] & allowed_S[None, :]
    begin, end = divmod(int(sums_SS.masked_fill(~in_order_SS, -torch.inf).argmax()), len(first_S))
    return begin, end


def span_f1(predicted: tuple[int, int], true: tuple[int, int]) -> float:
    """Return the F1 of two spans of tokens: twice what they share, over the sum of their lengths.

    For words in place of tokens, this is SQuAD's F1, which also leaves out articles and punctuation
    of English.

    Source: Rajpurkar et al. 2016, arXiv 1606.05250.
    """
    shared = max(0, min(predicted[1], true[1]) - max(predicted[0], true[0]) + 1)
    return 2 * shared / (predicted[1] - predicted[0] + true[1] - true[0] + 2)


def best_answers(
    tokenizer: PreTrainedTokenizerBase, table: Any, max_length: int, logits: Sequence[Tensor]
) -> list[str]:
    """Return the answers that a model gives: the spans whose two logits have the largest sum.

    A span is in the context and has at most `LONGEST_ANSWER` tokens. The first token's logits are
    those of no answer, which is an empty text.

    Args:
        tokenizer, table, max_length: as for `question_windows`.
        logits: for each question (2, S) logits of the first and the last token, as
            `predict_tokens` returns them.
    """
    answers = []
    windows = question_windows(tokenizer, table, max_length)
    contexts = table.column("text_b").to_pylist()
    for window, context, logits_2S in zip(windows, contexts, logits, strict=True):
        in_context_S = torch.tensor([place is not None for place in window.characters])
        begin, end = best_span(logits_2S, in_context_S)
        places = window.characters[begin], window.characters[end]
        first_S, last_S = logits_2S.double()
        if float(first_S[0] + last_S[0]) >= float(first_S[begin] + last_S[end]) or None in places:
            answers.append("")
            continue
        answers.append(context[places[0][0] : places[1][1]].strip())  # type: ignore[index]
    return answers
