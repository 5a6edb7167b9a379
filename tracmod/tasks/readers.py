"""Rows of TSV, CSV, JSON-lines and Parquet files, plain or gzipped, with line numbers."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

Row = tuple[int, dict[str, Any]]  # line number from 1 (Parquet: row number), and the values


def read_rows(path: str | Path) -> Iterator[Row]:
    """Yield each row of a file as (line number, values by column name).

    The format follows from the ending of the name. `.tsv` is tab-separated *without quoting*, as
    most corpora are published: a quotation mark is text, and every line is a row. `.csv` is
    comma-separated with the quoting of RFC 4180. `.jsonl` and `.json` have one JSON object per
    line. `.parquet` is Parquet. All may be gzipped (`.gz`). Text is UTF-8, the first line of TSV
    and CSV names the columns, and blank lines are skipped.

    Raises:
        ValueError: no such file, an unknown ending, or a malformed row; the message names file and
            line.
    """
    path = Path(path)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = (
        suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else "".join(suffixes[-1:])
    )
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
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number}: not valid UTF-8: {error.reason}") from None
            yield number, text


def _read_tsv(path: Path) -> Iterator[Row]:
    return _with_header(
        path, ((number, line.rstrip("\r\n").split("\t")) for number, line in _lines(path))
    )


def _read_csv(path: Path) -> Iterator[Row]:
    return _with_header(path, _csv_records(path))


def _csv_records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield records with the number of their first line; a quoted field may span lines."""
    csv.field_size_limit(2**31 - 1)
    records = csv.reader((line for _, line in _lines(path)), strict=True)
    while True:
        start = records.line_num + 1
        try:
            record = next(records, None)
        except csv.Error as error:
            raise ValueError(f"{path}:{start}: not valid CSV: {error}") from None
        if record is None:
            return
        yield start, record


def _with_header(path: Path, records: Iterator[tuple[int, list[str]]]) -> Iterator[Row]:
    """Yield records as rows, under the names of the columns in the first record."""
    header: list[str] | None = None
    for number, fields in records:
        if fields in ([], [""]):
            continue
        if header is None:
            header = fields
            repeated = sorted({name for name in header if header.count(name) > 1})
            if repeated:
                raise ValueError(
                    f"{path}:{number}: expected distinct columns, got {', '.join(repeated)} twice"
                )
        elif len(fields) != len(header):
            raise ValueError(
                f"{path}:{number}: expected {len(header)} fields ({', '.join(header)}), "
                f"got {len(fields)}"
            )
        else:
            yield number, dict(zip(header, fields, strict=True))


def _read_json_lines(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_distinct_keys)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", error)
            raise ValueError(f"{path}:{number}: not valid JSON: {reason}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: expected a JSON object, got {type(row).__name__}")
        yield number, row


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


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".tsv": _read_tsv,
    ".csv": _read_csv,
    ".jsonl": _read_json_lines,
    ".json": _read_json_lines,
    ".parquet": _read_parquet,
}
