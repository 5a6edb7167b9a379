"""FeatureStore: what is read is what was written, whatever happened between."""

from __future__ import annotations

import errno
import gc
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tracmod import durable
from tracmod.durable import canonical_json, seal
from tracmod.store import FeatureStore, identity_differences, verify_store

IDENTITY = {
    "projection": {"dim": 5, "kind": "rademacher", "seed": 0},
    "parameters": "encoder",
    "head_mask": None,
    "model": "a" * 64,
    "tokenizer": "b" * 64,
    "data": "c" * 64,
}
DIM = 5


def names(count: int) -> list[str]:
    return [f"zh-é-{row}\n" for row in range(count)]


def rows_of(count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, DIM, generator=generator).to(dtype)


def create(path: Path, count: int = 10, shard_rows: int = 4, **changes: object) -> FeatureStore:
    arguments: dict = {"ids": names(count), "dim": DIM, "identity": IDENTITY} | changes
    return FeatureStore.create(path, shard_rows=shard_rows, **arguments)


def fill(store: FeatureStore) -> None:
    features = rows_of(store.num_rows)
    for shard in store.missing_shards():
        rows = store.shard_range(shard)
        store.write_shard(shard, features[rows.start : rows.stop])


def made(path: Path, count: int = 10, **arguments: object) -> Path:
    with create(path, count, **arguments) as store:
        fill(store)
    return path


def read_all(path: Path) -> tuple[list[str], torch.Tensor]:
    store = FeatureStore.open(path)
    return store.ids, store.read()


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("count", [0, 1, 3, 4, 31, 33, 127])
def test_reads_what_was_written(tmp_path: Path, count: int, dtype: str) -> None:
    path = made(tmp_path / "s", count, dtype=dtype, shard_rows=32)
    store = FeatureStore.open(path, IDENTITY)
    expected = rows_of(count).to(store.dtype)
    assert store.complete
    assert store.verify() == []
    assert (len(store), store.dim, store.ids) == (count, DIM, names(count))
    assert torch.equal(store.read(), expected)
    norms = torch.linalg.vector_norm(expected.double(), dim=1).float()
    torch.testing.assert_close(store.norms(), norms, rtol=1e-7, atol=0)


@pytest.mark.parametrize("block", [1, 3, 4, 8, 9, 100])
def test_blocks_and_slices_are_the_rows_in_order(tmp_path: Path, block: int) -> None:
    store = FeatureStore.open(made(tmp_path / "s", 31))
    starts = [start for start, _ in store.blocks(block)]
    assert starts == list(range(0, 31, block))
    assert torch.equal(torch.cat([rows for _, rows in store.blocks(block)]), rows_of(31))
    for start, stop in [(0, 0), (31, 31), (3, 5), (0, 4), (7, 30)]:
        assert torch.equal(store.read(start, stop), rows_of(31)[start:stop])
        assert torch.equal(store.norms(start, stop), store.norms()[start:stop])


def test_a_shard_is_mapped_and_the_file_cannot_be_changed_through_it(tmp_path: Path) -> None:
    store = FeatureStore.open(made(tmp_path / "s"))
    store.read(0, 4).zero_()
    assert verify_store(store.path) == []
    assert torch.equal(FeatureStore.open(store.path).read(), rows_of(10))


def test_any_float_dtype_is_taken_and_norms_are_of_the_stored_rows(tmp_path: Path) -> None:
    with create(tmp_path / "s", 2, dtype="bfloat16") as store:
        store.write_shard(0, torch.full((2, DIM), 1.001, dtype=torch.float64))
        assert torch.equal(store.norms(), torch.full((2,), DIM**0.5))


def test_shards_are_plain_safetensors(tmp_path: Path) -> None:
    with safe_open(made(tmp_path / "s") / "shard-00002.safetensors", "pt") as shard:
        assert sorted(shard.keys()) == ["features", "norms"]
        assert torch.equal(shard.get_tensor("features"), rows_of(10)[8:])


def test_files_do_not_depend_on_the_order_of_writing(tmp_path: Path) -> None:
    with create(tmp_path / "backwards") as store:
        for shard in reversed(range(3)):
            rows = store.shard_range(shard)
            store.write_shard(shard, rows_of(10)[rows.start : rows.stop])
    assert contents(tmp_path / "backwards") == contents(made(tmp_path / "forwards"))


# --- Resuming and faults ----------------------------------------------------------------------


def test_resuming_writes_only_what_is_missing(tmp_path: Path) -> None:
    path = made(tmp_path / "s")
    before = (path / "shard-00000.safetensors").stat().st_mtime_ns
    (path / "shard-00001.safetensors").unlink()
    with create(path) as store:
        assert store.missing_shards() == [1]
        assert not store.complete
        fill(store)
        assert store.complete
    assert (path / "shard-00000.safetensors").stat().st_mtime_ns == before


class Killed(BaseException):
    """Stands for kill -9: no handler of the store may run on it."""


def test_killed_between_any_two_steps_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = contents(made(tmp_path / "undisturbed"))
    steps_left = 0

    def stopping(step):  # type: ignore[no-untyped-def]
        def call(*arguments):  # type: ignore[no-untyped-def]
            nonlocal steps_left
            steps_left -= 1
            if steps_left < 0:
                raise Killed
            return step(*arguments)

        return call

    def half_written(data: bytes) -> bytes:
        return data[: len(data) // 2]

    killed = 0
    for kill_at in range(1000):
        path = tmp_path / f"kill-{kill_at}"
        steps_left = kill_at
        with monkeypatch.context() as patch:
            patch.setattr(durable.os, "fsync", stopping(os.fsync))
            patch.setattr(durable.os, "replace", stopping(os.replace))
            try:
                made(path)
                break
            except Killed:
                killed += 1
        gc.collect()  # the dead writer's lock
        for temporary in path.glob(".*.tmp"):  # it may have got less far than the name
            temporary.write_bytes(half_written(temporary.read_bytes()))
        for problem in verify_store(path):
            assert "is missing" in problem or "no manifest.json" in problem
        assert contents(made(path)) == undisturbed
    assert killed == 1 + 5 * 3  # flush the parent folder; for 5 files: flush, rename, flush folder


WRITER = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from test_store import fill, create
from pathlib import Path
store = create(Path(sys.argv[1]), 400, shard_rows=8)
print("ready", flush=True)
fill(store)
"""


def test_kill_9_at_random_moments(tmp_path: Path) -> None:
    undisturbed = contents(made(tmp_path / "undisturbed", 400, shard_rows=8))
    command = [sys.executable, "-c", WRITER, str(tmp_path / "s"), str(Path(__file__).parent)]
    for moment in random.Random(0).sample(range(50), 3):
        writer = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(moment / 1000)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        assert all("is missing" in problem for problem in verify_store(tmp_path / "s"))
    made(tmp_path / "s", 400, shard_rows=8)
    assert contents(tmp_path / "s") == undisturbed


def test_a_second_writer_is_refused_until_the_first_is_done(tmp_path: Path) -> None:
    first = create(tmp_path / "s")
    with pytest.raises(ValueError, match="is being written by another"):
        create(tmp_path / "s")
    fill(first)
    assert FeatureStore.open(tmp_path / "s").complete  # readers need no lock
    first.close()
    with pytest.raises(ValueError, match="open for reading"):
        first.write_shard(0, rows_of(10)[:4])
    create(tmp_path / "s").close()


def test_a_writer_that_was_refused_lets_go_even_if_its_error_is_kept(tmp_path: Path) -> None:
    made(tmp_path / "s")
    with pytest.raises(ValueError, match="parameters") as kept:
        create(tmp_path / "s", identity=IDENTITY | {"parameters": "all"})
    create(tmp_path / "s").close()
    assert kept.value.__traceback__ is not None  # its frames hold what create had opened


def test_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER + "\nimport time; time.sleep(60)"]
    writer = subprocess.Popen(
        [*command, str(tmp_path / "s"), str(Path(__file__).parent)], stdout=subprocess.PIPE
    )
    assert writer.stdout is not None
    writer.stdout.readline()
    with pytest.raises(ValueError, match="is being written by another"):
        create(tmp_path / "s", 400, shard_rows=8)
    writer.kill()
    writer.wait()
    writer.stdout.close()
    create(tmp_path / "s", 400, shard_rows=8).close()


@pytest.mark.parametrize("name", ["manifest.json", "ids.json", "shard-00001.safetensors"])
def test_one_flipped_bit_anywhere_is_found_and_never_used(tmp_path: Path, name: str) -> None:
    path = made(tmp_path / "s")
    file = path / name
    good = file.read_bytes()
    chance = random.Random(1)
    every_header_byte = range(min(len(good), 320))
    for position in [*every_header_byte, *(chance.randrange(len(good)) for _ in range(100))]:
        bad = bytearray(good)
        bad[position] ^= 1 << chance.randrange(8)
        file.write_bytes(bad)
        assert any(str(file) in problem for problem in verify_store(path)), position
        with pytest.raises(ValueError, match=name):
            read_all(path)
    file.write_bytes(good)
    assert verify_store(path) == []


def test_a_damaged_shard_is_written_anew(tmp_path: Path) -> None:
    path = made(tmp_path / "s")
    good = contents(path)
    for name in ["shard-00000.safetensors", "shard-00002.safetensors", "ids.json"]:
        (path / name).write_bytes(good[name][:-3] + b"???")
    with create(path) as store:
        assert store.missing_shards() == [0, 2]
        fill(store)
    assert contents(path) == good


@pytest.mark.parametrize("size", [0, 1, 7, 8, 100, -1])
def test_truncated_shard(tmp_path: Path, size: int) -> None:
    path = made(tmp_path / "s")
    file = path / "shard-00001.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    [problem] = verify_store(path)
    assert str(file) in problem
    assert "bytes" in problem
    store = FeatureStore.open(path)
    assert torch.equal(store.read(0, 4), rows_of(10)[:4])
    with pytest.raises(ValueError, match="shard-00001"):
        store.read()


def test_shards_of_another_store_or_place_are_refused(tmp_path: Path) -> None:
    path = made(tmp_path / "s", 12)
    other = made(tmp_path / "other", 12, identity=IDENTITY | {"model": "d" * 64})
    shard = path / "shard-00001.safetensors"
    for wrong in [path / "shard-00000.safetensors", other / "shard-00001.safetensors"]:
        shard.write_bytes(wrong.read_bytes())
        assert "shard of another store or place" in verify_store(path)[0]
        with pytest.raises(ValueError, match="another store or place"):
            FeatureStore.open(path).read()


def test_missing_shard_is_named(tmp_path: Path) -> None:
    path = made(tmp_path / "s")
    (path / "shard-00002.safetensors").unlink()
    assert verify_store(path) == [f"{path}/shard-00002.safetensors is missing"]
    with pytest.raises(ValueError, match=r"shard-00002\.safetensors is missing"):
        FeatureStore.open(path).norms()


def test_foreign_files_are_named(tmp_path: Path) -> None:
    path = made(tmp_path / "s")
    for name in ["notes.txt", "shard-00003.safetensors", "shard-000001.safetensors"]:
        (path / name).write_text("x")
    (path / "folder").mkdir()
    (path / ".shard-00001.safetensors.tmp").write_text("of a killed writer: never read")
    assert [problem.split()[0].rsplit("/", 1)[1] for problem in verify_store(path)] == [
        "folder",
        "notes.txt",
        "shard-000001.safetensors",
        "shard-00003.safetensors",
    ]


def test_a_folder_that_holds_something_else_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"not empty \(thesis\.tex"):
        create(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]
    path = made(tmp_path / "s")
    (path / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"shard-00000.safetensors is there\) and has no manifest"):
        create(path)


def test_newer_version_and_no_store(tmp_path: Path) -> None:
    path = made(tmp_path / "s")
    manifest = json.loads((path / "manifest.json").read_bytes()) | {"version": 2}
    (path / "manifest.json").write_bytes(canonical_json(manifest))
    for attempt in [lambda: FeatureStore.open(path), lambda: create(path)]:
        with pytest.raises(ValueError, match="format version 2, this tracmod reads version 1"):
            attempt()
    assert "format version 2" in verify_store(path)[0]
    with pytest.raises(ValueError, match="no feature store at"):
        FeatureStore.open(tmp_path)
    (path / "manifest.json").write_bytes(seal({"format": "something"}))
    with pytest.raises(ValueError, match="not the manifest of a feature store"):
        FeatureStore.open(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"identity": IDENTITY | {"model": "e" * 64}}, 'identity.model: expected "e{64}", got "a'),
        ({"identity": IDENTITY | {"tokenizer": None}}, 'identity.tokenizer: expected null, got "b'),
        ({"identity": IDENTITY | {"data": "f"}}, 'identity.data: expected "f", got "c'),
        (
            {"identity": IDENTITY | {"projection": {"dim": 5, "kind": "sjlt", "seed": 0}}},
            'identity.projection.kind: expected "sjlt", got "rademacher"',
        ),
        ({"dim": 6}, "dim: expected 6, got 5"),
        ({"dtype": "float16"}, 'dtype: expected "float16", got "float32"'),
        ({"shard_rows": 3}, "shard_rows: expected 3, got 4"),
        ({"ids": names(9)}, "num_rows: expected 9, got 10"),
        ({"ids": [*names(9), "x"]}, "ids_sha256: expected"),
    ],
)
def test_another_run_is_refused_with_what_differs(
    tmp_path: Path, changes: dict, message: str
) -> None:
    path = made(tmp_path / "s")
    before = contents(path)
    with pytest.raises(ValueError, match=message):
        create(path, **changes)
    if "identity" in changes:
        with pytest.raises(ValueError, match=message.removeprefix("identity.")):
            FeatureStore.open(path, changes["identity"])
    assert contents(path) == before


def test_identity_differences() -> None:
    assert identity_differences(IDENTITY, IDENTITY) == []
    other = IDENTITY | {"data": "x", "parameters": "all"}
    assert identity_differences(other, IDENTITY, ignore=["data"]) == [
        'parameters: expected "all", got "encoder"'
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_names_its_example(tmp_path: Path, value: float) -> None:
    with create(tmp_path / "s") as store:
        features = rows_of(10)[4:8]
        features[2, 3] = value
        with pytest.raises(ValueError, match=r"example 'zh-é-6\\n'"):
            store.write_shard(1, features)
        assert store.missing_shards() == [0, 1, 2]


def test_a_row_too_large_for_the_dtype_names_its_example(tmp_path: Path) -> None:
    with (
        create(tmp_path / "s", dtype="float16") as store,
        pytest.raises(ValueError, match=r"example 'zh-é-1\\n'.* too large for torch.float16"),
    ):
        store.write_shard(0, rows_of(10)[:4] * torch.tensor([[1.0], [1e6], [1.0], [1e6]]))


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(3, DIM), r"expected 4 x 5 floats, got \(3, 5\)"),
        (torch.zeros(4, DIM + 1), r"got \(4, 6\)"),
        (torch.zeros(4, DIM, dtype=torch.int64), "of torch.int64"),
    ],
)
def test_wrong_shard(tmp_path: Path, features: torch.Tensor, message: str) -> None:
    with create(tmp_path / "s") as store:
        with pytest.raises(ValueError, match=message):
            store.write_shard(0, features)
        with pytest.raises(ValueError, match="shard 3 of"):
            store.write_shard(3, rows_of(4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": ["a", "b", "a"]}, "each once, 'a' is there again, row 2"),
        ({"ids": ["a", 7]}, "expected strings, row 1 is 7"),
        ({"dim": 0}, "at least 1, got 0"),
        ({"shard_rows": 0}, "at least 1, got 5 and 0"),
        ({"dtype": "int4"}, "expected float32, bfloat16, float16, got 'int4'"),
        ({"identity": {"x": float("nan")}}, "JSON cannot hold it"),
        ({"identity": {"x": torch.float32}}, "JSON cannot hold it"),
    ],
)
def test_wrong_arguments_leave_no_folder(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create(tmp_path / "s", **changes)
    assert not (tmp_path / "s").exists()


def test_wrong_ranges(tmp_path: Path) -> None:
    store = FeatureStore.open(made(tmp_path / "s"))
    for start, stop in [(-1, 3), (5, 4), (0, 11)]:
        with pytest.raises(ValueError, match="it has 10 rows"):
            store.read(start, stop)
    with pytest.raises(ValueError, match="blocks of 0 rows"):
        next(store.blocks(0))


def write_ones(store: FeatureStore) -> None:
    for shard in range(store.num_shards):
        store.write_shard(shard, torch.ones(len(store.shard_range(shard)), store.dim))


def assert_disk_full_is_survived(store: FeatureStore) -> None:
    """Writes shards until one does not fit; the others are still sound."""
    with pytest.raises(OSError, match="No space left on device") as full:
        write_ones(store)
    missing = store.missing_shards()
    assert missing == list(range(missing[0], store.num_shards))
    assert full.value.errno == errno.ENOSPC
    assert f"cannot write {store.path}/shard-{missing[0]:05d}" in str(full.value)
    assert len(verify_store(store.path)) == len(missing)
    assert not list(store.path.glob(".*.tmp"))


def test_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with create(tmp_path / "s") as store:
        syncs = 0

        def full(descriptor: int) -> None:
            nonlocal syncs
            syncs += 1
            if syncs > 2:
                raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(durable.os, "fsync", full)
            assert_disk_full_is_survived(store)
        fill(store)
        assert store.verify() == []


def test_disk_full_for_real(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("a small file system cannot be mounted here")
    try:
        with create(small / "s", 4000, dim=500, shard_rows=100) as store:
            assert_disk_full_is_survived(store)
        (small / "s" / "shard-00000.safetensors").unlink()
        with create(small / "s", 4000, dim=500, shard_rows=100) as store:
            assert store.missing_shards()[0] == 0
            store.write_shard(0, torch.ones(100, 500))
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_opening_a_thousand_shards_is_quick(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(durable.os, "fsync", lambda descriptor: None)
        path = made(tmp_path / "s", 1000, shard_rows=1)
    start = time.perf_counter()
    store = FeatureStore.open(path, IDENTITY)
    assert len(store.ids) == 1000
    assert time.perf_counter() - start < 0.2
