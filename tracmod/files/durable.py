"""Files that are written whole or not at all, and checksums that tell if they still are."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

CHECKSUMS = "checksums.json"


def seal(content: dict[str, Any]) -> bytes:
    """JSON with the SHA-256 of the rest under `sha256`; `unseal` finds any changed byte."""
    digest = sha256(canonical_json(content))
    return canonical_json({**content, "sha256": digest})


def unseal(file: Path | str, data: bytes) -> dict[str, Any]:
    """The content of sealed JSON; `file` is its name in an error.

    Raises:
        ValueError: `data` is not, byte for byte, what `seal` wrote.
    """
    with contextlib.suppress(ValueError):  # not JSON, not UTF-8
        content = json.loads(data)
        if isinstance(content, dict):
            content.pop("sha256", None)
            if seal(content) == data:
                return content
    raise ValueError(f"{file} is damaged: its checksum does not match what it holds")


def write_file(file: Path, data: bytes, writer: str = "") -> None:
    """Writes a file whole or not at all, and returns when it is on disk.

    Args:
        file: where.
        data: what.
        writer: who, where several may write the same file at a time.

    Raises:
        OSError: With the file's path in one sentence; nothing is left behind.
    """
    temporary = temporary_name(file, writer)
    try:
        with open(temporary, "wb") as out:
            out.write(data)
        publish_file(temporary, file)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(
            error.errno,
            f"cannot write {file} ({len(data):,} bytes): {error.strerror}; "
            "what was written before is kept",
        ) from error


def this_process() -> str:
    """Names this process among all that may share a file system."""
    return f".{os.uname().nodename}-{os.getpid()}"


def temporary_name(file: Path, writer: str = "") -> Path:
    """Where a file is written before it gets its name: the same folder, hidden."""
    return file.with_name(f".{file.name}{writer}.tmp")


def publish_file(temporary: Path, file: Path) -> None:
    """Flushes a file that was written aside to disk and gives it its name."""
    with open(temporary, "rb") as written:
        os.fsync(written.fileno())
    os.replace(temporary, file)
    sync_folder(file.parent)


def link_file(source: Path, target: Path) -> None:
    """Give a file a second name (a hard link), or copy it where the file system has no links.

    What tracmod writes is put in place by a rename, never changed in place: so whoever writes
    `target` anew leaves `source` as it is.
    """
    temporary = temporary_name(target)
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    publish_file(temporary, target)


def link_folder(source: Path, target: Path) -> None:
    """`link_file` for every file below a folder; temporary files and locks are left out."""
    for file in sorted(source.rglob("*")):
        name = file.relative_to(source)
        hidden = any(part.startswith(".") for part in name.parts)
        if file.is_file() and not hidden and file.suffix != ".lock":
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            link_file(file, target / name)


def file_sha256(file: Path) -> str:
    """SHA-256 of a file, 64 hexadecimal digits."""
    with open(file, "rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def sha256(data: bytes) -> str:
    """SHA-256 of bytes, 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def canonical_json(content: Any) -> bytes:
    """JSON in the one form of these values: keys sorted, ASCII, one entry per line.

    Raises:
        TypeError, ValueError: JSON cannot hold a value (NaN, or no JSON type).
    """
    return (json.dumps(content, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def sync_folder(folder: Path) -> None:
    """Flushes the names in a folder to disk: a rename lasts only then."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        ValueError: not valid JSON; the file is named.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None


def write_json(path: Path, tree: Any) -> None:
    """Write JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, (json.dumps(tree, indent=1, ensure_ascii=False) + "\n").encode())


def write_parquet(path: Path, table: pa.Table) -> None:
    """Write a table, whole or not at all."""
    import pyarrow.parquet as pq  # here: what else is in this module needs no pyarrow

    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, buffer.getvalue())


def write_csv(path: Path, table: pa.Table) -> None:
    """Write a table as CSV, whole or not at all."""
    from pyarrow import csv

    path.parent.mkdir(parents=True, exist_ok=True)
    data = io.BytesIO()
    csv.write_csv(table, data)
    write_file(path, data.getvalue())


def write_checksums(folder: Path, owned: str = ".") -> None:
    """Record the SHA-256 of every file in the part of `folder` that was just written.

    Of the feature stores only the manifests: shards carry their own digests. Left out are the
    index, which carries its own too, and run.json, which changes with every stage. What was
    recorded of other parts stays, also of files that have changed or are gone since: so damage
    done in between is not taken for sound.

    Args:
        folder: where checksums.json lies.
        owned: what to hash anew, a path in `folder`; by default everything.
    """
    sums = {
        name: digest
        for name, digest in read_checksums(folder).items()
        if not Path(name).is_relative_to(owned)
    }
    for file in (folder / owned).rglob("*"):
        name = file.relative_to(folder)
        if file.is_file() and _is_recorded(name):
            sums[str(name)] = file_sha256(file)
    write_json(folder / CHECKSUMS, dict(sorted(sums.items())))


def add_checksums(folder: Path, sums: dict[str, str]) -> None:
    """Record the SHA-256 of files that belong to `folder` and lie elsewhere."""
    write_json(folder / CHECKSUMS, dict(sorted({**read_checksums(folder), **sums}.items())))


def take_checksums(source: Path, folder: Path, owned: str) -> None:
    """Record for the part `owned` of `folder` what `source` records for it.

    So damage done in `source` before its files were linked is not taken for sound.
    """
    sums = {
        name: digest
        for place, is_source in ((folder, False), (source, True))
        for name, digest in read_checksums(place).items()
        if Path(name).is_relative_to(owned) == is_source
    }
    write_json(folder / CHECKSUMS, dict(sorted(sums.items())))


def read_checksums(folder: Path) -> dict[str, str]:
    """What `write_checksums` recorded: file name -> SHA-256; {} where it never did.

    Raises:
        ValueError: checksums.json is not what `write_checksums` writes.
    """
    record = folder / CHECKSUMS
    if not record.is_file():
        return {}
    try:
        sums = json.loads(record.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{record} is damaged: {error}") from None
    if not isinstance(sums, dict):
        raise ValueError(f"{record} is damaged: expected file names and checksums")
    return sums


def _is_recorded(name: Path) -> bool:
    """Whether checksums.json answers for this file of the folder."""
    if name.parts[0] in ("index", "run.json", CHECKSUMS):
        return False
    if any(part.startswith(".") for part in name.parts):
        return False
    return name.parts[0] != "features" or name.name == "manifest.json"


def identity_differences(
    expected: dict[str, Any], got: dict[str, Any], ignore: Sequence[str] = ()
) -> list[str]:
    """Where two identities differ: `projection.dim: expected 4096, got 1024`, one per entry.

    Args:
        expected: What the caller works with.
        got: What the store was built with.
        ignore: Top-level entries that may differ (`data`, between train and query examples).
    """
    differing = []
    for key in sorted({*expected, *got} - {*ignore, "sha256", "fingerprint"}):
        one, other = expected.get(key), got.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            differing += [f"{key}.{line}" for line in identity_differences(one, other)]
        elif one != other:
            differing.append(f"{key}: expected {json.dumps(one)}, got {json.dumps(other)}")
    return differing
