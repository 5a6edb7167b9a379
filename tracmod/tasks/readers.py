"""Rows of TSV, CSV, JSON-lines, Parquet and CoNLL files, plain or gzipped, with line numbers."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NoReturn, cast

import pyarrow as pa
import pyarrow.parquet as pq

Row = tuple[int, dict[str, Any]]  # line number from 1 (Parquet: row number), and the values

# What separates the fields of CSV: the first of these that is in its header. Spreadsheets write
# semicolons where a comma is the decimal sign.
CSV_DELIMITERS = (",", ";", "\t", "|")
LONGEST_SHOWN, MOST_SHOWN = 60, 30  # characters of a value, and columns, in a message
# The start of files in other encodings than UTF-8, of which the first bytes tell.
BYTE_ORDER_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


def read_rows(path: str | Path) -> Iterator[Row]:
    """Yield each row of a file as (line number, values by column name).

    The format follows from the ending of the name. `.tsv` is tab-separated *without quoting*, as
    most corpora are published: a quotation mark is text, and every line is a row. `.csv` has the
    quoting of RFC 4180; its fields are separated by the first of `CSV_DELIMITERS` that is in the
    header. `.jsonl`, `.ndjson` and `.json` have one JSON object per line, or one array of objects;
    or the form of SQuAD, whose rows are its questions (`_squad_questions`).
    `.parquet` is Parquet. All may be gzipped (`.gz`). Text is UTF-8, the first line of TSV and CSV
    names the columns, and blank lines are skipped. Columns without a name are left out (the index
    that pandas writes has none).

    `.conllu` is CoNLL-U, and `.conll`, `.bio`, `.iob` and `.iob2` have a word and, last on the
    line, its tag. Their rows are sentences with the columns `tokens` and `tags`, lists of a word
    and a tag for each token (`_read_conllu`, `_read_tagged_words`).

    Raises:
        ValueError: no such file, an unknown ending, or a malformed row; the message names file and
            line.
    """
    path = Path(path)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = (
        suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else "".join(suffixes[-1:])
    )
    if path.is_dir():
        raise ValueError(f"{path}: expected a file, got a folder")
    reader = _READERS.get(kind)
    if reader is None:
        raise ValueError(
            f"{path}: expected a name that ends in {', '.join(_READERS)}, or in one of them and .gz"
        )
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    return _with_clear_errors(reader, path)


def stated_class_names(path: str | Path) -> dict[str, list[str]]:
    """Return the names of the classes that a Parquet file states in its schema, by column.

    `datasets` writes the columns of its feature `ClassLabel` as numbers, and the name of each
    number into the metadata of the schema. Other formats state nothing. (Dictionaries of Arrow need
    no such care: their rows are read as the names themselves.)
    """
    path = Path(path)
    if ".parquet" not in [suffix.lower() for suffix in path.suffixes[-2:]]:
        return {}
    try:
        with _open(path) as file:
            metadata = pq.read_schema(io.BytesIO(file.read())).metadata or {}
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return {
            column: [str(name) for name in feature["names"]]
            for column, stated in features.items()
            for feature in [stated.get("feature", stated)]  # of a list, that of its values
            if feature.get("_type") == "ClassLabel" and feature.get("names")
        }
    except KeyError:
        return {}  # not written by `datasets`, or without features
    except (
        OSError,
        EOFError,
        zlib.error,
        pa.ArrowException,
        ValueError,
        TypeError,
        AttributeError,
    ) as error:
        raise ValueError(f"{path}: the schema cannot be read: {error}") from None


def _with_clear_errors(reader: Callable[[Path], Iterator[Row]], path: Path) -> Iterator[Row]:
    """Yield the rows, and turn the errors of reading and decompressing into ValueErrors."""
    try:
        yield from reader(path)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None


def _open(path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return cast(IO[bytes], gzip.open(path))
    return path.open("rb")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield numbered lines, decoded one by one, so that invalid UTF-8 has a line number."""
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                _check_encoding(path, line)
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number}: not valid UTF-8: {error.reason}") from None
            yield number, text


def _check_encoding(path: Path, line: bytes) -> None:
    """Refuse a first line in UTF-16 or UTF-32, by its byte order mark or its zeros."""
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if line.startswith(mark):
            raise ValueError(f"{path}:1: expected UTF-8, got {encoding}")
    if b"\0" in line:
        raise ValueError(f"{path}:1: expected UTF-8, got zero bytes, as UTF-16 and UTF-32 have")


def _read_tsv(path: Path) -> Iterator[Row]:
    return _with_header(
        path, ((number, line.rstrip("\r\n").split("\t")) for number, line in _lines(path)), "\t"
    )


def _read_csv(path: Path) -> Iterator[Row]:
    lines = _lines(path)
    before = []
    header = ""
    for number, line in lines:
        before.append((number, line))
        header = line.strip("\r\n")
        if header:
            break
    delimiter = next((mark for mark in CSV_DELIMITERS if mark in header), ",")
    records = _csv_records(path, itertools.chain(before, lines), delimiter)
    return _with_header(path, records, delimiter)


def _csv_records(
    path: Path, lines: Iterator[tuple[int, str]], delimiter: str
) -> Iterator[tuple[int, list[str]]]:
    """Yield records with the number of their first line; a quoted field may span lines."""
    csv.field_size_limit(2**31 - 1)
    # RFC 4180 counts spaces before a quotation mark as text, and then the mark, too. Such a field
    # was almost surely meant to be quoted.
    spaced_quote = re.compile(f'(?:^|{re.escape(delimiter)}) +"')
    record_lines: list[str] = []

    def following() -> Iterator[str]:
        for _, line in lines:
            record_lines.append(line)
            yield line

    records = csv.reader(following(), delimiter=delimiter, strict=True)
    while True:
        start = records.line_num + 1
        record_lines.clear()
        try:
            record = next(records, None)
            if record is None:
                return
            if any(map(spaced_quote.search, record_lines)):
                stripped = next(
                    csv.reader(
                        record_lines, delimiter=delimiter, strict=True, skipinitialspace=True
                    )
                )
                if [f.lstrip(" ") for f in record] != [f.lstrip(" ") for f in stripped]:
                    raise csv.Error("spaces before a quotation mark at the start of a field")
        except csv.Error as error:
            reason = str(error)
            if reason.startswith("new-line character"):
                reason = "a carriage return, without a line feed, outside quotation marks"
            raise ValueError(f"{path}:{start}: not valid CSV: {reason}") from None
        yield start, record


def _with_header(
    path: Path, records: Iterator[tuple[int, list[str]]], delimiter: str
) -> Iterator[Row]:
    """Yield records as rows, under the names of the columns in the first record."""
    header: list[str] | None = None
    for number, fields in records:
        if fields in ([], [""]):
            continue
        if header is None:
            header = [name.strip(" ") for name in fields]  # as after the comma of "text, label"
            repeated = sorted({name for name in header if name and header.count(name) > 1})
            if repeated:
                raise ValueError(
                    f"{path}:{number}: expected distinct columns, got {', '.join(repeated)} twice"
                )
            if all(re.fullmatch('"[^"]+"', name) for name in header):  # of TSV; CSV has no marks
                raise ValueError(
                    f"{path}:{number}: the columns are quoted as in CSV, and TSV is read without "
                    "quoting: name the file .csv"
                )
            if any("\r" in name for name in header):
                raise ValueError(
                    f"{path}:{number}: expected lines that end in a line feed, got carriage returns"
                )
            if len(header) == 1:
                raise ValueError(
                    f"{path}:{number}: expected columns separated by {delimiter!r}, got "
                    f"{shown(header[0])}"
                )
        elif len(fields) != len(header):
            raise ValueError(
                f"{path}:{number}: expected {len(header)} fields ({shown_names(header)}), "
                f"got {len(fields)}"
            )
        else:
            yield number, {name: value for name, value in zip(header, fields, strict=True) if name}


def _read_json_lines(path: Path) -> Iterator[Row]:
    """Yield the objects of JSON lines, or of a JSON array, which may be on several lines.

    Of a single object of SQuAD's form, its questions.
    """
    lines, is_first = _lines(path), True
    for number, line in lines:
        if not line.strip():
            continue
        if line.lstrip().startswith("["):
            yield from _json_array(path, number, line + "".join(text for _, text in lines))
            return
        fault: Exception | None = None
        try:
            row = json.loads(line, object_pairs_hook=_distinct_keys)
        except (ValueError, RecursionError) as error:
            row, fault = None, error
        if is_first and fault is not None and line.lstrip().startswith("{"):
            with suppress(ValueError, RecursionError):  # an object on several lines
                whole = json.loads(line + "".join(text for _, text in lines))
                row, fault = (whole, None) if _is_squad(whole) else (None, fault)
        if fault is not None:
            reason = getattr(fault, "msg", fault)
            raise ValueError(f"{path}:{number}: not valid JSON: {reason}")
        if is_first and _is_squad(row):
            yield from enumerate(_squad_questions(path, row["data"]), 1)
            return
        is_first = False
        yield number, _json_row(path, number, row)


def _is_squad(tree: Any) -> bool:
    """Return whether a JSON value has the form of SQuAD: `data`, a list of `paragraphs`."""
    data = tree.get("data") if isinstance(tree, dict) else None
    return isinstance(data, list) and bool(data) and "paragraphs" in data[0]


def _squad_questions(path: Path, data: Any) -> Iterator[dict[str, Any]]:
    """Yield the questions of SQuAD's form: id, question, context, answers."""
    try:
        for article in data:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    own = {name: question[name] for name in ("id", "question", "answers")}
                    yield own | {"context": paragraph["context"]}
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected the form of SQuAD, data of paragraphs with a context and qas with "
            f"id, question and answers; {type(error).__name__}: {error}"
        ) from None


def _json_array(path: Path, line: int, text: str) -> Iterator[Row]:
    """Yield the objects of a JSON array.

    Args:
        path: the file.
        line: the number of the first line of `text`.
        text: the array, and what follows it.
    """
    decoder = json.JSONDecoder(object_pairs_hook=_distinct_keys)
    space = re.compile(r"[ \t\r\n]*")
    counted = 0  # characters before which lines are counted

    def skip(position: int) -> int:
        nonlocal line, counted
        position = space.match(text, position).end()  # type: ignore[union-attr]
        line += text.count("\n", counted, position)
        counted = position
        return position

    def fail(reason: object) -> NoReturn:
        raise ValueError(f"{path}:{line}: not valid JSON: {reason}")

    position = skip(skip(0) + 1)
    at_end = text.startswith("]", position)
    while not at_end:
        try:
            row, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            fail(getattr(error, "msg", error))
        yield line, _json_row(path, line, row)
        position = skip(end)
        at_end = text.startswith("]", position)
        if not at_end:
            if not text.startswith(",", position):
                fail("Expecting ',' or ']'")
            position = skip(position + 1)
    position = skip(position + 1)
    if position < len(text):
        fail("text after the array")


def _json_row(path: Path, line: int, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{path}:{line}: expected a JSON object, got {type(row).__name__}")
    return row


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict; of a repeated key, json would take the last value."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"expected distinct keys, got {', '.join(repeated)} twice")
    return row


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        with _open(path) as file:
            source = pq.ParquetFile(io.BytesIO(file.read()))
            names = source.schema_arrow.names
            repeated = sorted({name for name in names if names.count(name) > 1})
            if repeated:
                raise ValueError(
                    f"{path}: expected distinct columns, got {', '.join(repeated)} twice"
                )
            number = 0
            for batch in source.iter_batches():
                for row in _parquet_rows(path, number, batch):
                    number += 1
                    yield number, row
    except pa.ArrowException as error:
        raise ValueError(f"{path}: not a readable Parquet file: {error}") from None


def _parquet_rows(path: Path, before: int, batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Return the rows of a batch; a value that is no Python value is named by its row.

    Such values are text that is not UTF-8, and dates beyond those of Python.
    """
    try:
        return cast(list[dict[str, Any]], batch.to_pylist())
    except (ValueError, OverflowError) as error:
        for position in range(len(batch)):
            try:
                batch.slice(position, 1).to_pylist()
            except (ValueError, OverflowError) as fault:
                raise ValueError(f"{path}:{before + position + 1}: {fault}") from None
        raise ValueError(f"{path}: {error}") from None


CONLLU_COLUMNS = (
    "id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc",
)  # fmt: skip


def _read_conllu(path: Path) -> Iterator[Row]:
    """Yield the sentences of CoNLL-U.

    `tokens` are the forms and `tags` the UPOS of the syntactic words; the lists under the other
    names of columns, such as xpos and deprel, can take the place of the tags. `id` is the sent_id
    of the comment. Lines of multiword tokens (1-2) and of empty nodes (8.1) are left out.
    """
    sentence_id: str | None = None
    for first, lines in _blocks(path):
        columns: dict[str, list[str]] = {name: [] for name in CONLLU_COLUMNS}
        sentence_id = None
        for number, line in lines:
            if line.startswith("#"):
                name, _, value = line[1:].partition("=")
                sentence_id = value.strip() if name.strip() == "sent_id" else sentence_id
                continue
            fields = line.split("\t")
            if len(fields) != len(CONLLU_COLUMNS):
                raise ValueError(
                    f"{path}:{number}: expected the {len(CONLLU_COLUMNS)} fields of CoNLL-U "
                    f"separated by tabs, got {len(fields)}"
                )
            if not re.fullmatch(r"[0-9]+([-.][0-9]+)?", fields[0]):
                raise ValueError(
                    f"{path}:{number}: expected the number of a word, got {shown(fields[0])}"
                )
            if fields[0].isdecimal():
                for name, value in zip(CONLLU_COLUMNS, fields, strict=True):
                    columns[name].append(value)
        words = {name: columns[name] for name in CONLLU_COLUMNS if name != "id"}
        if words["form"]:
            own_id = {} if sentence_id is None else {"id": sentence_id}
            yield first, own_id | {"tokens": words["form"], "tags": words["upos"]} | words


def _read_tagged_words(path: Path) -> Iterator[Row]:
    """Yield the sentences of a file with a word per line and an empty line after a sentence.

    The first field of a line is the word and the last one its tag. Fields are separated by tabs, or
    else by spaces. Lines of -DOCSTART- and comments (`# name = value`) are left out.
    """
    width: int | None = None
    for first, lines in _blocks(path):
        tokens, tags = [], []
        for number, line in lines:
            if line.startswith("-DOCSTART-") or re.match(r"# ?\S+ = ", line):
                continue
            fields = line.split("\t") if "\t" in line else line.split()
            width = len(fields) if width is None else width
            if len(fields) != width or width < 2:
                expected = width if width and width > 1 else "two or more"
                raise ValueError(
                    f"{path}:{number}: expected {expected} fields, a word and its tag, got "
                    f"{len(fields)}: {shown(line)}"
                )
            tokens.append(fields[0].strip())
            tags.append(fields[-1].strip())
        if tokens:
            yield first, {"tokens": tokens, "tags": tags}


def _blocks(path: Path) -> Iterator[tuple[int, list[tuple[int, str]]]]:
    """Yield the numbered lines between empty ones, and the number of the first."""
    block: list[tuple[int, str]] = []
    for number, line in _lines(path):
        line = line.rstrip("\r\n")
        if line.strip():
            block.append((number, line))
        elif block:
            yield block[0][0], block
            block = []
    if block:
        yield block[0][0], block


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".tsv": _read_tsv,
    ".csv": _read_csv,
    ".jsonl": _read_json_lines,
    ".json": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".parquet": _read_parquet,
    ".conllu": _read_conllu,
    ".conll": _read_tagged_words,
    ".bio": _read_tagged_words,
    ".iob": _read_tagged_words,
    ".iob2": _read_tagged_words,
}


def shown(value: Any) -> str:
    """Return a value as messages show it: as Python writes it, and not too long."""
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 3]}..."


def shown_names(names: Sequence[str]) -> str:
    """Return the columns of a file as messages list them; names that are not plain are quoted."""
    listed = [
        name if re.fullmatch(r"[\w.:/-]{1,40}", name) else shown(name)
        for name in names[:MOST_SHOWN]
    ]
    more = len(names) - MOST_SHOWN
    return ", ".join(listed + ([f"and {more} more"] if more > 0 else []))


def text_fault(text: str) -> str | None:
    """Return why a text is not Unicode, to follow its name in a message; None if it is."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        surrogate = ord(text[error.start])
        return f"is not valid Unicode: half of a surrogate pair, U+{surrogate:04X}"
    return None
