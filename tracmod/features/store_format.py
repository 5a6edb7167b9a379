"""The format of a feature store: the manifest, its segments and its checks."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tracmod.files.durable import (
    canonical_json,
    identity_differences,
    sha256,
    unseal,
)
from tracmod.files.object_storage import (
    Location,
)

FORMAT = "tracmod-features"


# A manifest is of the lowest version that can read it: 2 with int8 rows or appended ones, of which
# version 1 knows nothing, else 1. So stores without them stay the same bytes, for old readers too.
VERSION = 2


DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}


MANIFEST, LOCK = "manifest.json", "writer.lock"


NO_DIGEST = b"0" * 64


@dataclass(frozen=True)
class Segment:
    """Rows that were added together."""

    rows: range
    ids_name: str  # the file of their ids
    ids_sha256: str
    fingerprint: str  # in the header of each of its shards


def encode_ids(ids: Sequence[str]) -> bytes:
    repeated = len(set(ids)) != len(ids)
    seen: set[str] = set()
    for row, name in enumerate(ids):
        if not isinstance(name, str):
            raise ValueError(f"ids of a feature store: expected strings, row {row} is {name!r}")
        if repeated and name in seen:
            raise ValueError(
                f"ids of a feature store: each once, {name!r} is there again, row {row}"
            )
        seen.add(name)
    return canonical_json(list(ids))


def ids_file_name(segment: int) -> str:
    return f"ids-{segment}.json" if segment else "ids.json"


def new_manifest(
    num_rows: int,
    ids_sha256: str,
    dim: int,
    identity: dict[str, Any],
    dtype: str,
    shard_rows: int,
) -> dict[str, Any]:
    """Checks the arguments of `create`; the manifest of a new store."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype of a feature store: expected {', '.join(DTYPES)}, got {dtype!r}")
    if dim < 1 or shard_rows < 1:
        raise ValueError(
            f"a feature store needs dim and shard_rows of at least 1, got {dim} and {shard_rows}"
        )
    content = {
        "format": FORMAT,
        "version": 2 if dtype == "int8" else 1,
        "num_rows": num_rows,
        "dim": dim,
        "dtype": dtype,
        "shard_rows": shard_rows,
        "identity": as_json(identity),
        "ids_sha256": ids_sha256,
    }
    # Shards of the first segment carry it; it stays what it is when rows are appended.
    return {**content, "fingerprint": sha256(canonical_json(content))}


def as_json(value: Any) -> Any:
    """A value of an identity as it is when it has been read again."""
    try:
        return json.loads(canonical_json(value))
    except (TypeError, ValueError) as error:
        raise ValueError(f"identity of a feature store: JSON cannot hold it: {error}") from error


def segments_of(manifest: dict[str, Any]) -> list[Segment]:
    """The segments of a store, in row order."""
    segments: list[Segment] = []
    start, fingerprint = 0, manifest["fingerprint"]
    for number, part in enumerate([manifest, *manifest.get("appended", [])]):
        if number > 0:
            fingerprint = sha256(canonical_json({"after": fingerprint, **part}))
        rows = range(start, start + part["num_rows"])
        segments.append(Segment(rows, ids_file_name(number), part["ids_sha256"], fingerprint))
        start = rows.stop
    return segments


def data_identity(segments: Sequence[range], data: Callable[[int, int], Any]) -> Any:
    """The entry `data` of an identity: a digest, or of several segments a list."""
    digests = [data(rows.start, rows.stop) for rows in segments]
    return digests if len(digests) > 1 else digests[0]


def identity_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """What all rows of a store were made with."""
    identity: dict[str, Any] = manifest["identity"]
    appended = manifest.get("appended", [])
    if not appended:
        return identity
    return identity | {"data": [identity.get("data"), *(part["data"] for part in appended)]}


def manifest_differences(
    new: dict[str, Any], found: dict[str, Any], ids_sha256: list[str]
) -> list[str]:
    """Where a store on disk is not, its appended rows included, what `create` is asked for.

    Args:
        new: The manifest that a new store would have.
        found: The manifest that is there.
        ids_sha256: Of the ids asked for, cut as the store there has them in segments.
    """
    segments = segments_of(found)
    whole = {
        "num_rows": segments[-1].rows.stop,
        "identity": identity_of(found),
        "ids_sha256": [one.ids_sha256 for one in segments],
    }
    ignored = ["version", "appended"]
    return identity_differences(new | {"ids_sha256": ids_sha256}, found | whole, ignored)


def as_slice(rows: range) -> slice:
    return slice(rows.start, rows.stop)


def read_manifest(path: Location) -> dict[str, Any]:
    file = path / MANIFEST
    if not file.is_file():
        raise ValueError(f"no feature store at {path}: there is no {MANIFEST}")
    data = file.read_bytes()
    version = _version(data)
    if version > VERSION:  # before the seal: a newer version may be sealed in another way
        raise ValueError(
            f"{file} is of format version {version}, this tracmod reads versions up to {VERSION}: "
            "use a newer tracmod (or the file is damaged)"
        )
    content = unseal(str(file), data)
    if content.get("format") != FORMAT:
        raise ValueError(f"{file} is not the manifest of a feature store")
    return content


def _version(manifest: bytes) -> int:
    """The version that a manifest claims; 0 when it cannot be told."""
    try:
        content = json.loads(manifest)
    except ValueError:
        return 0
    version = content.get("version") if isinstance(content, dict) else None
    return version if isinstance(version, int) else 0


def require_sound(problem: str | None) -> None:
    if problem is not None:
        raise ValueError(f"{problem}; run what wrote the store again and it writes it anew")


def shard_problem(
    file: Location, data: bytes | mmap.mmap, stamp: bytes, data_bytes: int
) -> str | None:
    """Checks a shard's size, stamp and digest; `data_bytes` is what its tensors must take."""
    size = len(data)
    if size < 8:
        return f"{file} is damaged: it has {size} bytes"
    with memoryview(data) as view:
        header = 8 + int.from_bytes(view[:8], "little")
        if size != header + data_bytes:
            return (
                f"{file} is damaged: it has {size} bytes, "
                f"its header and rows make {header + data_bytes}"
            )
        position = data.find(stamp, 0, header) + len(stamp)
        if position < len(stamp):
            return f"{file} is damaged, or a shard of another store or place"
        digest = hashlib.sha256(view[:position])
        digest.update(NO_DIGEST)
        digest.update(view[position + 64 :])
        if view[position : position + 64] != digest.hexdigest().encode():
            return f"{file} is damaged: its checksum does not match what it holds"
    return None
