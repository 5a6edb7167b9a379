"""Rows of features from memory, from a store, or selected from several of them, in one interface.

Shape suffixes: N rows, K numbers per row, C checkpoints.
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

from tracmod.features.shards import CACHED_SHARDS
from tracmod.features.store import FeatureStore
from tracmod.files.durable import canonical_json, sha256


class Rows(Protocol):
    """The features of N examples at one checkpoint.

    Attributes:
        shape: (N, K).
        dtype: The dtype of the rows that `read` returns.
        ends: The ends of the blocks that are read without a copy (those of shards), ascending; the
            last one is N.
        key: A string that identifies these rows, without reading them from a store.
        mapped_bytes: Memory that reading needs at a time, in addition to the rows.
        kept_bytes: Memory that stays occupied after reading (shards of object storage).
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
        """Return the rows [start, stop), (stop - start, K)."""

    def take(self, rows: Sequence[int]) -> Tensor:
        """Return the rows with these numbers, (len(rows), K)."""

    def norms(self) -> Tensor:
        """Return the L2 norms of the rows, (N,), on the CPU."""

    def magnitudes(self, start: int, stop: int) -> Tensor:
        """Return numbers from the largest absolute value of each row to its L2 norm, on the CPU."""

    def will_read(self, start: int, stop: int) -> None:
        """Tell the operating system that the rows [start, stop) will be read soon."""


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

    def magnitudes(self, start: int, stop: int) -> Tensor:
        return row_magnitudes(self.tensor[start:stop]).cpu()

    def will_read(self, start: int, stop: int) -> None:
        pass


@dataclass(frozen=True)
class StoreRows:
    """Rows of a store, each shard of which is verified before its first row is used."""

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
        """A shard is mapped as a whole to verify it; a fetched one is both bytes and tensors."""
        return self.store.shard_bytes if self.store.is_on_disk else 2 * self.store.shard_bytes

    @property
    def kept_bytes(self) -> int:
        return 0 if self.store.is_on_disk else CACHED_SHARDS * self.store.shard_bytes

    def read(self, start: int, stop: int) -> Tensor:
        return self.store.read(start, stop)

    def take(self, rows: Sequence[int]) -> Tensor:
        return self.store.take(rows)

    def norms(self) -> Tensor:
        return self.store.norms()

    def magnitudes(self, start: int, stop: int) -> Tensor:
        return self.store.norms(start, stop)

    def will_read(self, start: int, stop: int) -> None:
        self.store.will_read(start, stop)


@dataclass(frozen=True)
class ChosenRows:
    """Rows that each come from one of several sources, for example from that of their language.

    Attributes:
        sources: The sources by name, all of the same shape.
        names: (N,) the name of the source of every row.
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
                own = torch.from_numpy(rows[low:high] - start)
                chosen[own] = self.sources[name].read(start, stop)[own]
        return chosen

    def take(self, rows: Sequence[int]) -> Tensor:
        return torch.cat([self.sources[self.names[row]].take([row]) for row in rows])

    def norms(self) -> Tensor:
        chosen = torch.empty(self.shape[0])
        for name, rows in self._rows_of.items():
            chosen[rows] = self.sources[name].norms()[rows]
        return chosen

    def magnitudes(self, start: int, stop: int) -> Tensor:
        chosen = torch.empty(stop - start)
        for name, rows in self._rows_of.items():
            low, high = np.searchsorted(rows, [start, stop])
            if low < high:
                own = torch.from_numpy(rows[low:high] - start)
                chosen[own] = self.sources[name].magnitudes(start, stop).float()[own]
        return chosen

    def will_read(self, start: int, stop: int) -> None:
        for source in self.sources.values():
            source.will_read(start, stop)


@dataclass(frozen=True)
class SomeRows:
    """Some rows of a source, in the same order.

    Attributes:
        source: All rows.
        chosen: (N,) the numbers of the rows, ascending.
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
        ends = torch.searchsorted(self.chosen, torch.tensor(list(self.source.ends)))
        return sorted({*ends.tolist()} - {0})

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

    def magnitudes(self, start: int, stop: int) -> Tensor:
        chosen = self.chosen[start:stop]
        if not len(chosen):
            return torch.zeros(0)
        first, end = int(chosen[0]), int(chosen[-1]) + 1
        return self.source.magnitudes(first, end)[chosen - first]

    def will_read(self, start: int, stop: int) -> None:
        self.source.will_read(int(self.chosen[start]), int(self.chosen[stop - 1]) + 1)


def as_rows(features: Features) -> Rows:
    """Wrap the features of one checkpoint, in any form that callers may pass, as `Rows`."""
    if isinstance(features, FeatureStore):
        return StoreRows(features)
    if isinstance(features, Tensor | np.ndarray):
        return TensorRows(torch.as_tensor(features))
    return features


# Rows of a larger or smaller magnitude than these are scaled before they are multiplied. Products
# of two rows between them, and sums of their squares, are far from the limits of float32.
SMALLEST_MAGNITUDE, LARGEST_MAGNITUDE = 2.0**-40, 2.0**40


def row_magnitudes(rows: Tensor) -> Tensor:
    """Return numbers from the largest absolute value of each row to its L2 norm, on its device.

    L2 norms take an eighth of the time of largest values. Where the squares of a row leave the
    range of its dtype, the norm is extreme, and the largest value is taken instead.
    """
    norms = torch.linalg.vector_norm(rows, dim=1)
    ordinary = (norms >= SMALLEST_MAGNITUDE) & (norms <= LARGEST_MAGNITUDE)
    unsure = ordinary.logical_not().nonzero().flatten()
    if len(unsure):
        norms[unsure] = torch.linalg.vector_norm(rows[unsure], ord=torch.inf, dim=1)
    return norms


def extreme_exponents(magnitudes: Tensor) -> Tensor | None:
    """Return the binary exponents of extreme magnitudes, and 0 for others; None if all are 0.

    Args:
        magnitudes: Non-negative numbers.

    Returns:
        float64 in the shape of `magnitudes`. A row divided by 2 to this power has a magnitude
        around 1, and the division is exact.
    """
    magnitudes = magnitudes.double()
    extreme = (magnitudes < SMALLEST_MAGNITUDE) & (magnitudes > 0)
    extreme |= (magnitudes > LARGEST_MAGNITUDE) & magnitudes.isfinite()
    if not bool(extreme.any()):
        return None
    return torch.where(extreme, magnitudes.frexp().exponent.double(), 0)


def scaled_rows(rows: Tensor, exponents: Tensor | None) -> Tensor:
    """Divide rows by 2 to the power of their exponents; None leaves them as they are."""
    if exponents is None:
        return rows
    rows, chosen = rows.clone(), exponents.nonzero().flatten()
    factors = torch.exp2(-exponents[chosen])[:, None].to(rows.device)
    chosen = chosen.to(rows.device)
    rows[chosen] = (rows[chosen].double() * factors).to(rows.dtype)
    return rows


def block_ranges(rows: Rows, most: int) -> list[tuple[int, int]]:
    """Divide rows into ranges of at most `most`, none of which crosses an end of `rows.ends`."""
    assert most >= 1
    ranges, start = [], 0
    for end in rows.ends:
        ranges += [(low, min(low + most, end)) for low in range(start, end, most)]
        start = end
    return ranges


def read_blocks(
    trains: Sequence[Rows], ranges: Sequence[tuple[int, int]], at_once: int, ahead: bool
) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield (start, C tensors of rows) for every block in order, reading several blocks at once.

    Args:
        trains: The rows at each of C checkpoints, with the same N.
        ranges: The blocks, one after the other.
        at_once: The number of blocks that are read and held in memory at a time, by a thread each.
        ahead: Whether to read the next blocks while the caller works on the previous ones. This
            helps if the work is done elsewhere (on a GPU) or if reading mostly waits (for object
            storage). Otherwise the operating system is only told that the blocks will be read, and
            all cores alternate between the caller's work and the checksums: a reading thread that
            takes one core from a team of OpenMP threads delays the whole team.
    """

    def read(block: tuple[int, int]) -> list[Tensor]:
        return [rows.read(*block) for rows in trains]

    with ThreadPoolExecutor(at_once) as pool:
        groups = [ranges[first : first + at_once] for first in range(0, len(ranges), at_once)]
        pending = [pool.submit(read, block) for block in groups[0]] if groups else []
        for number, group in enumerate(groups):
            blocks = [future.result() for future in pending]
            following = groups[number + 1] if number + 1 < len(groups) else []
            if ahead:
                pending = [pool.submit(read, block) for block in following]
            else:
                for rows in trains if following else ():
                    rows.will_read(following[0][0], following[-1][1])
            for (start, _), block in zip(group, blocks, strict=True):
                yield start, block
            del blocks, block  # before the next ones are read: memory for one group at a time
            if not ahead:
                pending = [pool.submit(read, block) for block in following]
