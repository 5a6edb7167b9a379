"""Which columns of an example file are which of ours: chosen, checked, and suggested."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tracmod.tasks.readers import shown_names, text_fault

COLUMNS = ("id", "language", "text_a", "text_b", "label", "group")
OPTIONAL = ("id", "language", "text_b", "group")
# Of sentences whose words have tags (`tasks.token_files`).
TOKEN_FILE_COLUMNS = ("id", "language", "tokens", "tags", "group")
# Of questions and contexts (`tasks.question_files`).
QUESTION_FILE_COLUMNS = ("id", "language", "question", "context", "answers", "group")
# The language of examples whose file states none: the code of ISO 639 for "undetermined".
NO_LANGUAGE = "und"

# Names under which public data sets have our columns, the likeliest first. They are suggested in
# messages and never taken by themselves.
COMMON_NAMES = {
    "id": "idx guid index uid uuid example_id sample_id row_id pair_id pairid qid review_id "
    "sentence_id doc_id",
    "language": "lang locale language_code lang_code languages lang_id",
    "text_a": "sentence1 sentence_1 premise question1 text1 text_1 sentence text review "
    "review_body content question query tweet body comment message utterance document input",
    "label": "labels gold_label label_ids gold class target category sentiment stars score rating "
    "label_text y",
}
# The first text of a pair -> the names of the second, the likeliest first.
SECOND_TEXTS = {
    "text_a": "text_b",
    "sentence1": "sentence2",
    "sentence_1": "sentence_2",
    "premise": "hypothesis",
    "question1": "question2",
    "text1": "text2",
    "text_1": "text_2",
    "question": "sentence answer passage context",
    "query": "passage document",
}


@dataclass(frozen=True)
class ColumnChoice:
    """The columns of a file that are read.

    Attributes:
        names: our column -> its name in the file; columns that the file does not have are left out.
        notes: sentences on what the file does not say: its ids, its language.
    """

    names: dict[str, str]
    notes: list[str]


def parse_columns(text: str) -> dict[str, str]:
    """Return the columns that `text_a=premise,text_b=hypothesis,...` names.

    A name in the file may be empty (`text_b=`): the column is then not read. It may contain commas,
    where what follows them is no further `column=`.

    Raises:
        ValueError: a column is not one of `COLUMNS`, is named twice, or has no name.
    """
    columns: dict[str, str] = {}
    for part in re.split(r",(?=\s*\w+\s*=)", text):
        name, equals, name_in_file = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise ValueError(f"columns: expected COLUMN=NAME, got {part!r}")
        if name in columns:
            raise ValueError(f"columns: expected {name} once, got it twice")
        columns[name] = name_in_file
    known = dict.fromkeys((*COLUMNS, *TOKEN_FILE_COLUMNS, *QUESTION_FILE_COLUMNS))
    check_columns(columns, known)
    return columns


def check_columns(columns: Mapping[str, str], known: Iterable[str] = COLUMNS) -> None:
    """Refuse a mapping of columns that no file could satisfy.

    Raises:
        ValueError: a column is unknown, a column that every file must have is left out, or both
            texts are the same column.
    """
    if not isinstance(columns, Mapping):
        raise ValueError(f"columns: expected a dict of names, got {columns!r}")
    known = tuple(known)
    unknown = sorted(set(columns) - set(known))
    if unknown:
        raise ValueError(
            f"columns: expected names among {', '.join(known)}, got {', '.join(unknown)}"
        )
    for name, name_in_file in columns.items():
        if not isinstance(name_in_file, str):
            raise ValueError(f"columns: expected a name for {name}, got {name_in_file!r}")
        if not name_in_file and name not in OPTIONAL:
            raise ValueError(f"columns: expected a name for {name}, got none")
    if columns.get("text_b") and columns.get("text_a", "text_a") == columns["text_b"]:
        raise ValueError(
            f"columns: expected two columns for text_a and text_b, got {columns['text_b']} for both"
        )


def check_language(language: str) -> None:
    """Refuse a language that is blank or not Unicode.

    Raises:
        ValueError: it is.
    """
    if not isinstance(language, str) or not language.strip():
        raise ValueError(f"language: expected a name, got {language!r}")
    fault = text_fault(language)
    if fault is not None:
        raise ValueError(f"language {fault}")


def missing_notes(
    path: str | Path, names: Iterable[str], language: str | None, unit: str
) -> list[str]:
    """Return sentences on what a file does not say: its ids, its language.

    Args:
        path: the file.
        names: our columns that it has.
        language: the language given for all of it, or None.
        unit: the word for its rows, in the plural.
    """
    notes = []
    if "id" not in names:
        notes.append(f"{path}: no column id: ids are the numbers of the {unit}, from 0")
    if "language" not in names and language is None:
        notes.append(
            f"{path}: no column language: all {unit} have the language {NO_LANGUAGE} "
            "(--language NAME)"
        )
    return notes


def names_in_rows(
    known: Iterable[str], names_in_file: Sequence[str], columns: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    """Return our columns that a file has, with their names there, and the names that it lacks.

    A file that lacks the name given, but has the column under its own name, is read by its own. An
    optional column is lacking only if a name was given for it.

    Args:
        known: our columns.
        names_in_file: the names of its columns.
        columns: our column -> its name in the file. An empty name leaves the column out.
    """
    names: dict[str, str] = {}
    missing = []
    for name in known:
        name_in_file = columns.get(name, name)
        if name_in_file and name_in_file not in names_in_file and name in names_in_file:
            name_in_file = name
        if name_in_file in names_in_file:
            names[name] = name_in_file
        elif name_in_file and (name not in OPTIONAL or name in columns):
            missing.append(name_in_file)
    return names, missing


def choose_columns(
    path: str | Path,
    names_in_file: Sequence[str],
    columns: Mapping[str, str],
    language: str | None = None,
) -> ColumnChoice:
    """Choose the columns of a file of a user's own examples.

    - A column has the name that `columns` gives it, or else its own. A file that lacks the name
      given, but has the column under its own name, is read by its own.
    - Without ids, they are the numbers of the rows, from 0. Without languages, all rows have the
      language given, or else `NO_LANGUAGE`.
    - A column that looks like a language or the second text of a pair is never left out in silence.

    Args:
        path: the file, for messages.
        names_in_file: the names of its columns.
        columns: our column -> its name in the file. An empty name leaves the column out.
        language: the language of all rows of files without a column of languages.

    Raises:
        ValueError: a column is missing, or would be left out in silence; the message lists the
            columns of the file and, where it has a likely one, a mapping that would take it.
    """
    names, missing = names_in_rows(COLUMNS, names_in_file, columns)
    if language is not None:
        missing = [name for name in missing if name != columns.get("language")]
    suggested = _suggested(names_in_file, names, columns)
    if language is not None:
        suggested.pop("language", None)
    if missing:
        _fail(path, f"expected a column {', '.join(missing)}", names_in_file, suggested, columns)
    if "language" in suggested:
        expected = "expected a column language, or --language NAME for all examples"
        _fail(path, expected, names_in_file, suggested, columns)
    if "text_b" in suggested:
        expected = (
            f"expected text_b beside text_a={names['text_a']}, or --columns text_b= for texts "
            "without a second one"
        )
        _fail(path, expected, names_in_file, suggested, columns)
    notes = []
    if "id" not in names:
        use = f" (--columns id={suggested['id']} takes that column)" if "id" in suggested else ""
        notes.append(f"{path}: no column id: ids are the numbers of the rows, from 0{use}")
    if "language" not in names and language is None:
        notes.append(
            f"{path}: no column language: all examples have the language {NO_LANGUAGE} "
            "(--language NAME)"
        )
    return ColumnChoice(names, notes)


def _suggested(
    names_in_file: Sequence[str], names: Mapping[str, str], columns: Mapping[str, str]
) -> dict[str, str]:
    """Return columns that are not read, and the likely name of each in the file."""
    taken = set(names.values())
    by_key = {_key(name): name for name in reversed(names_in_file) if name not in taken}
    suggested: dict[str, str] = {}

    def suggest(name: str, common: str) -> None:
        if name not in names and columns.get(name) != "":
            likely = [by_key[key] for key in (name, *common.split()) if key in by_key]
            suggested.update({name: likely[0]} if likely else {})

    for name, common in COMMON_NAMES.items():
        suggest(name, common)
    first = names.get("text_a") or suggested.get("text_a")
    suggest("text_b", SECOND_TEXTS.get(_key(first), "") if first else "")
    return suggested


def _key(name: str) -> str:
    """Return a name of a column without the differences of case, spaces and marks."""
    return re.sub(r"[\s-]+", "_", name.strip("\ufeff \t\"'")).casefold()


def _fail(
    path: str | Path,
    expected: str,
    names_in_file: Sequence[str],
    suggested: Mapping[str, str],
    columns: Mapping[str, str],
) -> None:
    """Raise the error of a missing column, with a mapping that would be accepted, if there is."""
    present = {name: value for name, value in columns.items() if value in ("", *names_in_file)}
    needed = {"text_a", "label"} - set(names_in_file) - set(present) - set(suggested)
    advice = ""
    if suggested:
        pairs = {**present, **suggested} | dict.fromkeys(sorted(needed), "NAME")
        ordered = [f"{name}={pairs[name]}" for name in COLUMNS if name in pairs]
        advice = f"; for example --columns {shlex.quote(','.join(ordered))}"
    elif needed:
        advice = f"; --columns {','.join(f'{name}=NAME' for name in sorted(needed))} says which"
    raise ValueError(f"{path}: {expected}, got {shown_names(names_in_file)}{advice}")
