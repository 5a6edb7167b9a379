"""Searches in stores: the bits of one dense call, bounded memory, any number of interruptions."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import textwrap

import pytest
import torch

import tracmod as tm
from tracmod import kernels
from tracmod.features.rows import ChosenRows, StoreRows, TensorRows, block_ranges
from tracmod.features.store import FeatureStore
from tracmod.influence import streaming
from tracmod.influence.scores import top_influences, without_examples
from tracmod.influence.streaming import Search, plan_blocks

IDENTITY = {"projection": {"dim": 24}, "model": "a", "data": "b"}
LANGUAGES = ["de", "en", "zh"]


def features(count, seed, dim=24, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator).to(dtype)


def store_of(path, rows, shard_rows=16, identity=IDENTITY):
    ids = [f"{path.name}-{row}" for row in range(len(rows))]
    dtype = str(rows.dtype).removeprefix("torch.")
    with FeatureStore.create(
        path, ids=ids, dim=rows.shape[1], identity=identity, dtype=dtype, shard_rows=shard_rows
    ) as store:
        for shard in store.missing_shards():
            part = store.shard_range(shard)
            store.write_shard(shard, rows[part.start : part.stop])
    return FeatureStore.open(path)


def stored(folder, name, count, checkpoints=2, dtype=torch.float32, shard_rows=16):
    """Tensors, and stores of the same, whose shards end at different rows."""
    tensors = [features(count, seed, dtype=dtype) for seed in range(checkpoints)]
    return tensors, [
        store_of(folder / f"{name}-{number}", rows, shard_rows + number)
        for number, rows in enumerate(tensors)
    ]


def assert_same_bits(expected, actual):
    """Compare all fields of two results."""
    for name, value in vars(expected).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, getattr(actual, name)), name
        else:
            assert value == getattr(actual, name), name


def least_memory(queries, trains, k, num_groups=0):
    """The number of bytes that the error of a search without memory asks for."""
    search = Search(
        [StoreRows(store) for store in queries], [StoreRows(store) for store in trains], k,
        [1.0] * len(trains), None, None, num_groups, torch.device("cpu"),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"memory.*got 0") as refused:
        plan_blocks(search, 0)
    return int(re.search(r"[\d,]{7,}", str(refused.value))[0].replace(",", ""))


@pytest.mark.parametrize("normalize", [None, "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_query", "num_train"), [(1, 1), (4, 33), (9, 127), (31, 300)])
def test_stores_in_blocks_give_the_dense_result(tmp_path, num_query, num_train, dtype, normalize):
    query, query_stores = stored(tmp_path, "query", num_query, dtype=dtype)
    train, train_stores = stored(tmp_path, "train", num_train, dtype=dtype)
    arguments = {
        "k": 7,
        "groups": [LANGUAGES[row % 3] for row in range(num_train)],
        "weights": [0.3, 2.0],
        "normalize": normalize,
    }
    dense = tm.top_influences(query, train, **arguments)
    assert_same_bits(dense, tm.top_influences(query_stores, train_stores, **arguments))
    small = least_memory(
        query_stores, train_stores, min(7, num_train), len(set(arguments["groups"]))
    )
    small += 8 * num_train  # the least of a search with groups
    for memory in (small, small + 1000, small + 20_000):
        assert_same_bits(
            dense, tm.top_influences(query_stores, train_stores, **arguments, memory=memory)
        )
    some = tm.top_influences(query_stores, train_stores, **arguments, opponents=False, memory=small)
    assert torch.equal(some.indices, dense.indices)
    assert torch.equal(some.scores, dense.scores)
    scores = tm.influence_scores(query, train, [0.3, 2.0], normalize)
    assert torch.equal(
        scores, tm.influence_scores(query_stores, train_stores, [0.3, 2.0], normalize)
    )


def test_little_memory_takes_several_passes_and_the_error_says_how_much_is_needed(tmp_path):
    _, queries = stored(tmp_path, "query", 40)
    _, trains = stored(tmp_path, "train", 50)
    needed = least_memory(queries, trains, 5)
    counted = []
    tm.top_influences(queries, trains, 5, memory=needed, advance=counted.append)
    assert sum(counted) == 40 * 50
    assert len(counted) > 50  # one training row and at most seventeen queries at a time
    with pytest.raises(ValueError, match=f"memory.*{needed:,}.*40 queries.*got {needed - 1:,}"):
        tm.top_influences(queries, trains, 5, memory=needed - 1)


@pytest.mark.parametrize("count", range(1, 120, 7))
def test_blocks_have_at_least_nine_queries(tmp_path, count):
    """Up to eight queries take another path of the kernel, whose sums round differently."""
    rows = StoreRows(store_of(tmp_path / "rows", features(count, 0)))
    for memory in range(streaming._KERNEL_BYTES + 40_000, streaming._KERNEL_BYTES + 70_000, 3_001):
        search = Search([rows], [rows], 3, [1.0], None, None, 0, torch.device("cpu"))
        try:
            passes = plan_blocks(search, memory).passes
        except ValueError:
            continue
        bounds = [block * count // passes for block in range(passes + 1)]
        sizes = [stop - start for start, stop in itertools.pairwise(bounds)]
        assert sum(sizes) == count
        assert passes == 1 or min(sizes) >= 9


def test_blocks_end_where_shards_do():
    class Ends:
        ends = (4, 8, 9)

    assert block_ranges(Ends(), 3) == [(0, 3), (3, 4), (4, 7), (7, 8), (8, 9)]
    assert block_ranges(TensorRows(features(5, 0)), 9) == [(0, 5)]


def test_rows_chosen_from_several_stores(tmp_path):
    names = [LANGUAGES[row * row % 3] for row in range(50)]
    tensors = {name: features(50, seed) for seed, name in enumerate(LANGUAGES)}
    stores = {name: StoreRows(store_of(tmp_path / name, rows)) for name, rows in tensors.items()}
    merged = torch.stack([tensors[name][row] for row, name in enumerate(names)])
    chosen = ChosenRows(stores, names)
    assert torch.equal(chosen.read(0, 50), merged)
    assert torch.equal(chosen.read(13, 37), merged[13:37])
    assert torch.equal(chosen.take([7, 3, 49]), merged[[7, 3, 49]])
    torch.testing.assert_close(chosen.norms(), merged.norm(dim=1))
    query = features(6, 9)
    assert_same_bits(tm.top_influences(query, merged, 5), tm.top_influences(query, chosen, 5))
    other = ChosenRows(stores, [*names[1:], names[0]])
    assert chosen.key != other.key


def test_without_examples_of_stores(tmp_path):
    query, query_stores = stored(tmp_path, "query", 6)
    train, train_stores = stored(tmp_path, "train", 40)
    groups = [LANGUAGES[row % 3] for row in range(40)]
    left_out = [[1, 30], [], [5], [1, 30], [39], []]
    top = tm.top_influences(query, train, 12, groups)
    assert_same_bits(
        without_examples(top, left_out, query, train, 10, groups),
        without_examples(top, left_out, query_stores, train_stores, 10, groups),
    )


def test_self_influence_is_the_diagonal(tmp_path):
    train, stores = stored(tmp_path, "train", 21)
    expected = tm.influence_scores(train, train, [0.5, 3.0]).diagonal().double()
    for rows in (train, stores):
        actual = tm.self_influence(rows, [0.5, 3.0])
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match=r"features.*\[21, 3\]"):
        tm.self_influence([train[0], train[1][:3]])


def test_stores_of_different_models_are_refused(tmp_path):
    query = store_of(tmp_path / "query", features(3, 0), identity={**IDENTITY, "data": "c"})
    other = store_of(tmp_path / "other", features(9, 0), identity={**IDENTITY, "model": "z"})
    tm.top_influences(query, store_of(tmp_path / "train", features(9, 0)))
    with pytest.raises(ValueError, match=r'model.*"z".*got "a"'):
        tm.top_influences(query, other)


def test_a_damaged_shard_stops_the_search(tmp_path):
    store = store_of(tmp_path / "train", features(40, 0))
    file = tmp_path / "train/shard-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors is damaged"):
        tm.top_influences(features(3, 1), FeatureStore.open(store.path))


# --- interrupted and resumed -------------------------------------------------------------------


class Stopped(Exception):
    pass


def stop_after(count):
    """Return an `advance` that raises at the given call."""
    calls = itertools.count(1)

    def advance(done):
        if next(calls) == count:
            raise Stopped

    return advance


@pytest.fixture
def search(tmp_path, monkeypatch):
    """A search in two passes of many blocks, saved after each."""
    monkeypatch.setattr(streaming, "SAVE_SECONDS", 0)
    query, queries = stored(tmp_path, "query", 26)
    train, trains = stored(tmp_path, "train", 150)
    groups = [LANGUAGES[row % 3] for row in range(150)]
    arguments = {"k": 9, "groups": groups, "weights": [1.0, 0.25], "normalize": "cosine"}
    memory = least_memory(queries, trains, 9, 3)
    dense = tm.top_influences(query, train, **arguments)
    return (
        queries,
        trains,
        {**arguments, "memory": memory, "progress": tmp_path / "progress"},
        dense,
    )


@pytest.mark.parametrize("stop", [1, 2, 60, 151, 299])
def test_a_resumed_search_gives_the_dense_result(search, stop, monkeypatch):
    queries, trains, arguments, dense = search
    with pytest.raises(Stopped):
        top_influences(queries, trains, **arguments, advance=stop_after(stop))
    counted = []
    plain, calls = kernels.top_k_dot, []

    def counting(*args, **named):
        calls.append(named["index_offset"])
        return plain(*args, **named)

    monkeypatch.setattr(kernels, "top_k_dot", counting)
    assert_same_bits(dense, top_influences(queries, trains, **arguments, advance=counted.append))
    assert sum(counted) == 26 * 150
    assert len(calls) <= 300 - stop  # finished work is not repeated
    calls.clear()
    assert_same_bits(dense, top_influences(queries, trains, **arguments))
    assert not calls
    some = top_influences(queries, trains, **arguments, opponents=False)
    assert calls  # progress of a search with opponents is of another result
    assert torch.equal(some.indices, dense.indices)


@pytest.mark.parametrize("more", [7_000, 11_000, 100_000])
def test_a_search_resumed_with_another_memory_gives_the_dense_result(search, more):
    queries, trains, arguments, dense = search
    arguments["memory"] += 5_000
    with pytest.raises(Stopped):
        top_influences(queries, trains, **arguments, advance=stop_after(9))
    for changed in (more, -2_500):
        other = arguments | {"memory": arguments["memory"] + changed}
        assert_same_bits(dense, top_influences(queries, trains, **other))


def test_a_share_without_queries_reads_nothing(tmp_path, monkeypatch):
    _, queries = stored(tmp_path, "query", 7)
    _, trains = stored(tmp_path, "train", 40)
    monkeypatch.setattr(FeatureStore, "read", None)
    groups = [LANGUAGES[row % 3] for row in range(40)]
    top = tm.top_influences(queries, trains, 4, groups, parts=8, part=5)
    assert top.indices.shape == (0, 4)
    assert top.group_shares.shape == (0, 3)


def test_progress_of_another_search_and_damaged_progress_are_ignored(search):
    queries, trains, arguments, dense = search
    top_influences(queries, trains, **arguments)
    other = top_influences(queries, trains, **(arguments | {"weights": [1.0, 1.0]}))
    assert not torch.equal(other.scores, dense.scores)
    for file in arguments["progress"].iterdir():
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 4
        file.write_bytes(data)
    assert_same_bits(dense, top_influences(queries, trains, **arguments))


@pytest.mark.slow
def test_kill_9_at_twenty_random_moments(search, tmp_path):
    queries, trains, arguments, dense = search
    script = textwrap.dedent(f"""
        import os, random, signal, time, torch
        from pathlib import Path
        torch.set_num_threads(1)
        from tracmod.influence import streaming
        from tracmod.influence.scores import top_influences
        from tracmod.features.store import FeatureStore
        streaming.SAVE_SECONDS = 0
        paths = {[[str(store.path) for store in side] for side in (queries, trains)]!r}
        arguments = {arguments | {"progress": str(arguments["progress"])}!r}
        arguments["progress"] = Path(arguments["progress"])
        random.seed(0)
        killed = 0
        for _ in range(20):
            child = os.fork()
            if child == 0:
                stores = [[FeatureStore.open(path) for path in side] for side in paths]
                top_influences(*stores, **arguments, advance=lambda _: time.sleep(0.03))
                os._exit(0)
            time.sleep(0.05 + 0.3 * random.random())
            os.kill(child, signal.SIGKILL)
            killed += os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        print(killed)
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 20
    assert_same_bits(dense, top_influences(queries, trains, **arguments))


@pytest.mark.slow
def test_memory_stays_within_the_limit(tmp_path):
    """A store of 400 MB is searched with 100 MB."""
    script = textwrap.dedent(f"""
        import re, torch
        from pathlib import Path
        torch.set_num_threads(1)
        import tracmod as tm
        from tracmod.features.store import FeatureStore

        def held(field):
            status = Path("/proc/self/status").read_text()
            return 1024 * int(re.search(field + r":\\s*(\\d+) kB", status)[1])

        folder = Path({str(tmp_path)!r})
        with FeatureStore.create(folder / "train", ids=[str(row) for row in range(200_000)],
                                 dim=512, identity={{}}) as train:
            for shard in range(train.num_shards):
                torch.manual_seed(shard)
                train.write_shard(shard, torch.randn(len(train.shard_range(shard)), 512))
        query = torch.randn(60, 512)
        tm.top_influences(query[:5], query, 3)  # the first call loads the kernel
        Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
        before = held("VmRSS")
        tm.top_influences(query, FeatureStore.open(folder / "train"), 100, memory=100_000_000)
        print(held("VmHWM") - before)
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout) < 100_000_000
