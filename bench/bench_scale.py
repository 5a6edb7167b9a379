"""A million training examples on disk: searching them, and what the feature store costs.

    python bench/bench_scale.py search [--rows N] [--memory 4GB]   against torch, numpy and FAISS
    python bench/bench_scale.py store                              writing, opening, verifying

The features are made (normal numbers of lognormal length), in a store of float32, one of bfloat16
and one of int8 rows: 7 GB for a million rows, kept in --folder. Every method runs in a process of
its own, so that its peak memory is its own, and its ranking is checked before its time counts. When
they are searched the files are in the page cache; `store` tells reading from disk and from the
cache apart.
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
MATMUL_ROWS = 32_768  # of the block whose product torch.matmul is timed with

# --- made features --------------------------------------------------------------------------


def made_rows(seed: int, rows: int, dim: int) -> Tensor:
    """Rows of unlike lengths, as gradients have."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randn(rows, 1, generator=generator).exp()
    return torch.randn(rows, dim, generator=generator) * lengths


def queries_of(asked: dict[str, Any]) -> Tensor:
    return made_rows(10**6, asked["queries"], asked["dim"])


def groups_of(rows: int) -> Tensor:
    return torch.arange(rows) % GROUPS


def make_store(folder: Path, dtype: str, rows: int, dim: int) -> FeatureStore:
    """The store of made rows, finished if it was begun."""
    ids = [f"row-{row}" for row in range(rows)]
    with FeatureStore.create(
        folder, ids=ids, dim=dim, identity={"made": True}, dtype=dtype
    ) as store:
        for shard in tqdm(store.missing_shards(), desc=f"make {dtype}", unit="shard", disable=None):
            store.write_shard(shard, made_rows(shard, len(store.shard_range(shard)), dim))
    return FeatureStore.open(folder)


# --- methods --------------------------------------------------------------------------------


def ours(asked: dict[str, Any], dtype: str) -> dict[str, Any]:
    store = FeatureStore.open(Path(asked["folder"]) / dtype)
    query = queries_of(asked)
    query = query.bfloat16() if dtype == "bfloat16" else query
    groups = groups_of(len(store))
    start = time.perf_counter()
    top = tm.top_influences(query, store, K, groups, memory=asked["memory"])
    seconds = time.perf_counter() - start
    assert top.group_sums is not None
    return {"seconds": seconds, "scores": top.scores, "opponent_scores": top.opponent_scores,
            "indices": top.indices, "opponent_indices": top.opponent_indices,
            "group_sums": top.group_sums}  # fmt: skip


def matmul(asked: dict[str, Any], dtype: str) -> dict[str, Any]:
    """`torch.matmul` alone, of a block in memory again and again: nothing read, nothing ranked."""
    rows, block_rows = asked["rows"], min(MATMUL_ROWS, asked["rows"])
    query_QK = queries_of(asked).to(getattr(torch, dtype))
    block_KR = made_rows(0, block_rows, asked["dim"]).to(query_QK.dtype).T
    out = torch.empty(len(query_QK), block_rows, dtype=query_QK.dtype)
    torch.matmul(query_QK, block_KR, out=out)
    start = time.perf_counter()
    for _ in range(rows // block_rows):
        torch.matmul(query_QK, block_KR, out=out)
    seconds = time.perf_counter() - start
    return {"seconds": seconds * rows / (rows // block_rows * block_rows)}


def with_numpy(asked: dict[str, Any]) -> dict[str, Any]:
    """Block by block of the store: product, partition, merge; sums by group as a product."""
    store = FeatureStore.open(Path(asked["folder"]) / "float32")
    query = queries_of(asked).numpy()
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
        for sign, (best, places) in sides.items():
            kept = np.argpartition(-sign * scores, min(K, len(block)) - 1, axis=1)[:, :K]
            best = np.concatenate([best, np.take_along_axis(scores, kept, 1)], axis=1)
            places = np.concatenate([places, kept + first], axis=1)
            order = np.argsort(-sign * best, axis=1, kind="stable")[:, :K]
            best, places = (np.take_along_axis(one, order, 1) for one in (best, places))
            sides[sign] = best, places
    seconds = time.perf_counter() - start
    named = {"": sides[1], "opponent_": sides[-1]}
    return {"seconds": seconds, "group_sums": torch.from_numpy(sums)} | {
        f"{side}{name}": torch.from_numpy(one)
        for side, pair in named.items()
        for name, one in zip(("scores", "indices"), pair, strict=True)
    }


def faiss_flat(asked: dict[str, Any]) -> dict[str, Any]:
    """IndexFlatIP with all rows in memory; opponents are what -q finds; no sums by group."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    store = FeatureStore.open(Path(asked["folder"]) / "float32")
    index = faiss.IndexFlatIP(store.dim)
    start = time.perf_counter()
    for _, block in store.blocks(store.shard_rows):
        index.add(block.numpy())
    built = time.perf_counter() - start
    query = queries_of(asked).numpy()
    start = time.perf_counter()
    scores, indices = index.search(query, K)
    low, low_indices = index.search(-query, K)
    seconds = time.perf_counter() - start
    found = {"scores": scores, "indices": indices, "opponent_scores": -low,
             "opponent_indices": low_indices}  # fmt: skip
    return {"seconds": seconds, "build_seconds": built} | {
        name: torch.from_numpy(one) for name, one in found.items()
    }


METHODS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "matmul float32": lambda asked: matmul(asked, "float32"),
    "ours float32": lambda asked: ours(asked, "float32"),
    "matmul bfloat16": lambda asked: matmul(asked, "bfloat16"),
    "ours bfloat16": lambda asked: ours(asked, "bfloat16"),
    "ours int8": lambda asked: ours(asked, "int8"),
    "numpy": with_numpy,
    "FAISS flat": faiss_flat,
}


def method(name: str, asked: dict[str, Any], to: Path) -> None:
    """One method in this process; its figures and ranking into `to`."""
    base = peak_memory()
    found = METHODS[name](asked)
    figures = {"base_bytes": base, "peak_bytes": peak_memory()}
    figures |= {key: one for key, one in found.items() if not isinstance(one, Tensor)}
    tensors = {key: one.contiguous() for key, one in found.items() if isinstance(one, Tensor)}
    save_file(tensors, to / "ranking.safetensors")
    (to / "figures.json").write_text(json.dumps(figures), encoding="utf-8")


def in_process(name: str, asked: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "method", name, json.dumps(asked), folder]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        require(done.returncode == 0, f"{name}: {done.stderr.strip()[-400:]}")
        figures = json.loads((Path(folder) / "figures.json").read_text(encoding="utf-8"))
        return figures, load_file(Path(folder) / "ranking.safetensors")


# --- search ---------------------------------------------------------------------------------


def truth(store: FeatureStore, query_QK: Tensor) -> Tensor:
    """(Q, N) scores of the stored rows, products in float64."""
    parts = [query_QK.double() @ block.double().T for _, block in store.blocks(store.shard_rows)]
    return torch.cat(parts, dim=1)


def check(name: str, ranking: dict[str, Tensor], scores_QN: Tensor) -> None:
    """The first queries' ranking, both sides, and sums, against float64.

    Positions may differ where scores are as close as rounding.
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


def search(given: argparse.Namespace) -> None:
    folder, memory = given.folder, parse_bytes(given.memory)
    asked = {"folder": str(folder), "rows": given.rows, "dim": given.dim, "queries": given.queries,
             "memory": memory}  # fmt: skip
    stores = {one: make_store(folder / one, one, given.rows, given.dim) for one in DTYPES}
    some = queries_of(asked)[: given.checked]
    expected = {
        one: truth(store, some.bfloat16() if one == "bfloat16" else some)
        for one, store in stores.items()
    }
    rows: dict[str, dict[str, Any]] = {}
    for _ in range(given.rounds):
        for name in METHODS:
            figures, ranking = in_process(name, asked)
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
    sizes = {one: store_bytes(store) / given.rows for one, store in stores.items()}
    write(given, {"part": "scale-search", **asked, "folder": None, "k": K, "groups": GROUPS,
                  "methods": rows, "bytes_per_example": sizes})  # fmt: skip


def store_bytes(store: FeatureStore) -> int:
    return sum(file_size(file) for file in entries(store.path))


# --- the store ------------------------------------------------------------------------------


def store_costs(given: argparse.Namespace) -> None:
    """What writing adds to collection; opening; verifying against reading and against hashing."""
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        result = {
            "part": "scale-store",
            "writing": writing(folder, given.examples),
            "opening": opening(folder, given.shards),
            "verifying": verifying(folder, given.gigabytes),
        }
    print(json.dumps(result, indent=1))
    write(given, result)


def writing(folder: Path, count: int) -> dict[str, Any]:
    """Seconds of collecting features of the mini model, into memory and into a store."""
    examples, projection = as_examples(random_examples(count)), tm.Projection(4096)
    model = random_model("mini")
    made: dict[str, Tensor] = {}
    with frozen(model):
        collector = Collector(model, projection)
        tries = iter(range(10**6))

        def into_memory() -> None:
            made["memory"] = collector.collect(examples)

        def into_store() -> None:
            ids = [str(row) for row in range(count)]
            path = folder / f"written-{next(tries)}"
            with FeatureStore.create(path, ids=ids, dim=4096, identity={}) as store:
                collect_to_store(collector, examples, store)
            made["path"] = path  # type: ignore[assignment]

        methods = {"memory": into_memory, "store": into_store}
        seconds = take_turns(methods, torch.device("cpu"), seconds=300, rounds=6)
    stored = FeatureStore.open(made["path"]).read()  # type: ignore[arg-type]
    error = float((stored - made["memory"]).norm() / made["memory"].norm())
    require(error < 1e-5, f"stored features are off by {error:.1e}")
    share = seconds["store"] / seconds["memory"] - 1
    return {"examples": count, "seconds": seconds, "added": share}


def opening(folder: Path, shards: int) -> dict[str, Any]:
    """Seconds to open a store of many shards, and to read its first row."""
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
    """Bytes per second: verify, SHA-256 alone, and reading alone; from disk and from the cache."""
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
            "verify": lambda: require(verify_store(path) == [], f"{path} is not sound"),
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


def write(given: argparse.Namespace, result: dict[str, Any]) -> None:
    result = {**result, "environment": environment(torch.device("cpu"))}
    write_json(given.out / f"{result['part']}-cpu.json", result)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(required=True)
    here = Path(__file__).resolve().parent
    one = parts.add_parser("search")
    one.set_defaults(does=search)
    one.add_argument("--rows", type=int, default=1_000_000)
    one.add_argument("--dim", type=int, default=1024)
    one.add_argument("--queries", type=int, default=500)
    one.add_argument("--memory", default="4GB")
    one.add_argument("--rounds", type=int, default=3)
    one.add_argument("--checked", type=int, default=8, help="queries whose ranking is checked")
    two = parts.add_parser("store")
    two.set_defaults(does=store_costs)
    two.add_argument("--examples", type=int, default=2048)
    two.add_argument("--shards", type=int, default=1000, help="of the store that is opened")
    two.add_argument("--gigabytes", type=float, default=2.0, help="of the store that is verified")
    for part in (one, two):
        part.add_argument("--folder", type=Path, default=here.parent / "runs" / "scale")
        part.add_argument("--out", type=Path, default=here / "results")
    if sys.argv[1:2] == ["method"]:
        method(sys.argv[2], json.loads(sys.argv[3]), Path(sys.argv[4]))
        return
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    given.does(given)


if __name__ == "__main__":
    main()
