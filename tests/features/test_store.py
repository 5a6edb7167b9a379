"""FeatureStore: what is read is what was written, whatever happened in between."""

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import made_stores
import pytest
import torch
from made_stores import (
    DIM,
    GROWN,
    IDENTITY,
    contents,
    create,
    fill,
    grown,
    made,
    merge,
    names,
    part,
    parts,
    rows_of,
)
from safetensors import safe_open

from tracmod.features.shards import Shards
from tracmod.features.store import FeatureStore, verify_store
from tracmod.files import durable
from tracmod.files.durable import canonical_json, identity_differences, seal
from tracmod.files.object_storage import Location, location

SUPPORT = str(Path(made_stores.__file__).parent)  # for child processes


@pytest.fixture(params=["disk", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Location) -> Iterator[Location]:
    """The location of stores: a folder, or object storage in the memory of this process."""
    if request.param == "disk":
        yield tmp_path
        return
    bucket = location(f"memory://{tmp_path.name}")
    yield bucket
    if bucket.exists():
        bucket.fs.rm(bucket.key, recursive=True)


def dequantised(rows: torch.Tensor) -> torch.Tensor:
    """Quantize to int8 and restore, number by number."""
    restored = torch.zeros_like(rows)
    for row, numbers in enumerate(rows.tolist()):
        largest = torch.tensor(max(map(abs, numbers)))
        if largest > 0:
            step = largest / torch.tensor(127.0)
            codes = [round(float(torch.tensor(x) * (127.0 / largest))) for x in numbers]
            restored[row] = torch.tensor([float(code) for code in codes]) * step
    return restored


def read_all(path: Location) -> tuple[list[str], torch.Tensor]:
    store = FeatureStore.open(path)
    return store.ids, store.read()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("count", [0, 1, 3, 4, 31, 33, 127])
def test_reads_what_was_written(root: Location, count: int, dtype: str) -> None:
    path = made(root / "s", count, dtype=dtype, shard_rows=32)
    store = FeatureStore.open(path, IDENTITY)
    assert store.dtype == getattr(torch, dtype)
    is_int8 = dtype == "int8"
    expected = dequantised(rows_of(count)) if is_int8 else rows_of(count).to(store.dtype)
    assert store.complete
    assert store.verify() == []
    assert (len(store), store.dim, store.ids) == (count, DIM, names(count))
    assert torch.equal(store.read(), expected)
    norms = torch.linalg.vector_norm(expected.double(), dim=1).float()
    torch.testing.assert_close(store.norms(), norms, rtol=1e-7, atol=0)


def test_int8_rows_are_off_by_half_a_step_at_most(tmp_path: Path) -> None:
    rows = rows_of(4) * torch.tensor([[1e-30], [1.0], [1e30], [0.0]])
    with create(tmp_path / "s", 4, dtype="int8") as store:
        store.write_shard(0, rows)
    step = rows.abs().amax(dim=1, keepdim=True) / 127
    assert torch.all((store.read() - rows).abs() <= step * (0.5 + 2**-15))
    assert torch.equal(store.read()[3], torch.zeros(DIM))
    assert store.norms()[3] == 0


def test_an_int8_shard_is_codes_scales_and_norms(tmp_path: Path) -> None:
    path = made(tmp_path / "s", dtype="int8")
    with safe_open(path / "shard-00002.safetensors", "pt") as shard:
        assert sorted(shard.keys()) == ["features", "norms", "scales"]
        codes, scales = shard.get_tensor("features"), shard.get_tensor("scales")
        assert (codes.dtype, codes.abs().amax(dim=1).tolist()) == (torch.int8, [127, 127])
        assert torch.equal(codes * scales[:, None], FeatureStore.open(path).read(8))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_take_gives_rows_by_number(root: Location, dtype: str) -> None:
    store = grown(root / "s", [10, 11, 23], dtype=dtype)
    for rows in [[], [0], [22, 0, 10, 9, 11, 9, 22], list(range(23))]:
        assert torch.equal(store.take(rows), store.read()[rows])
        assert torch.equal(store.take(torch.tensor(rows, dtype=torch.int32)), store.read()[rows])
    for wrong, message in [([0, 23], "row 23 of"), ([-1], "row -1 of"), ([0.5], "float"),
                           ([True], "bool"), (3, "int64")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            store.take(wrong)


def test_take_reads_only_the_shards_that_hold_the_rows(root: Location) -> None:
    path = made(root / "s")
    (path / "shard-00001.safetensors").unlink()
    store = FeatureStore.open(path)
    assert torch.equal(store.take([9, 0]), rows_of(10)[[9, 0]])
    with pytest.raises(ValueError, match="shard-00001"):
        store.take([4])


def test_slices_are_those_of_a_list(root: Location) -> None:
    store = FeatureStore.open(made(root / "s"))
    for rows in [slice(None), slice(3, 7), slice(7, 3), slice(-2, None), slice(1, 99, 3)]:
        assert torch.equal(store[rows], rows_of(10)[rows])
    assert torch.equal(store[::-1], rows_of(10).flip(0))
    with pytest.raises(TypeError, match="expected a slice, got 0"):
        list(store)  # type: ignore[call-overload]


@pytest.mark.parametrize("block", [1, 3, 4, 8, 9, 100])
def test_blocks_and_slices_are_the_rows_in_order(root: Location, block: int) -> None:
    store = FeatureStore.open(made(root / "s", 31))
    starts = [start for start, _ in store.blocks(block)]
    assert starts == list(range(0, 31, block))
    assert torch.equal(torch.cat([rows for _, rows in store.blocks(block)]), rows_of(31))
    for start, stop in [(0, 0), (31, 31), (3, 5), (0, 4), (7, 30)]:
        assert torch.equal(store.read(start, stop), rows_of(31)[start:stop])
        assert torch.equal(store.norms(start, stop), store.norms()[start:stop])


def test_a_file_cannot_be_changed_through_what_was_read(root: Location) -> None:
    store = FeatureStore.open(made(root / "s"))
    store.read(0, 4).zero_()
    assert torch.equal(store.read(), rows_of(10))
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


def test_files_do_not_depend_on_the_order_of_writing(root: Location) -> None:
    with create(root / "backwards") as store:
        for shard in reversed(range(3)):
            rows = store.shard_range(shard)
            store.write_shard(shard, rows_of(10)[rows.start : rows.stop])
    assert contents(root / "backwards") == contents(made(root / "forwards"))


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
    """Simulates kill -9: no exception handler of the store may run."""


@pytest.mark.parametrize(
    ("start", "work", "files"),
    [
        (lambda path: None, made, 2 + 3),
        (lambda path: grown(path, [10]), lambda path: grown(path, [17]), 2 + 2),
        (lambda path: parts(path.parent), merge, 2 + 5),
    ],
    ids=["make", "grow", "merge"],
)
def test_resumes_after_a_kill_between_any_two_steps(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    start: Callable[[Path], Any],
    work: Callable[[Path], Any],
    files: int,
) -> None:
    start(tmp_path / "undisturbed")
    work(tmp_path / "undisturbed")
    undisturbed = contents(tmp_path / "undisturbed")
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
        start(path)
        before = contents(path) if path.exists() else {}
        steps_left = kill_at
        with monkeypatch.context() as patch:
            patch.setattr(durable.os, "fsync", stopping(os.fsync))
            patch.setattr(durable.os, "replace", stopping(os.replace))
            try:
                work(path)
                break
            except Killed:
                killed += 1
        gc.collect()  # releases the lock of the killed writer
        for temporary in path.glob(".*.tmp"):  # it may have been killed before it was complete
            temporary.write_bytes(half_written(temporary.read_bytes()))
        for problem in verify_store(path):
            assert "is missing" in problem or "no manifest.json" in problem
        now = contents(path) if path.exists() else {}
        assert {name for name in before if now[name] != before[name]} <= {"manifest.json"}
        work(path)
        assert contents(path) == undisturbed
    # Flush the parent folder; then for each file: flush it, rename it, flush the folder.
    assert killed == 1 + files * 3


WRITER = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from made_stores import fill, create
from pathlib import Path
store = create(Path(sys.argv[1]), 400, shard_rows=8)
print("ready", flush=True)
fill(store)
"""
GROWER = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from made_stores import grown
from pathlib import Path
print("ready", flush=True)
grown(Path(sys.argv[1]), [23], shard_rows=1)
"""
MERGER = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from made_stores import merge
from pathlib import Path
print("ready", flush=True)
merge(Path(sys.argv[1]))
"""


@pytest.mark.parametrize(
    ("script", "start", "work"),
    [
        (WRITER, lambda path: None, lambda path: made(path, 400, shard_rows=8)),
        (
            GROWER,
            lambda path: path.exists() or grown(path, [3], shard_rows=1),
            lambda path: grown(path, [23], shard_rows=1),
        ),
        (MERGER, lambda path: parts(path.parent, 100, shard_rows=1), merge),
    ],
    ids=["make", "grow", "merge"],
)
def test_kill_9_at_random_moments(
    tmp_path: Path, script: str, start: Callable[[Path], Any], work: Callable[[Path], Any]
) -> None:
    start(tmp_path / "undisturbed")
    work(tmp_path / "undisturbed")
    undisturbed = contents(tmp_path / "undisturbed")
    command = [
        sys.executable,
        "-c",
        script,
        str(tmp_path / "s"),
        SUPPORT,
    ]
    start(tmp_path / "s")
    for moment in random.Random(0).sample(range(50), 3):
        writer = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(moment / 1000)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        if (tmp_path / "s" / "manifest.json").exists():
            assert all("is missing" in problem for problem in verify_store(tmp_path / "s"))
    work(tmp_path / "s")
    assert contents(tmp_path / "s") == undisturbed


def test_a_second_writer_is_refused_until_the_first_is_done(tmp_path: Path) -> None:
    first = create(tmp_path / "s")
    with pytest.raises(ValueError, match="is being written by another"):
        create(tmp_path / "s")
    fill(first)
    assert FeatureStore.open(tmp_path / "s").complete  # readers need no lock
    first.close()
    with pytest.raises(ValueError, match="/s is open for reading"):
        first.write_shard(0, rows_of(10)[:4])
    create(tmp_path / "s").close()


def test_a_refused_writer_releases_the_lock_even_if_its_error_is_referenced(tmp_path: Path) -> None:
    made(tmp_path / "s")
    with pytest.raises(ValueError, match="parameters") as refused:
        create(tmp_path / "s", identity=IDENTITY | {"parameters": "all"})
    create(tmp_path / "s").close()
    assert refused.value.__traceback__ is not None  # its frames refer to the lock


def test_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER + "\nimport time; time.sleep(60)"]
    writer = subprocess.Popen(
        [*command, str(tmp_path / "s"), SUPPORT],
        stdout=subprocess.PIPE,
    )
    assert writer.stdout is not None
    writer.stdout.readline()
    with pytest.raises(ValueError, match="is being written by another"):
        create(tmp_path / "s", 400, shard_rows=8)
    writer.kill()
    writer.wait()
    writer.stdout.close()
    create(tmp_path / "s", 400, shard_rows=8).close()


@pytest.mark.parametrize(
    "name",
    [
        "manifest.json",
        "ids.json",
        "ids-1.json",
        "shard-00001.safetensors",
        "shard-00003.safetensors",
    ],
)
def test_one_flipped_bit_anywhere_is_found_and_never_used(root: Location, name: str) -> None:
    path = grown(root / "s", [10, 17]).path
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


def test_a_damaged_shard_is_written_anew(root: Location) -> None:
    path = made(root / "s")
    good = contents(path)
    for name in ["shard-00000.safetensors", "shard-00002.safetensors", "ids.json"]:
        (path / name).write_bytes(good[name][:-3] + b"???")
    with create(path) as store:
        assert store.missing_shards() == [0, 2]
        fill(store)
    assert contents(path) == good


@pytest.mark.parametrize("size", [0, 1, 7, 8, 100, -1])
def test_truncated_shard(root: Location, size: int) -> None:
    path = made(root / "s")
    file = path / "shard-00001.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    [problem] = verify_store(path)
    assert str(file) in problem
    assert "bytes" in problem
    store = FeatureStore.open(path)
    assert torch.equal(store.read(0, 4), rows_of(10)[:4])
    with pytest.raises(ValueError, match="shard-00001"):
        store.read()


def test_shards_of_another_store_or_number_are_refused(root: Location) -> None:
    path = made(root / "s", 12)
    other = made(root / "other", 12, identity=IDENTITY | {"model": "d" * 64})
    shard = path / "shard-00001.safetensors"
    for wrong in [path / "shard-00000.safetensors", other / "shard-00001.safetensors"]:
        shard.write_bytes(wrong.read_bytes())
        assert "another store" in verify_store(path)[0]
        with pytest.raises(ValueError, match="another store"):
            FeatureStore.open(path).read()


def test_errors_name_a_missing_shard(root: Location) -> None:
    path = made(root / "s")
    (path / "shard-00002.safetensors").unlink()
    assert verify_store(path) == [f"{path}/shard-00002.safetensors is missing"]
    with pytest.raises(ValueError, match=r"shard-00002\.safetensors is missing"):
        FeatureStore.open(path).norms()


def test_files_that_do_not_belong_to_the_store_are_named(tmp_path: Path) -> None:
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


def test_a_folder_with_other_content_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"thesis\.tex"):
        create(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]
    path = made(tmp_path / "s")
    (path / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"shard-00000\.safetensors.*manifest"):
        create(path)


def test_newer_version_and_no_store(root: Location) -> None:
    path = made(root / "s")
    manifest = json.loads((path / "manifest.json").read_bytes()) | {"version": 3}
    (path / "manifest.json").write_bytes(canonical_json(manifest))
    for attempt in [lambda: FeatureStore.open(path), lambda: create(path)]:
        with pytest.raises(ValueError, match=r"manifest\.json: .*version 2 .*version 3"):
            attempt()
    assert "version 3" in verify_store(path)[0]
    with pytest.raises(ValueError, match="no feature store at"):
        FeatureStore.open(root)
    (path / "manifest.json").write_bytes(seal({"format": "something"}))
    with pytest.raises(ValueError, match=r"manifest\.json"):
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
def test_errors_name_what_differs_in_another_run(
    root: Location, changes: dict, message: str
) -> None:
    path = made(root / "s")
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_names_its_example(
    tmp_path: Path, value: float, dtype: str
) -> None:
    with create(tmp_path / "s", dtype=dtype) as store:
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
        ({"ids": ["a", "b", "a"]}, "ids .*row 2: 'a'"),
        ({"ids": ["a", 7]}, "ids .*row 1: .*string.*, got 7"),
        ({"dim": 0}, "dim .*1, got 0"),
        ({"shard_rows": 0}, "shard_rows .*1, got 0"),
        ({"dtype": "int4"}, "dtype .*float32, bfloat16, float16, int8, got 'int4'"),
        ({"identity": {"x": float("nan")}}, "identity .*JSON"),
        ({"identity": {"x": torch.float32}}, "identity .*JSON"),
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
    with pytest.raises(ValueError, match=r"rows.*got 0"):
        next(store.blocks(0))


# --- Growing and merging ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_grown_store_is_its_rows_in_order_and_keeps_what_was_there(
    tmp_path: Path, dtype: str
) -> None:
    path = tmp_path / "s"
    grown(path, [10], dtype=dtype)
    before, times = contents(path), {file: file.stat().st_mtime_ns for file in path.iterdir()}
    store = grown(path, [11, 23], dtype=dtype)
    assert store.verify() == []
    assert store.ids == FeatureStore.open(path).ids == names(23)
    whole = made(tmp_path / "whole", 23, dtype=dtype)
    assert torch.equal(store.read(), FeatureStore.open(whole).read())
    assert torch.equal(store.norms(), FeatureStore.open(whole).norms())
    assert [len(store.shard_range(shard)) for shard in range(7)] == [4, 4, 2, 1, 4, 4, 4]
    assert store.identity["data"] == ["0-10", "10-11", "11-23"]
    assert len(FeatureStore.open(path, store.identity)) == 23
    with pytest.raises(
        ValueError, match=r'data: expected "0-10", got \["0-10", "10-11", "11-23"\]'
    ):
        FeatureStore.open(path, IDENTITY | {"data": "0-10"})
    for block in (1, 3, 4, 9):
        blocks = [rows for _, rows in store.blocks(block)]
        assert torch.equal(torch.cat(blocks), store.read())
    del before["manifest.json"], times[path / "manifest.json"]
    assert before.items() <= contents(path).items()
    assert times == {file: file.stat().st_mtime_ns for file in times}


def test_manifests_say_version_2_only_where_version_1_could_not_read_them(tmp_path: Path) -> None:
    def version(path: Path) -> int:
        return json.loads((path / "manifest.json").read_bytes())["version"]

    assert version(made(tmp_path / "float")) == 1
    assert version(made(tmp_path / "int8", dtype="int8")) == 2
    assert version(grown(tmp_path / "grown", [10]).path) == 1
    assert version(grown(tmp_path / "grown", [17]).path) == 2


def test_a_reader_keeps_its_rows_while_the_store_grows(tmp_path: Path) -> None:
    reader = grown(tmp_path / "s", [10])
    grown(tmp_path / "s", [17])
    assert torch.equal(reader.read(), rows_of(GROWN)[:10])
    assert (len(reader), reader.verify()) == (10, [])


def test_appended_rows_are_missing_until_they_are_written(tmp_path: Path) -> None:
    path = made(tmp_path / "s")
    with create(path) as store:
        store.append(["x", "y"], data="d")
        assert store.missing_shards() == [3]
        assert (len(store), store.ids) == (12, [*names(10), "x", "y"])
    assert verify_store(path) == [f"{path}/shard-00003.safetensors is missing"]
    with create(
        path, ids=[*names(10), "x", "y"], identity=IDENTITY | {"data": ["c" * 64, "d"]}
    ) as store:
        store.write_shard(3, torch.ones(2, DIM))
        assert store.complete


@pytest.mark.parametrize(
    ("ids", "data", "message"),
    [
        (["x", "zh-é-3\n"], None, r"/s .*'zh-é-3\\n'"),
        (["x", "x"], None, "ids .*row 1: 'x'"),
        (["x", 3], None, "ids .*row 1: .*string.*, got 3"),
        ([], None, "rows to append .*got none"),
        (["x"], float("nan"), "identity .*JSON"),
    ],
)
def test_a_wrong_append_leaves_the_store_as_it_was(
    root: Location, ids: list, data: object, message: str
) -> None:
    path = made(root / "s")
    before = contents(path)
    with create(path) as store:
        with pytest.raises(ValueError, match=message):
            store.append(ids, data)
        assert len(store) == 10
    assert contents(path) == before
    with pytest.raises(ValueError, match="/s is open for reading"):
        FeatureStore.open(path).append(["x"])


def test_a_disk_that_is_full_at_an_append_leaves_the_store_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = made(tmp_path / "s")
    manifest = (path / "manifest.json").read_bytes()
    for allowed in (0, 1):  # replacements before the disk is full: of no file, of ids-1.json
        left = allowed

        def full(source: Path, target: Path, replace: Callable = os.replace) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            replace(source, target)

        with create(path) as store, monkeypatch.context() as patch:
            patch.setattr(durable.os, "replace", full)
            with pytest.raises(OSError, match="No space left on device"):
                store.append(["x"])
            assert (len(store), store.complete) == (10, True)
        assert (path / "manifest.json").read_bytes() == manifest
        assert verify_store(path) == []


def test_two_writers_cannot_append(tmp_path: Path) -> None:
    path = grown(tmp_path / "s", [10]).path
    data = IDENTITY | {"data": "0-10"}
    with create(path, identity=data), pytest.raises(ValueError, match="is being written by"):
        grown(path, [17])
    assert len(grown(path, [17])) == 17


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": names(9)}, "num_rows: expected 9, got 17"),
        ({"ids": [*names(16), "x", "y"]}, "ids_sha256: expected"),
        ({"ids": ["x", *names(20)[1:]]}, "ids_sha256: expected"),
        ({"data": lambda start, stop: f"{start}+{stop}"}, "identity.data: expected"),
        ({"data": lambda start, stop: "changed" if start else "0-10"}, "identity.data: expected"),
        ({"identity": IDENTITY | {"model": "e"}}, 'identity.model: expected "e"'),
        ({"dtype": "int8"}, 'dtype: expected "int8", got "float32"'),
        ({"shard_rows": 8}, "shard_rows: expected 8, got 4"),
    ],
)
def test_a_store_does_not_grow_where_its_rows_have_changed(
    root: Location, changes: dict, message: str
) -> None:
    path = grown(root / "s", [10, 17]).path
    before = contents(path)
    arguments: dict = {"ids": names(23), "data": "{}-{}".format, "identity": IDENTITY} | changes
    with pytest.raises(ValueError, match=message):
        FeatureStore.grow(path, **{"dim": DIM, "shard_rows": 4} | arguments)
    assert contents(path) == before
    with pytest.raises(ValueError, match="num_rows: expected 10, got 17"):
        create(path)


def test_growing_resumes_missing_shards_of_every_segment(root: Location) -> None:
    undisturbed = contents(grown(root / "undisturbed", [10, 11, 23]).path)
    path = grown(root / "s", [10, 11]).path
    for shard in (1, 3):
        (path / f"shard-{shard:05d}.safetensors").unlink()
    (path / "ids-1.json").unlink()
    grown(path, [23])
    assert contents(path) == undisturbed


def test_shards_of_another_growth_of_the_same_rows_are_refused(tmp_path: Path) -> None:
    store, other = (grown(tmp_path / name, [10]).path for name in ("store", "other"))
    for path, name in ((store, "x"), (other, "y")):
        with create(path, identity=IDENTITY | {"data": "0-10"}) as writer:
            writer.append([name])
            writer.write_shard(3, torch.ones(1, DIM))
    (store / "shard-00003.safetensors").write_bytes(
        (other / "shard-00003.safetensors").read_bytes()
    )
    assert "another store" in verify_store(store)[0]


def test_linking_takes_the_segments_that_are_the_same(root: Location) -> None:
    donor = grown(root / "donor", [10, 17]).path
    with create(root / "s", identity=IDENTITY | {"data": "0-10"}) as store:
        assert store.link_shards(donor) == 3
        store.append(names(17)[10:], "10-17")
        assert store.link_shards(donor) == 2
        store.append(["x"], "17-18")
        assert store.link_shards(donor) == 0
        assert store.missing_shards() == [5]
    with create(root / "t", identity=IDENTITY | {"data": "0-10"}) as store:
        store.append(names(17)[10:], "another")
        assert store.link_shards(donor) == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_a_merged_store_is_the_rows_of_its_parts_bit_by_bit(root: Location, dtype: str) -> None:
    sources = parts(root, 31, dtype=dtype)
    done: list[int] = []
    merged = FeatureStore.merge(root / "s", sources, done.append)
    assert merged.verify() == []
    assert merged.ids == names(31)
    assert merged.identity == IDENTITY | {"data": ["0", "10", "15"]}
    assert sum(done) == 31
    stores = [FeatureStore.open(source) for source in sources]
    assert torch.equal(merged.read(), torch.cat([store.read() for store in stores]))
    assert torch.equal(merged.norms(), torch.cat([store.norms() for store in stores]))
    assert contents(merged.path) == contents(
        made(root / "t", 31, dtype=dtype, identity=merged.identity)
    )


def test_merging_resumes_and_reads_one_shard_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = parts(tmp_path)
    undisturbed = contents(FeatureStore.merge(tmp_path / "undisturbed", sources).path)
    path = FeatureStore.merge(tmp_path / "s", sources).path
    for shard in (1, 4):
        (path / f"shard-{shard:05d}.safetensors").unlink()
    read: list[int] = []
    rows_of_shards = Shards.rows

    def counted(self: Shards, name: str, start: int, stop: int) -> torch.Tensor:
        read.append(stop - start)
        return rows_of_shards(self, name, start, stop)

    monkeypatch.setattr(Shards, "rows", counted)
    FeatureStore.merge(path, sources)
    assert contents(path) == undisturbed
    assert sum(read) == 2 * (4 + 1)  # features and norms of the two shards
    assert max(read) <= 4


def test_stores_that_cannot_be_merged_are_refused_before_anything_is_written(
    root: Location,
) -> None:
    sources = parts(root)
    int8 = part(root / "int8", 0, 3, 5, dtype="int8")
    other = part(root / "other", 0, 3, 5, identity=IDENTITY | {"model": "e"})
    with pytest.raises(ValueError, match=r'/int8 .*: dtype: expected "float32"'):
        FeatureStore.merge(root / "s", [*sources, int8])
    with pytest.raises(ValueError, match=r'/other .*: model: expected "a'):
        FeatureStore.merge(root / "s", [*sources, other])
    with pytest.raises(ValueError, match=r"part-0 and .*part-0 .*'zh-é-0"):
        FeatureStore.merge(root / "s", [*sources, sources[0]])
    with pytest.raises(ValueError, match=r"stores .*got none"):
        FeatureStore.merge(root / "s", [])
    with pytest.raises(ValueError, match="no feature store at"):
        FeatureStore.merge(root / "s", [*sources, root])
    (sources[2] / "shard-00001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors is missing"):
        FeatureStore.merge(root / "s", sources)
    assert not (root / "s").exists()
    with pytest.raises(ValueError, match=r"/other .*identity"):
        FeatureStore.merge(other, sources[:2])


def test_a_damaged_part_is_not_merged(tmp_path: Path) -> None:
    sources = parts(tmp_path)
    file = sources[1] / "shard-00000.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"{file} is damaged"):
        FeatureStore.merge(tmp_path / "s", sources)
    file.write_bytes(good)
    assert FeatureStore.merge(tmp_path / "s", sources).verify() == []


def test_verifying_reports_the_bytes_of_every_shard(tmp_path: Path) -> None:
    path = grown(tmp_path / "s", [10, 17]).path
    sizes: list[int] = []
    assert verify_store(path, sizes.append) == []
    assert sizes == [file.stat().st_size for file in sorted(path.glob("shard-*"))]


def write_ones(store: FeatureStore) -> None:
    for shard in range(store.num_shards):
        store.write_shard(shard, torch.ones(len(store.shard_range(shard)), store.dim))


def assert_disk_full_is_survived(store: FeatureStore) -> None:
    """Write shards until one does not fit, and check that the others are sound."""
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
