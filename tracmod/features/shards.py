"""The shard files of a feature store: written with a checksum, verified, read by row number.

Shape suffixes: N rows of the store, R chosen rows.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
from bisect import bisect_right
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor

from tracmod.features.store_format import Manifest
from tracmod.files.durable import sha256
from tracmod.files.object_storage import Location, file_size, link_file, opened, write_file

READERS = 8  # threads that compute checksums, at most
CACHED_SHARDS = 2  # fetched shards of object storage that a store keeps in memory, at most
NO_DIGEST = b"0" * 64


class Shards:
    """The shard files of one store.

    A shard is a safetensors file. Its checksum cannot be stored beside it, since two files are not
    replaced at the same time; so it is in the file itself, in the metadata of the header: the
    SHA-256 of the whole file with these 64 digits set to 0. It follows a *stamp*, the fingerprint
    of the segment and the number of the shard, so that a sound shard of another store, or one under
    another number, is refused as well.

    On disk, a shard is verified once by each object and then mapped into memory. On object storage,
    it is fetched whole and verified each time; the last ones are kept.

    Attributes:
        path: The folder of the store.
        ranges: The rows of every shard.
    """

    def __init__(self, path: Location, manifest: Manifest) -> None:
        self.path = path
        self._verified: set[int] = set()
        # Shards of object storage, the last one used at the end. This dictionary is replaced and
        # never changed in place, because other threads may be reading it.
        self._cached: dict[int, dict[str, Tensor]] = {}
        self.use(manifest)

    def use(self, manifest: Manifest) -> None:
        """Use a manifest: the first one, or one with appended rows, which changes no shard."""
        self._manifest = manifest
        # Each segment is cut into shards by itself, so appending leaves the existing shards alone.
        shards = [
            (range(start, min(start + manifest.shard_rows, segment.rows.stop)), segment.fingerprint)
            for segment in manifest.segments
            for start in segment.rows[:: manifest.shard_rows]
        ]
        self.ranges = [rows for rows, _ in shards]
        self._fingerprints = [fingerprint for _, fingerprint in shards]
        self._starts = [rows.start for rows in self.ranges]

    def __len__(self) -> int:
        return len(self.ranges)

    @property
    def tensor_names(self) -> list[str]:
        """The names of the tensors of a shard."""
        is_int8 = self._manifest.dtype == torch.int8
        return ["features", "norms", *(["scales"] if is_int8 else [])]

    @property
    def is_on_disk(self) -> bool:
        return isinstance(self.path, Path)

    def file(self, shard: int) -> Location:
        return self.path / f"shard-{shard:05d}.safetensors"

    def _stamp(self, shard: int) -> bytes:
        """Return what precedes the digest in the header of a shard."""
        return f"store={self._fingerprints[shard]} shard={shard:05d} sha256=".encode()

    def write(self, shard: int, tensors: dict[str, Tensor], writer: str = "") -> None:
        """Write a shard with its stamp and checksum, whole or not at all.

        Args:
            shard: The number of the shard.
            tensors: One for each of `tensor_names`.
            writer: Part of the name of the temporary file, where several processes write.
        """
        assert tensors.keys() == set(self.tensor_names)
        # The file is built with a digest of zeros, hashed, and the digest is put in their place.
        note = self._stamp(shard) + NO_DIGEST
        data = save(tensors, {"tracmod": note.decode()})
        position = data.index(note) + len(note) - 64
        data = data[:position] + sha256(data).encode() + data[position + 64 :]
        self._verified.discard(shard)
        write_file(self.file(shard), data, writer)
        self._cached = {}
        self._verified.add(shard)

    def link(self, source: Shards) -> int:
        """Link the shards that are absent here from a store that has the same; return how many.

        Equal stamps mean equal content. A damaged shard is noticed at its first use, like any.
        """
        absent = [
            shard
            for shard in range(min(len(self), len(source)))
            if source._stamp(shard) == self._stamp(shard)
            and source.file(shard).is_file()
            and not self.file(shard).exists()
        ]
        for shard in absent:
            link_file(source.file(shard), self.file(shard))
        return len(absent)

    def problem(self, shard: int) -> str | None:
        """Return what is wrong with a shard, in one sentence, or None if it is sound.

        Reads the whole file, unless this object has found it sound before.
        """
        if shard in self._verified:
            return None
        file = self.file(shard)
        if not file.is_file():
            return f"{file} is missing"
        with opened(file) as data:
            problem = self._problem_of(shard, data)
        if problem is None:
            self._verified.add(shard)
        return problem

    def problems(self, advance: Callable[[int], Any] | None = None) -> list[str | None]:
        """Return `problem` of every shard, with several threads (computing a digest frees the GIL).

        Args:
            advance: Called with the bytes of every shard after it was read.
        """
        readers = min(READERS, torch.get_num_threads())
        pool = ThreadPoolExecutor(readers)

        def check(shard: int) -> str | None:
            if self.is_on_disk and shard + readers < len(self):
                self._prefetch(shard + readers)  # the disk reads while the cores compute
            return self.problem(shard)

        problems = []
        try:
            for shard, problem in enumerate(pool.map(check, range(len(self)))):
                problems.append(problem)
                if advance is not None and self.file(shard).is_file():
                    advance(file_size(self.file(shard)))
        finally:
            pool.shutdown(cancel_futures=True)
        return problems

    def _problem_of(self, shard: int, data: bytes | mmap.mmap) -> str | None:
        row_bytes = self._manifest.dim * self._manifest.dtype.itemsize
        row_bytes += (len(self.tensor_names) - 1) * torch.float32.itemsize
        data_bytes = len(self.ranges[shard]) * row_bytes
        return shard_problem(self.file(shard), data, self._stamp(shard), data_bytes)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the rows [start, stop) of a tensor of the shards.

        Rows of a single shard on disk are a view of the mapped file, others a copy.

        Raises:
            ValueError: The range is not within the store, or a shard is missing or damaged.
        """
        num_rows = self._manifest.num_rows
        stop = num_rows if stop is None else stop
        if not 0 <= start <= stop <= num_rows:
            raise ValueError(f"rows {start} to {stop} of {self.path}: it has {num_rows} rows")
        parts = []
        while start < stop:
            shard = bisect_right(self._starts, start) - 1
            rows = self.ranges[shard]
            end = min(stop, rows.stop)
            parts.append(self._load(shard, name)[start - rows.start : end - rows.start])
            start = end
        if not parts:
            return self._empty(name, 0)
        if len(parts) > 1:
            return torch.cat(parts)
        # A cached tensor is copied, so that a caller who writes to it changes no later read.
        return parts[0] if self.is_on_disk else parts[0].clone()

    def take(self, name: str, rows_R: Tensor) -> Tensor:
        """Return rows by number, loading each shard that holds some of them once."""
        taken = self._empty(name, len(rows_R))
        starts = torch.tensor(self._starts, dtype=torch.int64)
        shards_R, order_R = (torch.bucketize(rows_R, starts, right=True) - 1).sort()
        shards, counts = shards_R.unique_consecutive(return_counts=True)
        for shard, positions in zip(shards.tolist(), order_R.split(counts.tolist()), strict=True):
            taken[positions] = self._load(shard, name)[rows_R[positions] - self._starts[shard]]
        return taken

    def prefetch(self, start: int, stop: int) -> None:
        """Tell the operating system that rows [start, stop) will be read; does not wait."""
        if not self.is_on_disk or start >= stop:
            return
        first, last = (bisect_right(self._starts, row) - 1 for row in (start, stop - 1))
        for shard in range(first, last + 1):
            self._prefetch(shard)

    def _prefetch(self, shard: int) -> None:
        with contextlib.suppress(OSError):  # the read itself reports what is wrong
            descriptor = os.open(str(self.file(shard)), os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)

    def _empty(self, name: str, rows: int) -> Tensor:
        if name == "features":
            return torch.empty(rows, self._manifest.dim, dtype=self._manifest.dtype)
        return torch.empty(rows)

    def _load(self, shard: int, name: str) -> Tensor:
        if not self.is_on_disk:
            cached = self._cached
            tensors = cached.get(shard) or self._fetch(shard)
            others = [item for item in cached.items() if item[0] != shard]
            self._cached = dict([*others, (shard, tensors)][-CACHED_SHARDS:])
            return tensors[name]
        _require_sound(self.problem(shard))
        with safe_open(self.file(shard), "pt") as file:
            return file.get_tensor(name)

    def _fetch(self, shard: int) -> dict[str, Tensor]:
        try:
            data = self.file(shard).read_bytes()
        except FileNotFoundError as error:
            _require_sound(str(error))
            raise
        _require_sound(self._problem_of(shard, data))
        return load(data)


def _require_sound(problem: str | None) -> None:
    if problem is not None:
        raise ValueError(f"{problem}; run the command that wrote the store again to replace it")


def shard_problem(
    file: Location, data: bytes | mmap.mmap, stamp: bytes, data_bytes: int
) -> str | None:
    """Check the size, the stamp and the digest of a shard.

    Args:
        file: Its name in the message.
        data: The bytes of the file.
        stamp: What precedes the digest in its header.
        data_bytes: The bytes that its tensors must have.

    Returns:
        What is wrong, in one sentence, or None.
    """
    size = len(data)
    if size < 8:
        return f"{file} is damaged: it has {size} bytes"
    with memoryview(data) as view:
        header = 8 + int.from_bytes(view[:8], "little")
        if size != header + data_bytes:
            return (
                f"{file} is damaged: it has {size} bytes, "
                f"its header and rows need {header + data_bytes}"
            )
        position = data.find(stamp, 0, header) + len(stamp)
        if position < len(stamp):
            return f"{file} is damaged, or it is a shard of another store or with another number"
        digest = hashlib.sha256(view[:position])
        digest.update(NO_DIGEST)
        digest.update(view[position + 64 :])
        if view[position : position + 64] != digest.hexdigest().encode():
            return f"{file} is damaged: its checksum does not match its content"
    return None
