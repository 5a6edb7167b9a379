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
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not valid JSON: {error.msg}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: expected a JSON object, got {type(row).__name__}")
        yield number, row


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        with _open(path) as file:
            source = pq.ParquetFile(io.BytesIO(file.read()))
            number = 0
            for batch in source.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except pa.ArrowException as error:
        raise ValueError(f"{path}: not a readable Parquet file: {error}") from None


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".tsv": _read_tsv,
    ".csv": _read_csv,
    ".jsonl": _read_json_lines,
    ".json": _read_json_lines,
    ".parquet": _read_parquet,
}
