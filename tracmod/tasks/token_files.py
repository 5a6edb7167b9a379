"""Example files of token classifiers: sentences whose words have tags, checked row by row."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from tracmod.choices import LossKind
from tracmod.tasks.columns import (
    COMMON_NAMES,
    NO_LANGUAGE,
    TOKEN_FILE_COLUMNS,
    check_columns,
    check_language,
    missing_notes,
    names_in_rows,
)
from tracmod.tasks.examples import SCHEMA
from tracmod.tasks.files import check_refused, clean, read_model_files, stated_by_number
from tracmod.tasks.question_files import read_question_files
from tracmod.tasks.readers import (
    Row,
    read_rows,
    shown,
    shown_names,
    stated_class_names,
    text_fault,
)
from tracmod.tasks.tag_scores import UNTAGGED, sentence_class

# `text_a` is the words with spaces between them, for those who read it, and `label` the class of
# the sentence (`sentence_class`), by which sentences are drawn and shown.
TOKEN_SCHEMA = SCHEMA.append(pa.field("tokens", pa.list_(pa.string()))).append(
    pa.field("tags", pa.list_(pa.int64()))
)

# Names under which public data sets have our columns, suggested in messages.
COMMON_TOKEN_NAMES = {
    "id": COMMON_NAMES["id"],
    "language": COMMON_NAMES["language"],
    "tokens": "words forms form word token",
    "tags": "ner_tags pos_tags upos labels label ner tag label_ids",
}

NO_TAG = "_"  # the name of a word's tag if it has none; its number is UNTAGGED


def read_labelled_files(
    paths: Sequence[str | Path],
    label_names: Sequence[str],
    columns: Mapping[str, str] | None = None,
    language: str | None = None,
    *,
    loss_kind: LossKind,
    model_inputs: Collection[str] = (),
    notes: list[str] | None = None,
) -> list[pa.Table]:
    """Read files of examples of texts, of words or of questions, as the loss of the model has it.

    Args:
        paths, label_names, columns, language, model_inputs, notes: as for `read_model_files`.
        loss_kind: with `token_cross_entropy`, files are those of `read_token_files`, and with
            `span_cross_entropy` those of `read_question_files`.
    """
    if loss_kind == "span_cross_entropy":
        return read_question_files(paths, columns, language, model_inputs=model_inputs, notes=notes)
    if loss_kind == "token_cross_entropy":
        return read_token_files(
            paths, label_names, columns, language, model_inputs=model_inputs, notes=notes
        )
    return read_model_files(
        paths,
        label_names,
        columns,
        language,
        loss_kind=loss_kind,
        model_inputs=model_inputs,
        notes=notes,
    )


def read_token_files(
    paths: Sequence[str | Path],
    label_names: Sequence[str],
    columns: Mapping[str, str] | None = None,
    language: str | None = None,
    *,
    model_inputs: Collection[str] = (),
    notes: list[str] | None = None,
) -> list[pa.Table]:
    """Read files of sentences whose words have tags of a model, by name or by number.

    - JSON lines and Parquet have lists in the columns `tokens` and `tags`. CoNLL-U, and files with
      a word and its tag per line, are read into these.
    - Text is the name of a tag. Numbers are those of the model, unless the schema of a Parquet file
      names them (`datasets` does); -100 is a word without a tag.
    - Without ids, they are the numbers of the rows, from 0. Without languages, all sentences are of
      the language given, or else of "und".

    Args:
        paths: files; see `read_rows`.
        label_names: the model's `id2label`, in the order of the numbers.
        columns: our column name -> the name in the files, where they differ.
        language: the language of sentences of files without a column of languages.
        model_inputs: columns that are refused, because they are inputs of the model.
        notes: gets a sentence for everything that a file does not say.

    Returns:
        Tables with `TOKEN_SCHEMA`.

    Raises:
        ValueError: a missing column, a malformed row or an unknown tag; the message names file and
            line.
    """
    columns = columns or {}
    check_columns(columns, TOKEN_FILE_COLUMNS)
    if language is not None:
        check_language(language)
    files = [TokenFile.read(path, columns, language, refused=model_inputs) for path in paths]
    if language is not None and all(file.has_languages for file in files):
        raise ValueError(
            f"language: expected none, because every file has a column of languages, got "
            f"{language!r}"
        )
    if notes is not None:
        notes.extend(note for file in files for note in file.notes)
    return [file.table(label_names) for file in files]


@dataclass(frozen=True)
class TokenFile:
    """The checked sentences of a file.

    Attributes:
        path: the file.
        lines: the number of the line where each sentence begins.
        values: id, language, group and tokens of each sentence.
        tags: the tags of each sentence: names, or numbers where nothing names them.
        class_names: the names of the numbers of tags, if the schema of the file states them.
        has_languages: whether the file states the language of its sentences.
        notes: sentences on what the file does not say.
    """

    path: Path
    lines: list[int]
    values: dict[str, list[Any]]
    tags: list[list[str | int]]
    class_names: list[str] | None
    has_languages: bool
    notes: list[str]

    @classmethod
    def read(
        cls,
        path: str | Path,
        columns: Mapping[str, str],
        language: str | None,
        *,
        refused: Collection[str] = (),
    ) -> TokenFile:
        """Read and check a file.

        Args:
            path: the file.
            columns: our column -> its name in the file. An empty name leaves an optional one out.
            language: the language of all sentences of a file without a column of languages.
            refused: columns that the file must not have.

        Raises:
            ValueError: a missing column, no sentences, or a malformed one.
        """
        check_columns(columns, TOKEN_FILE_COLUMNS)
        rows, stated = read_rows(path), stated_class_names
        return cls.of_rows(path, rows, columns, language, stated=stated, refused=refused)

    @classmethod
    def of_rows(
        cls,
        path: str | Path,
        rows: Iterable[Row],
        columns: Mapping[str, str],
        language: str | None,
        *,
        stated: Callable[[str | Path], Mapping[str, list[str]]] = lambda _: {},
        refused: Collection[str] = (),
    ) -> TokenFile:
        """Check rows, which are in the file or have its name.

        Args:
            path, columns, language, refused: as for `read`.
            rows: numbers of lines, and values by column.
            stated: returns the names of the numbers of tags, by column, for the path.
        """
        names_in_file: list[str] = []
        names: dict[str, str] = {}
        class_names: list[str] | None = None
        values: dict[str, list[Any]] = {name: [] for name in ("id", "language", "group", "tokens")}
        lines: list[int] = []
        tags: list[list[str | int]] = []
        ids: set[str] = set()
        for row_number, (line, row) in enumerate(rows):
            new_names = [name for name in row if name not in names_in_file]
            if new_names:
                names_in_file += new_names
                check_refused(path, new_names, refused)
                chosen = _choose_names(path, names_in_file, columns, language)
                late = {"id", "language"} & (chosen.keys() - names.keys())
                if row_number and late:
                    raise ValueError(
                        f"{path}:{line}: column {', '.join(late)}, which the first row does not "
                        f"have"
                    )
                names = chosen
            if not row_number:
                class_names = stated(path).get(names["tags"])
            tokens: Any = row.get(names["tokens"])
            own_tags: Any = row.get(names["tags"])
            fault = _words_fault(tokens, own_tags, names)
            cells: dict[str, Any] = {
                name: row.get(names.get(name, "")) for name in ("id", "language", "group")
            }
            if "id" not in names:
                cells["id"] = str(row_number)
            if "language" not in names:
                cells["language"] = NO_LANGUAGE if language is None else language
            if fault is None:
                # `clean` checks texts with a label, too.
                cells |= {"text_a": " ".join(tokens), "text_b": None, "label": "tags"}
                cells |= {"split_group": None}
                fault = clean(cells)
            if fault is None and cells["id"] in ids:
                fault = f"id {cells['id']!r} occurs twice"
            if fault is not None:
                raise ValueError(f"{path}:{line}: {fault}")
            ids.add(str(cells["id"]))
            lines.append(line)
            for name, own_values in values.items():
                own_values.append(list(tokens) if name == "tokens" else cells[name])
            tags.append([_named(tag, class_names) for tag in own_tags])
        if not lines:
            raise ValueError(f"{path}: expected sentences, got none")
        notes = missing_notes(path, names, language, "sentences")
        has_languages = "language" in names
        return cls(Path(path), lines, values, tags, class_names, has_languages, notes)

    def table(self, label_names: Sequence[str]) -> pa.Table:
        """Return the sentences with `TOKEN_SCHEMA`, tags as numbers.

        Raises:
            ValueError: a tag is not among the names, or a sentence has no tag.
        """
        number_of: dict[str | int, int] = {number: number for number in range(len(label_names))}
        number_of[UNTAGGED] = UNTAGGED
        if self.class_names is not None and stated_by_number(self.class_names, label_names):
            pairs = zip(self.class_names, range(len(label_names)), strict=False)
            number_of |= dict(pairs)
        number_of |= {name: number for number, name in enumerate(label_names)}
        numbers = []
        for line, own_tags in zip(self.lines, self.tags, strict=True):
            for position, tag in enumerate(own_tags):
                if tag not in number_of:
                    raise ValueError(
                        f"{self.path}:{line}: unknown tag {shown(tag)} of word {position}, "
                        f"expected one of {shown_names(label_names)}"
                    )
            if all(tag == UNTAGGED for tag in own_tags):
                raise ValueError(f"{self.path}:{line}: expected a word with a tag, got none")
            numbers.append([number_of[tag] for tag in own_tags])
        return _table(self.values | {"tags": numbers}, label_names)


def _table(columns: dict[str, list[Any]], tag_names: Sequence[str]) -> pa.Table:
    """Return sentences with `TOKEN_SCHEMA`; text and class follow from their words and tags."""
    made = {
        "text_a": [" ".join(tokens) for tokens in columns["tokens"]],
        "text_b": [None] * len(columns["id"]),
        "label": [sentence_class(tags, tag_names) for tags in columns["tags"]],
    }
    return pa.table({name: (columns | made)[name] for name in TOKEN_SCHEMA.names}, TOKEN_SCHEMA)


def pool_of_sentences(files: Iterable[TokenFile], tag_names: Sequence[str]) -> pa.Table:
    """Return the sentences of files as the table of a pool, which splits are drawn from."""
    table = pa.concat_tables([file.table(tag_names) for file in files])
    return table.append_column("split_group", pa.nulls(len(table), pa.string()))


def distinct_tags(files: Iterable[TokenFile]) -> list[str]:
    """Return the names of the tags in files: O first, B-X before I-X, in the order of the text.

    Raises:
        ValueError: a tag is a number that nothing names.
    """
    names: set[str] = set()
    for file in files:
        for line, own_tags in zip(file.lines, file.tags, strict=True):
            numbers = [tag for tag in own_tags if not isinstance(tag, str) and tag != UNTAGGED]
            if numbers:
                raise ValueError(
                    f"{file.path}:{line}: expected names of tags, got the number {numbers[0]}, "
                    f"which the file does not name"
                )
            names |= {tag for tag in own_tags if isinstance(tag, str)}
    return sorted(names, key=lambda name: (name != "O", name.partition("-")[2], name))


def tagged_text(words: Sequence[str], tags: Sequence[str]) -> str:
    """Return a sentence as it is shown: `Ada/B-PER lives in Paris/B-LOC`."""
    shown_words = (
        word if tag in ("O", NO_TAG) else f"{word}/{tag}"
        for word, tag in zip(words, tags, strict=True)
    )
    return " ".join(shown_words)


def _choose_names(
    path: str | Path,
    names_in_file: Sequence[str],
    columns: Mapping[str, str],
    language: str | None,
) -> dict[str, str]:
    """Return our columns that a file has, with their names there (`names_in_rows`)."""
    names, missing = names_in_rows(TOKEN_FILE_COLUMNS, names_in_file, columns)
    likely = {
        name: common
        for name, commons in COMMON_TOKEN_NAMES.items()
        for common in reversed(commons.split())
        if name not in names and common in names_in_file and columns.get(name) != ""
    }
    expected = f"a column {', '.join(missing)}, as a token classifier needs"
    if not missing and "language" in likely and language is None:
        missing, expected = ["language"], "a column language, or --language NAME for all sentences"
    if missing:
        pairs = ",".join(f"{name}={value}" for name, value in likely.items())
        advice = f"; for example --columns {shlex.quote(pairs)}" if pairs else ""
        raise ValueError(f"{path}: expected {expected}, got {shown_names(names_in_file)}{advice}")
    return names


def _words_fault(tokens: Any, tags: Any, names: Mapping[str, str]) -> str | None:
    """Return what is wrong with the words and tags of a sentence, or None."""
    for name, values in (("tokens", tokens), ("tags", tags)):
        if not isinstance(values, list | tuple):
            return f"expected a list in column {names[name]}, got {shown(values)}"
    if not tokens:
        return "expected a sentence of one word or more, got none"
    if len(tokens) != len(tags):
        return f"expected a tag for each of {len(tokens)} words, got {len(tags)}"
    for position, (token, tag) in enumerate(zip(tokens, tags, strict=True)):
        if not isinstance(token, str) or not token.strip():
            return f"expected words in {names['tokens']}, got {shown(token)} as word {position}"
        is_tag = (isinstance(tag, str) and tag.strip()) or type(tag) is int
        if not is_tag:
            return f"expected names or numbers of tags, got {shown(tag)} of word {position}"
        faults = (text_fault(value) for value in (token, tag) if isinstance(value, str))
        fault = next((fault for fault in faults if fault is not None), None)
        if fault is not None:
            return f"word {position} {fault}"
    return None


def _named(tag: Any, stated: Sequence[str] | None) -> str | int:
    """Return a tag by its name if there is one, else by its number."""
    if isinstance(tag, str):
        return tag.strip()
    return stated[tag] if stated is not None and 0 <= tag < len(stated) else int(tag)
