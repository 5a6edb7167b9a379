"""Example files of question answering: questions, contexts and the answers in them, checked."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from tracmod.tasks.columns import (
    NO_LANGUAGE,
    QUESTION_FILE_COLUMNS,
    check_columns,
    check_language,
    missing_notes,
    names_in_rows,
)
from tracmod.tasks.examples import SCHEMA
from tracmod.tasks.files import check_refused, clean
from tracmod.tasks.readers import Row, read_rows, shown, shown_names, text_fault

# `text_a` is the question and `text_b` the context. `answer` is the first of the answers given,
# empty for a question without one, and `answer_start` its first character in the context, or -1.
QUESTION_SCHEMA = SCHEMA.append(pa.field("answer", pa.string())).append(
    pa.field("answer_start", pa.int64())
)


def read_question_files(
    paths: Sequence[str | Path],
    columns: Mapping[str, str] | None = None,
    language: str | None = None,
    *,
    model_inputs: Collection[str] = (),
    notes: list[str] | None = None,
) -> list[pa.Table]:
    """Read files of questions, and of contexts in which their answers are.

    - JSON has the form of SQuAD (also of XQuAD, MLQA and TyDiQA-GoldP): `data` of `paragraphs` with
      a `context` and `qas`, each with `id`, `question` and `answers`.
    - JSON lines and Parquet have the columns `question`, `context` and `answers`, as `datasets`
      has them: `{"text": [...], "answer_start": [...]}`, or a list of `{"text", "answer_start"}`.
    - `answer_start` counts characters of the context, from 0. Of several answers, the first is
      taken. A question without an answer (SQuAD 2) has an empty list.
    - Without ids, they are the numbers of the rows, from 0. Without languages, all questions are of
      the language given, or else of "und".

    Args:
        paths: files.
        columns: our column name -> the name in the files, where they differ.
        language: the language of the questions of files without a column of languages.
        model_inputs: columns that are refused, because they are inputs of the model.
        notes: gets a sentence for everything that a file does not say.

    Returns:
        Tables with `QUESTION_SCHEMA`.

    Raises:
        ValueError: a missing column, a malformed row, or an answer that is not in its context; the
            message names file and line.
    """
    columns = columns or {}
    check_columns(columns, QUESTION_FILE_COLUMNS)
    if language is not None:
        check_language(language)
    return [
        question_table(
            path,
            read_rows(path),
            columns,
            language,
            refused=model_inputs,
            notes=notes,
        )
        for path in paths
    ]


def question_table(
    path: str | Path,
    numbered_rows: Iterable[Row],
    columns: Mapping[str, str],
    language: str | None,
    *,
    refused: Collection[str] = (),
    notes: list[str] | None = None,
) -> pa.Table:
    """Check questions, and return them with `QUESTION_SCHEMA`.

    Args:
        path: the file that they are in, for messages.
        numbered_rows: numbers of lines, and values by column.
        columns, language, notes: as for `read_question_files`.
        refused: columns that the file must not have.
    """
    names: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    ids: set[str] = set()
    for row_number, (line, row) in enumerate(numbered_rows):
        if not row_number:
            check_refused(path, list(row), refused)
            names, missing = names_in_rows(QUESTION_FILE_COLUMNS, list(row), columns)
            if missing:
                raise ValueError(
                    f"{path}: expected a column {', '.join(missing)}, as question answering needs, "
                    f"got {shown_names(list(row))}"
                )
            if language is not None and "language" in names:
                raise ValueError(
                    f"language: expected none, because {path} has a column of languages, got "
                    f"{language!r}"
                )
            if notes is not None:
                notes += missing_notes(path, names, language, "questions")
        cells: dict[str, Any] = {name: row.get(names[name]) for name in names}
        question, context = cells.get("question"), cells.get("context")
        answers = _answers(cells["answers"])
        answer, start = answers[0] if answers else ("", -1)
        fault = None
        if answers is None:
            fault = (
                f"expected texts and as many answer_start in column {names['answers']}, got "
                f"{shown(cells['answers'])}"
            )
        elif answers:
            fault = _answer_fault(answer, start, context)
        made = {
            "id": cells.get("id", str(row_number)),
            "language": cells.get("language", language or NO_LANGUAGE),
            "text_a": question,
            "text_b": context,
            "label": "answer",  # `clean` checks a label, too
            "group": cells.get("group"),
            "split_group": None,
        }
        fault = fault or clean(made)
        if fault is None and made["text_b"] is None:
            fault = f"expected a text in column {names['context']}, got none"
        if fault is None and made["id"] in ids:
            fault = f"id {made['id']!r} occurs twice"
        if fault is not None:
            raise ValueError(f"{path}:{line}: {fault}")
        ids.add(str(made["id"]))
        # As they are in the file: `answer_start` counts the characters of the context.
        start += len(answer) - len(answer.lstrip())
        span = {"answer": answer.strip(), "answer_start": start}
        rows.append(made | {"text_a": question, "text_b": context, "label": 0} | span)
    if not rows:
        raise ValueError(f"{path}: expected questions, got none")
    return pa.table(
        {name: [row[name] for row in rows] for name in QUESTION_SCHEMA.names}, QUESTION_SCHEMA
    )


def _answers(values: Any) -> list[tuple[Any, Any]] | None:
    """Return texts and first characters of answers, in either form; None for another form."""
    if isinstance(values, list | tuple) and all(isinstance(one, Mapping) for one in values):
        return [(one.get("text"), one.get("answer_start")) for one in values]
    if not isinstance(values, Mapping):
        return None
    lists: list[Any] = [values.get("text"), values.get("answer_start")]
    if not all(isinstance(own, list | tuple) for own in lists) or len(lists[0]) != len(lists[1]):
        return None
    return list(zip(*lists, strict=True))


def _answer_fault(answer: Any, start: Any, context: Any) -> str | None:
    """Return what is wrong with an answer, or None."""
    if not isinstance(answer, str) or not answer.strip() or type(start) is not int:
        return f"expected a text and a number as the answer, got {shown((answer, start))}"
    fault = text_fault(answer)
    if fault is not None:
        return f"answer {fault}"
    found = context[start : start + len(answer)] if isinstance(context, str) else None
    if start < 0 or found != answer:
        return f"expected {shown(answer)} at character {start} of the context, got {found!r}"
    return None
