"""Feature rows wherever they lie: in memory, in a store, or chosen from several stores.

Shape letters: N rows, K numbers per row, R rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tracmod.features.shards import KEPT_SHARDS
from tracmod.features.store import FeatureStore
from tracmod.files.durable import canonical_json, sha256


class Rows(Protocol):
    """One checkpoint's features of N examples.

    Attributes:
        shape: (N, K).
        dtype: what `read` gives.
        ends: where blocks that are read without a copy end, ascending, N the last.
        key: what tells these rows from any others, without reading them.
        mapped_bytes: what reading maps into memory at a time, beside the rows.
        kept_bytes: what it keeps there, of object storage.
    """

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def ends(self) -> Sequence[int]: ...

    @property
    def key(self) -> str: ...

    @property
    def mapped_bytes(self) -> int: ...

    @property
    def kept_bytes(self) -> int: ...

    def read(self, start: int, stop: int) -> Tensor:
        """The rows [start, stop), (stop - start, K)."""

    def take(self, rows: Sequence[int]) -> Tensor:
        """The rows of these numbers, (len(rows), K)."""

    def norms(self) -> Tensor:
        """(N,) the L2 norms of the rows, on the CPU."""

    def will_read(self, start: int, stop: int) -> None:
        """Tell the system that the rows [start, stop) will be read soon."""


Features = Tensor | NDArray[Any] | FeatureStore | Rows


@dataclass(frozen=True)
class TensorRows:
    """Rows in memory, on any device."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.tensor.shape[0], self.tensor.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def ends(self) -> list[int]:
        return [len(self.tensor)]

    @property
    def key(self) -> str:
        return sha256(self.tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())

    @property
    def mapped_bytes(self) -> int:
        return 0

    @property
    def kept_bytes(self) -> int:
        return 0

    def read(self, start: int, stop: int) -> Tensor:
        return self.tensor[start:stop]

    def take(self, rows: Sequence[int]) -> Tensor:
        return self.tensor[rows]

    def norms(self) -> Tensor:
        return torch.linalg.vector_norm(self.tensor.double(), dim=1).cpu()

    def will_read(self, start: int, stop: int) -> None:
        pass


@dataclass(frozen=True)
class StoreRows:
    """Rows of a store: every shard is verified before its first row is used."""

    store: FeatureStore

    @property
    def shape(self) -> tuple[int, int]:
        return self.store.num_rows, self.store.dim

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.store.dtype == torch.int8 else self.store.dtype

    @cached_property
    def ends(self) -> list[int]:
        return [self.store.shard_range(shard).stop for shard in range(self.store.num_shards)]

    @cached_property
    def key(self) -> str:
        return sha256((self.store.path / "manifest.json").read_bytes())

    @property
    def mapped_bytes(self) -> int:
        """A shard is mapped whole while it is verified; fetched, it is bytes and then tensors."""
        return self.store.shard_bytes if self.store.is_on_disk else 2 * self.store.shard_bytes

    @property
    def kept_bytes(self) -> int:
        return 0 if self.store.is_on_disk else KEPT_SHARDS * self.store.shard_bytes

    def read(self, start: int, stop: int) -> Tensor:
        return self.store.read(start, stop)

    def take(self, rows: Sequence[int]) -> Tensor:
        return self.store.take(rows)

    def norms(self) -> Tensor:
        return self.store.norms()

    def will_read(self, start: int, stop: int) -> None:
        self.store.will_read(start, stop)


@dataclass(frozen=True)
class ChosenRows:
    """Every row from one of several sources of the same shape: that of its language, say.

    Attributes:
        sources: by name.
        names: (N,) the source of every row.
    """

    sources: Mapping[str, Rows]
    names: Sequence[str]

    @property
    def _first(self) -> Rows:
        return next(iter(self.sources.values()))

    @property
    def shape(self) -> tuple[int, int]:
        return self._first.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._first.dtype

    @property
    def ends(self) -> Sequence[int]:
        return self._first.ends

    @cached_property
    def key(self) -> str:
        keys = {name: source.key for name, source in self.sources.items()}
        return sha256(canonical_json([keys, list(self.names)]))

    @property
    def mapped_bytes(self) -> int:
        return max(source.mapped_bytes for source in self.sources.values())

    @property
    def kept_bytes(self) -> int:
        return sum(source.kept_bytes for source in self.sources.values())

    @cached_property
    def _rows_of(self) -> dict[str, NDArray[np.int64]]:
        names = np.asarray(self.names)
        return {name: np.flatnonzero(names == name) for name in self.sources}

    def read(self, start: int, stop: int) -> Tensor:
        chosen = torch.empty(stop - start, self.shape[1], dtype=self.dtype)
        for name, rows in self._rows_of.items():
            low, high = np.searchsorted(rows, [start, stop])
            if low < high:
                mine = torch.from_numpy(rows[low:high] - start)
                chosen[mine] = self.sources[name].read(start, stop)[mine]
        return chosen

    def take(self, rows: Sequence[int]) -> Tensor:
        return torch.cat([self.sources[self.names[row]].take([row]) for row in rows])

    def norms(self) -> Tensor:
        chosen = torch.empty(self.shape[0])
        for name, rows in self._rows_of.items():
            chosen[rows] = self.sources[name].norms()[rows]
        return chosen

    def will_read(self, start: int, stop: int) -> None:
        for source in self.sources.values():
            source.will_read(start, stop)


@dataclass(frozen=True)
class SomeRows:
    """Some of the rows of a source, in their order there.

    Attributes:
        source: all rows.
        chosen: (N,) numbers of rows, ascending.
    """

    source: Rows
    chosen: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.chosen), self.source.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    @cached_property
    def ends(self) -> list[int]:
        places = torch.searchsorted(self.chosen, torch.tensor(list(self.source.ends)))
        return sorted({*places.tolist()} - {0})

    @cached_property
    def key(self) -> str:
        return sha256(canonical_json([self.source.key, self.chosen.tolist()]))

    @property
    def mapped_bytes(self) -> int:
        return self.source.mapped_bytes

    @property
    def kept_bytes(self) -> int:
        return self.source.kept_bytes

    def read(self, start: int, stop: int) -> Tensor:
        return self.source.take(self.chosen[start:stop].tolist())

    def take(self, rows: Sequence[int]) -> Tensor:
        return self.source.take(self.chosen[list(rows)].tolist())

    def norms(self) -> Tensor:
        return self.source.norms()[self.chosen]

    def will_read(self, start: int, stop: int) -> None:
        self.source.will_read(int(self.chosen[start]), int(self.chosen[stop - 1]) + 1)


def as_rows(features: Features) -> Rows:
    """What a caller may give as features of one checkpoint, as `Rows`."""
    if isinstance(features, FeatureStore):
        return StoreRows(features)
    if isinstance(features, Tensor | np.ndarray):
        return TensorRows(torch.as_tensor(features))
    return features


def block_ranges(rows: Rows, most: int) -> list[tuple[int, int]]:
    """Cuts rows into ranges of at most `most`, none across an end of `rows.ends`."""
    assert most >= 1
    ranges, start = [], 0
    for end in rows.ends:
        ranges += [(low, min(low + most, end)) for low in range(start, end, most)]
        start = end
    return ranges


def read_blocks(
    trains: Sequence[Rows], ranges: Sequence[tuple[int, int]], at_once: int, ahead: bool
) -> Iterator[tuple[int, list[Tensor]]]:
    """Yields (start, (C,) rows of a block), in order; reads and verifies several at once.

    Args:
        trains: (C,) of the same N.
        ranges: the blocks, one after the other.
        at_once: how many blocks are read, and held, at once, each by a thread.
        ahead: read the next blocks while those before are worked on: where that is done elsewhere
            than on these cores, or reading is mostly waiting. Else the system is only told that
            they will be wanted, and the cores are all for the work and then all for the checksums:
            threads that take a core from a team of threads cost the whole team.
    """

    def read(block: tuple[int, int]) -> list[Tensor]:
        return [rows.read(*block) for rows in trains]

    with ThreadPoolExecutor(at_once) as pool:
        groups = [ranges[first : first + at_once] for first in range(0, len(ranges), at_once)]
        coming = [pool.submit(read, block) for block in groups[0]] if groups else []
        for place, group in enumerate(groups):
            blocks = [one.result() for one in coming]
            following = groups[place + 1] if place + 1 < len(groups) else []
            if ahead:
                coming = [pool.submit(read, block) for block in following]
            else:
                for rows in trains if following else ():
                    rows.will_read(following[0][0], following[-1][1])
            for (start, _), block in zip(group, blocks, strict=True):
                yield start, block
            del blocks, block
            if not ahead:
                coming = [pool.submit(read, block) for block in following]
