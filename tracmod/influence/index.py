"""InfluenceIndex: approximate nearest-neighbour search (FAISS) for the strongest influences.

One inner-product index over rows of sum(K_c) numbers answers TracIn over all checkpoints:

    sum_c w_c <f_c, q_c> = <v, u>,   v = [sqrt(w_1) f_1 | ... | sqrt(w_C) f_C],   u the same of q

With normalize="cosine" every f_c and q_c is divided by its norm first (rows of zeros stay zero).
Because of the square roots the weights must not be negative. Opponents are the neighbours of -u.
Rows are padded with zeros to a multiple of 8, which product quantisation divides them by.

The kinds, with N rows of D numbers, and the memory of one row:

    flat    Flat                 exact                                              4 D bytes
    sq8     SQ8                  every number in 8 bits                             D
    ivf     IVF<lists>,Flat      lists = min(4 sqrt(N), N / 39)                     4 D
    ivfpq   IVF<lists>,PQ<D/8>   the same, 8 numbers in one byte                    D / 8
    hnsw    HNSW32               a graph of 32 neighbours per row                   4 D + 256

What an inexact index guarantees. Nothing for a single query: a search may miss any of the true
neighbours. But `recall` states a measured average. While the index is filled, the exact 100
strongest of 64 sampled queries are computed in the same pass over the rows, for both signs, because
neighbours of -u lie elsewhere than those of u and are found less often. Afterwards the effort of a
search (lists probed by ivf and ivfpq, candidates of hnsw) is doubled until the worse of the two
recalls reaches the requested one, or until doubling no longer helps (sq8 and ivfpq are limited by
their codes). All scores that a search returns belong to rows it has seen: exact for flat, ivf and
hnsw, those of the compressed row for sq8 and ivfpq.

`faiss.ParameterSpace` would search for the effort as well, but it chooses by measured time: the
same index got nprobe 64, 32 and 64 in three tries. It also averages both signs, and tries no
efSearch above 512 and no nprobe between its powers of two.

With a GPU and a FAISS built for it, the centres of the lists (ivf, ivfpq) are on the GPU while they
are clustered and while rows are assigned to the nearest of them: nearly all of the work, lists x D
products per row. The index itself stays in the memory of the CPU and is searched there, because the
GPU indexes of FAISS have no filter and their codes at most 96 bytes. The other kinds have no
centres. (Not yet run on a GPU: the tests run the same lines on the CPU.)

Beside the index itself, building holds a sample for training and one block of rows. An index is
reproducible for one seed and number of threads; for that the graph of hnsw is built by one thread.

The wheels of FAISS and torch each bring an OpenMP runtime of their own (GNU's libgomp). They load
together in either order, and the threads of one are idle while the other works.

Shape suffixes: C checkpoints, N train, Q query, B rows of a block, K numbers per feature row, D
numbers per index row, k neighbours.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from tracmod.choices import IndexKind, positive_number, whole_number
from tracmod.features.rows import (
    LARGEST_MAGNITUDE,
    SMALLEST_MAGNITUDE,
    extreme_exponents,
    row_magnitudes,
    scaled_rows,
)
from tracmod.features.store import FeatureStore
from tracmod.files import progress
from tracmod.files.durable import (
    file_sha256,
    identity_differences,
    publish_file,
    seal,
    temporary_name,
    unseal,
    write_file,
)
from tracmod.influence.scores import checkpoint_weights

try:
    import faiss as _faiss
except ImportError as error:
    raise ImportError("tracmod.influence.index needs FAISS: pip install faiss-cpu") from error

faiss: Any = _faiss  # its type stubs lack the keyword arguments
IndexFeatures = FeatureStore | Tensor

FORMAT = "tracmod-index"
VERSION = 1
KINDS = get_args(IndexKind)
GPU_KINDS = ("ivf", "ivfpq")
BLOCK_ROWS = 1024
RECALL_QUERIES = 64
RECALL_K = 100
MIN_GAIN = 0.005  # least gain of recall for which the effort of a search is doubled
_INDEX, _META = "index.faiss", "index.json"
_PQ_CENTROIDS = 256
_ROWS_PER_CENTRE = 64  # in the training sample


class Neighbours(NamedTuple):
    """Result of a search; rows are queries, strongest first.

    Attributes:
        scores: (Q, k) float32, TracIn scores (positive: the example lowered the query's loss), of
            the compressed rows for sq8 and ivfpq. Descending; for opponents ascending.
        indices: (Q, k) int64, rows of the training examples; -1 (with the score -inf, for opponents
            +inf) where fewer than k were found.
    """

    scores: Tensor
    indices: Tensor


@dataclass
class InfluenceIndex:
    """An index over the training examples of one run, created by `build` or `load`.

    Attributes:
        index: the FAISS index.
        kind: one of `KINDS`.
        ids: (N,) id of every training example.
        languages: (N,) its language, or None.
        dims: (C,) number of features K at every checkpoint.
        weights: (C,) weight of every checkpoint.
        normalize: None or "cosine".
        identities: (C,) identity of the store that the features of each checkpoint came from; None
            for a tensor.
        recall: measured share of the exact strongest examples that a search finds, by
            "proponents" and "opponents", with "k" and the number of "queries".
        effort: lists probed (ivf, ivfpq) or candidates kept (hnsw) by a search; 0 for other kinds.
        seconds: duration of "train", "add" and "measure" when the index was built; not saved.

    Examples:
        >>> import torch
        >>> from tracmod.influence.index import InfluenceIndex
        >>> train = torch.tensor([[2.0, 1.0], [-1.0, 0.0], [0.0, 3.0]])
        >>> index = InfluenceIndex.build([train], kind="flat", ids=["a", "b", "c"])
        >>> found = index.search([torch.tensor([[1.0, 0.0]])], k=2)
        >>> [index.ids[row] for row in found.indices[0]], found.scores
        (['a', 'c'], tensor([[2., 0.]]))
    """

    index: Any
    kind: str
    ids: list[str]
    languages: list[str] | None
    dims: list[int]
    weights: list[float]
    normalize: str | None
    identities: list[dict[str, Any] | None]
    recall: dict[str, float]
    effort: int
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def build(
        cls,
        trains: Sequence[IndexFeatures],
        *,
        kind: str = "flat",
        ids: Sequence[str] | None = None,
        languages: Sequence[str] | None = None,
        weights: Sequence[float] | None = None,
        normalize: str | None = None,
        queries: Sequence[IndexFeatures] | None = None,
        recall: float = 0.95,
        seed: int = 0,
        memory: int = 4_000_000_000,
        device: str = "cpu",
    ) -> InfluenceIndex:
        """Build an index and measure its recall.

        Args:
            trains: (C,) stores or tensors (N, K_c) with the features of the training examples, one
                per checkpoint.
            kind: one of `KINDS`.
            ids: (N,) ids for tensors; None for the ids of the stores, or row numbers.
            languages: (N,) languages for the filter of `search`.
            weights: (C,) weights of the checkpoints, not negative; None for 1 each.
            normalize: None or "cosine".
            queries: (C,) features to measure the recall with; None for 64 training examples, each
                of which also finds itself.
            recall: share of the exact 100 strongest examples that a search should find, above 0 and
                up to 1, as far as the kind can.
            seed: seed of the samples and of the clustering.
            memory: bytes that training may take beside the index itself.
            device: where the lists of ivf and ivfpq are clustered: "cpu", "cuda", "cuda:1", ...

        Raises:
            ValueError: arguments do not fit together, there are too few examples for the kind, the
                GPU does not exist, or the kind has no use for one.
        """
        dims, count = _shapes(trains, "training examples")
        if kind not in KINDS:
            raise ValueError(f"kind of an index: expected {', '.join(KINDS)}, got {kind!r}")
        if count == 0:
            raise ValueError("training examples: expected at least 1, got 0")
        if kind == "ivfpq" and count < _PQ_CENTROIDS:
            raise ValueError(
                f"training examples of an ivfpq index: expected at least {_PQ_CENTROIDS}, "
                f"got {count}: use flat"
            )
        if normalize not in (None, "cosine"):
            raise ValueError(f"normalize: expected None or 'cosine', got {normalize!r}")
        if languages is not None and len(languages) != count:
            raise ValueError(f"languages: expected {count}, one per example, got {len(languages)}")
        memory, seed = whole_number("memory", memory), whole_number("seed", seed, 0)
        if positive_number("recall", recall) > 1:
            raise ValueError(f"recall: expected a share above 0 and up to 1, got {recall}")
        gpu = gpu_number(device, kind)
        built = cls(
            index=_new_index(kind, count, _padded(sum(dims)), seed),
            kind=kind,
            ids=_ids(trains, ids, count),
            languages=None if languages is None else list(languages),
            dims=dims,
            weights=checkpoint_weights(weights, len(trains)),
            normalize=normalize,
            identities=[
                features.identity if isinstance(features, FeatureStore) else None
                for features in trains
            ],
            recall={},
            effort=0,
        )
        probes_QD = built._recall_queries(trains, queries, seed)
        with built._timed("train"):
            built._train(trains, seed, memory, gpu)
        with built._timed("add"):
            exact_Qk = built._add(trains, probes_QD, gpu)
        with built._timed("measure"):
            built._tune(probes_QD, exact_Qk, recall)
        return built

    def search(
        self,
        queries: Sequence[IndexFeatures],
        k: int,
        *,
        opponents: bool = False,
        languages: Sequence[str] | None = None,
    ) -> Neighbours:
        """Find the k training examples with the largest (or smallest) scores of every query.

        Args:
            queries: (C,) stores or tensors (Q, K_c), checkpoints in the order of `build`.
            k: number of examples per query.
            opponents: whether to find the most negative scores instead of the most positive.
            languages: only training examples of these languages; None for all. An ivf or hnsw index
                may then find fewer than k.

        Raises:
            ValueError: the queries have other checkpoints, sizes or identities (projection,
                parameters, mask, model, tokenizer) than the index, or it lacks a language.
        """
        dims, count = _shapes(queries, "queries")
        k = whole_number("k", k)
        if dims != self.dims:
            raise ValueError(
                f"queries: expected {self.dims} numbers per row at the checkpoints, got {dims}"
            )
        self._check_identities(queries)
        selector = None if languages is None else self._selector(languages)
        sign = -1 if opponents else 1
        result = Neighbours(torch.empty(count, k), torch.empty(count, k, dtype=torch.int64))
        for start, block_BD in self._blocks(queries, "search"):
            rows = slice(start, start + len(block_BD))
            result.scores[rows], result.indices[rows] = self._nearest(block_BD, k, sign, selector)
        return result

    def check_built_from(
        self,
        trains: Sequence[FeatureStore],
        weights: Sequence[float] | None = None,
        normalize: str | None = None,
    ) -> None:
        """Check that `build` with these arguments would give this index.

        Raises:
            ValueError: stores (their data included), weights or normalize are others; the message
                says what differs.
        """
        expected: dict[str, Any] = {
            "normalize": normalize,
            "weights": checkpoint_weights(weights, len(trains)),
        }
        built: dict[str, Any] = {"weights": self.weights, "normalize": self.normalize}
        for checkpoint, store in enumerate(trains):
            expected[f"checkpoint {checkpoint}"] = store.identity
        for checkpoint, identity in enumerate(self.identities):
            built[f"checkpoint {checkpoint}"] = identity
        differing = identity_differences(expected, built)
        if differing:
            raise ValueError(
                f"the index was built from something else: {'; '.join(differing)}; build it again"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write index.faiss and index.json into a folder, each whole or not at all.

        Raises:
            OSError: the disk is full or not writable.
        """
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        file = path / _INDEX
        temporary = temporary_name(file)
        try:
            faiss.write_index(self.index, str(temporary))
        except RuntimeError as error:  # FAISS has no other error for a full disk
            temporary.unlink(missing_ok=True)
            raise OSError(f"cannot write {file}: {error}") from error
        digest = file_sha256(temporary)
        publish_file(temporary, file)
        meta = {field.name: getattr(self, field.name) for field in fields(self)}
        del meta["index"], meta["seconds"]
        head = {"format": FORMAT, "version": VERSION, "index_sha256": digest}
        write_file(path / _META, seal({**head, **meta}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> InfluenceIndex:
        """Read an index that `save` wrote, after comparing its checksums.

        Raises:
            ValueError: there is no index in the folder, or it is damaged or of another version.
        """
        path = Path(path)
        meta_file, file = path / _META, path / _INDEX
        for part in (meta_file, file):
            if not part.is_file():
                raise ValueError(f"no index at {path}: {part.name} is missing")
        meta = unseal(meta_file, meta_file.read_bytes())
        head = {key: meta.pop(key, None) for key in ("format", "version", "index_sha256")}
        if (head["format"], head["version"]) != (FORMAT, VERSION):
            raise ValueError(
                f"{meta_file}: expected {FORMAT} version {VERSION}, "
                f"got {head['format']} version {head['version']}"
            )
        if file_sha256(file) != head["index_sha256"]:
            raise ValueError(
                f"{file} is damaged or does not belong to {_META}: build the index again"
            )
        return cls(index=faiss.read_index(str(file)), **meta)

    @property
    def bytes_per_example(self) -> float:
        """Bytes of memory per example: its row or code, number in a list, and links in a graph."""
        index = self.index
        if isinstance(index, faiss.IndexIVF):
            return index.code_size + 8
        if isinstance(index, faiss.IndexHNSW):
            graph = index.hnsw
            links = 4 * graph.neighbors.size() + 8 * graph.offsets.size() + 4 * graph.levels.size()
            return index.storage.sa_code_size() + links / len(self.ids)
        return index.sa_code_size()

    @property
    def fixed_bytes(self) -> int:
        """Bytes of memory that do not depend on the examples: centres of lists and codebook."""
        index = self.index
        if not isinstance(index, faiss.IndexIVF):
            return 0
        codebook = index.pq.centroids.size() * 4 if isinstance(index, faiss.IndexIVFPQ) else 0
        return index.nlist * index.d * 4 + codebook

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - started

    # --- training and adding ------------------------------------------------------------------

    def _train(
        self, trains: Sequence[IndexFeatures], seed: int, memory: int, gpu: int | None
    ) -> None:
        """Train on a sample drawn without replacement.

        FAISS copies the sample up to three times, so a quarter of `memory` bounds it.
        """
        index = self.index
        if index.is_trained:
            return
        lists = index.nlist if isinstance(index, faiss.IndexIVF) else 0
        useful = _ROWS_PER_CENTRE * max(lists, _PQ_CENTROIDS)
        fitting = max(_PQ_CENTROIDS, memory // (4 * 4 * index.d))
        sample = self._rows(trains, min(len(self.ids), useful, fitting), seed, "sample").numpy()
        with _threads(torch.get_num_threads()):
            if lists:
                self._cluster(sample, gpu)
            if self.kind in ("sq8", "ivfpq"):
                with progress.bar("train codes", 1, "step") as bar:
                    index.train(sample)
                    bar.update(1)
            index.is_trained = True

    def _cluster(self, sample: np.ndarray, gpu: int | None) -> None:
        """Find the centres of the lists.

        The same as FAISS's own training, but one round at a time so that progress is visible: each
        round starts from the centres of the round before.
        """
        index = self.index
        clustering = faiss.Clustering(index.d, index.nlist, index.cp)
        clustering.niter = 1
        nearest = _searchable_centres(index, gpu)
        for _ in progress.each(range(index.cp.niter), "cluster", "round"):
            clustering.train(sample, nearest)
        centres = faiss.vector_to_array(clustering.centroids).reshape(-1, index.d)
        index.quantizer.add(centres)
        if self.kind == "ivfpq":
            # Codes hold the difference of a row and its centre. Centres of length 1 would leave
            # more than the row itself where rows are short; the best common length is the mean of
            # <row, centre>, and which centre is nearest does not depend on it.
            along, _ = index.quantizer.search(sample, 1)
            index.quantizer.reset()
            index.quantizer.add(centres * along.mean())

    def _add(self, trains: Sequence[IndexFeatures], probes_QD: Tensor, gpu: int | None) -> Tensor:
        """Add all rows; return the exact top k (2 Q, k) of the probes and of their negatives."""
        k = min(RECALL_K, len(self.ids))
        signed_QD = torch.cat([probes_QD, -probes_QD])
        best_scores = torch.full((len(signed_QD), k), -math.inf)
        best_indices = torch.full((len(signed_QD), k), -1, dtype=torch.int64)
        has_lists = isinstance(self.index, faiss.IndexIVF)
        nearest = _searchable_centres(self.index, gpu) if has_lists else None
        with _threads(1 if self.kind == "hnsw" else torch.get_num_threads()):
            for start, block_BD in self._blocks(trains, "add"):
                rows = block_BD.numpy()
                if nearest is None:
                    self.index.add(rows)
                else:  # `index.add` with the nearest centres found where they lie
                    _, lists_B1 = nearest.search(rows, 1)
                    pointers = faiss.swig_ptr(rows), None, faiss.swig_ptr(lists_B1)
                    self.index.add_core(len(rows), *pointers)
                scores_QB = signed_QD @ block_BD.T
                indices_QB = torch.arange(start, start + len(rows)).expand(len(signed_QD), -1)
                top = torch.cat([best_scores, scores_QB], dim=1).topk(k, dim=1)
                candidates = torch.cat([best_indices, indices_QB], dim=1)
                best_scores, best_indices = top.values, candidates.gather(1, top.indices)
        return best_indices

    # --- recall -------------------------------------------------------------------------------

    def _recall_queries(
        self, trains: Sequence[IndexFeatures], queries: Sequence[IndexFeatures] | None, seed: int
    ) -> Tensor:
        """Return a sample of encoded queries (Q, D) to measure the recall with."""
        if queries is None:
            return self._rows(trains, min(RECALL_QUERIES, len(self.ids)), seed + 1, None)
        dims, count = _shapes(queries, "queries")
        if dims != self.dims or count == 0:
            raise ValueError(
                f"queries: expected at least 1 row of {self.dims} numbers, got {count} of {dims}"
            )
        self._check_identities(queries)
        return self._rows(queries, min(RECALL_QUERIES, count), seed + 1, None)

    def _tune(self, probes_QD: Tensor, exact_Qk: Tensor, wanted: float) -> None:
        """Set `effort` and `recall`: the least effort that reaches the wanted recall.

        Doubling stops as soon as it gains less than `MIN_GAIN`; the effort before is kept.
        """
        worst = -1.0
        for effort in progress.each(self._efforts(), "measure", "effort"):
            before, self.effort = self.effort, effort
            recall = self._measure(probes_QD, exact_Qk)
            gain = min(recall["proponents"], recall["opponents"]) - worst
            if gain < MIN_GAIN:
                self.effort = before
                return
            self.recall, worst = recall, worst + gain
            if worst >= wanted:
                return

    def _efforts(self) -> list[int]:
        """Return the efforts to try, doubling from a small one up to an exhaustive search."""
        if isinstance(self.index, faiss.IndexIVF):
            least, most = -(-self.index.nlist // 64), self.index.nlist
        elif isinstance(self.index, faiss.IndexHNSW):
            least, most = 2 * RECALL_K, max(2 * RECALL_K, len(self.ids))
        else:
            return [0]
        doublings = math.ceil(math.log2(most / least))
        return [min(least << step, most) for step in range(doublings + 1)]

    def _measure(self, probes_QD: Tensor, exact_Qk: Tensor) -> dict[str, float]:
        """Return the share of the exact top k that a search with the present effort finds."""
        count, k = len(probes_QD), exact_Qk.shape[1]
        nearest_Qk = torch.cat(
            [self._nearest(probes_QD, k, sign, None).indices for sign in (1, -1)]
        )
        hits = (nearest_Qk[:, :, None] == exact_Qk[:, None, :]).any(dim=1).double().mean(dim=1)
        return {
            "k": k,
            "queries": count,
            "proponents": round(float(hits[:count].mean()), 6),
            "opponents": round(float(hits[count:].mean()), 6),
        }

    # --- encoding of features -----------------------------------------------------------------

    def _rows(
        self, features: Sequence[IndexFeatures], size: int, seed: int, bar: str | None
    ) -> Tensor:
        """Return a sample of encoded rows, drawn without replacement, (size, D), in row order.

        Each block that holds sampled rows is read once, under a progress bar called `bar`.
        """
        count = _shapes(features, "features")[1]
        sample = np.sort(np.random.default_rng(seed).choice(count, size, replace=False))
        by_block = np.split(sample, np.flatnonzero(np.diff(sample // BLOCK_ROWS)) + 1)
        parts = []
        blocks = by_block if bar is None else progress.each(by_block, bar, "block")
        for rows in blocks:
            start = int(rows[0]) // BLOCK_ROWS * BLOCK_ROWS
            parts.append(self._block(features, start)[torch.from_numpy(rows - start)])
        return torch.cat(parts)

    def _blocks(self, features: Sequence[IndexFeatures], bar: str) -> Iterator[tuple[int, Tensor]]:
        """Yield (start, encoded rows (B, D)), under a progress bar if there are several blocks."""
        count = _shapes(features, "features")[1]
        starts = range(0, count, BLOCK_ROWS)
        for start in progress.each(starts, bar, "block") if len(starts) > 1 else starts:
            yield start, self._block(features, start)

    def _block(self, features: Sequence[IndexFeatures], start: int) -> Tensor:
        """Return the encoded rows (B, D) of the block that begins at `start`."""
        stop = min(start + BLOCK_ROWS, _shapes(features, "features")[1])
        block_BD = self._encode(
            [
                checkpoint.read(start, stop)
                if isinstance(checkpoint, FeatureStore)
                else checkpoint[start:stop].detach()
                for checkpoint in features
            ]
        )
        bad = torch.nonzero(~torch.isfinite(block_BD).all(dim=1))
        if len(bad):
            raise ValueError(f"features of row {start + int(bad[0])}: expected finite numbers")
        return block_BD

    def _encode(self, features: Sequence[Tensor]) -> Tensor:
        """Scale rows (B, K_c) of the C checkpoints and join them: (B, D) float32, padded."""
        encoded_BD = torch.zeros(len(features[0]), _padded(sum(self.dims)))
        start = 0
        for rows, weight in zip(features, self.weights, strict=True):
            rows = rows.to("cpu", torch.float32)
            if self.normalize == "cosine":
                rows = scaled_rows(rows, extreme_exponents(row_magnitudes(rows)))
                norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64)
                rows = rows / norms.float().masked_fill(norms == 0, 1)
            encoded_BD[:, start : start + rows.shape[1]] = math.sqrt(weight) * rows
            start += rows.shape[1]
        # FAISS adds products in float32, which cannot represent those of extreme numbers.
        largest = float(encoded_BD.abs().max()) if encoded_BD.numel() else 0.0
        if LARGEST_MAGNITUDE < largest < math.inf or 0 < largest < SMALLEST_MAGNITUDE:
            raise ValueError(
                f"features of an index: expected the largest number, times the root of its weight, "
                f"from {SMALLEST_MAGNITUDE:.0e} to {LARGEST_MAGNITUDE:.0e}, got {largest:.1e}; "
                f"multiply the features by a constant or use normalize='cosine'"
            )
        return encoded_BD

    # --- searching ----------------------------------------------------------------------------

    def _nearest(self, queries_QD: Tensor, k: int, sign: int, selector: Any) -> Neighbours:
        """Return the k largest (sign 1) or smallest (sign -1) scores of encoded queries."""
        parameters = {} if selector is None else {"sel": selector}
        if isinstance(self.index, faiss.IndexIVF):
            search = faiss.SearchParametersIVF(nprobe=self.effort, **parameters)
        elif isinstance(self.index, faiss.IndexHNSW):
            search = faiss.SearchParametersHNSW(efSearch=max(self.effort, 2 * k), **parameters)
        else:
            search = faiss.SearchParameters(**parameters)
        with _threads(torch.get_num_threads()):
            scores, indices = self.index.search((sign * queries_QD).numpy(), k, params=search)
        indices_Qk = torch.from_numpy(indices)
        scores_Qk = torch.from_numpy(scores).masked_fill(indices_Qk < 0, -math.inf)
        return Neighbours(sign * scores_Qk, indices_Qk)

    def _selector(self, languages: Sequence[str]) -> Any:
        """Return a FAISS filter for the training examples of some languages."""
        if self.languages is None:
            raise ValueError("languages: this index was built without them")
        if isinstance(languages, str):
            raise ValueError(f"languages: expected a sequence, got the string {languages!r}")
        unknown = sorted(set(languages) - set(self.languages))
        if unknown or not languages:
            raise ValueError(
                f"languages: expected some of {', '.join(sorted(set(self.languages)))}, "
                f"got {', '.join(unknown) or 'none'}"
            )
        allowed = np.isin(np.array(self.languages), list(languages))
        return faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))

    def _check_identities(self, queries: Sequence[IndexFeatures]) -> None:
        """Check that query features were made like the training features, except for the data.

        Raises:
            ValueError: they were not; the message says in what they differ.
        """
        for checkpoint, (identity, query) in enumerate(zip(self.identities, queries, strict=True)):
            if identity is None or not isinstance(query, FeatureStore):
                continue
            differing = identity_differences(identity, query.identity, ignore=["data"])
            if differing:
                raise ValueError(
                    f"query features {query.path} (checkpoint {checkpoint}) do not match those in "
                    f"the index: {'; '.join(differing)}"
                )


def factory_string(kind: str, count: int, width: int) -> str:
    """Return the string with which `faiss.index_factory` creates a kind of index.

    Args:
        kind: one of `KINDS`.
        count: number of rows.
        width: numbers per row, a multiple of 8.
    """
    # FAISS warns below 39 rows per list, which are needed to place its centre.
    lists = max(1, min(round(4 * math.sqrt(count)), count // 39))
    return {
        "flat": "Flat",
        "sq8": "SQ8",
        "ivf": f"IVF{lists},Flat",
        "ivfpq": f"IVF{lists},PQ{width // 8}x8",
        "hnsw": "HNSW32",
    }[kind]


def _new_index(kind: str, count: int, width: int, seed: int) -> Any:
    """Return an empty FAISS index with the settings of clustering and codes."""
    string = factory_string(kind, count, width)
    index = faiss.index_factory(width, string, faiss.METRIC_INNER_PRODUCT)
    if isinstance(index, faiss.IndexIVF):
        index.cp.seed = seed
        # Centres are directions: a few rows of huge norm would draw everything to their centres.
        index.cp.spherical = True
        index.cp.min_points_per_centroid = 1
    if isinstance(index, faiss.IndexIVFPQ):
        index.pq.cp.seed = seed
        index.pq.cp.min_points_per_centroid = 1
        # FAISS's default of 25 rounds over 256 rows per centre is 10 times the work; on synthetic
        # features of 512 numbers it gained 0.01 (cosine) to 0.04 (dot) of recall.
        index.pq.cp.niter = 10
        index.pq.cp.max_points_per_centroid = _ROWS_PER_CENTRE
        # It orders codes for a Hamming filter that is not used here, and takes 1.6 s per byte.
        index.do_polysemous_training = False
    if isinstance(index, faiss.IndexHNSW):
        index.hnsw.efConstruction = 100
    return index


def gpu_number(device: str, kind: str) -> int | None:
    """Return the number of the GPU that a device names, or None for the CPU.

    Args:
        device: "cpu", "cuda", "cuda:1", ...
        kind: kind of index to build there.

    Raises:
        ValueError: another device, a GPU that FAISS does not see, or a kind that has no use for
            one.
    """
    if device == "cpu":
        return None
    match = re.fullmatch(r"cuda(?::(\d+))?", device)
    if match is None:
        raise ValueError(f"device of an index: expected cpu, cuda, cuda:1, ..., got {device}")
    number = int(match[1] or 0)
    available = faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else 0
    if number >= available:
        raise ValueError(
            f"device of an index: got {device}, but FAISS sees {available or 'no'} GPUs: install "
            f"faiss-gpu in place of faiss-cpu on a machine with one, or use cpu"
        )
    if kind not in GPU_KINDS:
        raise ValueError(
            f"device of an index: got {device}, but only {' and '.join(GPU_KINDS)} have lists to "
            f"cluster on a GPU: build {kind} on the cpu"
        )
    return number


def _searchable_centres(index: Any, gpu: int | None) -> Any:
    """Return a copy of the (possibly still empty) centres of the lists, on the GPU if there is one.

    The copy is used for clustering and assignment; the index keeps its own centres on the CPU.
    """
    if gpu is None:
        return faiss.clone_index(index.quantizer)
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), gpu, index.quantizer)


def _padded(width: int) -> int:
    return -(-width // 8) * 8


def _shapes(features: Sequence[IndexFeatures], name: str) -> tuple[list[int], int]:
    """Return the (C,) numbers per row, and the number of rows, which all checkpoints share.

    Raises:
        ValueError: not a sequence of two-dimensional features with the same number of rows.
    """
    if isinstance(features, FeatureStore | Tensor) or not features:
        raise ValueError(f"{name}: expected a sequence of features, one per checkpoint")
    shapes = []
    for checkpoint in features:
        if isinstance(checkpoint, FeatureStore):
            shapes.append((checkpoint.num_rows, checkpoint.dim))
        elif checkpoint.ndim == 2:
            shapes.append((checkpoint.shape[0], checkpoint.shape[1]))
        else:
            raise ValueError(
                f"{name}: expected two dimensions (rows, numbers), got shape "
                f"{tuple(checkpoint.shape)}"
            )
    counts = [count for count, _ in shapes]
    if len(set(counts)) > 1:
        raise ValueError(f"{name}: expected as many rows at every checkpoint, got {counts}")
    return [dim for _, dim in shapes], counts[0]


def _ids(trains: Sequence[IndexFeatures], ids: Sequence[str] | None, count: int) -> list[str]:
    """Return the ids of the rows, those of the stores by default.

    Raises:
        ValueError: not one id per row, or a store with other ids.
    """
    stores = [features for features in trains if isinstance(features, FeatureStore)]
    if ids is None:
        ids = stores[0].ids if stores else [str(row) for row in range(count)]
    if len(ids) != count:
        raise ValueError(f"ids: expected {count}, one per example, got {len(ids)}")
    for store in stores:
        if store.ids != list(ids):
            raise ValueError(f"{store.path}: its examples, or their order, differ from `ids`")
    return list(ids)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Set the number of threads of FAISS, which is global to the process, for a while."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
