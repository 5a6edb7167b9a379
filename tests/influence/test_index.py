"""InfluenceIndex: the neighbours of brute force, measured recall, and errors by argument."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

faiss = pytest.importorskip("faiss")

from tracmod.features.store import FeatureStore  # noqa: E402
from tracmod.files.durable import seal  # noqa: E402
from tracmod.influence.index import KINDS, InfluenceIndex, _new_index, factory_string  # noqa: E402

IDENTITY = {"projection": {"dim": 12, "seed": 0}, "model": "m", "data": "train"}
WEIGHTS = [0.5, 2.0]
DIMS = [12, 7]


def features(count: int, seed: int = 0) -> list[Tensor]:
    """Two checkpoints; rows of very different norms around a few directions, as gradients are."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.Generator().manual_seed(99)
    sizes = torch.exp(torch.randn(count, 1, generator=generator))
    topics = torch.randint(10, (count,), generator=generator)
    return [
        sizes
        * (
            torch.randn(10, dim, generator=centres)[topics]
            + 0.5 * torch.randn(count, dim, generator=generator)
        )
        for dim in DIMS
    ]


def brute_force(
    trains: list[Tensor], queries: list[Tensor], normalize: str | None = None
) -> np.ndarray:
    """(Q, N) float64: the formula, written out."""
    total = np.zeros((len(queries[0]), len(trains[0])))
    for weight, train, query in zip(WEIGHTS, trains, queries, strict=True):
        product = query.double().numpy() @ train.double().numpy().T
        if normalize == "cosine":
            query_norm = np.linalg.norm(query.double().numpy(), axis=1)
            train_norm = np.linalg.norm(train.double().numpy(), axis=1)
            scale = np.outer(query_norm, train_norm)
            product = np.divide(product, scale, out=np.zeros_like(product), where=scale > 0)
        total += weight * product
    return total


def stores(path: Path, parts: list[Tensor], data: str = "train") -> list[FeatureStore]:
    made = []
    for checkpoint, rows in enumerate(parts):
        with FeatureStore.create(
            path / f"checkpoint-{checkpoint}",
            ids=[f"{data}-{row}" for row in range(len(rows))],
            dim=rows.shape[1],
            identity=IDENTITY | {"model": f"m{checkpoint}", "data": data},
            shard_rows=100,
        ) as store:
            for shard in store.missing_shards():
                store.write_shard(shard, rows[store.shard_range(shard)])
        made.append(FeatureStore.open(store.path))
    return made


@pytest.mark.parametrize("normalize", [None, "cosine"])
@pytest.mark.parametrize("opponents", [False, True])
@pytest.mark.parametrize("count", [1, 3, 31, 1025])
def test_flat_equals_brute_force(count: int, opponents: bool, normalize: str | None) -> None:
    trains, queries = features(count), features(9, seed=1)
    queries[0][4] = 0  # its cosine is 0
    index = InfluenceIndex.build(trains, weights=WEIGHTS, normalize=normalize)
    assert index.recall["proponents"] == index.recall["opponents"] == 1
    k = min(5, count)
    scores, indices = index.search(queries, k, opponents=opponents)
    exact = brute_force(trains, queries, normalize)
    expected = np.sort(exact, axis=1)[:, :k] if opponents else -np.sort(-exact, axis=1)[:, :k]
    np.testing.assert_allclose(scores.numpy(), expected, rtol=2e-5, atol=1e-5)
    at_indices = np.take_along_axis(exact, indices.numpy(), axis=1)
    np.testing.assert_allclose(at_indices, expected, rtol=2e-5, atol=1e-5)


def test_features_of_any_dtype_at_one_checkpoint() -> None:
    train, query = features(50)[0].bfloat16(), features(4, seed=1)[0].half()
    scores, indices = InfluenceIndex.build([train]).search([query], 3)
    exact = query.float() @ train.float().T
    assert torch.equal(indices, exact.topk(3).indices)
    torch.testing.assert_close(scores, exact.topk(3).values)


def test_stores_and_tensors_give_the_same(tmp_path: Path) -> None:
    trains, queries = features(230), features(7, seed=1)
    from_stores = InfluenceIndex.build(stores(tmp_path / "train", trains), weights=WEIGHTS)
    assert from_stores.ids[229] == "train-229"
    neighbours = from_stores.search(stores(tmp_path / "query", queries, "test"), 20)
    expected = InfluenceIndex.build(trains, weights=WEIGHTS).search(queries, 20)
    assert torch.equal(neighbours.scores, expected.scores)
    assert torch.equal(neighbours.indices, expected.indices)


@pytest.mark.parametrize(("kind", "least"), [("sq8", 0.9), ("ivf", 0.95), ("hnsw", 0.85)])
@pytest.mark.parametrize("normalize", [None, "cosine"])
def test_recall_of_the_inexact_kinds(kind: str, least: float, normalize: str | None) -> None:
    trains, queries = features(3000), features(64, seed=1)
    index = InfluenceIndex.build(
        trains, kind=kind, weights=WEIGHTS, normalize=normalize, queries=queries
    )
    assert index.recall["k"] == 100
    assert index.recall["queries"] == 64
    for sign, name in [(1, "proponents"), (-1, "opponents")]:
        assert index.recall[name] >= least, index.recall
        exact = np.argsort(-sign * brute_force(trains, queries, normalize))[:, :100]
        nearest = index.search(queries, 100, opponents=sign < 0).indices.numpy()
        shares = [len({*a} & {*b}) / 100 for a, b in zip(exact, nearest, strict=True)]
        assert np.mean(shares) == pytest.approx(index.recall[name], abs=2e-3)


def test_a_higher_recall_takes_more_effort() -> None:
    trains, queries = features(3000), features(64, seed=1)
    low, high = (
        InfluenceIndex.build(trains, kind="ivf", queries=queries, recall=recall)
        for recall in (0.3, 1.0)
    )
    assert 0 < low.effort < high.effort <= high.index.nlist
    assert 0.3 <= low.recall["opponents"] < high.recall["opponents"]
    assert high.recall["proponents"] > 0.99


def test_recall_of_ivfpq() -> None:
    index = InfluenceIndex.build(features(3000), kind="ivfpq", queries=features(64, seed=1))
    assert index.recall["proponents"] > 0.5, index.recall
    assert index.index.code_size == 3  # 19 numbers padded to 24, 8 of them a byte


@pytest.mark.parametrize("kind", KINDS)
def test_building_repeats_and_a_file_keeps_it(kind: str, tmp_path: Path) -> None:
    trains, queries = features(600), features(5, seed=1)
    languages = ["en", "sw", "zh"] * 200
    built = [
        InfluenceIndex.build(trains, kind=kind, weights=WEIGHTS, languages=languages)
        for _ in range(2)
    ]
    built[0].save(tmp_path / "index")
    loaded = InfluenceIndex.load(tmp_path / "index")
    for other in (built[1], loaded):
        for opponents in (False, True):
            one = built[0].search(queries, 30, opponents=opponents)
            two = other.search(queries, 30, opponents=opponents)
            assert torch.equal(one.scores, two.scores)
            assert torch.equal(one.indices, two.indices)
    assert (loaded.ids, loaded.languages, loaded.recall) == (
        built[0].ids,
        languages,
        built[0].recall,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_filter_by_language(kind: str) -> None:
    trains, queries = features(900), features(5, seed=1)
    languages = ["en", "sw", "zh"] * 300
    index = InfluenceIndex.build(trains, kind=kind, weights=WEIGHTS, languages=languages)
    scores, indices = index.search(queries, 10, languages=["sw", "zh"])
    rows = indices[indices >= 0].tolist()
    assert len(rows) >= 25
    assert {languages[row] for row in rows} <= {"sw", "zh"}
    if kind == "flat":
        exact = torch.from_numpy(brute_force(trains, queries)).float()
        exact[:, [row for row in range(900) if languages[row] == "en"]] = -torch.inf
        torch.testing.assert_close(scores, exact.topk(10).values, rtol=2e-5, atol=1e-5)


def test_places_without_an_example() -> None:
    index = InfluenceIndex.build(features(3), weights=WEIGHTS, languages=["en", "en", "sw"])
    scores, indices = index.search(features(2), 5)
    assert (indices[:, 3:] == -1).all()
    assert (scores[:, 3:] == -torch.inf).all()
    scores, indices = index.search(features(2), 2, opponents=True, languages=["sw"])
    assert indices.tolist() == [[2, -1], [2, -1]]
    assert (scores[:, 1] == torch.inf).all()
    assert index.search([rows[:0] for rows in features(2)], 5).scores.shape == (0, 5)


def test_training_with_little_memory_uses_a_small_sample() -> None:
    small = InfluenceIndex.build(features(5000), kind="ivf", memory=1)
    assert small.recall["proponents"] > 0.3  # trained on 256 rows


def test_training_round_by_round_is_faiss_own_training() -> None:
    rows = features(3000)[0][:, :8].contiguous()
    own = _new_index("ivf", len(rows), rows.shape[1], seed=0)
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(torch.get_num_threads())
    own.train(rows.numpy())
    own.add(rows.numpy())
    faiss.omp_set_num_threads(threads)
    built = InfluenceIndex.build([rows], kind="ivf").index
    assert np.array_equal(faiss.serialize_index(built), faiss.serialize_index(own))


@pytest.mark.parametrize("normalize", [None, "cosine"])
def test_codes_are_as_good_for_small_gradients_and_learning_rates(normalize: str | None) -> None:
    trains, queries = features(3000), features(64, seed=1)
    recalls = []
    for size in (1.0, 2.0**-20):
        index = InfluenceIndex.build(
            [rows * size for rows in trains],
            kind="ivfpq",
            weights=[weight * size for weight in WEIGHTS],
            normalize=normalize,
            queries=[rows * size for rows in queries],
        )
        recalls.append(index.recall)
    assert recalls[1]["proponents"] == pytest.approx(recalls[0]["proponents"], abs=0.01)
    assert recalls[1]["opponents"] == pytest.approx(recalls[0]["opponents"], abs=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_the_stated_bytes_are_those_of_the_file(kind: str, tmp_path: Path) -> None:
    index = InfluenceIndex.build(features(2000), kind=kind)
    index.save(tmp_path)
    # The file also has a size before each list, and HNSW's probabilities of levels.
    stated = 2000 * index.bytes_per_example + index.fixed_bytes
    assert stated == pytest.approx((tmp_path / "index.faiss").stat().st_size, abs=2500)
    assert index.seconds.keys() == {"train", "add", "measure"}


def test_a_missing_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match=r"device.*got tpu"):
        InfluenceIndex.build(features(10), device="tpu")
    with pytest.raises(ValueError, match=r"device.*got cuda:97"):
        InfluenceIndex.build(features(10), kind="ivf", device="cuda:97")


@pytest.mark.parametrize("kind", KINDS)
def test_centres_on_a_gpu_give_the_index_of_the_cpu(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU is simulated by the CPU, and its uses are counted."""
    used: list[tuple[int, int]] = []

    def to_gpu(resources: object, number: int, centres: object) -> object:
        used.append((number, centres.ntotal))  # type: ignore[attr-defined]
        return faiss.clone_index(centres)

    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 2)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", to_gpu, raising=False)
    trains = features(600)
    if kind not in ("ivf", "ivfpq"):
        with pytest.raises(ValueError, match=rf"device.*cuda.*{kind}"):
            InfluenceIndex.build(trains, kind=kind, device="cuda")
        return
    gpu, cpu = (InfluenceIndex.build(trains, kind=kind, device=d) for d in ("cuda:1", "cpu"))
    assert used == [(1, 0), (1, gpu.index.nlist)]
    assert np.array_equal(faiss.serialize_index(gpu.index), faiss.serialize_index(cpu.index))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recall": 1.5}, r"recall.*got 1\.5"),
        ({"kind": "lsh"}, r"kind.*flat, sq8, ivf, ivfpq, hnsw.*'lsh'"),
        ({"kind": "ivfpq"}, r"ivfpq.*256.*got 10"),
        ({"weights": [1.0, -1.0]}, r"weights.*\[1.0, -1.0\]"),
        ({"weights": [1.0, float("nan")]}, r"weights.*\[1.0, nan\]"),
        ({"weights": [1.0]}, r"weights.*\b2\b.*got 1"),
        ({"normalize": "l2"}, r"normalize.*'l2'"),
        ({"ids": ["a"]}, r"ids.*\b10\b.*got 1"),
        ({"languages": ["en"]}, r"languages.*\b10\b.*got 1"),
        ({"queries": [torch.zeros(1, 3)] * 2}, r"queries.*\[12, 7\].*\[3, 3\]"),
    ],
)
def test_wrong_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InfluenceIndex.build(features(10), **arguments)


@pytest.mark.parametrize(
    ("trains", "message"),
    [
        ([], "training examples.*one per checkpoint"),
        (torch.zeros(3, 4), "training examples.*one per checkpoint"),
        ([torch.zeros(3)], r"got shape \(3,\)"),
        ([torch.zeros(3, 4), torch.zeros(2, 4)], r"training examples.*got \[3, 2\]"),
        ([torch.zeros(0, 4)], r"training examples.*\b1\b.*got 0"),
        ([torch.tensor([[1.0], [float("nan")]])], r"row 1\b.*finite"),
    ],
)
def test_wrong_features(trains: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InfluenceIndex.build(trains)


def test_wrong_searches() -> None:
    index = InfluenceIndex.build(features(10), weights=WEIGHTS, languages=["en", "sw"] * 5)
    queries = features(2)
    with pytest.raises(ValueError, match=r"k.*\b1\b.*got 0"):
        index.search(queries, 0)
    with pytest.raises(ValueError, match=r"queries.*\[12, 7\].*got \[7, 12\]"):
        index.search(queries[::-1], 1)
    with pytest.raises(ValueError, match=r"languages.*en, sw.*got zh"):
        index.search(queries, 1, languages=["en", "zh"])
    with pytest.raises(ValueError, match=r"languages.*'en'"):
        index.search(queries, 1, languages="en")
    with pytest.raises(ValueError, match="languages"):
        InfluenceIndex.build(features(10)).search(queries, 1, languages=["en"])
    queries[1][1, 3] = torch.inf
    with pytest.raises(ValueError, match=r"row 1\b.*finite"):
        index.search(queries, 1)


def test_queries_of_another_model_are_refused(tmp_path: Path) -> None:
    trains = stores(tmp_path / "train", [features(30)[0]] * 2)
    InfluenceIndex.build(trains).save(tmp_path / "index")
    index = InfluenceIndex.load(tmp_path / "index")
    queries = stores(tmp_path / "query", [features(3)[0]] * 2, "test")
    assert index.search(queries, 2).indices.shape == (3, 2)
    with pytest.raises(ValueError, match=r'checkpoint 0.*model.*"m0".*"m1"'):
        index.search(queries[::-1], 2)
    with pytest.raises(ValueError, match=r"checkpoint-0.*ids"):
        InfluenceIndex.build([trains[0], queries[1]][:1], ids=[str(row) for row in range(30)])


def test_an_index_of_other_features_or_weights_is_refused(tmp_path: Path) -> None:
    trains = stores(tmp_path / "train", features(30))
    index = InfluenceIndex.build(trains, weights=WEIGHTS, normalize="cosine")
    index.check_built_from(trains, WEIGHTS, "cosine")
    changed = stores(tmp_path / "changed", features(30), "other data")
    for arguments, message in [
        ((trains, WEIGHTS), r'normalize.*null.*"cosine"'),
        ((trains, None, "cosine"), r"weights.*\[1.0, 1.0\].*\[0.5, 2.0\]"),
        ((changed, WEIGHTS, "cosine"), r'checkpoint 0.data.*"other data".*"train"'),
        ((trains[:1], WEIGHTS[:1], "cosine"), r"checkpoint 1.*null"),
    ]:
        with pytest.raises(ValueError, match=message):
            index.check_built_from(*arguments)


def test_damaged_missing_and_newer_files_are_refused(tmp_path: Path) -> None:
    InfluenceIndex.build(features(30), weights=WEIGHTS).save(tmp_path)
    good = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert set(good) == {"index.faiss", "index.json"}
    for name, data in good.items():
        for position in range(0, len(data), max(1, len(data) // 50)):
            bad = bytearray(data)
            bad[position] ^= 4
            (tmp_path / name).write_bytes(bad)
            with pytest.raises(ValueError, match=f"{name} is damaged"):
                InfluenceIndex.load(tmp_path)
        (tmp_path / name).unlink()
        with pytest.raises(ValueError, match=rf"{tmp_path}.*{name}"):
            InfluenceIndex.load(tmp_path)
        (tmp_path / name).write_bytes(data)
    meta = json.loads(good["index.json"]) | {"version": 2}
    del meta["sha256"]
    (tmp_path / "index.json").write_bytes(seal(meta))
    with pytest.raises(ValueError, match=r"index.json.*version 1.*version 2"):
        InfluenceIndex.load(tmp_path)


def test_factory_strings_follow_the_number_of_rows() -> None:
    assert factory_string("ivf", 1, 8) == "IVF1,Flat"
    assert factory_string("ivf", 1000, 8) == "IVF25,Flat"
    assert factory_string("ivfpq", 10**6, 4096) == "IVF4000,PQ512x8"
    for kind in KINDS:
        faiss.index_factory(16, factory_string(kind, 1000, 16), faiss.METRIC_INNER_PRODUCT)


@pytest.mark.parametrize("order", ["import torch, faiss", "import faiss, torch"])
def test_faiss_and_torch_work_in_one_process_in_either_order(order: str) -> None:
    script = f"""
{order}
torch.set_num_threads(2)
x = torch.randn(4000, 64)
index = faiss.index_factory(64, "IVF16,Flat", faiss.METRIC_INNER_PRODUCT)
for _ in range(3):
    index.train(x.numpy()), index.add(x.numpy())
    y = x @ x[:500].T
    index.search(x[:50].numpy(), 5)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=100)


def test_without_faiss_the_error_says_what_to_install() -> None:
    script = "import sys; sys.modules['faiss'] = None; import tracmod.influence.index"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "ImportError" in result.stderr
    assert "pip install faiss-cpu" in result.stderr
