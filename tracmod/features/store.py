"""FeatureStore: rows of features in checksummed shards, which survive a kill at any instant.

The folder:

    manifest.json              format, version, num_rows, dim, dtype, shard_rows, identity, digest
                               of ids.json and of itself; after an append also `appended`, a list
                               of {num_rows, ids_sha256, data}, one entry per segment
    ids.json                   the id of every row of the first segment, in row order
    ids-1.json, ...            the ids of the rows that were appended first, ...
    shard-00000.safetensors    of n <= shard_rows rows: features (n, K) in `dtype`, norms (n,)
                               float32; where `dtype` is int8, features are codes and beside them
                               lie scales (n,) float32: a row is codes * scale
    writer.lock                empty; locked by the one process that writes

A segment is the rows that were added together: those the store was made with, or of one `append`.
Each is cut into shards by itself (its last may be shorter); shards are numbered throughout.

What makes it safe:

- Every file is written under a temporary name, flushed to disk and renamed. So a name that is there
  is whole. The manifest is written before any shard, and only `append` writes it again: that
  replacement is the moment at which the store has the new rows, and it needs no shard to change.
- A shard carries its checksum in its own safetensors header: the SHA-256 of the whole file with
  these 64 digits set to 0. Beside it stand the fingerprint of the segment and the shard's number,
  so that a shard of another store, or in another's place, is refused too. A segment's fingerprint
  is a digest of what its manifest said when it was added, all that was there before included.
- The checksum is verified at the first use of a shard by a FeatureStore object (one read of the
  file, 1 to 2 GB/s, which also warms the page cache); later reads map the file without a check.

On object storage (a URL in place of the path) the folder is the same, but:

- A file is one put, and a shard is fetched whole and verified each time; the last two are kept.
- There is no lock, and none is needed: two writers of the same store both put whole shards of it,
  and shards of another store are refused. Where two processes begin, or append, different rows in
  the same place at the same time, one of them gets an error, at the latest when it reads.

Shape letters: N rows of the store, n rows of a shard, K dim.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import mmap
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor

from tracmod.features.store_format import (
    DTYPES,
    LOCK,
    MANIFEST,
    NO_DIGEST,
    as_json,
    as_slice,
    data_identity,
    encode_ids,
    identity_of,
    ids_file_name,
    manifest_differences,
    new_manifest,
    read_manifest,
    require_sound,
    segments_of,
    shard_problem,
)
from tracmod.files.durable import (
    identity_differences,
    seal,
    sha256,
    sync_folder,
    this_process,
)
from tracmod.files.object_storage import (
    Location,
    ObjectPath,
    entries,
    file_size,
    link_file,
    location,
    opened,
    write_file,
)
from tracmod.kernels import quantize_rows

SHARD_ROWS = 1024
READERS = 8  # shards hashed at a time, at most
KEPT_SHARDS = 2  # of object storage, in memory, at most, by each FeatureStore object
_WHOLE_NUMBERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


StorePath = str | os.PathLike[str] | ObjectPath


class FeatureStore:
    """A folder of feature rows; made by `create` or `grow` (to write), `merge` or `open` (to read).

    Attributes:
        path: The folder, or its URL.
        num_rows: N, the number of examples.
        dim: K, the numbers per row.
        dtype: The torch dtype in which rows are stored; rows of int8 are read as float32.
        shard_rows: Rows per shard; the last shard of a segment may have fewer.
        identity: What the features were made with: projection, parameters, digests of head mask,
            model, tokenizer and data. A store is only used together with stores that agree. Where
            rows were appended, `data` is the list of the segments' digests.
    """

    def __init__(self, path: Location, manifest: dict[str, Any], lock: IO[bytes] | None) -> None:
        """Not for callers: `create` and `open` read the manifest and take the lock."""
        self.path = path
        self._lock = lock
        self._writer = ""  # of `share`: part of the names of its temporary files
        self._sound: set[int] = set()  # shards whose checksum this object has verified
        # Of object storage, the latest last. Never changed in place: other threads may read it.
        self._kept: dict[int, dict[str, Tensor]] = {}
        self._use(manifest)

    def _use(self, manifest: dict[str, Any]) -> None:
        self._manifest = manifest
        self._segments = segments_of(manifest)
        self.num_rows = self._segments[-1].rows.stop
        self.dim: int = manifest["dim"]
        self.dtype = DTYPES[manifest["dtype"]]
        self.shard_rows: int = manifest["shard_rows"]
        self.identity = identity_of(manifest)
        self._shards = [
            (range(start, min(start + self.shard_rows, one.rows.stop)), one.fingerprint)
            for one in self._segments
            for start in one.rows[:: self.shard_rows]
        ]
        self._starts = [rows.start for rows, _ in self._shards]
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
        """Starts a store, or opens the one that is there to go on with it, as its only writer.

        Args:
            path: The folder, or a URL (`s3://bucket/folder`); made when absent.
            ids: The id of every row, each once, in row order.
            dim: K, the numbers per row.
            identity: Values that JSON can hold; compared when the store is opened again.
            dtype: `float32`, `bfloat16`, `float16` or `int8` (a scale per row; what is read is off
                by at most half a step, max|row| / 254).
            shard_rows: Rows per shard.

        Returns:
            The store with the lock of its writer, held until `close` or the end of the process;
            on object storage without a lock (see above).

        Raises:
            ValueError: An argument is not valid; the folder holds something else; the store there
                differs (the sentence says in what); another writer has it.
            OSError: The disk is full or not writable; the object storage cannot be reached.
        """
        path = location(path)
        ids_sha256 = sha256(encode_ids(ids))
        manifest = new_manifest(len(ids), ids_sha256, dim, identity, dtype, shard_rows)
        if isinstance(path, Path):
            path.mkdir(parents=True, exist_ok=True)
            sync_folder(path.parent)
        _refuse_foreign_folder(path)
        lock = _lock(path)
        try:
            manifest = _claim(path, manifest, ids)
        except BaseException:
            lock.close()  # else held for as long as somebody keeps the error's traceback
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
        """`create`, but where the store holds the first of these rows, the rest is appended.

        Args:
            path, ids, dim, dtype, shard_rows: As for `create`; `ids` of all rows that are wanted.
            data: Digest of the examples of rows [start, stop): what is there is compared with it.
            identity: As for `create`, without `data`.

        Raises:
            ValueError, OSError: As `create`; a store is refused, and left as it is, where any of
                its rows is not the same now.
        """
        segments = [range(len(ids))]
        if (location(path) / MANIFEST).exists():
            segments = [one.rows for one in segments_of(read_manifest(location(path)))]
        kept = segments[-1].stop
        whole = identity | {"data": data_identity(segments, data)}
        store = cls.create(
            path, ids=ids[:kept], dim=dim, identity=whole, dtype=dtype, shard_rows=shard_rows
        )
        try:
            if kept < len(ids):
                store.append(ids[kept:], data(kept, len(ids)))
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
        """Writes the rows of several stores into one, in the order given, bit by bit as they are.

        Holds one shard in memory at a time. Stopped at any moment, the same call goes on where it
        was. Its identity is theirs, with the list of their data digests as `data`.

        Args:
            path: The new store's folder.
            stores: Folders of complete stores, alike in dim, dtype and identity but for its data,
                no id in two of them. `shard_rows` is the first one's.
            advance: Called with the number of rows done.

        Returns:
            The new store, open for reading.

        Raises:
            ValueError: Stores that differ (the sentence says in what), share an id, lack a shard
                or are damaged; `path` holds something else.
            OSError: The disk is full or not writable.
        """
        sources = [cls.open(one) for one in stores]
        _check_alike(sources)
        first = sources[0]
        with cls.create(
            path,
            ids=[name for source in sources for name in source.ids],
            dim=first.dim,
            identity=first.identity | {"data": [one.identity.get("data") for one in sources]},
            dtype=first._manifest["dtype"],
            shard_rows=first.shard_rows,
        ) as merged:
            missing = merged.missing_shards()
            lacking = sum(len(merged.shard_range(shard)) for shard in missing)
            advance(merged.num_rows - lacking)
            for shard in missing:
                rows = merged.shard_range(shard)
                merged._save(shard, {name: _rows_of(sources, name, rows) for name in first._names})
                advance(len(rows))
        return merged

    @classmethod
    def open(
        cls,
        path: StorePath,
        identity: dict[str, Any] | None = None,
        data: Callable[[int, int], Any] | None = None,
    ) -> FeatureStore:
        """Opens a store for reading; reads the manifest alone, so the cost is that of one file.

        Args:
            path: The folder.
            identity: If given, the identity that the store must have.
            data: Of a store that `grow` may have made: as there, and `identity` without `data`.

        Raises:
            ValueError: No store there; manifest damaged or of a newer version; other identity.
        """
        path = location(path)
        manifest = read_manifest(path)
        if identity is not None:
            if data is not None:
                segments = [one.rows for one in segments_of(manifest)]
                identity = identity | {"data": data_identity(segments, data)}
            differing = identity_differences(identity, identity_of(manifest))
            if differing:
                raise ValueError(f"{path} was built with something else: {'; '.join(differing)}")
        return cls(path, manifest, None)

    @classmethod
    def share(cls, path: StorePath) -> FeatureStore:
        """Opens a store to write shards beside other processes, each of them those it was given.

        For the workers of one who has made the store with `create` and hands out its shards: so
        there is no lock. A shard that two of them write is whole all the same, and either's.

        Raises:
            ValueError: As `open`.
        """
        store = cls.open(path)
        store._writer = this_process()
        return store

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
        return len(self._shards)

    @property
    def ids(self) -> list[str]:
        """The id of every row; read and checked at first use."""
        if self._ids is None:
            ids: list[str] = []
            for segment in self._segments:
                file = self.path / segment.ids_name
                data = file.read_bytes() if file.exists() else b""
                if sha256(data) != segment.ids_sha256:
                    raise ValueError(f"{file} is damaged: its checksum is not the manifest's")
                ids += json.loads(data)
            self._ids = ids
        return self._ids

    @property
    def is_on_disk(self) -> bool:
        """False for a store on object storage, whose shards are fetched."""
        return isinstance(self.path, Path)

    @property
    def shard_bytes(self) -> int:
        """What the features of the largest shard take."""
        return min(self.shard_rows, self.num_rows) * self.dim * self.dtype.itemsize

    @property
    def complete(self) -> bool:
        """True when no shard is missing; verifies what was not yet verified."""
        return not self.missing_shards()

    def missing_shards(self) -> list[int]:
        """The numbers of the shards to be written: absent, or there with a wrong checksum."""
        return [i for i, problem in enumerate(self._shard_problems()) if problem is not None]

    def shard_range(self, shard: int) -> range:
        """The rows of a shard."""
        if not 0 <= shard < self.num_shards:
            raise ValueError(f"shard {shard} of {self.path}: it has {self.num_shards} shards")
        return self._shards[shard][0]

    def append(self, ids: Sequence[str], data: Any = None) -> None:
        """Adds rows at the end; their shards are then missing, and are written by `write_shard`.

        No shard that is there changes. A kill at any moment leaves the store as it was, or with the
        new rows.

        Args:
            ids: The id of every new row, each once and none that is there already.
            data: Digest of the new examples, or anything else that JSON can hold.

        Raises:
            ValueError: An id is there already; no ids; store opened for reading.
            OSError: The disk is full or not writable; the store stays as it was.
        """
        self._require_writer()
        ids_json = encode_ids(ids)
        there = set(self.ids)
        for name in ids:
            if name in there:
                raise ValueError(f"{self.path} holds {name!r} already: only new ids are appended")
        if not ids:
            raise ValueError(f"rows to append to {self.path}: expected at least one, got none")
        segment = {"num_rows": len(ids), "ids_sha256": sha256(ids_json), "data": as_json(data)}
        appended = [*self._manifest.get("appended", []), segment]
        manifest = {**self._manifest, "version": 2, "appended": appended}
        write_file(self.path / segments_of(manifest)[-1].ids_name, ids_json)
        write_file(self.path / MANIFEST, seal(manifest))
        self._use(manifest)

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
        self._require_writer()
        if features.shape != (len(rows), self.dim) or not features.is_floating_point():
            raise ValueError(
                f"shard {shard} of {self.path}: expected {len(rows)} x {self.dim} floats, "
                f"got {tuple(features.shape)} of {features.dtype}"
            )
        stored, as_read = self._encode(features.detach().cpu())
        numbers = as_read.float().numpy()  # einsum: in float64, without a copy in float64
        squares = np.einsum("nk,nk->n", numbers, numbers, dtype=np.float64)
        stored["norms"] = torch.from_numpy(np.sqrt(squares)).float()
        bad = torch.nonzero(~torch.isfinite(stored["norms"]))
        if len(bad):
            raise ValueError(
                f"example {self.ids[rows[int(bad[0])]]!r}: its features are NaN, infinite or too "
                f"large for {self.dtype}; nothing of shard {shard} was written"
            )
        self._save(shard, stored)

    def _encode(self, features: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """What a shard stores of features (n, K), and the rows as they will be read."""
        if self.dtype != torch.int8:
            stored = features.to(self.dtype).contiguous()
            return {"features": stored}, stored
        codes, scales = quantize_rows(features.float().contiguous())
        return {"features": codes, "scales": scales}, codes * scales[:, None]

    def _save(self, shard: int, tensors: dict[str, Tensor]) -> None:
        """Writes a shard of these tensors, `_names` each, with its stamp and checksum."""
        assert tensors.keys() == set(self._names)
        note = self._stamp(shard) + NO_DIGEST
        data = save(tensors, {"tracmod": note.decode()})
        position = data.index(note) + len(note) - 64
        digest = sha256(data).encode()
        self._sound.discard(shard)
        whole = data[:position] + digest + data[position + 64 :]
        write_file(self._file(shard), whole, self._writer)
        self._kept = {}
        self._sound.add(shard)

    @property
    def _names(self) -> list[str]:
        """The tensors of a shard."""
        return ["features", "norms", *(["scales"] if self.dtype == torch.int8 else [])]

    def _require_writer(self) -> None:
        if self._lock is None and not self._writer:
            raise ValueError(f"{self.path} is open for reading: FeatureStore.create opens to write")

    def link_shards(self, other: StorePath) -> int:
        """Links the shards that this store lacks from another store of the very same content.

        The same: ids, dim, dtype, shard_rows and identity; of appended rows, those up to the first
        segment that differs. A linked shard is verified at its first use as any other, and written
        anew if it is damaged.

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
        lacking = [
            shard
            for shard in range(min(self.num_shards, source.num_shards))
            if source._stamp(shard) == self._stamp(shard)
            and source._file(shard).is_file()
            and not self._file(shard).exists()
        ]
        for shard in lacking:
            link_file(source._file(shard), self._file(shard))
        return len(lacking)

    def norms(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The L2 norms of rows [start, stop), (rows,) float32; raises as `read` does."""
        return self._gather("norms", start, stop)

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The rows [start, stop), (rows, K) in the dtype of the store; of int8, float32.

        Rows of one shard are a view of the mapped file (nothing is copied; writing to it does not
        reach the file); rows of several are copied together, and so are those of int8 or of object
        storage.

        Raises:
            ValueError: A shard is missing or damaged, or the range is not within the store.
        """
        stored = self._gather("features", start, stop)
        if self.dtype != torch.int8:
            return stored
        return stored * self._gather("scales", start, stop)[:, None]

    def __getitem__(self, rows: slice) -> Tensor:
        """`store[start:stop:step]`, as of a list; `read` where the step is 1, else `take`."""
        if not isinstance(rows, slice):  # also what iterating over the store would ask for
            raise TypeError(f"rows of a feature store: expected a slice, got {rows!r}")
        chosen = range(self.num_rows)[rows]
        if chosen.step != 1:
            return self.take(chosen)
        return self.read(chosen.start, max(chosen.start, chosen.stop))

    def take(self, rows: Sequence[int] | Tensor) -> Tensor:
        """Rows by number, in any order, repeated or not; reads only the shards that hold them.

        Args:
            rows: (R,) whole numbers from 0 to N - 1.

        Returns:
            (R, K) in the dtype of the store; of int8, float32.

        Raises:
            ValueError: A number is not of a row; a shard is missing or damaged.
        """
        rows_R = torch.as_tensor(rows)
        if rows_R.ndim != 1 or (len(rows_R) and rows_R.dtype not in _WHOLE_NUMBERS):
            raise ValueError(
                f"rows to take of {self.path}: expected a list of whole numbers, "
                f"got {tuple(rows_R.shape)} of {rows_R.dtype}"
            )
        rows_R = rows_R.cpu().long()
        wrong = rows_R[(rows_R < 0) | (rows_R >= self.num_rows)]
        if len(wrong):
            raise ValueError(f"row {int(wrong[0])} of {self.path}: it has {self.num_rows} rows")
        stored = self._take("features", rows_R)
        if self.dtype != torch.int8:
            return stored
        return stored * self._take("scales", rows_R)[:, None]

    def blocks(self, rows: int) -> Iterator[tuple[int, Tensor]]:
        """Yields (start, features (rows, K)) in row order; the last block may be shorter.

        A block within one shard is not copied: best a divisor of `shard_rows`.
        """
        if rows < 1:
            raise ValueError(f"blocks of {rows} rows: expected at least 1")
        for start in range(0, self.num_rows, rows):
            yield start, self.read(start, min(start + rows, self.num_rows))

    def will_read(self, start: int, stop: int) -> None:
        """Has the system read the files of rows [start, stop) ahead, on disk; waits for nothing."""
        if not self.is_on_disk or start >= stop:
            return
        first, last = (bisect_right(self._starts, row) - 1 for row in (start, stop - 1))
        for shard in range(first, last + 1):
            self._will_read(shard)

    def _will_read(self, shard: int) -> None:
        with contextlib.suppress(OSError):  # whoever reads it says what is wrong
            descriptor = os.open(str(self._file(shard)), os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)

    def verify(self) -> list[str]:
        """Reads everything anew from disk; one sentence per problem, none when sound."""
        return verify_store(self.path)

    def shard_problem(self, shard: int) -> str | None:
        """What is wrong with a shard on disk, in one sentence; None when it is whole.

        Reads the file once; a shard found whole is not read again by this object.
        """
        if shard in self._sound:
            return None
        file = self._file(shard)
        if not file.is_file():
            return f"{file} is missing"
        with opened(file) as data:
            problem = self._problem_of(shard, data)
        if problem is None:
            self._sound.add(shard)
        return problem

    def _problem_of(self, shard: int, data: bytes | mmap.mmap) -> str | None:
        """What is wrong with the bytes of a shard."""
        row_bytes = self.dim * self.dtype.itemsize
        row_bytes += (len(self._names) - 1) * torch.float32.itemsize
        rows = len(self.shard_range(shard))
        return shard_problem(self._file(shard), data, self._stamp(shard), rows * row_bytes)

    def _shard_problems(self, advance: Callable[[int], Any] | None = None) -> list[str | None]:
        """`shard_problem` of every shard, several files at a time; `advance` is told the bytes."""
        readers = min(READERS, torch.get_num_threads())  # hashing frees the GIL
        pool = ThreadPoolExecutor(readers)

        def check(shard: int) -> str | None:
            if self.is_on_disk and shard + readers < self.num_shards:
                self._will_read(shard + readers)  # the disk works while the cores do
            return self.shard_problem(shard)

        problems = []
        try:
            for shard, problem in enumerate(pool.map(check, range(self.num_shards))):
                problems.append(problem)
                if advance is not None and self._file(shard).is_file():
                    advance(file_size(self._file(shard)))
        finally:
            pool.shutdown(cancel_futures=True)
        return problems

    def _file(self, shard: int) -> Location:
        return self.path / f"shard-{shard:05d}.safetensors"

    def _stamp(self, shard: int) -> bytes:
        """What stands before the digest in a shard's header: whose it is and which."""
        return f"store={self._shards[shard][1]} shard={shard:05d} sha256=".encode()

    def _gather(self, name: str, start: int, stop: int | None) -> Tensor:
        stop = self.num_rows if stop is None else stop
        if not 0 <= start <= stop <= self.num_rows:
            raise ValueError(f"rows {start} to {stop} of {self.path}: it has {self.num_rows} rows")
        parts = []
        while start < stop:
            shard = bisect_right(self._starts, start) - 1
            rows = self.shard_range(shard)
            end = min(stop, rows.stop)
            parts.append(self._load(shard, name)[start - rows.start : end - rows.start])
            start = end
        if not parts:
            return self._empty(name, 0)
        if len(parts) > 1:
            return torch.cat(parts)
        # A copy of what is kept, so that a caller who writes to it changes no later read.
        return parts[0].clone() if not self.is_on_disk else parts[0]

    def _take(self, name: str, rows_R: Tensor) -> Tensor:
        taken = self._empty(name, len(rows_R))
        starts = torch.tensor(self._starts, dtype=torch.int64)
        shards_R, order_R = (torch.bucketize(rows_R, starts, right=True) - 1).sort()
        shards, counts = shards_R.unique_consecutive(return_counts=True)
        for shard, places in zip(shards.tolist(), order_R.split(counts.tolist()), strict=True):
            taken[places] = self._load(shard, name)[rows_R[places] - self._starts[shard]]
        return taken

    def _empty(self, name: str, rows: int) -> Tensor:
        if name == "features":
            return torch.empty(rows, self.dim, dtype=self.dtype)
        return torch.empty(rows)

    def _load(self, shard: int, name: str) -> Tensor:
        if not self.is_on_disk:
            kept = self._kept
            tensors = kept.get(shard) or self._fetch(shard)
            others = [one for one in kept.items() if one[0] != shard]
            self._kept = dict([*others, (shard, tensors)][-KEPT_SHARDS:])
            return tensors[name]
        require_sound(self.shard_problem(shard))
        with safe_open(self._file(shard), "pt") as file:
            return file.get_tensor(name)

    def _fetch(self, shard: int) -> dict[str, Tensor]:
        """A shard of object storage, whole and verified."""
        try:
            data = self._file(shard).read_bytes()
        except FileNotFoundError as error:
            require_sound(str(error))
            raise
        require_sound(self._problem_of(shard, data))
        return load(data)


def verify_store(path: StorePath, advance: Callable[[int], Any] | None = None) -> list[str]:
    """Checks every file of a store: digests, missing shards, files that do not belong there.

    Args:
        path: The folder, or its URL.
        advance: Called with the bytes of every shard, when it has been read.

    Returns:
        One sentence per problem; empty when the store is complete and sound. The leftover of a
        killed writer (a temporary file, the ids of rows that it did not come to append) is none:
        it is never read, and the next writer writes it anew.
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
    known = {MANIFEST, LOCK, *(ids_file_name(i) for i in range(len(store._segments) + 1))}
    known |= {store._file(shard).name for shard in range(store.num_shards)}
    for file in entries(store.path):
        if file.name not in known and not _is_temporary(file):
            problems.append(f"{file} does not belong to this store")
    return problems + [one for one in store._shard_problems(advance) if one is not None]


def _check_alike(stores: Sequence[FeatureStore]) -> None:
    """Refuses stores that cannot be merged."""
    if not stores:
        raise ValueError("stores to merge: expected at least one, got none")
    first = stores[0]
    holder: dict[str, Location] = {}
    made_with = [{"dim": s.dim, "dtype": s._manifest["dtype"], **s.identity} for s in stores]
    for store, identity in zip(stores, made_with, strict=True):
        differing = identity_differences(made_with[0], identity, ignore=["data"])
        if differing:
            raise ValueError(f"{store.path} is not like {first.path}: {'; '.join(differing)}")
        for name in store.ids:
            if name in holder:
                raise ValueError(f"{holder[name]} and {store.path} both hold example {name!r}")
            holder[name] = store.path
        for shard in range(store.num_shards):  # damage is found when the shard is read
            if not store._file(shard).is_file():
                raise ValueError(f"{store._file(shard)} is missing: merge takes complete stores")


def _rows_of(stores: Sequence[FeatureStore], name: str, rows: range) -> Tensor:
    """A stored tensor of some rows, counted throughout the stores."""
    parts, start = [], 0
    for store in stores:
        first, last = max(rows.start - start, 0), min(rows.stop - start, store.num_rows)
        if first < last:
            parts.append(store._gather(name, first, last))
        start += store.num_rows
    return torch.cat(parts)


def _refuse_foreign_folder(path: Location) -> None:
    """A store is not started in a folder that holds anything else."""
    if (path / MANIFEST).exists():
        return
    foreign = [
        file.name
        for file in entries(path)
        if file.name not in (ids_file_name(0), LOCK) and not _is_temporary(file)
    ]
    if foreign:
        raise ValueError(
            f"{path} is not empty ({foreign[0]} is there) and has no {MANIFEST}: "
            "a feature store needs its own folder"
        )


def _claim(path: Location, manifest: dict[str, Any], ids: Sequence[str]) -> dict[str, Any]:
    """Makes the folder a store of this manifest, if it is not one; the manifest that is there."""
    for file in entries(path):
        if _is_temporary(file):  # of a writer that was killed: we hold the lock now
            file.unlink()
    is_new, found = not (path / MANIFEST).exists(), manifest
    ids_jsons = [encode_ids(ids)]
    if not is_new:
        found = read_manifest(path)
        if "appended" in found:
            ids_jsons = [encode_ids(ids[as_slice(one.rows)]) for one in segments_of(found)]
        differing = manifest_differences(manifest, found, [sha256(one) for one in ids_jsons])
        if differing:
            raise ValueError(
                f"{path} holds other features than these: {'; '.join(differing)}; "
                "take another folder or remove this one"
            )
    for segment, ids_json in zip(segments_of(found), ids_jsons, strict=True):
        file = path / segment.ids_name
        if not file.exists() or file.read_bytes() != ids_json:
            write_file(file, ids_json)
    if is_new:
        write_file(path / MANIFEST, seal(manifest))
    return found


def _is_temporary(file: Location) -> bool:
    return file.name.startswith(".") and file.name.endswith(".tmp")


def _lock(path: Location) -> IO[bytes]:
    if isinstance(path, ObjectPath):
        return io.BytesIO()  # keeps nobody out, and is closed like a lock
    lock = open(path / LOCK, "ab")  # noqa: SIM115 (the open file is the lock)
    try:
        # flock, not lockf: it also keeps out a second writer of this same process. The kernel
        # drops it when the process ends, however it ends.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise ValueError(f"{path} is being written by another process or object") from None
    return lock
