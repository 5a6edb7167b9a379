"""The strongest rows for every query, over rows of any number: bounded memory, resumable.

    for a block of queries that fits in memory:
        for a few blocks of training rows:  read and verify them, on all cores
            for each of them:  top_k_dot, on all cores

`top_k_dot` takes up where it was left, bit for bit; so neither the blocks nor an interruption
change the result. Memory: see `plan_blocks`. Bytes read: the training rows once per block of
queries.

Shape letters: Q queries, N training rows, K numbers per row, C checkpoints, G groups.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tracmod import kernels
from tracmod.choices import DEFAULT_MEMORY
from tracmod.features.rows import Rows, TensorRows, block_ranges, read_blocks
from tracmod.features.shards import CACHED_SHARDS, READERS
from tracmod.files.durable import canonical_json, sha256
from tracmod.files.tensor_cache import read_tensors, write_tensors

MEMORY = DEFAULT_MEMORY
SAVE_SECONDS = 30.0
# What `top_k_dot` works in beside its arguments: scores of 256 x 2048, and some per thread.
_KERNEL_BYTES = 32 << 20
# `top_k_dot` takes another path for up to 8 queries, whose sums round otherwise.
_LEAST_QUERIES = 9


class Blocks(NamedTuple):
    """How the work is cut.

    Attributes:
        passes: blocks of queries, each of which passes over the training rows once.
        trains: training rows of a block.
        at_once: blocks that are read at once.
    """

    passes: int
    trains: int
    at_once: int


@dataclass(frozen=True)
class Search:
    """What is looked for.

    Attributes:
        queries: (C,) rows of Q queries.
        trains: (C,) rows of N training examples.
        k: places of each ranking.
        weights: (C,) of the checkpoints.
        normalize: None or "cosine".
        groups_N: the group of every training row, int64, on `device`; None for no sums.
        num_groups: G.
        device: where scores are computed.
    """

    queries: Sequence[Rows]
    trains: Sequence[Rows]
    k: int
    weights: Sequence[float]
    normalize: str | None
    groups_N: Tensor | None
    num_groups: int
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16 where all rows are, else float32."""
        given = {rows.dtype for rows in (*self.queries, *self.trains)}
        return torch.bfloat16 if given == {torch.bfloat16} else torch.float32

    @property
    def is_fetched(self) -> bool:
        """Whether training rows come from object storage."""
        return any(rows.kept_bytes for rows in self.trains)

    @property
    def reads_ahead(self) -> bool:
        """Whether rows are read while those before are worked on; see `read_blocks`."""
        return self.is_fetched or self.device.type != "cpu"

    @property
    def identity(self) -> dict[str, Any]:
        """All that the result depends on."""
        groups = None if self.groups_N is None else self.groups_N.cpu().numpy().tobytes()
        return {
            "queries": [rows.key for rows in self.queries],
            "trains": [rows.key for rows in self.trains],
            "k": self.k,
            "weights": list(self.weights),
            "normalize": self.normalize,
            "groups": None if groups is None else sha256(groups),
            "device": self.device.type,
        }


def search_rows(
    search: Search,
    memory: int = MEMORY,
    progress: Path | None = None,
    advance: Callable[[int], Any] | None = None,
    passes: int = 1,
    only: int | None = None,
) -> kernels.TopK:
    """`top_k_dot` of all queries and training rows.

    Args:
        search: what is looked for.
        memory: bytes that rows on disk may take at a time, with the rankings and buffers.
        progress: folder that keeps rankings between two tries, in files that are named by all that
            they depend on; the caller removes it when their results are safe.
        advance: called with the number of scores done; Q x N in all.
        passes: into how many blocks queries are cut at least, if there are enough of them.
        only: 0 to passes - 1: a share of these blocks, which alone is searched; absent: all.

    Raises:
        ValueError: too little memory; a shard that is missing or damaged.
    """
    blocks, count = plan_blocks(search, memory), search.queries[0].shape[0]
    cuts = max(blocks.passes, min(passes, count // _LEAST_QUERIES))
    ends = [place * count // cuts for place in range(cuts + 1)]
    parts = [
        _search_block(search, first, stop, blocks, progress, advance)
        for place, (first, stop) in enumerate(pairwise(ends))
        if first < stop and (only is None or place % passes == only)
    ]
    if not parts:
        return _nothing_found(search)
    columns = zip(*parts, strict=True)
    return kernels.TopK(*(None if one[0] is None else torch.cat(one) for one in columns))  # type: ignore[arg-type]


def _ranking_bytes(k: int, num_groups: int) -> int:
    """Of a query: scores and rows of both rankings, groups of one to count shares, and sums."""
    return 40 * k + 24 * num_groups


class Sizes(NamedTuple):
    """What the memory that a search takes depends on.

    Attributes:
        queries, trains: Q and N.
        row_bytes: of a row at all checkpoints, as it is computed with.
        ranking_bytes: of a query's two rankings and its sums by group.
        mapped_bytes: of the largest shard, which is mapped to be verified; of object storage also
            the shards that are kept.
    """

    queries: int
    trains: int
    row_bytes: int
    ranking_bytes: int
    mapped_bytes: int

    @classmethod
    def of_stores(
        cls,
        queries: int,
        trains: int,
        row_bytes: int,
        k: int,
        num_groups: int,
        shard_rows: int,
        on_disk: bool = True,
    ) -> Sizes:
        """Sizes that are known before there are stores; `row_bytes` as above."""
        mapped_bytes = min(shard_rows, max(queries, trains)) * row_bytes
        if not on_disk:  # a shard's bytes and tensors, and what is kept of queries and of training
            mapped_bytes *= 2 + 2 * CACHED_SHARDS
        return cls(queries, trains, row_bytes, _ranking_bytes(k, num_groups), mapped_bytes)

    @property
    def fixed(self) -> int:
        """Rankings and sums of all queries, groups, a shard, the kernel's buffers."""
        rankings = self.queries * self.ranking_bytes
        return _KERNEL_BYTES + rankings + 8 * self.trains + self.mapped_bytes

    @property
    def per_query(self) -> int:
        """A query that is worked on: its rows, its rankings before and after a block."""
        return self.row_bytes + 2 * self.ranking_bytes

    @property
    def per_train(self) -> int:
        """The row worked on, one that is read ahead, a copy in another dtype."""
        return 3 * self.row_bytes

    @property
    def least_queries(self) -> int:
        """Any number from here on can be cut so that no block has 1 to 8 queries."""
        return min(self.queries, 2 * _LEAST_QUERIES - 1)


def check_memory(sizes: Sizes, memory: int) -> None:
    """ValueError where not even a few queries and one training row fit."""
    needed = sizes.fixed + sizes.least_queries * sizes.per_query + sizes.per_train
    if memory < needed:
        raise ValueError(
            f"memory: expected at least {needed:,} bytes for {sizes.queries:,} queries and "
            f"{sizes.trains:,} training rows of {sizes.row_bytes:,} bytes over all checkpoints, "
            f"got {memory:,}"
        )


def plan_blocks(search: Search, memory: int) -> Blocks:
    """As many queries at a time as fit beside a block of training rows.

    Rows that are in memory already cost nothing and are not cut.

    Raises:
        ValueError: not even a few queries and one training row fit.
    """
    (num_queries, width), num_trains = search.queries[0].shape, search.trains[0].shape[0]
    every = (*search.queries, *search.trains)
    sizes = Sizes(
        num_queries,
        num_trains,
        row_bytes=len(search.trains) * width * search.dtype.itemsize,
        ranking_bytes=_ranking_bytes(search.k, search.num_groups),
        mapped_bytes=max(one.mapped_bytes for one in every) + sum(one.kept_bytes for one in every),
    )
    if not all(isinstance(rows, TensorRows) for rows in every):
        check_memory(sizes, memory)
    free = (memory - sizes.fixed - sizes.least_queries * sizes.per_query) // 2
    longest = max(
        (stop - start for start, stop in pairwise([0, *search.trains[0].ends])), default=0
    )
    trains = min(longest, max(1, free // sizes.per_train))
    more = trains * sizes.row_bytes * (2 if search.reads_ahead else 1) + sizes.mapped_bytes
    room = max(0, free - trains * sizes.per_train) // max(1, more)
    at_once = 1 if search.is_fetched else 1 + min(room, torch.get_num_threads() - 1, READERS - 1)
    taken = trains * sizes.per_train + (at_once - 1) * more
    queries = (memory - sizes.fixed - taken) // sizes.per_query
    if all(isinstance(rows, TensorRows) for rows in search.trains):
        trains = num_trains
    if all(isinstance(rows, TensorRows) for rows in search.queries):
        queries = num_queries
    # No block of 1 to 8 queries, unless there are no more.
    passes = min(-(-num_queries // max(1, queries)), num_queries // _LEAST_QUERIES)
    return Blocks(max(1, passes), max(1, trains), at_once)


def _nothing_found(search: Search) -> kernels.TopK:
    """The result for no queries."""
    scores, rows = (torch.empty(0, search.k, dtype=one) for one in (torch.float32, torch.int64))
    sums = None if search.groups_N is None else torch.empty(0, search.num_groups).double()
    found = (scores, rows, scores.clone(), rows.clone(), sums)
    return kernels.TopK(*(None if one is None else one.to(search.device) for one in found))  # type: ignore[arg-type]


def _search_block(
    search: Search,
    first: int,
    stop: int,
    blocks: Blocks,
    progress: Path | None,
    advance: Callable[[int], Any] | None,
) -> kernels.TopK:
    """The rankings of the queries [first, stop)."""
    saved = None if progress is None else _Progress(progress, search, first, stop)
    state, done = (None, 0) if saved is None else saved.load()
    if advance is not None and done:
        advance((stop - first) * done)
    if state is not None and done == search.trains[0].shape[0]:
        return state
    queries = [_ready(rows.read(first, stop), search) for rows in search.queries]
    # What was done may have ended elsewhere: with another `memory`, blocks were others.
    every = block_ranges(search.trains[0], blocks.trains)
    ranges = [(max(start, done), end) for start, end in every if end > done]
    for start, block in read_blocks(search.trains, ranges, blocks.at_once, search.reads_ahead):
        count = len(block[0])
        groups_N = None if search.groups_N is None else search.groups_N[start : start + count]
        state = kernels.top_k_dot(
            queries,
            [_ready(one, search) for one in block],
            k=search.k,
            weights=search.weights,
            normalize=search.normalize,
            groups=groups_N,
            num_groups=search.num_groups,
            state=state,
            index_offset=start,
        )
        if saved is not None:
            saved.keep(state, start + count)
        if advance is not None:
            advance((stop - first) * count)
    assert state is not None
    return state


def _ready(rows: Tensor, search: Search) -> Tensor:
    return rows.to(search.device, search.dtype).contiguous()


class _Progress:
    """The file of a block of queries; a damaged one is made anew."""

    def __init__(self, folder: Path, search: Search, first: int, stop: int) -> None:
        self._identity = {**search.identity, "first": first, "stop": stop}
        self._file = folder / f"{sha256(canonical_json(self._identity))[:32]}.safetensors"
        self._device = search.device
        self._count = search.trains[0].shape[0]
        self._saved_at = time.monotonic()

    def load(self) -> tuple[kernels.TopK | None, int]:
        """The rankings so far and the training rows that they are of."""
        try:
            kept = read_tensors(self._file, self._identity)
        except ValueError:
            return None, 0
        if kept is None:
            return None, 0
        parts = [kept[name].to(self._device) for name in kernels.TopK._fields if name in kept]
        return kernels.TopK(*parts, *([None] * (5 - len(parts)))), int(kept["done"])

    def keep(self, state: kernels.TopK, done: int) -> None:
        """Write the rankings, but not too often."""
        now = time.monotonic()
        if done < self._count and now - self._saved_at < SAVE_SECONDS:
            return
        tensors = {name: one for name, one in state._asdict().items() if one is not None}
        write_tensors(self._file, {**tensors, "done": torch.tensor(done)}, self._identity)
        self._saved_at = now
