"""Write files whole or not at all, and detect damage by checksums.

A file is written under a temporary name in the same folder, flushed to disk and renamed. Renaming
is atomic, so after a crash or a kill at any moment, the file has either its old content or the new
one. The folder is flushed too, because the new name is on disk only then.
"""

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
    """Return JSON with the SHA-256 of its content, by which `unseal` detects any change."""
    digest = sha256(canonical_json(content))
    return canonical_json({**content, "sha256": digest})


def unseal(file: Path | str, data: bytes) -> dict[str, Any]:
    """Return the content of sealed JSON.

    Args:
        file: Its name in an error message.
        data: The bytes of the file.

    Raises:
        ValueError: `data` is not, byte for byte, what `seal` returned.
    """
    with contextlib.suppress(ValueError):  # not JSON, not UTF-8
        content = json.loads(data)
        if isinstance(content, dict):
            content.pop("sha256", None)
            if seal(content) == data:
                return content
    raise ValueError(f"{file} is damaged: its checksum does not match its content")


def write_file(file: Path, data: bytes, writer: str = "") -> None:
    """Write a file whole or not at all. It is on disk when this returns.

    Args:
        file: Path of the file.
        data: Its content.
        writer: Name of the writer, if several processes may write the same file at the same time;
            each then has a temporary file of its own.

    Raises:
        OSError: The file could not be written. The message names it; nothing is left behind.
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
    """Return a name of this process that is unique among machines that share a file system."""
    return f".{os.uname().nodename}-{os.getpid()}"


def temporary_name(file: Path, writer: str = "") -> Path:
    """Return the hidden name in the same folder under which a file is first written."""
    return file.with_name(f".{file.name}{writer}.tmp")


def publish_file(temporary: Path, file: Path) -> None:
    """Flush a temporary file to disk and give it its final name."""
    with open(temporary, "rb") as written:
        os.fsync(written.fileno())
    os.replace(temporary, file)
    sync_folder(file.parent)


def link_file(source: Path, target: Path) -> None:
    """Give a file a second name (a hard link), or copy it if the file system has no links.

    Files are always replaced by renaming and never changed in place, so writing `target` again
    does not change `source`.
    """
    temporary = temporary_name(target)
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    publish_file(temporary, target)


def link_folder(source: Path, target: Path) -> None:
    """Link every file below a folder, except for temporary files and locks."""
    for file in sorted(source.rglob("*")):
        name = file.relative_to(source)
        hidden = any(part.startswith(".") for part in name.parts)
        if file.is_file() and not hidden and file.suffix != ".lock":
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            link_file(file, target / name)


def file_sha256(file: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with open(file, "rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def sha256(data: bytes) -> str:
    """SHA-256 of bytes, 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def canonical_json(content: Any) -> bytes:
    """Return JSON in a unique form of its values: sorted keys, ASCII, one entry per line.

    Raises:
        TypeError, ValueError: JSON cannot hold a value (NaN, or a type that JSON lacks).
    """
    return (json.dumps(content, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk; only then does a rename survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: The file is not valid JSON. The message names it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None


def write_json(path: Path, tree: Any) -> None:
    """Write a JSON file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, (json.dumps(tree, indent=1, ensure_ascii=False) + "\n").encode())


def write_parquet(path: Path, table: pa.Table) -> None:
    """Write a table as Parquet, whole or not at all."""
    import pyarrow.parquet as pq  # not at the top: nothing else in this module needs pyarrow

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

    Of feature stores, only the manifests are recorded, because shards carry their own digests. The
    index also carries its own, and run.json and logs change, so these are left out. Records
    of other parts are kept, even if their files have changed or disappeared since; otherwise damage
    that happened in between would be recorded as correct.

    Args:
        folder: The folder of checksums.json.
        owned: The part to record again, a path relative to `folder`; by default everything.
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
    """Record the given SHA-256 of files that belong to `folder` but are stored elsewhere."""
    write_json(folder / CHECKSUMS, dict(sorted({**read_checksums(folder), **sums}.items())))


def take_checksums(source: Path, folder: Path, owned: str) -> None:
    """Record for the part `owned` of `folder` what `source` has recorded for it.

    For files that were linked from `source`: if they were recorded anew, damage that they had
    already would be recorded as correct.
    """
    sums = {
        name: digest
        for recorded_in, is_source in ((folder, False), (source, True))
        for name, digest in read_checksums(recorded_in).items()
        if Path(name).is_relative_to(owned) == is_source
    }
    write_json(folder / CHECKSUMS, dict(sorted(sums.items())))


def read_checksums(folder: Path) -> dict[str, str]:
    """Return the recorded SHA-256 of each file, or {} if nothing has been recorded.

    Raises:
        ValueError: checksums.json is not in the format of `write_checksums`.
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
    """Return whether checksums.json records this file of the folder."""
    if name.parts[0] in ("index", "logs", "run.json", CHECKSUMS):
        return False
    if any(part.startswith(".") for part in name.parts):
        return False
    return name.parts[0] != "features" or name.name == "manifest.json"


def identity_differences(
    expected: dict[str, Any], got: dict[str, Any], ignore: Sequence[str] = ()
) -> list[str]:
    """Describe each difference of two identities: `projection.dim: expected 4096, got 1024`.

    An identity is a dictionary of all that something was made from, stored with it.

    Args:
        expected: The identity that the caller works with.
        got: The stored identity.
        ignore: Top-level entries that may differ (`data`, between train and query examples).
    """
    differing = []
    for key in sorted({*expected, *got} - {*ignore, "sha256", "fingerprint"}):
        wanted, stored = expected.get(key), got.get(key)
        if isinstance(wanted, dict) and isinstance(stored, dict):
            differing += [f"{key}.{line}" for line in identity_differences(wanted, stored)]
        elif wanted != stored:
            differing.append(f"{key}: expected {json.dumps(wanted)}, got {json.dumps(stored)}")
    return differing
