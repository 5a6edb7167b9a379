"""InfluenceIndex: approximate nearest-neighbour search (FAISS) for the strongest influences.

    sum_c w_c <f_c, q_c> = <v, u>,   v = [sqrt(w_1) f_1 | ... | sqrt(w_C) f_C],   u the same of q

so that one inner-product index over rows of sum(K_c) numbers answers TracIn over all checkpoints;
with normalize="cosine" every f_c and q_c is divided by its norm first (0 stays 0). The weights must
not be negative. Opponents are the neighbours of -u. Rows are padded with zeros to a multiple of 8.

The kinds, with N rows of D numbers, and what an example costs in memory:

    flat    Flat                 exact                                              4 D bytes
    sq8     SQ8                  every number in 8 bits                             D
    ivf     IVF<lists>,Flat      lists = min(4 sqrt(N), N / 39)                     4 D
    ivfpq   IVF<lists>,PQ<D/8>   the same, 8 numbers in one byte                    D / 8
    hnsw    HNSW32               a graph of 32 neighbours per row                   4 D + 256

How many lists are probed (ivf, ivfpq), or candidates kept (hnsw), is found when the index is built:
doubled until both proponents and opponents are found with the recall that was asked for, or it no
longer helps.

With a GPU and a FAISS built for it, the centres of the lists (ivf, ivfpq) lie there while they are
clustered and while rows are sent to the nearest of them: nearly all of the work, lists x D products
a row. The index itself stays in the CPU's memory and is searched there: FAISS's GPU indexes know no
filter, and their codes have at most 96 bytes. The other kinds have no centres. (Not yet tried on a
GPU: the same lines run on the CPU, where the tests see them.)

Apart from the index itself, building holds a sample for training and one block of rows. It is
repeatable for one seed and number of threads; the graph of hnsw is built by one thread for that.

The wheels of FAISS and torch each bring their own OpenMP runtime (libgomp). Both are GNU's and load
together in either order; the threads of one are idle while the other works.

Shape letters: C checkpoints, N train, Q query, K numbers per feature row, D numbers per index row.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tracmod.choices import IndexKind
from tracmod.features.store import FeatureStore
from tracmod.files.durable import (
    file_sha256,
    identity_differences,
    publish_file,
    seal,
    temporary_name,
    unseal,
    write_file,
)

try:
    import faiss as _faiss
except ImportError as error:
    raise ImportError("tracmod.influence.index needs FAISS: pip install faiss-cpu") from error

faiss: Any = _faiss  # its type stubs do not know the keyword arguments
Features = FeatureStore | Tensor

FORMAT = "tracmod-index"
VERSION = 1
KINDS = get_args(IndexKind)
GPU_KINDS = ("ivf", "ivfpq")
BLOCK_ROWS = 1024
RECALL_QUERIES = 64
RECALL_K = 100
MIN_GAIN = 0.005  # of recall, for which the effort of a search is doubled
_INDEX, _META = "index.faiss", "index.json"
_PQ_CENTROIDS = 256
_ROWS_PER_CENTRE = 64  # to train with


class Neighbours(NamedTuple):
    """What a search found; rows are queries, best first.

    Attributes:
        scores: (Q, k) float32, the TracIn score (positive: the example lowered the query's loss);
            that of the compressed row for sq8 and ivfpq. Descending; for opponents ascending.
        indices: (Q, k) int64, the row of the training example; -1 (and a score of -inf, for
            opponents +inf) where fewer than k were found.
    """

    scores: Tensor
    indices: Tensor


@dataclass
class InfluenceIndex:
    """An index over the training examples of one run; made by `build` or `load`.

    Attributes:
        index: The FAISS index.
        kind: One of `KINDS`.
        ids: (N,) the id of every training example.
        languages: (N,) its language, or None.
        dims: (C,) K of every checkpoint's features.
        weights: (C,) w_c.
        normalize: None or "cosine".
        identities: (C,) identity of the store each checkpoint's features came from, None if they
            came as a tensor.
        recall: Share of the exact k strongest that the index finds: k, queries, proponents,
            opponents.
        effort: Lists probed (ivf, ivfpq) or candidates kept (hnsw) by a search; else 0.
        seconds: That train, add and measure took when it was built; not saved.
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
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        trains: Sequence[Features],
        *,
        kind: str = "flat",
        ids: Sequence[str] | None = None,
        languages: Sequence[str] | None = None,
        weights: Sequence[float] | None = None,
        normalize: str | None = None,
        queries: Sequence[Features] | None = None,
        recall: float = 0.95,
        seed: int = 0,
        memory: int = 4_000_000_000,
        device: str = "cpu",
    ) -> InfluenceIndex:
        """Builds the index and measures its recall.

        Args:
            trains: (C,) stores or tensors (N, K_c) of the training examples, one per checkpoint.
            kind: One of `KINDS`.
            ids: (N,) for tensors; by default the stores' ids, or row numbers.
            languages: (N,) for the filter of `search`.
            weights: (C,) w_c >= 0; 1 each by default.
            normalize: None or "cosine".
            queries: (C,) features to measure the recall with; by default 64 training examples,
                of which each finds itself.
            recall: Share of the exact top 100 that a search should find, if the kind can.
            seed: Of the samples and the clustering.
            memory: Bytes that training may take, beside the index itself.
            device: Where the lists of ivf and ivfpq are clustered: cpu, cuda, cuda:1, ...

        Raises:
            ValueError: Arguments that do not fit together; too few examples for the kind; a GPU
                that is not there, or a kind that has no use for one.
        """
        dims, count = _shapes(trains, "training examples")
        if kind not in KINDS:
            raise ValueError(f"kind of an index: expected {', '.join(KINDS)}, got {kind!r}")
        if count == 0:
            raise ValueError("an index needs at least 1 training example, got 0")
        if kind == "ivfpq" and count < _PQ_CENTROIDS:
            raise ValueError(
                f"an ivfpq index needs at least {_PQ_CENTROIDS} training examples, got {count}: "
                "use flat"
            )
        if normalize not in (None, "cosine"):
            raise ValueError(f"normalize: expected None or 'cosine', got {normalize!r}")
        if languages is not None and len(languages) != count:
            raise ValueError(f"languages: expected {count}, one per example, got {len(languages)}")
        if not 0 < recall <= 1:
            raise ValueError(f"recall: expected a share above 0 and up to 1, got {recall}")
        gpu = gpu_number(device, kind)
        made = cls(
            index=_new_index(kind, count, _padded(sum(dims)), seed),
            kind=kind,
            ids=_ids(trains, ids, count),
            languages=None if languages is None else list(languages),
            dims=dims,
            weights=_weights(weights, len(trains)),
            normalize=normalize,
            identities=[t.identity if isinstance(t, FeatureStore) else None for t in trains],
            recall={},
            effort=0,
        )
        probes = made._recall_queries(trains, queries, seed)
        with made._timed("train"):
            made._train(trains, seed, memory, gpu)
        with made._timed("add"):
            exact = made._add(trains, probes, gpu)
        with made._timed("measure"):
            made._tune(probes, exact, recall)
        return made

    def search(
        self,
        queries: Sequence[Features],
        k: int,
        *,
        opponents: bool = False,
        languages: Sequence[str] | None = None,
    ) -> Neighbours:
        """The k training examples with the largest (for opponents: the smallest) scores.

        Args:
            queries: (C,) stores or tensors (Q, K_c), checkpoints in the order of `build`.
            k: How many per query.
            opponents: The most negative scores instead of the most positive.
            languages: Only training examples of these. An ivf or hnsw index may then find fewer
                than k.

        Raises:
            ValueError: Other checkpoints, sizes or identity (projection, parameters, mask, model,
                tokenizer) than the index was built with; a language that it does not have.
        """
        dims, count = _shapes(queries, "queries")
        if k < 1:
            raise ValueError(f"k: expected at least 1, got {k}")
        if dims != self.dims:
            raise ValueError(
                f"queries: expected {self.dims} numbers per row, checkpoint by checkpoint, "
                f"got {dims}"
            )
        self._check_identities(queries)
        selector = None if languages is None else self._selector(languages)
        sign = -1 if opponents else 1
        found = Neighbours(torch.empty(count, k), torch.empty(count, k, dtype=torch.int64))
        for start, block in self._blocks(queries, "search"):
            rows = slice(start, start + len(block))
            found.scores[rows], found.indices[rows] = self._nearest(block, k, sign, selector)
        return found

    def check_built_from(
        self,
        trains: Sequence[FeatureStore],
        weights: Sequence[float] | None = None,
        normalize: str | None = None,
    ) -> None:
        """Refuses an index that `build` with these arguments would not give.

        Raises:
            ValueError: Other stores (the data included), weights or form; says what differs.
        """
        asked: dict[str, Any] = {"normalize": normalize}
        asked["weights"] = _weights(weights, len(trains))
        built: dict[str, Any] = {"weights": self.weights, "normalize": self.normalize}
        for checkpoint, store in enumerate(trains):
            asked[f"checkpoint {checkpoint}"] = store.identity
        for checkpoint, identity in enumerate(self.identities):
            built[f"checkpoint {checkpoint}"] = identity
        differing = identity_differences(asked, built)
        if differing:
            raise ValueError(
                f"the index was built from something else: {'; '.join(differing)}; build it again"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes index.faiss and index.json, each whole or not at all, into a folder.

        Raises:
            OSError: The disk is full or not writable.
        """
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        file = path / _INDEX
        temporary = temporary_name(file)
        try:
            faiss.write_index(self.index, str(temporary))
        except RuntimeError as error:  # all that FAISS says of a full disk
            temporary.unlink(missing_ok=True)
            raise OSError(f"cannot write {file}: {error}") from error
        digest = file_sha256(temporary)
        publish_file(temporary, file)
        meta = {one.name: getattr(self, one.name) for one in fields(self)}
        del meta["index"], meta["seconds"]
        head = {"format": FORMAT, "version": VERSION, "index_sha256": digest}
        write_file(path / _META, seal({**head, **meta}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> InfluenceIndex:
        """Reads what `save` wrote, checksums first.

        Raises:
            ValueError: No index there, damaged, or of another version.
        """
        path = Path(path)
        meta_file, file = path / _META, path / _INDEX
        for part in (meta_file, file):
            if not part.is_file():
                raise ValueError(f"no index at {path}: there is no {part.name}")
        meta = unseal(meta_file, meta_file.read_bytes())
        head = {key: meta.pop(key, None) for key in ("format", "version", "index_sha256")}
        if (head["format"], head["version"]) != (FORMAT, VERSION):
            raise ValueError(
                f"{meta_file}: expected {FORMAT} version {VERSION}, "
                f"got {head['format']} version {head['version']}"
            )
        if file_sha256(file) != head["index_sha256"]:
            raise ValueError(f"{file} is damaged, or not of this {_META}: build the index again")
        return cls(index=faiss.read_index(str(file)), **meta)

    @property
    def bytes_per_example(self) -> float:
        """In memory: its row or code, its number in a list, its links in a graph."""
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
        """In memory, however many examples: the lists' centres and the codebook."""
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

    def _train(self, trains: Sequence[Features], seed: int, memory: int, gpu: int | None) -> None:
        """Trains on a sample drawn without replacement; what FAISS copies counts as 3 times it."""
        index = self.index
        if index.is_trained:
            return
        lists = index.nlist if isinstance(index, faiss.IndexIVF) else 0
        wanted = _ROWS_PER_CENTRE * max(lists, _PQ_CENTROIDS)
        fitting = max(_PQ_CENTROIDS, memory // (4 * 4 * index.d))
        sample = self._rows(trains, min(len(self.ids), wanted, fitting), seed, "sample").numpy()
        with _threads(torch.get_num_threads()):
            if lists:
                self._cluster(sample, gpu)
            if self.kind in ("sq8", "ivfpq"):
                with tqdm(total=1, desc="train codes", unit=" steps", disable=None) as bar:
                    index.train(sample)
                    bar.update(1)
            index.is_trained = True

    def _cluster(self, sample: np.ndarray, gpu: int | None) -> None:
        """Finds the centres of the lists, round by round so that they can be watched.

        As FAISS's own training does it: a round starts from the centres of the one before.
        """
        index = self.index
        clustering = faiss.Clustering(index.d, index.nlist, index.cp)
        clustering.niter = 1
        nearest = _centres(index, gpu)
        for _ in tqdm(range(index.cp.niter), desc="cluster", unit=" rounds", disable=None):
            clustering.train(sample, nearest)
        centres = faiss.vector_to_array(clustering.centroids).reshape(-1, index.d)
        index.quantizer.add(centres)
        if self.kind == "ivfpq":
            # Codes hold what is left of a row beside its centre. Centres of length 1 would leave
            # more than the row itself where rows are short; the best common length is the mean of
            # <row, centre>, and which centre is nearest does not depend on it.
            along, _ = index.quantizer.search(sample, 1)
            index.quantizer.reset()
            index.quantizer.add(centres * along.mean())

    def _add(self, trains: Sequence[Features], probes_QD: Tensor, gpu: int | None) -> Tensor:
        """Adds all rows; in the same pass finds the exact top k (2 Q, k) of probes and -probes."""
        k = min(RECALL_K, len(self.ids))
        signed_QD = torch.cat([probes_QD, -probes_QD])
        best = Neighbours(
            torch.full((len(signed_QD), k), -math.inf),
            torch.full((len(signed_QD), k), -1, dtype=torch.int64),
        )
        lists = isinstance(self.index, faiss.IndexIVF)
        nearest = _centres(self.index, gpu) if lists else None
        with _threads(1 if self.kind == "hnsw" else torch.get_num_threads()):
            for start, block in self._blocks(trains, "add"):
                if nearest is None:
                    self.index.add(block.numpy())
                else:
                    _add_to_lists(self.index, block.numpy(), nearest)
                best = _merge(best, signed_QD @ block.T, start)
        return best.indices

    def _tune(self, probes_QD: Tensor, exact: Tensor, wanted: float) -> None:
        """Sets `effort` and `recall`: the least effort that reaches the recall wanted."""
        worst = -1.0
        for effort in tqdm(self._efforts(), desc="measure", unit=" efforts", disable=None):
            before, self.effort = self.effort, effort
            recall = self._measure(probes_QD, exact)
            gained = min(recall["proponents"], recall["opponents"]) - worst
            if gained < MIN_GAIN:
                self.effort = before
                return
            self.recall, worst = recall, worst + gained
            if worst >= wanted:
                return

    def _efforts(self) -> list[int]:
        """What to try: from little, doubling, to everything."""
        if isinstance(self.index, faiss.IndexIVF):
            least, most = -(-self.index.nlist // 64), self.index.nlist
        elif isinstance(self.index, faiss.IndexHNSW):
            least, most = 2 * RECALL_K, max(2 * RECALL_K, len(self.ids))
        else:
            return [0]
        doublings = math.ceil(math.log2(most / least))
        return [min(least << step, most) for step in range(doublings + 1)]

    def _measure(self, probes_QD: Tensor, exact: Tensor) -> dict[str, float]:
        """Share of the exact top k that a search finds, with the present effort."""
        count, k = len(probes_QD), exact.shape[1]
        found = torch.cat([self._nearest(probes_QD, k, sign, None).indices for sign in (1, -1)])
        hits = (found[:, :, None] == exact[:, None, :]).any(dim=1).double().mean(dim=1)
        return {
            "k": k,
            "queries": count,
            "proponents": round(float(hits[:count].mean()), 6),
            "opponents": round(float(hits[count:].mean()), 6),
        }

    def _recall_queries(
        self, trains: Sequence[Features], queries: Sequence[Features] | None, seed: int
    ) -> Tensor:
        if queries is None:
            return self._rows(trains, min(RECALL_QUERIES, len(self.ids)), seed + 1, None)
        dims, count = _shapes(queries, "queries")
        if dims != self.dims or count == 0:
            raise ValueError(f"queries: expected rows of {self.dims}, got {count} of {dims}")
        self._check_identities(queries)
        return self._rows(queries, min(RECALL_QUERIES, count), seed + 1, None)

    def _rows(self, features: Sequence[Features], size: int, seed: int, bar: str | None) -> Tensor:
        """A sample of encoded rows without replacement, (size, D), in row order."""
        count = _shapes(features, "features")[1]
        chosen = np.sort(np.random.default_rng(seed).choice(count, size, replace=False))
        places = np.split(chosen, np.flatnonzero(np.diff(chosen // BLOCK_ROWS)) + 1)
        parts = []
        for rows in tqdm(places, desc=bar, unit=" blocks", disable=_no_bar(bar)):
            start = int(rows[0]) // BLOCK_ROWS * BLOCK_ROWS
            parts.append(self._block(features, start)[torch.from_numpy(rows - start)])
        return torch.cat(parts)

    def _blocks(self, features: Sequence[Features], bar: str) -> Iterator[tuple[int, Tensor]]:
        """Yields (start, encoded rows (rows, D)) under a progress bar, if it is not just one."""
        count = _shapes(features, "features")[1]
        disable = None if count > BLOCK_ROWS else True
        with tqdm(total=count, desc=bar, unit=" rows", disable=disable) as progress:
            for start in range(0, count, BLOCK_ROWS):
                block = self._block(features, start)
                yield start, block
                progress.update(len(block))

    def _block(self, features: Sequence[Features], start: int) -> Tensor:
        """The encoded rows of the block that begins at `start`."""
        stop = min(start + BLOCK_ROWS, _shapes(features, "features")[1])
        block = self._encode([_read(one, start, stop) for one in features])
        bad = torch.nonzero(~torch.isfinite(block).all(dim=1))
        if len(bad):
            raise ValueError(f"features of row {start + int(bad[0])}: expected finite numbers")
        return block

    def _encode(self, features: Sequence[Tensor]) -> Tensor:
        """(C,) rows (B, K_c) -> (B, D) float32: scaled, side by side, padded."""
        width = _padded(sum(self.dims))
        encoded = torch.zeros(len(features[0]), width)
        start = 0
        for rows, weight in zip(features, self.weights, strict=True):
            rows = rows.to("cpu", torch.float32)
            if self.normalize == "cosine":
                norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64)
                rows = rows / norms.float().masked_fill(norms == 0, 1)
            encoded[:, start : start + rows.shape[1]] = math.sqrt(weight) * rows
            start += rows.shape[1]
        return encoded

    def _nearest(self, rows_QD: Tensor, k: int, sign: int, selector: Any) -> Neighbours:
        """The k largest (sign 1) or smallest (sign -1) scores of encoded queries."""
        with _threads(torch.get_num_threads()):
            scores, indices = self.index.search(
                (sign * rows_QD).numpy(), k, params=self._parameters(k, selector)
            )
        indices_QK = torch.from_numpy(indices)
        scores_QK = torch.from_numpy(scores).masked_fill(indices_QK < 0, -math.inf)
        return Neighbours(sign * scores_QK, indices_QK)

    def _parameters(self, k: int, selector: Any) -> Any:
        chosen = {} if selector is None else {"sel": selector}
        if isinstance(self.index, faiss.IndexIVF):
            return faiss.SearchParametersIVF(nprobe=self.effort, **chosen)
        if isinstance(self.index, faiss.IndexHNSW):
            return faiss.SearchParametersHNSW(efSearch=max(self.effort, 2 * k), **chosen)
        return faiss.SearchParameters(**chosen)

    def _selector(self, languages: Sequence[str]) -> Any:
        """Lets through the training examples of some languages."""
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

    def _check_identities(self, queries: Sequence[Features]) -> None:
        """Query features must be made as the training features were, the data aside."""
        for checkpoint, (identity, query) in enumerate(zip(self.identities, queries, strict=True)):
            if identity is None or not isinstance(query, FeatureStore):
                continue
            differing = identity_differences(identity, query.identity, ignore=["data"])
            if differing:
                raise ValueError(
                    f"query features {query.path} (checkpoint {checkpoint}) were made otherwise "
                    f"than those in the index: {'; '.join(differing)}"
                )


def factory_string(kind: str, count: int, width: int) -> str:
    """The string for `faiss.index_factory`: a kind, for `count` rows of `width` numbers."""
    # FAISS asks for 39 rows per list to place its centre.
    lists = max(1, min(round(4 * math.sqrt(count)), count // 39))
    return {
        "flat": "Flat",
        "sq8": "SQ8",
        "ivf": f"IVF{lists},Flat",
        "ivfpq": f"IVF{lists},PQ{width // 8}x8",
        "hnsw": "HNSW32",
    }[kind]


def _new_index(kind: str, count: int, width: int, seed: int) -> Any:
    string = factory_string(kind, count, width)
    index = faiss.index_factory(width, string, faiss.METRIC_INNER_PRODUCT)
    if isinstance(index, faiss.IndexIVF):
        index.cp.seed = seed
        # Lists by direction: a few rows of huge norm would draw everything to their centres.
        index.cp.spherical = True
        index.cp.min_points_per_centroid = 1
    if isinstance(index, faiss.IndexIVFPQ):
        index.pq.cp.seed = seed
        index.pq.cp.min_points_per_centroid = 1
        # FAISS's 25 rounds over 256 rows per centre do 10 times the work; on made features of
        # 512 numbers they gained 0.01 (cosine) to 0.04 (dot) of recall.
        index.pq.cp.niter = 10
        index.pq.cp.max_points_per_centroid = _ROWS_PER_CENTRE
        # Orders codes for a Hamming filter that is not used here; 1.6 s per byte of a row.
        index.do_polysemous_training = False
    if isinstance(index, faiss.IndexHNSW):
        index.hnsw.efConstruction = 100
    return index


def gpu_number(device: str, kind: str) -> int | None:
    """The number of the GPU that is asked for, None for the CPU; refused where it cannot help."""
    if device == "cpu":
        return None
    asked = re.fullmatch(r"cuda(?::(\d+))?", device)
    if asked is None:
        raise ValueError(f"device of an index: expected cpu, cuda, cuda:1, ..., got {device}")
    number = int(asked[1] or 0)
    found = faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else 0
    if number >= found:
        raise ValueError(
            f"device of an index: got {device}, but this FAISS finds {found or 'no'} GPUs: install "
            f"faiss-gpu in place of faiss-cpu on a machine with one, or use cpu"
        )
    if kind not in GPU_KINDS:
        raise ValueError(
            f"device of an index: got {device}, but only {' and '.join(GPU_KINDS)} have lists to "
            f"cluster on a GPU: build {kind} on the cpu"
        )
    return number


def _centres(index: Any, gpu: int | None) -> Any:
    """The centres of the lists, searchable where they lie; as yet none before they are found."""
    if gpu is None:
        return faiss.clone_index(index.quantizer)
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), gpu, index.quantizer)


def _add_to_lists(index: Any, rows_BD: np.ndarray, nearest: Any) -> None:
    """`index.add(rows)`, the nearest centres found in `nearest`."""
    _, lists_B1 = nearest.search(rows_BD, 1)
    index.add_core(len(rows_BD), faiss.swig_ptr(rows_BD), None, faiss.swig_ptr(lists_B1))


def _padded(width: int) -> int:
    return -(-width // 8) * 8


def _shapes(features: Sequence[Features], name: str) -> tuple[list[int], int]:
    """(C,) the numbers per row, and the number of rows, which all checkpoints share."""
    if isinstance(features, FeatureStore | Tensor) or not features:
        raise ValueError(f"{name}: expected a sequence of features, one per checkpoint")
    shapes = []
    for one in features:
        shape = (one.num_rows, one.dim) if isinstance(one, FeatureStore) else tuple(one.shape)
        if len(shape) != 2:
            raise ValueError(f"{name}: expected rows x numbers, got shape {shape}")
        shapes.append(shape)
    counts = [rows for rows, _ in shapes]
    if len(set(counts)) > 1:
        raise ValueError(f"{name}: expected as many rows at every checkpoint, got {counts}")
    return [dim for _, dim in shapes], counts[0]


def _ids(trains: Sequence[Features], ids: Sequence[str] | None, count: int) -> list[str]:
    stores = [one for one in trains if isinstance(one, FeatureStore)]
    if ids is None:
        ids = stores[0].ids if stores else [str(row) for row in range(count)]
    if len(ids) != count:
        raise ValueError(f"ids: expected {count}, one per example, got {len(ids)}")
    for store in stores:
        if store.ids != list(ids):
            raise ValueError(f"{store.path} holds other examples, or in another order, than asked")
    return list(ids)


def _weights(weights: Sequence[float] | None, count: int) -> list[float]:
    values = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(values) != count:
        raise ValueError(f"weights: expected {count}, one per checkpoint, got {len(values)}")
    if not all(0 <= weight < math.inf for weight in values):
        raise ValueError(f"weights of an index: expected finite and not negative, got {values}")
    return values


def _read(features: Features, start: int, stop: int) -> Tensor:
    if isinstance(features, FeatureStore):
        return features.read(start, stop)
    return features[start:stop].detach()


def _no_bar(bar: str | None) -> bool | None:
    """What tqdm calls `disable`: None is "where the output is not a terminal"."""
    return True if bar is None else None


def _merge(best: Neighbours, scores_QB: Tensor, start: int) -> Neighbours:
    """The k best of those so far and of a block whose first row is `start`."""
    indices = torch.arange(start, start + scores_QB.shape[1]).expand(len(scores_QB), -1)
    scores = torch.cat([best.scores, scores_QB], dim=1)
    indices = torch.cat([best.indices, indices], dim=1)
    top = scores.topk(best.scores.shape[1], dim=1)
    return Neighbours(top.values, indices.gather(1, top.indices))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """FAISS's number of threads, which is its process's and not the index's."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
