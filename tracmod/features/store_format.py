"""The manifest of a feature store: what it says, its segments, and how it is checked.

A segment is a set of rows that were added together: those with which the store was created, or
those of one `append`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from tracmod.choices import whole_number
from tracmod.files.durable import canonical_json, identity_differences, seal, sha256, unseal
from tracmod.files.object_storage import Location, write_file

FORMAT = "tracmod-features"
# The version written is the lowest that can represent the store: 2 with int8 rows or appended rows,
# which version 1 does not know, otherwise 1. Other stores thus keep their bytes, and older versions
# of tracmod can read them.
VERSION = 2
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}
MANIFEST, LOCK = "manifest.json", "writer.lock"


@dataclass(frozen=True)
class Segment:
    """Rows that were added together.

    Attributes:
        rows: Their numbers.
        ids_file: Name of the file with their ids.
        ids_sha256: Digest of that file.
        fingerprint: Digest of what the manifest said when they were added, everything before
            included. It is part of the header of each of their shards.
    """

    rows: range
    ids_file: str
    ids_sha256: str
    fingerprint: str


@dataclass(frozen=True)
class Manifest:
    """The manifest of a store.

    Attributes:
        content: The values of manifest.json, without the digest of the file.
    """

    content: dict[str, Any]

    @classmethod
    def new(
        cls,
        ids: Sequence[str],
        dim: int,
        identity: dict[str, Any],
        dtype: str,
        shard_rows: int,
    ) -> Manifest:
        """Check the arguments of `FeatureStore.create` and describe a new store."""
        ids_sha256 = sha256(encode_ids(ids))
        if dtype not in DTYPES:
            expected = ", ".join(DTYPES)
            raise ValueError(f"dtype of a feature store: expected one of {expected}, got {dtype!r}")
        dim = whole_number("dim of a feature store", dim)
        shard_rows = whole_number("shard_rows of a feature store", shard_rows)
        content = {
            "format": FORMAT,
            "version": 2 if dtype == "int8" else 1,
            "num_rows": len(ids),
            "dim": dim,
            "dtype": dtype,
            "shard_rows": shard_rows,
            "identity": as_json(identity),
            "ids_sha256": ids_sha256,
        }
        # The fingerprint of the first segment; appending rows does not change it.
        return cls({**content, "fingerprint": sha256(canonical_json(content))})

    @classmethod
    def read(cls, path: Location) -> Manifest:
        """Read and check the manifest in a folder.

        Raises:
            ValueError: There is none, it is damaged, or its version is newer than this program.
        """
        file = path / MANIFEST
        if not file.is_file():
            raise ValueError(f"no feature store at {path}: there is no {MANIFEST}")
        data = file.read_bytes()
        version = _claimed_version(data)
        # Before the digest is checked, since a newer version may compute it in another way.
        if version > VERSION:
            raise ValueError(
                f"{file}: expected format version {VERSION} or lower, got version {version}: use a "
                "newer tracmod (or the file is damaged)"
            )
        content = unseal(str(file), data)
        if content.get("format") != FORMAT:
            raise ValueError(f"{file} is not the manifest of a feature store")
        return cls(content)

    def write(self, path: Location) -> None:
        """Write manifest.json; replacing it is what makes appended rows part of the store."""
        write_file(path / MANIFEST, seal(self.content))

    def with_appended(self, ids: Sequence[str], data: Any) -> Manifest:
        """Describe the store with one more segment; `data` is the digest of its examples."""
        segment = {
            "num_rows": len(ids),
            "ids_sha256": sha256(encode_ids(ids)),
            "data": as_json(data),
        }
        appended = [*self.content.get("appended", []), segment]
        return Manifest({**self.content, "version": 2, "appended": appended})

    @property
    def dim(self) -> int:
        return int(self.content["dim"])

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.content["dtype"]]

    @property
    def shard_rows(self) -> int:
        return int(self.content["shard_rows"])

    @property
    def num_rows(self) -> int:
        return self.segments[-1].rows.stop

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that the features depend on; `data` is a list if rows were appended."""
        identity: dict[str, Any] = self.content["identity"]
        appended = self.content.get("appended", [])
        if not appended:
            return identity
        return identity | {"data": [identity.get("data"), *(part["data"] for part in appended)]}

    @cached_property
    def segments(self) -> list[Segment]:
        """The segments in the order of their rows."""
        segments: list[Segment] = []
        start, fingerprint = 0, self.content["fingerprint"]
        for number, part in enumerate([self.content, *self.content.get("appended", [])]):
            if number > 0:
                fingerprint = sha256(canonical_json({"after": fingerprint, **part}))
            rows = range(start, start + part["num_rows"])
            segments.append(Segment(rows, ids_file_name(number), part["ids_sha256"], fingerprint))
            start = rows.stop
        return segments

    def differences(self, new: Manifest, ids_sha256: list[str]) -> list[str]:
        """Compare this store, including its appended rows, with what `create` would make.

        Args:
            new: The manifest of a new store.
            ids_sha256: Digests of the ids of the new store, cut into the segments of this one.
        """
        complete = {
            "num_rows": self.num_rows,
            "identity": self.identity,
            "ids_sha256": [segment.ids_sha256 for segment in self.segments],
        }
        expected, got = new.content | {"ids_sha256": ids_sha256}, self.content | complete
        return identity_differences(expected, got, ignore=["version", "appended"])


def encode_ids(ids: Sequence[str]) -> bytes:
    """Return the content of a file of ids.

    Raises:
        ValueError: An id is not a string, or occurs twice.
    """
    repeated = len(set(ids)) != len(ids)
    seen: set[str] = set()
    for row, name in enumerate(ids):
        if not isinstance(name, str):
            raise ValueError(f"ids of a feature store: row {row}: expected a string, got {name!r}")
        if repeated and name in seen:
            raise ValueError(f"ids of a feature store: row {row}: {name!r} occurs a second time")
        seen.add(name)
    return canonical_json(list(ids))


def ids_file_name(segment: int) -> str:
    """Return the name of the file with the ids of a segment."""
    return f"ids-{segment}.json" if segment else "ids.json"


def as_json(value: Any) -> Any:
    """Return a value of an identity as it will be after it was written and read again."""
    try:
        return json.loads(canonical_json(value))
    except (TypeError, ValueError) as error:
        raise ValueError(f"identity of a feature store: JSON cannot hold it: {error}") from error


def data_identity(segments: Sequence[range], data: Callable[[int, int], Any]) -> Any:
    """Return the entry `data` of an identity: a digest, or a list of them for several segments.

    Args:
        segments: The rows of each segment.
        data: Returns the digest of the examples of rows [start, stop).
    """
    digests = [data(rows.start, rows.stop) for rows in segments]
    return digests if len(digests) > 1 else digests[0]


def _claimed_version(manifest: bytes) -> int:
    """Return the version that a manifest claims to have, or 0 if it claims none."""
    try:
        content = json.loads(manifest)
    except ValueError:
        return 0
    version = content.get("version") if isinstance(content, dict) else None
    return version if isinstance(version, int) else 0
