"""FeatureStore: feature rows on disk, in checksummed shards that survive a kill at any instant.

The folder:

    manifest.json              format, version, num_rows, dim, dtype, shard_rows, identity, digest
                               of ids.json and of itself; written once, before any shard
    ids.json                   the id of every row, in row order
    shard-00000.safetensors    features (n, K) in `dtype` and norms (n,) float32 of rows
                               [i * shard_rows, (i + 1) * shard_rows); n <= shard_rows
    writer.lock                empty; locked by the one process that writes

What makes it safe:

- Every file is written under a temporary name, flushed to disk and renamed; the manifest never
  changes afterwards. So a name that is there is whole, and no file depends on a later one.
- A shard carries its checksum in its own safetensors header: the SHA-256 of the whole file with
  these 64 digits set to 0. Beside it stand the fingerprint of the store and the shard's number, so
  that a shard of another store, or in another's place, is refused too.
- The checksum is verified at the first use of a shard by a FeatureStore object (one read of the
  file, 1 to 2 GB/s, which also warms the page cache); later reads map the file without a check.

Shape letters: N rows of the store, n rows of a shard, K dim.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from tracmod.durable import (
    canonical_json,
    link_file,
    seal,
    sha256,
    sync_folder,
    unseal,
    write_file,
)

FORMAT = "tracmod-features"
VERSION = 1
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_MANIFEST, _IDS, _LOCK = "manifest.json", "ids.json", "writer.lock"
_SHARD_NAME = re.compile(r"shard-(\d{5,})\.safetensors")
_NO_DIGEST = b"0" * 64


class FeatureStore:
    """A folder of feature rows; made by `create` (to write) or `open` (to read).

    Attributes:
        path: The folder.
        num_rows: N, the number of examples.
        dim: K, the numbers per row.
        dtype: The torch dtype in which rows are stored.
        shard_rows: Rows per shard; the last shard may have fewer.
        identity: What the features were made with: projection, parameters, digests of head mask,
            model, tokenizer and data. A store is only used together with stores that agree.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], lock: IO[bytes] | None) -> None:
        """Not for callers: `create` and `open` read the manifest and take the lock."""
        self.path = path
        self.num_rows: int = manifest["num_rows"]
        self.dim: int = manifest["dim"]
        self.dtype = DTYPES[manifest["dtype"]]
        self.shard_rows: int = manifest["shard_rows"]
        self.identity: dict[str, Any] = manifest["identity"]
        self._ids_sha256: str = manifest["ids_sha256"]
        self._fingerprint: str = manifest["fingerprint"]
        self._lock = lock
        self._ids: list[str] | None = None
        self._sound: set[int] = set()  # shards whose checksum this object has verified

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        *,
        ids: Sequence[str],
        dim: int,
        identity: dict[str, Any],
        dtype: str = "float32",
        shard_rows: int = 1024,
    ) -> FeatureStore:
        """Starts a store, or opens the one that is there to go on with it, as its only writer.

        Args:
            path: The folder; made when absent.
            ids: The id of every row, each once, in row order.
            dim: K, the numbers per row.
            identity: Values that JSON can hold; compared when the store is opened again.
            dtype: `float32`, `bfloat16` or `float16`.
            shard_rows: Rows per shard.

        Returns:
            The store with the lock of its writer, held until `close` or the end of the process.

        Raises:
            ValueError: An argument is not valid; the folder holds something else; the store there
                differs (the sentence says in what); another writer has it.
            OSError: The disk is full or not writable.
        """
        path = Path(path)
        ids_json = _ids_json(ids)
        manifest = _new_manifest(ids, ids_json, dim, identity, dtype, shard_rows)
        path.mkdir(parents=True, exist_ok=True)
        sync_folder(path.parent)
        _refuse_foreign_folder(path)
        lock = _lock(path)
        try:
            manifest = _claim(path, manifest, ids_json)
        except BaseException:
            lock.close()  # else held for as long as somebody keeps the error's traceback
            raise
        return cls(path, manifest, lock)

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], identity: dict[str, Any] | None = None
    ) -> FeatureStore:
        """Opens a store for reading; reads the manifest alone, so the cost is that of one file.

        Args:
            path: The folder.
            identity: If given, the identity that the store must have.

        Raises:
            ValueError: No store there; manifest damaged or of a newer version; other identity.
        """
        path = Path(path)
        manifest = _read_manifest(path)
        if identity is not None:
            differing = identity_differences(identity, manifest["identity"])
            if differing:
                raise ValueError(f"{path} was built with something else: {'; '.join(differing)}")
        return cls(path, manifest, None)

    def close(self) -> None:
        """Lets another process write; reading goes on."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> FeatureStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return self.num_rows

    def __repr__(self) -> str:
        return f"FeatureStore({str(self.path)!r}, {self.num_rows} x {self.dim}, {self.dtype})"

    @property
    def num_shards(self) -> int:
        """The shards of the complete store."""
        return -(-self.num_rows // self.shard_rows)

    @property
    def ids(self) -> list[str]:
        """The id of every row; read and checked at first use."""
        if self._ids is None:
            file = self.path / _IDS
            data = file.read_bytes() if file.exists() else b""
            if sha256(data) != self._ids_sha256:
                raise ValueError(f"{file} is damaged: its checksum is not the manifest's")
            self._ids = json.loads(data)
        return self._ids

    @property
    def complete(self) -> bool:
        """True when no shard is missing; verifies what was not yet verified."""
        return not self.missing_shards()

    def missing_shards(self) -> list[int]:
        """The numbers of the shards to be written: absent, or there with a wrong checksum."""
        return [i for i in range(self.num_shards) if self.shard_problem(i) is not None]

    def shard_range(self, shard: int) -> range:
        """The rows of a shard."""
        if not 0 <= shard < self.num_shards:
            raise ValueError(f"shard {shard} of {self.path}: it has {self.num_shards} shards")
        start = shard * self.shard_rows
        return range(start, min(start + self.shard_rows, self.num_rows))

    def write_shard(self, shard: int, features: Tensor) -> None:
        """Writes one shard, whole or not at all; on disk when this returns.

        Norms are those of the stored (rounded) rows, summed in float64.

        Args:
            shard: Its number.
            features: (n, K) of a float dtype, n = the rows of the shard; stored in `dtype`.

        Raises:
            ValueError: Wrong shape or dtype; a row that is NaN, infinite or too large for the
                dtype (the sentence names its example); store opened for reading.
            OSError: The disk is full; the store stays valid without this shard.
        """
        rows = self.shard_range(shard)
        if self._lock is None:
            raise ValueError(f"{self.path} is open for reading: FeatureStore.create opens to write")
        if features.shape != (len(rows), self.dim) or not features.is_floating_point():
            raise ValueError(
                f"shard {shard} of {self.path}: expected {len(rows)} x {self.dim} floats, "
                f"got {tuple(features.shape)} of {features.dtype}"
            )
        stored = features.detach().to("cpu", self.dtype).contiguous()
        norms = np.linalg.norm(stored.double().numpy(), axis=1)
        norms_n = torch.from_numpy(norms).float()
        bad = torch.nonzero(~torch.isfinite(norms_n))
        if len(bad):
            raise ValueError(
                f"example {self.ids[rows[int(bad[0])]]!r}: its features are NaN, infinite or too "
                f"large for {self.dtype}; nothing of shard {shard} was written"
            )
        note = self._stamp(shard) + _NO_DIGEST
        data = save({"features": stored, "norms": norms_n}, {"tracmod": note.decode()})
        position = data.index(note) + len(note) - 64
        digest = sha256(data).encode()
        self._sound.discard(shard)
        write_file(self._file(shard), data[:position] + digest + data[position + 64 :])
        self._sound.add(shard)

    def link_shards(self, other: str | os.PathLike[str]) -> int:
        """Links the shards that this store lacks from another store of the very same content.

        The same: ids, dim, dtype, shard_rows and identity. A linked shard is verified at its first
        use as any other, and written anew if it is damaged.

        Args:
            other: The folder of a store, finished or not, or of none.

        Returns:
            How many shards were linked; 0 where `other` is no store or holds something else.
        """
        assert self._lock is not None
        try:
            source = FeatureStore.open(other)
        except ValueError:
            return 0
        if source._fingerprint != self._fingerprint:
            return 0
        lacking = [
            shard
            for shard in range(self.num_shards)
            if source._file(shard).is_file() and not self._file(shard).exists()
        ]
        for shard in lacking:
            link_file(source._file(shard), self._file(shard))
        return len(lacking)

    def norms(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The L2 norms of rows [start, stop), (rows,) float32; raises as `read` does."""
        return self._gather("norms", start, stop)

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The rows [start, stop), (rows, K) in the dtype of the store.

        Rows of one shard are a view of the mapped file (nothing is copied; writing to it does not
        reach the file); rows of several are copied together.

        Raises:
            ValueError: A shard is missing or damaged, or the range is not within the store.
        """
        return self._gather("features", start, stop)

    def blocks(self, rows: int) -> Iterator[tuple[int, Tensor]]:
        """Yields (start, features (rows, K)) in row order; the last block may be shorter.

        A block that ends where a shard does is not copied: best a divisor of `shard_rows`.
        """
        if rows < 1:
            raise ValueError(f"blocks of {rows} rows: expected at least 1")
        for start in range(0, self.num_rows, rows):
            yield start, self.read(start, min(start + rows, self.num_rows))

    def verify(self) -> list[str]:
        """Reads everything anew from disk; one sentence per problem, none when sound."""
        return verify_store(self.path)

    def shard_problem(self, shard: int) -> str | None:
        """What is wrong with a shard on disk, in one sentence; None when it is whole.

        Reads the file once; a shard found whole is not read again by this object.
        """
        if shard in self._sound:
            return None
        file, rows = self._file(shard), len(self.shard_range(shard))
        if not file.is_file():
            return f"{file} is missing"
        row_bytes = self.dim * self.dtype.itemsize + torch.float32.itemsize
        problem = _shard_problem(file, self._stamp(shard), rows * row_bytes)
        if problem is None:
            self._sound.add(shard)
        return problem

    def _file(self, shard: int) -> Path:
        return self.path / f"shard-{shard:05d}.safetensors"

    def _stamp(self, shard: int) -> bytes:
        """What stands before the digest in a shard's header: whose it is and which."""
        return f"store={self._fingerprint} shard={shard:05d} sha256=".encode()

    def _gather(self, name: str, start: int, stop: int | None) -> Tensor:
        stop = self.num_rows if stop is None else stop
        if not 0 <= start <= stop <= self.num_rows:
            raise ValueError(f"rows {start} to {stop} of {self.path}: it has {self.num_rows} rows")
        parts = []
        while start < stop:
            shard = start // self.shard_rows
            rows = self.shard_range(shard)
            end = min(stop, rows.stop)
            parts.append(self._load(shard, name)[start - rows.start : end - rows.start])
            start = end
        if not parts:
            return (
                torch.empty(0, self.dim, dtype=self.dtype) if name == "features" else torch.empty(0)
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _load(self, shard: int, name: str) -> Tensor:
        problem = self.shard_problem(shard)
        if problem is not None:
            raise ValueError(f"{problem}; run what wrote the store again and it writes it anew")
        with safe_open(self._file(shard), "pt") as file:
            return file.get_tensor(name)


def verify_store(
    path: str | os.PathLike[str],
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> list[str]:
    """Checks every file of a store: digests, missing shards, files that do not belong there.

    Args:
        path: The folder.
        progress: Wraps the iteration over the shards, for instance `tqdm`.

    Returns:
        One sentence per problem; empty when the store is complete and sound. The leftover of a
        killed writer (a temporary file) is none: it is never read, and the next writer removes it.
    """
    try:
        store = FeatureStore.open(path)
    except (ValueError, OSError) as error:
        return [str(error)]
    problems = []
    try:
        assert len(store.ids) == store.num_rows
    except (ValueError, OSError) as error:
        problems.append(str(error))
    for file in sorted(store.path.iterdir()):
        shard = _SHARD_NAME.fullmatch(file.name)
        if shard and store._file(int(shard[1])) == file and int(shard[1]) < store.num_shards:
            continue
        if file.name not in (_MANIFEST, _IDS, _LOCK) and not _is_temporary(file):
            problems.append(f"{file} does not belong to this store")
    shard_problems = (store.shard_problem(i) for i in progress(range(store.num_shards)))
    return problems + [problem for problem in shard_problems if problem is not None]


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


def _ids_json(ids: Sequence[str]) -> bytes:
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


def _new_manifest(
    ids: Sequence[str],
    ids_json: bytes,
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
    try:
        identity = json.loads(canonical_json(identity))
    except (TypeError, ValueError) as error:
        raise ValueError(f"identity of a feature store: JSON cannot hold it: {error}") from error
    content = {
        "format": FORMAT,
        "version": VERSION,
        "num_rows": len(ids),
        "dim": dim,
        "dtype": dtype,
        "shard_rows": shard_rows,
        "identity": identity,
        "ids_sha256": sha256(ids_json),
    }
    # Shards carry it. It stays what it was should rows be added to the store one day.
    return {**content, "fingerprint": sha256(canonical_json(content))}


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / _MANIFEST
    if not file.is_file():
        raise ValueError(f"no feature store at {path}: there is no {_MANIFEST}")
    data = file.read_bytes()
    version = _version(data)
    if version > VERSION:  # before the seal: a newer version may be sealed in another way
        raise ValueError(
            f"{file} is of format version {version}, this tracmod reads version {VERSION}: "
            "use a newer tracmod (or the file is damaged)"
        )
    content = unseal(file, data)
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


def _refuse_foreign_folder(path: Path) -> None:
    """A store is not started in a folder that holds anything else."""
    if (path / _MANIFEST).exists():
        return
    foreign = [
        file.name
        for file in sorted(path.iterdir())
        if file.name not in (_IDS, _LOCK) and not _is_temporary(file)
    ]
    if foreign:
        raise ValueError(
            f"{path} is not empty ({foreign[0]} is there) and has no {_MANIFEST}: "
            "a feature store needs its own folder"
        )


def _claim(path: Path, manifest: dict[str, Any], ids_json: bytes) -> dict[str, Any]:
    """Begin the store, or check that it is the one that is there; the manifest on disk."""
    for leftover in path.glob(".*.tmp"):  # of a writer that was killed: we hold the lock now
        leftover.unlink()
    if (path / _MANIFEST).exists():
        found = _read_manifest(path)
        differing = identity_differences(manifest, found)
        if differing:
            raise ValueError(
                f"{path} holds other features than these: {'; '.join(differing)}; "
                "take another folder or remove this one"
            )
        manifest = found
    if not (path / _IDS).exists() or (path / _IDS).read_bytes() != ids_json:
        write_file(path / _IDS, ids_json)
    if not (path / _MANIFEST).exists():
        write_file(path / _MANIFEST, seal(manifest))
    return manifest


def _is_temporary(file: Path) -> bool:
    return file.name.startswith(".") and file.name.endswith(".tmp")


def _lock(path: Path) -> IO[bytes]:
    lock = open(path / _LOCK, "ab")  # noqa: SIM115 (the open file is the lock)
    try:
        # flock, not lockf: it also keeps out a second writer of this same process. The kernel
        # drops it when the process ends, however it ends.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise ValueError(f"{path} is being written by another process or object") from None
    return lock


def _shard_problem(file: Path, stamp: bytes, data_bytes: int) -> str | None:
    """Checks a shard's size, stamp and digest; `data_bytes` is what its tensors must take."""
    with open(file, "rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        if size < 8:
            return f"{file} is damaged: it has {size} bytes"
        with (
            mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as view,
        ):
            header = 8 + int.from_bytes(view[:8], "little")
            if size != header + data_bytes:
                return (
                    f"{file} is damaged: it has {size} bytes, "
                    f"its header and rows make {header + data_bytes}"
                )
            position = mapped.find(stamp, 0, header) + len(stamp)
            if position < len(stamp):
                return f"{file} is damaged, or a shard of another store or place"
            digest = hashlib.sha256(view[:position])
            digest.update(_NO_DIGEST)
            digest.update(view[position + 64 :])
            if view[position : position + 64] != digest.hexdigest().encode():
                return f"{file} is damaged: its checksum does not match what it holds"
    return None
