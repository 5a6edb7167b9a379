"""FeatureStore: rows of features in checksummed shards that survive a kill at any moment.

The folder of a store contains:

    manifest.json              format, version, num_rows, dim, dtype, shard_rows, identity, digests
                               of ids.json and of the manifest itself; after rows were appended,
                               also `appended`, a list of {num_rows, ids_sha256, data} with one
                               entry per segment
    ids.json                   the ids of the rows of the first segment, in row order
    ids-1.json, ...            the ids of the rows that were appended first, ...
    shard-00000.safetensors    n <= shard_rows rows: features (n, K) in `dtype` and norms (n,)
                               float32; if `dtype` is int8, the features are codes, and there are
                               also scales (n,) float32: a row is codes * scale
    writer.lock                empty; locked by the one process that writes

A segment is a set of rows that were added together: those with which the store was created, or
those of one `append`. Each segment is cut into shards by itself, so its last shard may be shorter;
shards are numbered throughout.

Why a kill (even kill -9, or a power failure) at any moment does no harm:

- Every file is written under a temporary name, flushed to disk and renamed. Renaming is atomic, so
  a file that has its final name is complete. A temporary file left by a killed writer is never
  read, and the next writer removes it.
- The manifest is written before any shard, so a shard always belongs to a known store. Only
  `append` replaces the manifest, after it has written the new ids; this one replacement adds the
  rows, and no existing shard has to change.
- A shard that is missing or damaged is the unit of work: `missing_shards` lists them, and whoever
  collects features writes these and no others. A run that is started again thus resumes.
- Shards carry their own checksum, together with the store and the number that they belong to (see
  `Shards`). It is verified before the first row of a shard is used.
- The lock is that of the operating system, which releases it when a process ends, however it ends.

On object storage (a URL instead of a path) the folder is the same, with these differences:

- A file is written by one put, which is atomic. A shard is fetched as a whole and verified each
  time; the last ones are kept in memory.
- There is no lock, and none is needed. Two writers of the same store both put complete shards of
  it, and shards of another store are refused. If two processes create, or append, different rows at
  the same URL at the same time, one of them gets an error, at the latest when it reads.

Shape suffixes: N rows of the store, n rows of a shard, K dim, R chosen rows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from filelock import Timeout, UnixFileLock
from torch import Tensor

from tracmod.choices import whole_number
from tracmod.features.merge import Source, check_mergeable, copy_shards
from tracmod.features.shards import Shards
from tracmod.features.store_format import (
    LOCK,
    MANIFEST,
    Manifest,
    data_identity,
    encode_ids,
    ids_file_name,
)
from tracmod.files.durable import identity_differences, sha256, sync_folder, this_process
from tracmod.files.object_storage import Location, ObjectPath, entries, location, write_file
from tracmod.kernels import quantize_rows

SHARD_ROWS = 1024
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)

StorePath = str | os.PathLike[str] | ObjectPath


class FeatureStore:
    """Rows of features in a folder or on object storage, for data sets that exceed the memory.

    A store is created and resumed by `create` or `grow`, which lock it for one writer, and opened
    for reading by `open`. `merge` makes one store of several. It can be passed wherever features
    are expected, for example to `top_influences`.

    Attributes:
        path: The folder, or the URL.
        num_rows: N, the number of rows.
        dim: K, the numbers per row.
        dtype: The torch dtype in which rows are stored. Rows of int8 are read as float32.
        shard_rows: Rows per shard; the last shard of a segment may have fewer.
        identity: What the features were made with: projection, parameters, digests of head mask,
            model, tokenizer and data. Only stores that agree are used together. If rows were
            appended, `data` is the list of the segments' digests.

    Examples:
        >>> import tempfile
        >>> import torch
        >>> import tracmod as tm
        >>> folder, rows = tempfile.mkdtemp(), torch.randn(5, 8)
        >>> names = ["a", "b", "c", "d", "e"]
        >>> store = tm.FeatureStore.create(
        ...     f"{folder}/store", ids=names, dim=8, identity={"model": "mine"}, shard_rows=2
        ... )
        >>> with store:
        ...     for shard in store.missing_shards():  # after an interruption: those still missing
        ...         part = store.shard_range(shard)
        ...         store.write_shard(shard, rows[part.start : part.stop])
        >>> store = tm.FeatureStore.open(f"{folder}/store")
        >>> store.ids, store.complete, torch.equal(store[1:4], rows[1:4])
        (['a', 'b', 'c', 'd', 'e'], True, True)
    """

    def __init__(self, path: Location, manifest: Manifest, lock: ExitStack | None) -> None:
        """Not for callers: `create` and `open` read the manifest and take the lock."""
        self.path = path
        self._lock = lock
        self._writer = ""  # set by `share`: part of the names of temporary files
        self._shards = Shards(path, manifest)
        self._use(manifest)

    def _use(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._shards.use(manifest)
        self.num_rows = manifest.num_rows
        self.dim = manifest.dim
        self.dtype = manifest.dtype
        self.shard_rows = manifest.shard_rows
        self.identity = manifest.identity
        self._ids: list[str] | None = None

    @classmethod
    def create(
        cls,
        path: StorePath,
        *,
        ids: Sequence[str],
        dim: int,
        identity: dict[str, Any],
        dtype: str = "float32",
        shard_rows: int = SHARD_ROWS,
    ) -> FeatureStore:
        """Create a store, or open an existing one to resume writing it, as its only writer.

        Args:
            path: The folder, or a URL (`s3://bucket/folder`). It is created if it does not exist.
            ids: The id of every row in row order, without repetitions.
            dim: K, the numbers per row.
            identity: Values that JSON can hold. They are compared when the store is opened again.
            dtype: `float32`, `bfloat16`, `float16` or `int8` (with one scale per row; numbers that
                are read are off by at most half a step, max|row| / 254).
            shard_rows: Rows per shard.

        Returns:
            The store. It holds the writer's lock until `close` or the end of the process; there is
            no lock on object storage.

        Raises:
            ValueError: An argument is invalid, the folder contains something else, the store in it
                differs (the message says in what), or another writer has locked it.
            OSError: The disk is full or not writable, or object storage cannot be reached.
        """
        path = location(path)
        manifest = Manifest.new(ids, dim, identity, dtype, shard_rows)
        if isinstance(path, Path):
            path.mkdir(parents=True, exist_ok=True)
            sync_folder(path.parent)
        _refuse_other_folder(path)
        lock = _lock(path)
        try:
            manifest = _initialize(path, manifest, ids)
        except BaseException:
            lock.close()  # otherwise held for as long as somebody keeps the error's traceback
            raise
        return cls(path, manifest, lock)

    @classmethod
    def grow(
        cls,
        path: StorePath,
        *,
        ids: Sequence[str],
        data: Callable[[int, int], Any],
        dim: int,
        identity: dict[str, Any],
        dtype: str = "float32",
        shard_rows: int = SHARD_ROWS,
    ) -> FeatureStore:
        """Create or resume a store as `create` does, or append rows to one that has the first ones.

        Args:
            path, dim, dtype, shard_rows: As for `create`.
            ids: The ids of all rows, including those that the store already has.
            data: Returns the digest of the examples of rows [start, stop). It is compared with the
                digests of the segments that are there.
            identity: As for `create`, without `data`.

        Raises:
            ValueError, OSError: As for `create`. If any existing row would differ now, the store is
                refused and not modified.
        """
        segments = [range(len(ids))]
        if (location(path) / MANIFEST).exists():
            segments = [segment.rows for segment in Manifest.read(location(path)).segments]
        existing_rows = segments[-1].stop
        store = cls.create(
            path,
            ids=ids[:existing_rows],
            dim=dim,
            identity=identity | {"data": data_identity(segments, data)},
            dtype=dtype,
            shard_rows=shard_rows,
        )
        try:
            if existing_rows < len(ids):
                store.append(ids[existing_rows:], data(existing_rows, len(ids)))
        except BaseException:
            store.close()
            raise
        return store

    @classmethod
    def merge(
        cls,
        path: StorePath,
        stores: Sequence[StorePath],
        advance: Callable[[int], Any] = lambda rows: None,
    ) -> FeatureStore:
        """Write the rows of several stores into one, in the given order and with the same bits.

        One shard is held in memory at a time. If the merge is interrupted, the same call resumes
        it. The new identity is that of the stores, with the list of their data digests as `data`.

        Args:
            path: The folder of the new store.
            stores: Folders of complete stores that agree in dim, dtype and identity, except for
                its data, and share no id. `shard_rows` is taken from the first one.
            advance: Called with the number of rows that were written.

        Returns:
            The new store, open for reading.

        Raises:
            ValueError: The stores differ (the message says in what), share an id, lack a shard or
                are damaged, or `path` contains something else.
            OSError: The disk is full or not writable.
        """
        opened = [cls.open(store) for store in stores]
        sources = [Source(store.ids, store._manifest, store._shards) for store in opened]
        check_mergeable(sources)
        first = opened[0]
        with cls.create(
            path,
            ids=[name for store in opened for name in store.ids],
            dim=first.dim,
            identity=first.identity | {"data": [store.identity.get("data") for store in opened]},
            dtype=first._manifest.content["dtype"],
            shard_rows=first.shard_rows,
        ) as merged:
            copy_shards(sources, merged._shards, merged.missing_shards(), advance)
        return merged

    @classmethod
    def open(
        cls,
        path: StorePath,
        identity: dict[str, Any] | None = None,
        data: Callable[[int, int], Any] | None = None,
    ) -> FeatureStore:
        """Open a store for reading. Only its manifest is read.

        Args:
            path: The folder, or the URL.
            identity: The identity that the store must have, if given.
            data: For a store made by `grow`: as there, and `identity` is without `data`.

        Raises:
            ValueError: There is no store, its manifest is damaged or of a newer version, or its
                identity differs.
        """
        path = location(path)
        manifest = Manifest.read(path)
        if identity is not None:
            if data is not None:
                segments = [segment.rows for segment in manifest.segments]
                identity = identity | {"data": data_identity(segments, data)}
            differing = identity_differences(identity, manifest.identity)
            if differing:
                raise ValueError(f"{path} was built with other settings: {'; '.join(differing)}")
        return cls(path, manifest, None)

    @classmethod
    def share(cls, path: StorePath) -> FeatureStore:
        """Open a store for writing without a lock, to write shards beside other processes.

        For the workers of a process that has created the store with `create` and distributes its
        shards. If two workers write the same shard, it is complete, and one of theirs.

        Raises:
            ValueError: As for `open`.
        """
        store = cls.open(path)
        store._writer = this_process()
        return store

    def close(self) -> None:
        """Release the lock, so that another process can write; the store can still be read."""
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
        """The number of shards of the complete store."""
        return len(self._shards)

    @property
    def ids(self) -> list[str]:
        """The id of every row. They are read, and their checksum is verified, at first use."""
        if self._ids is None:
            ids: list[str] = []
            for segment in self._manifest.segments:
                file = self.path / segment.ids_file
                data = file.read_bytes() if file.exists() else b""
                if sha256(data) != segment.ids_sha256:
                    raise ValueError(f"{file} is damaged: its checksum is not the manifest's")
                ids += json.loads(data)
            self._ids = ids
        return self._ids

    @property
    def is_on_disk(self) -> bool:
        """False for a store on object storage, whose shards are fetched."""
        return self._shards.is_on_disk

    @property
    def shard_bytes(self) -> int:
        """The bytes of the features of the largest shard."""
        return min(self.shard_rows, self.num_rows) * self.dim * self.dtype.itemsize

    @property
    def complete(self) -> bool:
        """Whether no shard is missing. Shards that were not verified before are verified."""
        return not self.missing_shards()

    def missing_shards(self) -> list[int]:
        """Return the numbers of the shards to write: those that are absent or damaged."""
        problems = self._shards.problems()
        return [shard for shard, problem in enumerate(problems) if problem is not None]

    def shard_range(self, shard: int) -> range:
        """Return the rows of a shard."""
        if not 0 <= shard < self.num_shards:
            raise ValueError(f"shard {shard} of {self.path}: it has {self.num_shards} shards")
        return self._shards.ranges[shard]

    def append(self, ids: Sequence[str], data: Any = None) -> None:
        """Add rows at the end. Their shards are then missing; `write_shard` writes them.

        No existing shard changes. After a kill at any moment, the store is as it was before, or has
        the new rows.

        Args:
            ids: The ids of the new rows, without repetitions and none of an existing row.
            data: Digest of the new examples, or any other value that JSON can hold.

        Raises:
            ValueError: There are no ids, an id is there already, or the store is open for reading.
            OSError: The disk is full or not writable; the store is not modified.
        """
        self._require_writer()
        ids_json = encode_ids(ids)
        existing = set(self.ids)
        for name in ids:
            if name in existing:
                raise ValueError(f"{self.path} already contains {name!r}: append only new ids")
        if not ids:
            raise ValueError(f"rows to append to {self.path}: expected at least one, got none")
        manifest = self._manifest.with_appended(ids, data)
        write_file(self.path / manifest.segments[-1].ids_file, ids_json)
        manifest.write(self.path)
        self._use(manifest)

    def write_shard(self, shard: int, features: Tensor) -> None:
        """Write one shard, whole or not at all. It is on disk when this returns.

        The norms of the rows as stored, that is after rounding, are written with them. Their sums
        of squares are computed in float64.

        Args:
            shard: The number of the shard.
            features: (n, K) of a floating-point dtype, with the n rows of the shard. They are
                converted to `dtype`.

        Raises:
            ValueError: The shape or dtype is wrong, a row is NaN, infinite or too large for the
                dtype (the message names its example), or the store is open for reading.
            OSError: The disk is full; the store stays valid without this shard.
        """
        rows = self.shard_range(shard)
        self._require_writer()
        if features.shape != (len(rows), self.dim) or not features.is_floating_point():
            raise ValueError(
                f"shard {shard} of {self.path}: expected {len(rows)} x {self.dim} floats, "
                f"got {tuple(features.shape)} of {features.dtype}"
            )
        features = features.detach().cpu()
        if self.dtype == torch.int8:
            codes, scales = quantize_rows(features.float().contiguous())
            tensors = {"features": codes, "scales": scales}
            restored_nK = codes * scales[:, None]
        else:
            restored_nK = features.to(self.dtype).contiguous()
            tensors = {"features": restored_nK}
        numbers = restored_nK.float().numpy()  # einsum sums in float64 without a float64 copy
        squares = np.einsum("nk,nk->n", numbers, numbers, dtype=np.float64)
        tensors["norms"] = torch.from_numpy(np.sqrt(squares)).float()
        not_finite = torch.nonzero(~torch.isfinite(tensors["norms"]))
        if len(not_finite):
            raise ValueError(
                f"example {self.ids[rows[int(not_finite[0])]]!r}: its features are NaN, infinite "
                f"or too large for {self.dtype}; shard {shard} was not written"
            )
        self._check_not_too_small(shard, features, restored_nK)
        self._shards.write(shard, tensors, self._writer)

    def _check_not_too_small(self, shard: int, features: Tensor, stored_nK: Tensor) -> None:
        """Refuse rows whose largest number changes by more than 5% because it is so small."""
        if self.dtype == torch.float32:
            return
        largest, stored = (
            torch.linalg.vector_norm(rows.float(), ord=torch.inf, dim=1)
            for rows in (features, stored_nK)
        )
        lost = torch.nonzero((stored - largest).abs() > 0.05 * largest)
        if len(lost):
            row = int(lost[0])
            raise ValueError(
                f"example {self.ids[self.shard_range(shard)[row]]!r}: its features, at most "
                f"{float(largest[row]):.1e}, are too small for {self.dtype}; shard {shard} was not "
                f"written; use float32"
            )

    def _require_writer(self) -> None:
        if self._lock is None and not self._writer:
            raise ValueError(f"{self.path} is open for reading: use FeatureStore.create to write")

    def link_shards(self, other: StorePath) -> int:
        """Link the missing shards from another store that has the same content.

        The same content means the same ids, dim, dtype, shard_rows and identity; for appended rows,
        up to the first segment that differs. A linked shard is verified at its first use, like any
        other, and is written anew if it is damaged.

        Args:
            other: The folder of another store, complete or not; or a folder without a store.

        Returns:
            The number of linked shards; 0 if `other` is no store or has other content.
        """
        assert self._lock is not None
        try:
            source = FeatureStore.open(other)
        except ValueError:
            return 0
        return self._shards.link(source._shards)

    def norms(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the L2 norms of rows [start, stop), (rows,) float32; raises as `read` does."""
        return self._shards.rows("norms", start, stop)

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return rows [start, stop), (rows, K), in the dtype of the store (of int8: float32).

        Rows of a single shard are a view of the mapped file; nothing is copied, and writing to it
        does not change the file. Rows of several shards are copied, and so are those of int8 or of
        object storage.

        Raises:
            ValueError: The range is not within the store, or a shard is missing or damaged.
        """
        stored = self._shards.rows("features", start, stop)
        if self.dtype != torch.int8:
            return stored
        return stored * self._shards.rows("scales", start, stop)[:, None]

    def __getitem__(self, rows: slice) -> Tensor:
        """Return `store[start:stop:step]` as a list does: by `read` if the step is 1, or `take`."""
        if not isinstance(rows, slice):  # iterating over a store would ask for numbers, too
            raise TypeError(f"rows of a feature store: expected a slice, got {rows!r}")
        chosen = range(self.num_rows)[rows]
        if chosen.step != 1:
            return self.take(chosen)
        return self.read(chosen.start, max(chosen.start, chosen.stop))

    def take(self, rows: Sequence[int] | Tensor) -> Tensor:
        """Return rows by number, in any order and with repetitions; reads only their shards.

        Args:
            rows: (R,) integers from 0 to N - 1.

        Returns:
            (R, K) in the dtype of the store (of int8: float32).

        Raises:
            ValueError: A number is not that of a row, or a shard is missing or damaged.
        """
        rows_R = torch.as_tensor(rows)
        if rows_R.ndim != 1 or (len(rows_R) and rows_R.dtype not in _INTEGERS):
            raise ValueError(
                f"rows to take of {self.path}: expected a list of integers, "
                f"got {tuple(rows_R.shape)} of {rows_R.dtype}"
            )
        rows_R = rows_R.cpu().long()
        outside = rows_R[(rows_R < 0) | (rows_R >= self.num_rows)]
        if len(outside):
            raise ValueError(f"row {int(outside[0])} of {self.path}: it has {self.num_rows} rows")
        stored = self._shards.take("features", rows_R)
        if self.dtype != torch.int8:
            return stored
        return stored * self._shards.take("scales", rows_R)[:, None]

    def blocks(self, rows: int) -> Iterator[tuple[int, Tensor]]:
        """Yield (start, features (rows, K)) in row order; the last block may be shorter.

        A block within one shard is not copied, so a divisor of `shard_rows` is best.
        """
        rows = whole_number("rows of a block", rows)
        for start in range(0, self.num_rows, rows):
            yield start, self.read(start, min(start + rows, self.num_rows))

    def will_read(self, start: int, stop: int) -> None:
        """Tell the operating system to read the files of rows [start, stop) ahead; do not wait."""
        self._shards.prefetch(start, stop)

    def verify(self) -> list[str]:
        """Read everything from disk again; return one sentence per problem."""
        return verify_store(self.path)

    def shard_problem(self, shard: int) -> str | None:
        """Return what is wrong with a shard, in one sentence, or None if it is sound.

        Reads the file once; a shard that was sound is not read again by this object.
        """
        return self._shards.problem(shard)


def verify_store(path: StorePath, advance: Callable[[int], Any] | None = None) -> list[str]:
    """Check every file of a store: digests, missing shards, files that do not belong to it.

    Args:
        path: The folder, or the URL.
        advance: Called with the bytes of every shard after it was read.

    Returns:
        One sentence per problem; empty if the store is complete and sound. What a killed writer
        leaves behind (a temporary file, or the ids of rows that were not appended) is no problem:
        it is never read, and the next writer replaces it.
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
    segments = len(store._manifest.segments)
    known = {MANIFEST, LOCK, *(ids_file_name(segment) for segment in range(segments + 1))}
    known |= {store._shards.file(shard).name for shard in range(store.num_shards)}
    for file in entries(store.path):
        if file.name not in known and not _is_temporary(file):
            problems.append(f"{file} does not belong to this store")
    return problems + [
        problem for problem in store._shards.problems(advance) if problem is not None
    ]


def _refuse_other_folder(path: Location) -> None:
    """Raise if a store would be created in a folder that contains anything else."""
    if (path / MANIFEST).exists():
        return
    known = (ids_file_name(0), LOCK)
    for file in entries(path):
        if file.name not in known and not _is_temporary(file):
            raise ValueError(
                f"{path} is not empty (it contains {file.name}) and has no {MANIFEST}: "
                "a feature store needs its own folder"
            )


def _initialize(path: Location, manifest: Manifest, ids: Sequence[str]) -> Manifest:
    """Write the ids and the manifest of a new store, or compare an existing store with them.

    Returns:
        The manifest that is in the folder now; that of an existing store may have segments.
    """
    for file in entries(path):
        if _is_temporary(file):  # of a writer that was killed: this process holds the lock
            file.unlink()
    is_new = not (path / MANIFEST).exists()
    existing = manifest if is_new else Manifest.read(path)
    ids_jsons = [encode_ids(ids)]
    if "appended" in existing.content:
        parts = [segment.rows for segment in existing.segments]
        ids_jsons = [encode_ids(ids[rows.start : rows.stop]) for rows in parts]
    if not is_new:
        differing = existing.differences(manifest, [sha256(data) for data in ids_jsons])
        if differing:
            raise ValueError(
                f"{path} contains other features: {'; '.join(differing)}; use another folder or "
                "remove this one"
            )
    for segment, ids_json in zip(existing.segments, ids_jsons, strict=True):
        file = path / segment.ids_file
        if not file.exists() or file.read_bytes() != ids_json:
            write_file(file, ids_json)
    if is_new:
        manifest.write(path)
    return existing


def _is_temporary(file: Location) -> bool:
    return file.name.startswith(".") and file.name.endswith(".tmp")


def _lock(path: Location) -> ExitStack:
    """Take the writer's lock of a folder; closing the result releases it.

    Object storage has no locks, so there is nothing to release.
    """
    held = ExitStack()
    if isinstance(path, Path):
        # The lock is flock's: it excludes another writer of the same process, too, and the kernel
        # releases it when the process ends. A lock that only consists of an existing file would
        # survive kill -9, so there is no fallback to one.
        lock = UnixFileLock(path / LOCK, blocking=False, thread_local=False, fallback_to_soft=False)
        try:
            held.enter_context(lock)
        except Timeout:
            raise ValueError(f"{path} is being written by another process or object") from None
    return held
