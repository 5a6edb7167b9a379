"""Files that are written whole or not at all, and checksums that tell if they still are."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

CHECKSUMS = "checksums.json"


def seal(content: dict[str, Any]) -> bytes:
    """JSON with the SHA-256 of the rest under `sha256`; `unseal` finds any changed byte."""
    digest = sha256(canonical_json(content))
    return canonical_json({**content, "sha256": digest})


def unseal(file: Path, data: bytes) -> dict[str, Any]:
    """The content of sealed JSON.

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


def write_file(file: Path, data: bytes) -> None:
    """Writes a file whole or not at all, and returns when it is on disk.

    Raises:
        OSError: With the file's path in one sentence; nothing is left behind.
    """
    temporary = temporary_name(file)
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


def temporary_name(file: Path) -> Path:
    """Where a file is written before it gets its name: the same folder, hidden."""
    return file.with_name(f".{file.name}.tmp")


def publish_file(temporary: Path, file: Path) -> None:
    """Flushes a file that was written aside to disk and gives it its name."""
    with open(temporary, "rb") as written:
        os.fsync(written.fileno())
    os.replace(temporary, file)
    sync_folder(file.parent)


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


def write_json(path: Path, tree: Any) -> None:
    """Write JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, (json.dumps(tree, indent=1, ensure_ascii=False) + "\n").encode())


def write_checksums(folder: Path) -> None:
    """Record the SHA-256 of every file written since the last time.

    Left out are the feature stores and the index, which carry their own, and run.json, which
    changes with every stage. What was recorded before stays as it was, so that a file damaged in
    between is not taken for sound.
    """
    record = folder / CHECKSUMS
    sums = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    recorded = record.stat().st_mtime_ns if record.is_file() else 0
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder)
        own = name.parts[0] in ("features", "index", "run.json", CHECKSUMS)
        if own or any(part.startswith(".") for part in name.parts):
            continue
        if str(name) not in sums or file.stat().st_mtime_ns > recorded:
            sums[str(name)] = file_sha256(file)
    write_json(record, {name: sums[name] for name in sorted(sums) if (folder / name).is_file()})
