"""Top-k search over feature rows on disk: bounded memory, resumable, and exact to the last bit.

The search is a loop over two kinds of blocks:

    for each block of queries that fits into memory:            one pass over the training rows
        for each block of training rows, in row order:          read and verified on all cores
            merge the block's scores into the rankings          `kernels.top_k_dot`, on all cores

Why in this order. Training rows outnumber queries by orders of magnitude, so they are the side
that is streamed, and each block of queries costs one pass over them. Bytes read are therefore
`passes x N x row_bytes`; with enough memory for all queries there is one pass. The reverse nesting
would read less of the queries but keep the rankings of *all* queries in flight for each block, and
a search that was interrupted could not finish any query.

Why the result does not depend on the blocks. A ranking is merged with the scores of the next block
under a total order: better score first, and among equal scores the lower row number first (NaN
before everything, so that it is noticed). The k first rows of a total order are the same however
the rows are divided. The products of a score are added in an order of their own, and scores are
added to the group sums in row order, so `top_k_dot` called block by block with the state of the
call before gives the bits of a single call. One exception needs care: for up to 8 queries the
kernel takes another path whose sums round differently, so no block has fewer than 9 queries unless
there are no more (`_LEAST_QUERIES`).

Cosine needs the norms of whole rows. A row is never divided across blocks, so the kernel sums its
squares beside its products and needs neither a pass of its own for norms nor normalised copies.

Memory, where Q and N are all queries and training rows and q, t those of a block:

    fixed   32 MiB of kernel buffers + Q rankings + 8 N for group numbers + one shard
    + q x   (row + 2 rankings)       its features, and its rankings before and after a block
    + t x   3 rows                   the block scored, the block read ahead, a copy in another dtype

`plan_blocks` chooses q and t so that this stays within the `memory` of the caller.

Shape suffixes: Q queries, N training rows, K numbers per row, C checkpoints, G groups.
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
from tracmod.features.rows import (
    Rows,
    TensorRows,
    block_ranges,
    extreme_exponents,
    read_blocks,
    scaled_rows,
)
from tracmod.features.shards import CACHED_SHARDS, READERS
from tracmod.files.durable import canonical_json, sha256
from tracmod.files.tensor_cache import read_tensors, write_tensors

SAVE_SECONDS = 30.0  # at least this long between two saves of the same block of queries
# Working memory of `top_k_dot`: 256 x 2048 scores, and buffers per thread.
_KERNEL_BYTES = 32 << 20
# `top_k_dot` computes up to 8 queries on another path, whose sums round differently.
_LEAST_QUERIES = 9


@dataclass(frozen=True)
class Search:
    """Inputs and options of a search.

    Attributes:
        queries: (C,) rows of the Q queries, one entry per checkpoint.
        trains: (C,) rows of the N training examples.
        k: length of each ranking.
        weights: (C,) weight of each checkpoint.
        normalize: None or "cosine".
        groups_N: group number of every training row, int64, on `device`; None for no sums.
        num_groups: G.
        device: where scores are computed.
        opponents: whether opponents are ranked. If not, their ranking has the strongest alone,
            which `check_scores` needs.
    """

    queries: Sequence[Rows]
    trains: Sequence[Rows]
    k: int
    weights: Sequence[float]
    normalize: str | None
    groups_N: Tensor | None
    num_groups: int
    device: torch.device
    opponents: bool = True

    @property
    def opponents_k(self) -> int:
        """Length of the ranking of opponents."""
        return self.k if self.opponents else 1

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the rows given to the kernel: bfloat16 if all rows are, otherwise float32."""
        dtypes = {rows.dtype for rows in (*self.queries, *self.trains)}
        return torch.bfloat16 if dtypes == {torch.bfloat16} else torch.float32

    @property
    def is_remote(self) -> bool:
        """Whether training rows are fetched from object storage."""
        return any(rows.kept_bytes for rows in self.trains)

    @property
    def reads_ahead(self) -> bool:
        """Whether blocks are read while the blocks before are scored; see `read_blocks`."""
        return self.is_remote or self.device.type != "cpu"

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that the result depends on; saved progress is looked up by it."""
        groups = None if self.groups_N is None else self.groups_N.cpu().numpy().tobytes()
        return {
            "queries": [rows.key for rows in self.queries],
            "trains": [rows.key for rows in self.trains],
            "k": self.k,
            "weights": list(self.weights),
            "normalize": self.normalize,
            "groups": None if groups is None else sha256(groups),
            "device": self.device.type,
            **({} if self.opponents else {"opponents": False}),
        }


def search_rows(
    search: Search,
    memory: int = DEFAULT_MEMORY,
    progress: Path | None = None,
    advance: Callable[[int], Any] | None = None,
    parts: int = 1,
    part: int | None = None,
) -> kernels.TopK:
    """Return the result of `top_k_dot` for all queries and training rows.

    Args:
        search: queries, training rows and options.
        memory: bytes that rows on disk may take, together with rankings and buffers.
        progress: folder for intermediate rankings, from which an interrupted call resumes. The
            names of its files are derived from everything they depend on. The caller removes the
            folder once the results are safe.
        advance: called with the number of scores just computed; Q x N in total.
        parts: minimum number of query blocks; fewer if there are too few queries.
        part: from 0 to parts - 1: search only the blocks with this number modulo `parts`, so that
            several processes can share the work. None searches all.

    Returns:
        `kernels.TopK` of the queries that were searched, in their order.

    Raises:
        ValueError: too little memory, or a shard that is missing or damaged.
    """
    plan, num_queries = plan_blocks(search, memory), search.queries[0].shape[0]
    num_blocks = max(plan.passes, min(parts, num_queries // _LEAST_QUERIES))
    bounds = [block * num_queries // num_blocks for block in range(num_blocks + 1)]
    results = [
        _search_block(search, first, stop, plan, progress, advance)
        for block, (first, stop) in enumerate(pairwise(bounds))
        if first < stop and (part is None or block % parts == part)
    ]
    if not results:  # no queries, or none in this part
        num_groups = None if search.groups_N is None else search.num_groups
        results = [
            kernels.empty_ranking(0, search.k, num_groups, search.device, search.opponents_k)
        ]
    fields = [
        None if blocks[0] is None else torch.cat(blocks) for blocks in zip(*results, strict=True)
    ]
    return kernels.TopK(*fields)  # type: ignore[arg-type]


# --- memory ----------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """Quantities that the memory of a search depends on.

    Attributes:
        num_queries, num_trains: Q and N.
        row_bytes: bytes of one row at all checkpoints, in the dtype of the computation.
        ranking_bytes: bytes of one query's two rankings and its sums by group.
        mapped_bytes: bytes of the largest shard, which is mapped whole while it is verified, and
            of the shards that are kept from object storage.
    """

    num_queries: int
    num_trains: int
    row_bytes: int
    ranking_bytes: int
    mapped_bytes: int

    @classmethod
    def of_stores(
        cls,
        num_queries: int,
        num_trains: int,
        row_bytes: int,
        k: int,
        num_groups: int,
        shard_rows: int,
        on_disk: bool = True,
    ) -> Sizes:
        """Return the sizes of a search in stores that need not exist yet.

        Args:
            num_queries, num_trains, row_bytes: as above.
            k: length of each ranking.
            num_groups: G.
            shard_rows: rows per shard.
            on_disk: False for stores in object storage.
        """
        mapped_bytes = min(shard_rows, max(num_queries, num_trains)) * row_bytes
        if not on_disk:  # the bytes and tensors of a shard, and the cached shards of both sides
            mapped_bytes *= 2 + 2 * CACHED_SHARDS
        ranking_bytes = _ranking_bytes(k, k, num_groups)
        return cls(num_queries, num_trains, row_bytes, ranking_bytes, mapped_bytes)

    @classmethod
    def of_search(cls, search: Search) -> Sizes:
        """Return the sizes of a search in rows that exist."""
        sides = (*search.queries, *search.trains)
        num_queries, width = search.queries[0].shape
        return cls(
            num_queries,
            search.trains[0].shape[0],
            row_bytes=len(search.trains) * width * search.dtype.itemsize,
            ranking_bytes=_ranking_bytes(search.k, search.opponents_k, search.num_groups),
            mapped_bytes=max(rows.mapped_bytes for rows in sides)
            + sum(rows.kept_bytes for rows in sides),
        )

    @property
    def fixed(self) -> int:
        """Bytes that do not depend on the blocks."""
        rankings = self.num_queries * self.ranking_bytes
        return _KERNEL_BYTES + rankings + 8 * self.num_trains + self.mapped_bytes

    @property
    def per_query(self) -> int:
        """Bytes per query of a block: its row, and its rankings before and after a merge."""
        return self.row_bytes + 2 * self.ranking_bytes

    @property
    def per_train(self) -> int:
        """Bytes per row of a training block: scored, read ahead, and in another dtype."""
        return 3 * self.row_bytes

    @property
    def least_queries(self) -> int:
        """Least number of queries of a block for which memory must suffice.

        If a block may hold 17 queries, any number of at least 9 can be split evenly into blocks of
        9 to 17.
        """
        return min(self.num_queries, 2 * _LEAST_QUERIES - 1)


def _ranking_bytes(k: int, opponents_k: int, num_groups: int) -> int:
    """Return the bytes of one query's results.

    Per place: score and row number in each ranking (12 bytes), and group numbers while the shares
    of one ranking are counted (16). Per group: the sum and the shares in both rankings (24).
    """
    return 28 * k + 12 * opponents_k + 24 * num_groups


def check_memory(sizes: Sizes, memory: int) -> None:
    """Check that the smallest possible blocks fit into memory.

    Raises:
        ValueError: they do not; the message says how many bytes are needed.
    """
    needed = sizes.fixed + sizes.least_queries * sizes.per_query + sizes.per_train
    if memory < needed:
        raise ValueError(
            f"memory: expected at least {needed:,} bytes for {sizes.num_queries:,} queries "
            f"and {sizes.num_trains:,} training rows of {sizes.row_bytes:,} bytes over all "
            f"checkpoints, got {memory:,}"
        )


class BlockPlan(NamedTuple):
    """How a search is divided into blocks.

    Attributes:
        passes: number of blocks of queries, each of which reads all training rows once.
        train_rows: rows of a training block.
        at_once: training blocks that are read at the same time.
    """

    passes: int
    train_rows: int
    at_once: int


def plan_blocks(search: Search, memory: int) -> BlockPlan:
    """Choose the blocks of a search so that it stays within `memory` bytes.

    Training rows get at most half of what remains after the fixed part and the smallest query
    block; they need no more than a shard per reading thread. Queries get the rest, because each
    further block of them costs another pass. Rows that are in memory already are neither counted
    nor divided.

    Raises:
        ValueError: not even the smallest blocks fit.
    """
    sizes = Sizes.of_search(search)
    queries_in_memory, trains_in_memory = (
        all(isinstance(rows, TensorRows) for rows in side)
        for side in (search.queries, search.trains)
    )
    if not (queries_in_memory and trains_in_memory):
        check_memory(sizes, memory)
    for_trains = (memory - sizes.fixed - sizes.least_queries * sizes.per_query) // 2
    # A block does not cross the end of a shard, so that reading it does not copy. Shards of other
    # checkpoints usually end at the same rows. If they do not, reading is still correct: a block
    # that crosses one of their ends is copied from two shards.
    largest_shard = max(
        (stop - start for start, stop in pairwise([0, *search.trains[0].ends])), default=0
    )
    train_rows = min(largest_shard, max(1, for_trains // sizes.per_train))
    # More blocks at a time let several threads verify checksums; each maps a shard of its own.
    per_block = train_rows * sizes.row_bytes * (2 if search.reads_ahead else 1)
    per_block += sizes.mapped_bytes
    more = max(0, for_trains - train_rows * sizes.per_train) // max(1, per_block)
    at_once = 1 if search.is_remote else 1 + min(more, torch.get_num_threads() - 1, READERS - 1)
    used = train_rows * sizes.per_train + (at_once - 1) * per_block
    block_queries = (memory - sizes.fixed - used) // sizes.per_query
    if trains_in_memory:
        train_rows = sizes.num_trains
    if queries_in_memory:
        block_queries = sizes.num_queries
    needed = -(-sizes.num_queries // max(1, block_queries))
    passes = min(needed, sizes.num_queries // _LEAST_QUERIES)
    return BlockPlan(max(1, passes), max(1, train_rows), at_once)


# --- one block of queries ---------------------------------------------------------------------


def _search_block(
    search: Search,
    first: int,
    stop: int,
    plan: BlockPlan,
    progress: Path | None,
    advance: Callable[[int], Any] | None,
) -> kernels.TopK:
    """Return the rankings of the queries [first, stop), resuming from saved progress."""
    exponents = query_exponents(search.queries, first, stop, search.normalize)
    saved = None if progress is None else _Progress(progress, search, first, stop)
    state, done = (None, 0) if saved is None else saved.load()
    if advance is not None and done:
        advance((stop - first) * done)
    if state is not None and done == search.trains[0].shape[0]:
        return _unscaled(state, search, exponents, first)
    queries = [
        scaled_rows(_on_device(rows.read(first, stop), search), its_exponents)
        for rows, its_exponents in zip(search.queries, exponents, strict=True)
    ]
    # With another `memory` the blocks of an interrupted call ended elsewhere: `done` may lie within
    # a block of this plan, of which only the rest is read.
    blocks = block_ranges(search.trains[0], plan.train_rows)
    remaining = [(max(start, done), end) for start, end in blocks if end > done]
    for start, trains in read_blocks(search.trains, remaining, plan.at_once, search.reads_ahead):
        count = len(trains[0])
        groups_N = None if search.groups_N is None else search.groups_N[start : start + count]
        state = kernels.top_k_dot(
            queries,
            _train_rows(search, trains, start),
            k=search.k,
            weights=search.weights,
            normalize=search.normalize,
            groups=groups_N,
            num_groups=search.num_groups,
            state=state,
            index_offset=start,
            opponents_k=search.opponents_k,
        )
        if saved is not None:
            saved.save(state, start + count)
        if advance is not None:
            advance((stop - first) * count)
    assert state is not None
    return _unscaled(state, search, exponents, first)


def query_exponents(
    queries: Sequence[Rows], first: int, stop: int, normalize: str | None
) -> list[Tensor | None]:
    """Return by which powers of two the queries of a block are divided at each checkpoint.

    Most queries are not divided. Those of extreme magnitude would make products that float32 cannot
    represent. A cosine does not depend on the magnitude, so each row may have its own power; for
    inner products, a query has the same one at all checkpoints.
    """
    magnitudes = [rows.magnitudes(first, stop).double() for rows in queries]
    if normalize != "cosine":
        magnitudes = [torch.stack(magnitudes).amax(dim=0)] * len(magnitudes)
    return [extreme_exponents(its_magnitudes) for its_magnitudes in magnitudes]


def _train_rows(search: Search, trains: Sequence[Tensor], start: int) -> list[Tensor]:
    """Return a block of training rows on the device, for cosines without extreme magnitudes."""
    rows = [_on_device(block, search) for block in trains]
    if search.normalize != "cosine":
        return rows
    stop = start + len(trains[0])
    return [
        scaled_rows(block, extreme_exponents(source.magnitudes(start, stop)))
        for block, source in zip(rows, search.trains, strict=True)
    ]


def _unscaled(
    state: kernels.TopK, search: Search, exponents: Sequence[Tensor | None], first: int
) -> kernels.TopK:
    """Return rankings with the scores of the queries before they were scaled, checked."""
    scores, opponent_scores, sums = state.scores, state.opponent_scores, state.group_sums
    best = torch.stack([scores[:, :1], opponent_scores[:, :1]]).abs().amax(dim=0)
    if search.normalize != "cosine" and exponents[0] is not None:
        factors_Q1 = torch.exp2(exponents[0])[:, None].to(scores.device)
        scores, opponent_scores = (
            (values * factors_Q1).float() for values in (scores, opponent_scores)
        )
        sums = None if sums is None else sums * factors_Q1
    check_scores(search, first, best[:, 0], scores, opponent_scores)
    return state._replace(scores=scores, opponent_scores=opponent_scores, group_sums=sums)


# Sums of products below this would be sums of numbers that float32 cannot represent fully.
SMALLEST_SCORE = 1e-30


def check_scores(
    search: Search, first: int, computed_Q: Tensor, scores_QP: Tensor, opponents_QP: Tensor
) -> None:
    """Check that float32 can represent the largest and smallest scores of queries.

    Args:
        search: the search; of its fields those of rows, weights and normalize are read.
        first: row number of the first query.
        computed_Q: largest absolute scores of the queries, scaled as they were computed.
        scores_QP, opponents_QP: scores of the queries; rankings need only their first places.

    Raises:
        ValueError: a score is too large, or all scores of a query are too small.
    """
    if not scores_QP.numel():
        return
    ends = torch.cat([scores_QP, opponents_QP], dim=1)
    finite_Q = ends.isfinite().all(dim=1)
    rows_Q = torch.arange(first, first + len(computed_Q))
    if not bool(finite_Q.all()):
        row = int(rows_Q[finite_Q.logical_not().cpu()][0])
        raise ValueError(
            f"query_features: row {row}: expected scores up to {torch.finfo(torch.float32).max:.1e}"
            f" (float32), got larger ones; divide the features or the weights by a constant"
        )
    if search.normalize == "cosine":
        return
    largest_Q = ends.abs().amax(dim=1)
    limits = torch.finfo(torch.float32)
    vanished_Q = (computed_Q > 0) & (largest_Q < limits.tiny)
    small_Q = (computed_Q < SMALLEST_SCORE).cpu()
    if bool(small_Q.any()):
        # Either there is nothing to add, or the products were too small to be added.
        magnitudes = [rows.magnitudes(first, first + len(computed_Q)) for rows in search.queries]
        largest_N = [rows.magnitudes(0, rows.shape[0]).double().max() for rows in search.trains]
        bound_Q = sum(
            weight * (magnitude_Q.double() > 0) * largest
            for weight, magnitude_Q, largest in zip(
                search.weights, magnitudes, largest_N, strict=True
            )
        )
        assert isinstance(bound_Q, Tensor)
        vanished_Q |= (small_Q & (bound_Q > 0) & (bound_Q < SMALLEST_SCORE)).to(vanished_Q.device)
    if bool(vanished_Q.any()):
        row = int(rows_Q[vanished_Q.cpu()][0])
        raise ValueError(
            f"query_features: row {row}: expected scores of at least {limits.tiny:.1e} (float32), "
            f"all of its scores are smaller; multiply the features or the weights by a constant, "
            f"or use normalize='cosine'"
        )


def _on_device(rows: Tensor, search: Search) -> Tensor:
    return rows.to(search.device, search.dtype).contiguous()


class _Progress:
    """The intermediate rankings of one block of queries, in one file.

    The file holds the rankings and the number of training rows that they cover. It is replaced as a
    whole, so after a kill it is the last complete state. Its name is a digest of the identity of
    the search and the block, so that a search with other features, weights or groups never reads
    it. A file that is damaged is ignored, and its work repeated.
    """

    def __init__(self, folder: Path, search: Search, first: int, stop: int) -> None:
        self._identity = {**search.identity, "first": first, "stop": stop}
        self._file = folder / f"{sha256(canonical_json(self._identity))[:32]}.safetensors"
        self._device = search.device
        self._num_trains = search.trains[0].shape[0]
        self._saved_at = time.monotonic()

    def load(self) -> tuple[kernels.TopK | None, int]:
        """Return the saved rankings and the number of training rows they cover, or (None, 0)."""
        try:
            tensors = read_tensors(self._file, self._identity)
        except ValueError:  # damaged
            tensors = None
        if tensors is None:
            return None, 0
        fields = [tensors.get(name) for name in kernels.TopK._fields]
        fields = [None if field is None else field.to(self._device) for field in fields]
        return kernels.TopK(*fields), int(tensors["done"])  # type: ignore[arg-type]

    def save(self, state: kernels.TopK, done: int) -> None:
        """Write the rankings if they are complete, or if the last save is long ago."""
        now = time.monotonic()
        if done < self._num_trains and now - self._saved_at < SAVE_SECONDS:
            return
        tensors = {name: field for name, field in state._asdict().items() if field is not None}
        write_tensors(self._file, {**tensors, "done": torch.tensor(done)}, self._identity)
        self._saved_at = now
