"""Time the search over a million training examples on disk, and the feature store.

    python bench/bench_scale.py search [--rows N] [--memory 4GB]   with torch, numpy and FAISS
    python bench/bench_scale.py store                              writing, opening, verifying

The features are random (normal numbers of lognormal length), in one store each of float32, bfloat16
and int8 rows: 7 GB for a million rows, kept in --folder. Every method runs in a process of its own,
so that its peak memory is not that of another, and its ranking is checked before its time counts.
During the search the files are in the page cache; `store` distinguishes reading from disk and from
the cache.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

import tracmod as tm
from tracmod.bench.collect import require
from tracmod.bench.measure import environment, peak_memory, take_turns, write_json
from tracmod.bench.models import random_examples, random_model
from tracmod.config import parse_bytes
from tracmod.features.collector import Collector, collect_to_store
from tracmod.features.store import FeatureStore, verify_store
from tracmod.files.object_storage import entries, file_size
from tracmod.models.inputs import as_examples
from tracmod.models.modes import frozen

K, GROUPS = 100, 5
DTYPES = ("float32", "bfloat16", "int8")
MATMUL_ROWS = 32_768  # number of rows in the block with which torch.matmul is timed

# --- random features ------------------------------------------------------------------------


def random_rows(seed: int, rows: int, dim: int) -> Tensor:
    """Return normal rows of very different lengths, as gradients have."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randn(rows, 1, generator=generator).exp()
    return torch.randn(rows, dim, generator=generator) * lengths


def queries_of(job: dict[str, Any]) -> Tensor:
    return random_rows(10**6, job["queries"], job["dim"])


def groups_of(rows: int) -> Tensor:
    return torch.arange(rows) % GROUPS


def make_store(folder: Path, dtype: str, rows: int, dim: int) -> FeatureStore:
    """Create a store of random rows, or complete one that an earlier run left incomplete."""
    ids = [f"row-{row}" for row in range(rows)]
    with FeatureStore.create(
        folder, ids=ids, dim=dim, identity={"made": True}, dtype=dtype
    ) as store:
        for shard in tqdm(
            store.missing_shards(), desc=f"create {dtype}", unit="shard", disable=None
        ):
            store.write_shard(shard, random_rows(shard, len(store.shard_range(shard)), dim))
    return FeatureStore.open(folder)


# --- methods --------------------------------------------------------------------------------


def tracmod_search(job: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Search a store with `top_influences`."""
    store = FeatureStore.open(Path(job["folder"]) / dtype)
    query = queries_of(job)
    query = query.bfloat16() if dtype == "bfloat16" else query
    groups = groups_of(len(store))
    start = time.perf_counter()
    top = tm.top_influences(query, store, K, groups, memory=job["memory"])
    seconds = time.perf_counter() - start
    assert top.group_sums is not None
    return {"seconds": seconds, "scores": top.scores, "opponent_scores": top.opponent_scores,
            "indices": top.indices, "opponent_indices": top.opponent_indices,
            "group_sums": top.group_sums}  # fmt: skip


def matmul(job: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Multiply the same block in memory again and again, without reading or ranking anything."""
    rows, block_rows = job["rows"], min(MATMUL_ROWS, job["rows"])
    query_QK = queries_of(job).to(getattr(torch, dtype))
    block_KR = random_rows(0, block_rows, job["dim"]).to(query_QK.dtype).T
    out = torch.empty(len(query_QK), block_rows, dtype=query_QK.dtype)
    torch.matmul(query_QK, block_KR, out=out)
    start = time.perf_counter()
    for _ in range(rows // block_rows):
        torch.matmul(query_QK, block_KR, out=out)
    seconds = time.perf_counter() - start
    return {"seconds": seconds * rows / (rows // block_rows * block_rows)}


def with_numpy(job: dict[str, Any]) -> dict[str, Any]:
    """Search block by block: product, partition, merge; sums by group as a product."""
    store = FeatureStore.open(Path(job["folder"]) / "float32")
    query = queries_of(job).numpy()
    start = time.perf_counter()
    sides: dict[int, tuple[Any, Any]] = {
        sign: (np.empty((len(query), 0), np.float32), np.empty((len(query), 0), np.int64))
        for sign in (1, -1)
    }
    sums = np.zeros((len(query), GROUPS))
    for first, block in store.blocks(store.shard_rows):
        scores = query @ block.numpy().T
        one_hot = np.eye(GROUPS, dtype=np.float32)[np.arange(first, first + len(block)) % GROUPS]
        sums += scores @ one_hot
        for sign, (best, rows) in sides.items():
            kept = np.argpartition(-sign * scores, min(K, len(block)) - 1, axis=1)[:, :K]
            best = np.concatenate([best, np.take_along_axis(scores, kept, 1)], axis=1)
            rows = np.concatenate([rows, kept + first], axis=1)
            order = np.argsort(-sign * best, axis=1, kind="stable")[:, :K]
            sides[sign] = np.take_along_axis(best, order, 1), np.take_along_axis(rows, order, 1)
    seconds = time.perf_counter() - start
    result: dict[str, Any] = {"seconds": seconds, "group_sums": torch.from_numpy(sums)}
    for side, (best, rows) in {"": sides[1], "opponent_": sides[-1]}.items():
        result[f"{side}scores"] = torch.from_numpy(best)
        result[f"{side}indices"] = torch.from_numpy(rows)
    return result


def faiss_flat(job: dict[str, Any]) -> dict[str, Any]:
    """Search an IndexFlatIP with all rows in memory.

    Opponents are the proponents of the negated query. There are no sums by group.
    """
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    store = FeatureStore.open(Path(job["folder"]) / "float32")
    index = faiss.IndexFlatIP(store.dim)
    start = time.perf_counter()
    for _, block in store.blocks(store.shard_rows):
        index.add(block.numpy())
    built = time.perf_counter() - start
    query = queries_of(job).numpy()
    start = time.perf_counter()
    scores, indices = index.search(query, K)
    low, low_indices = index.search(-query, K)
    seconds = time.perf_counter() - start
    ranking = {"scores": scores, "indices": indices, "opponent_scores": -low,
               "opponent_indices": low_indices}  # fmt: skip
    return {"seconds": seconds, "build_seconds": built} | {
        name: torch.from_numpy(array) for name, array in ranking.items()
    }


METHODS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "matmul float32": lambda job: matmul(job, "float32"),
    "ours float32": lambda job: tracmod_search(job, "float32"),
    "matmul bfloat16": lambda job: matmul(job, "bfloat16"),
    "ours bfloat16": lambda job: tracmod_search(job, "bfloat16"),
    "ours int8": lambda job: tracmod_search(job, "int8"),
    "numpy": with_numpy,
    "FAISS flat": faiss_flat,
}


def run_method(name: str, job: dict[str, Any], folder: Path) -> None:
    """Run one method in this process; write its figures and ranking into the folder."""
    base = peak_memory()
    result = METHODS[name](job)
    figures = {"base_bytes": base, "peak_bytes": peak_memory()}
    figures |= {key: value for key, value in result.items() if not isinstance(value, Tensor)}
    ranking = {k: value.contiguous() for k, value in result.items() if isinstance(value, Tensor)}
    save_file(ranking, folder / "ranking.safetensors")
    (folder / "figures.json").write_text(json.dumps(figures), encoding="utf-8")


def in_process(name: str, job: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Run a method in a new process; return its figures and ranking."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "method", name, json.dumps(job), folder]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        require(done.returncode == 0, f"{name}: {done.stderr.strip()[-400:]}")
        figures = json.loads((Path(folder) / "figures.json").read_text(encoding="utf-8"))
        return figures, load_file(Path(folder) / "ranking.safetensors")


# --- search ---------------------------------------------------------------------------------


def truth(store: FeatureStore, query_QK: Tensor) -> Tensor:
    """Compute the (Q, N) scores of the stored rows with products in float64."""
    parts = [query_QK.double() @ block.double().T for _, block in store.blocks(store.shard_rows)]
    return torch.cat(parts, dim=1)


def check(name: str, ranking: dict[str, Tensor], scores_QN: Tensor) -> None:
    """Compare the first queries' rankings of both signs, and their sums, with float64.

    Rows may differ from float64's ranking if their scores are as close as rounding.

    Raises:
        WrongResult: a ranking, score or sum is off by more than rounding.
    """
    count = len(scores_QN)
    for side, sign in (("", 1), ("opponent_", -1)):
        expected = sign * (sign * scores_QN).topk(K).values
        got = scores_QN.gather(1, ranking[f"{side}indices"][:count])
        error = float(((got - expected).abs() / expected.abs()).max())
        require(error < 1e-4, f"{name}: {side or 'proponent_'}ranking off by {error:.1e}")
        error = float((ranking[f"{side}scores"][:count] - got).abs().max() / got.abs().max())
        require(error < 1e-5, f"{name}: {side or 'proponent_'}scores off by {error:.1e}")
    if "group_sums" in ranking:
        sums = torch.zeros(count, GROUPS, dtype=torch.float64)
        sums.index_add_(1, groups_of(scores_QN.shape[1]), scores_QN)
        scale = scores_QN.abs().sum(dim=1).max()
        error = float((ranking["group_sums"][:count] - sums).abs().max() / scale)
        require(error < 1e-6, f"{name}: sums by group off by {error:.1e}")


def search(options: argparse.Namespace) -> None:
    folder, memory = options.folder, parse_bytes(options.memory)
    job = {"folder": str(folder), "rows": options.rows, "dim": options.dim,
           "queries": options.queries, "memory": memory}  # fmt: skip
    stores = {
        dtype: make_store(folder / dtype, dtype, options.rows, options.dim) for dtype in DTYPES
    }
    some = queries_of(job)[: options.checked]
    expected = {
        dtype: truth(store, some.bfloat16() if dtype == "bfloat16" else some)
        for dtype, store in stores.items()
    }
    rows: dict[str, dict[str, Any]] = {}
    for _ in range(options.rounds):
        for name in METHODS:
            figures, ranking = in_process(name, job)
            if ranking:
                dtype = name.removeprefix("ours ")
                check(name, ranking, expected.get(dtype, expected["float32"]))
            best = rows.setdefault(name, figures)
            for key, value in figures.items():
                best[key] = max(best[key], value) if "bytes" in key else min(best[key], value)
            print(f"{name:16} {figures['seconds']:8.2f} s  {figures['peak_bytes'] / 1e6:8,.0f} MB")
    for name, row in rows.items():
        dtype = "bfloat16" if "bfloat16" in name else "float32"
        row["speed_of_matmul"] = rows[f"matmul {dtype}"]["seconds"] / row["seconds"]
    sizes = {dtype: store_bytes(store) / options.rows for dtype, store in stores.items()}
    write(options, {"part": "scale-search", **job, "folder": None, "k": K, "groups": GROUPS,
                  "methods": rows, "bytes_per_example": sizes})  # fmt: skip


def store_bytes(store: FeatureStore) -> int:
    return sum(file_size(file) for file in entries(store.path))


# --- the store ------------------------------------------------------------------------------


def store_costs(options: argparse.Namespace) -> None:
    """Time writing beside collection, opening, and verifying beside reading and hashing."""
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        result = {
            "part": "scale-store",
            "writing": writing(folder, options.examples),
            "opening": opening(folder, options.shards),
            "verifying": verifying(folder, options.gigabytes),
        }
    print(json.dumps(result, indent=1))
    write(options, result)


def writing(folder: Path, count: int) -> dict[str, Any]:
    """Time the collection of features of the mini model, into memory and into a store."""
    examples, projection = as_examples(random_examples(count)), tm.Projection(4096)
    model = random_model("mini")
    in_memory, written = torch.empty(0), folder
    with frozen(model):
        collector = Collector(model, projection)
        tries = iter(range(10**6))

        def into_memory() -> None:
            nonlocal in_memory
            in_memory = collector.collect(examples)

        def into_store() -> None:
            nonlocal written
            ids = [str(row) for row in range(count)]
            written = folder / f"written-{next(tries)}"
            with FeatureStore.create(written, ids=ids, dim=4096, identity={}) as store:
                collect_to_store(collector, examples, store)

        methods = {"memory": into_memory, "store": into_store}
        seconds = take_turns(methods, torch.device("cpu"), seconds=300, rounds=6)
    stored = FeatureStore.open(written).read()
    error = float((stored - in_memory).norm() / in_memory.norm())
    require(error < 1e-5, f"stored features are off by {error:.1e}")
    share = seconds["store"] / seconds["memory"] - 1
    return {"examples": count, "seconds": seconds, "added": share}


def opening(folder: Path, shards: int) -> dict[str, Any]:
    """Time opening a store of many shards, and opening it and reading its first row."""
    path = folder / "opened"
    ids = [str(row) for row in range(16 * shards)]
    with FeatureStore.create(path, ids=ids, dim=64, identity={}, shard_rows=16) as store:
        for shard in range(shards):
            store.write_shard(shard, torch.ones(16, 64))
    seconds = take_turns(
        {
            "open": lambda: FeatureStore.open(path),
            "read": lambda: FeatureStore.open(path).read(0, 1),
        },
        torch.device("cpu"),
    )
    return {"shards": shards, "seconds": seconds}


def verifying(folder: Path, gigabytes: float) -> dict[str, Any]:
    """Measure bytes per second of verifying, SHA-256 and reading, from disk and from the cache."""
    path, dim = folder / "verified", 4096
    rows = max(1024, round(gigabytes * 1e9 / (4 * dim)))
    store = make_store(path, "float32", rows, dim)
    files = sorted(path.glob("shard-*"))
    size = store_bytes(store)
    seconds = {}
    for cached in (False, True):
        for name, work in {
            "read": lambda: read_files(files),
            "SHA-256": lambda: hash_files(files),
            "verify": lambda: require(verify_store(path) == [], f"{path}: damaged shards"),
        }.items():
            if not cached:
                drop_from_cache(files)
            start = time.perf_counter()
            work()
            seconds[f"{name}, {'cached' if cached else 'from disk'}"] = time.perf_counter() - start
    return {"bytes": size, "gbytes_per_second": {n: size / s / 1e9 for n, s in seconds.items()}}


def read_files(files: Iterable[Path]) -> None:
    buffer = bytearray(1 << 22)
    for file in files:
        with open(file, "rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def hash_files(files: Iterable[Path]) -> None:
    for file in files:
        with open(file, "rb") as opened:
            hashlib.file_digest(opened, "sha256")


def drop_from_cache(files: Iterable[Path]) -> None:
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


# --- the command ----------------------------------------------------------------------------


def write(options: argparse.Namespace, result: dict[str, Any]) -> None:
    result = {**result, "environment": environment(torch.device("cpu"))}
    write_json(options.out / f"{result['part']}-cpu.json", result)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(required=True)
    here = Path(__file__).resolve().parent
    search_parser = parts.add_parser("search")
    search_parser.set_defaults(function=search)
    search_parser.add_argument("--rows", type=int, default=1_000_000)
    search_parser.add_argument("--dim", type=int, default=1024)
    search_parser.add_argument("--queries", type=int, default=500)
    search_parser.add_argument("--memory", default="4GB")
    search_parser.add_argument("--rounds", type=int, default=3)
    search_parser.add_argument("--checked", type=int, default=8, help="number of queries checked")
    store_parser = parts.add_parser("store")
    store_parser.set_defaults(function=store_costs)
    store_parser.add_argument("--examples", type=int, default=2048)
    store_parser.add_argument("--shards", type=int, default=1000, help="of the store to open")
    store_parser.add_argument("--gigabytes", type=float, default=2.0, help="of the store to verify")
    for part in (search_parser, store_parser):
        part.add_argument("--folder", type=Path, default=here.parent / "runs" / "scale")
        part.add_argument("--out", type=Path, default=here / "results")
    if sys.argv[1:2] == ["method"]:
        run_method(sys.argv[2], json.loads(sys.argv[3]), Path(sys.argv[4]))
        return
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    options.function(options)


if __name__ == "__main__":
    main()
