"""Example files of question answering: questions, contexts and the answers in them, checked."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from tracmod.tasks.columns import (
    NO_LANGUAGE,
    QUESTION_FILE_COLUMNS,
    check_columns,
    check_language,
    missing_notes,
)
from tracmod.tasks.examples import SCHEMA
from tracmod.tasks.files import check_refused, clean
from tracmod.tasks.readers import Row, open_file, read_rows, shown, shown_names, text_fault

# `text_a` is the question and `text_b` the context. `answer` is the first of the answers given,
# empty for a question without one, and `answer_start` its first character in the context, or -1.
QUESTION_SCHEMA = SCHEMA.append(pa.field("answer", pa.string())).append(
    pa.field("answer_start", pa.int64())
)
NEEDED = ("question", "context", "answers")


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
            _question_rows(Path(path)),
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
            names = _choose_names(path, list(row), columns)
            if language is not None and "language" in names:
                raise ValueError(
                    f"language: expected none, because {path} has a column of languages, got "
                    f"{language!r}"
                )
            if notes is not None:
                notes += missing_notes(path, names, language, "questions")
        cells: dict[str, Any] = {name: row.get(names[name]) for name in names}
        question, context = cells.get("question"), cells.get("context")
        fault, answer, start = _answer(cells.get("answers"), context, names)
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
        own = {"text_a": question, "text_b": context, "answer": answer, "answer_start": start}
        rows.append(made | own | {"label": 0})
    if not rows:
        raise ValueError(f"{path}: expected questions, got none")
    return pa.table(
        {name: [row[name] for row in rows] for name in QUESTION_SCHEMA.names}, QUESTION_SCHEMA
    )


def _question_rows(path: Path) -> Iterator[Row]:
    """Yield the questions of a file with the number of their line (of SQuAD's form, from 1)."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if ".json" not in suffixes[-2:] or not path.is_file():
        yield from read_rows(path)
        return
    with open_file(path) as file:
        start = file.read(1)
        while start.isspace():
            start = file.read(1)
        try:
            tree = json.loads((start + file.read()).decode()) if start == b"{" else None
        except ValueError:
            tree = None  # JSON lines
    if not isinstance(tree, dict) or "data" not in tree:
        yield from read_rows(path)
        return
    yield from enumerate(_squad_questions(path, tree["data"]), 1)


def _squad_questions(path: Path, data: Any) -> Iterator[dict[str, Any]]:
    """Yield the questions of a file of SQuAD's form, each with its context."""
    try:
        for article in data:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    yield {
                        "id": question["id"],
                        "question": question["question"],
                        "context": paragraph["context"],
                        "answers": question["answers"],
                    }
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected the form of SQuAD, data of paragraphs with a context and qas with "
            f"id, question and answers; {type(error).__name__}: {error}"
        ) from None


def _choose_names(
    path: str | Path, names_in_file: Sequence[str], columns: Mapping[str, str]
) -> dict[str, str]:
    """Return our columns that a file has, with their names there."""
    names = {}
    for name in QUESTION_FILE_COLUMNS:
        name_in_file = columns.get(name, name)
        if name_in_file and name_in_file not in names_in_file and name in names_in_file:
            name_in_file = name
        if name_in_file in names_in_file:
            names[name] = name_in_file
        elif name_in_file and (name in NEEDED or name in columns):
            raise ValueError(
                f"{path}: expected a column {name_in_file}, as question answering needs, got "
                f"{shown_names(names_in_file)}"
            )
    return names


def _answer(answers: Any, context: Any, names: Mapping[str, str]) -> tuple[str | None, str, int]:
    """Return what is wrong with the answers of a question, or None, and the first of them."""
    column = names.get("answers", "answers")
    pairs: list[tuple[Any, Any]] | None = None
    if isinstance(answers, Mapping):
        texts, starts = answers.get("text"), answers.get("answer_start")
        if isinstance(texts, list | tuple) and isinstance(starts, list | tuple):
            pairs = list(zip(texts, starts, strict=False)) if len(texts) == len(starts) else None
    elif isinstance(answers, list | tuple) and all(isinstance(one, Mapping) for one in answers):
        pairs = [(one.get("text"), one.get("answer_start")) for one in answers]
    if pairs is None:
        return (
            f"expected texts and as many answer_start in column {column}, got {shown(answers)}",
            "",
            -1,
        )
    if not pairs:
        return None, "", -1
    answer, start = pairs[0]
    if not isinstance(answer, str) or not answer.strip() or type(start) is not int:
        return f"expected a text and a number as the answer, got {shown(pairs[0])}", "", -1
    fault = text_fault(answer)
    if fault is not None:
        return f"answer {fault}", "", -1
    found = context[start : start + len(answer)] if isinstance(context, str) else None
    if start < 0 or found != answer:
        fault = f"expected {shown(answer)} at character {start} of the context, got {found!r}"
        return fault, "", -1
    spaces = len(answer) - len(answer.lstrip())
    return None, answer.strip(), start + spaces
