"""Object storage: stores, runs and commands with URLs, and drivers that fail."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from click.testing import CliRunner
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import known_implementations
from made_stores import IDENTITY, contents, create, fill, grown, made, merge, parts, rows_of
from tiny_study import RESULTS, files_of, tiny_config

from tracmod.attribution.query import Attributor
from tracmod.cli import main
from tracmod.features.collector import Collector
from tracmod.features.rows import StoreRows
from tracmod.features.store import FeatureStore, verify_store
from tracmod.files.durable import sha256
from tracmod.files.object_storage import ObjectPath, location
from tracmod.influence.scores import top_influences
from tracmod.study.pipeline import run_stages
from tracmod.study.plan import plan_run
from tracmod.study.run_folder import RunFolder
from tracmod.study.sweep import load_sweep
from tracmod.validation.integrity import verify


class DriverError(Exception):
    """Stands for exceptions that drivers pass on and that are no OSError (NoCredentialsError)."""


class FlakyFileSystem(MemoryFileSystem):
    """Object storage in memory that fails on demand and records what is fetched."""

    protocol = "flaky"
    fails: dict[str, Exception]  # operation -> the exception that it raises
    puts_left: int  # before puts fail
    fetched: list[str]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("flaky://"))

    def _may_fail(self, operation: str) -> None:
        if operation in self.fails:
            raise self.fails[operation]

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        FlakyFileSystem.puts_left -= 1
        if self.puts_left < 0:
            self._may_fail("put")
        super().pipe_file(path, value, mode, **options)

    def cat_file(self, path: str, *arguments: Any, **options: Any) -> bytes:
        self._may_fail("get")
        self.fetched.append(path.rpartition("/")[2])
        return super().cat_file(path, *arguments, **options)

    def info(self, path: str, **options: Any) -> Any:
        self._may_fail("info")
        return super().info(path, **options)

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        self._may_fail("list")
        return super().ls(path, detail, **options)


@pytest.fixture(autouse=True)
def empty_storage() -> Iterator[None]:
    """Object storage in memory is shared by the process; begin each test without objects."""
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    FlakyFileSystem.fails, FlakyFileSystem.puts_left, FlakyFileSystem.fetched = {}, 0, []
    MemoryFileSystem.store.clear()
    yield
    MemoryFileSystem.store.clear()


def bucket(name: str = "") -> ObjectPath:
    path = location(f"flaky://bucket{name}")
    assert isinstance(path, ObjectPath)
    return path


def flip(file: ObjectPath) -> None:
    """Flip one bit of the last byte."""
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


# --- Locations -------------------------------------------------------------------------------


def test_a_path_stays_a_path_and_file_urls_are_the_path_they_name(tmp_path: Path) -> None:
    assert location("runs/x") == location(Path("runs/x")) == Path("runs/x")
    assert location(f"file://{tmp_path}/x") == location(f"local://{tmp_path}/x/") == tmp_path / "x"
    assert str(location("memory://bucket/x/")) == "memory://bucket/x"
    assert location(bucket("/x")) == bucket() / "x" == (bucket() / "x/y").parent


def test_errors_name_an_invalid_url() -> None:
    with pytest.raises(ValueError, match="gopher://bucket/x: Protocol not known: gopher"):
        FeatureStore.open("gopher://bucket/x")
    with pytest.raises(ValueError, match=r"s3:/bucket/x: expected a path"):
        FeatureStore.open(Path("s3://bucket/x"))


def test_errors_name_a_driver_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = {"class": "no_such_driver.FileSystem", "err": "Install no-such-driver to access it"}
    monkeypatch.setitem(known_implementations, "absent", entry)
    with pytest.raises(ValueError, match="absent://bucket/x: Install no-such-driver to access it"):
        FeatureStore.open("absent://bucket/x")
    run = RunFolder(tmp_path / "run", tiny_config(collect={"features": "absent://bucket/x"}))
    for begin in (run_stages, plan_run):  # before anything is trained
        with pytest.raises(ValueError, match="Install no-such-driver"):
            begin(run)
    assert not run.path.exists()


def test_an_object_path_lists_what_a_folder_would(tmp_path: Path) -> None:
    for folder in (tmp_path, bucket()):
        assert list(folder.iterdir() if folder.exists() else []) == []
        made(folder / "a", 3)
        made(folder / "b" / "c", 3)
        assert sorted(entry.name for entry in folder.iterdir()) == ["a", "b"]
        stores = sorted(
            str(file.parent).removeprefix(f"{folder}/") for file in folder.rglob("ids.json")
        )
        assert stores == ["a", "b/c"]
        assert not (folder / "b").is_file()
        assert (folder / "b").exists()
        assert not (folder / "b/d").exists()


# --- A store ---------------------------------------------------------------------------------


def test_a_store_is_the_same_bytes_on_disk_and_on_object_storage(tmp_path: Path) -> None:
    on_disk = contents(grown(tmp_path / "s", [10, 17], dtype="int8").path)
    del on_disk["writer.lock"]
    assert contents(grown(bucket("/s"), [10, 17], dtype="int8").path) == on_disk


def test_a_shard_is_fetched_once_for_all_of_its_blocks() -> None:
    store = FeatureStore.open(made(bucket("/s"), 31))
    FlakyFileSystem.fetched.clear()
    assert torch.equal(torch.cat([block for _, block in store.blocks(1)]), rows_of(31))
    every = [f"shard-{shard:05d}.safetensors" for shard in range(8)]
    assert FlakyFileSystem.fetched == every
    for rows in ([0, 4, 1, 5], [0], [4]):  # two shards are cached; a third replaces the older one
        store.take(rows)
    assert FlakyFileSystem.fetched == [*every, every[0], every[1]]
    store.take([8])
    store.take([4])
    store.take([0])
    assert FlakyFileSystem.fetched[10:] == [every[2], every[0]]


def test_a_shard_that_is_written_anew_is_read_anew() -> None:
    with create(bucket("/s")) as store:
        fill(store)
        store.read()
        store.write_shard(0, torch.ones(4, 5))
        assert torch.equal(store.read(0, 4), torch.ones(4, 5))
        assert torch.equal(store.read(4), rows_of(10)[4:])


def test_a_shard_that_is_damaged_between_two_reads_is_not_used() -> None:
    store = FeatureStore.open(made(bucket("/s")))
    store.read()
    shard = bucket("/s/shard-00000.safetensors")
    flip(shard)
    with pytest.raises(ValueError, match=r"flaky://bucket/s/shard-00000.* is damaged"):
        store.read(0, 1)
    assert verify_store("flaky://bucket/s")[0].startswith(f"{shard} is damaged")


def test_two_writers_of_one_store_do_no_harm_and_of_another_are_refused() -> None:
    with create(bucket("/s")) as first, create(bucket("/s")) as second:
        first.write_shard(0, rows_of(10)[:4])
        assert second.missing_shards() == [1, 2]
        fill(second)
        fill(first)
        with pytest.raises(ValueError, match=r"flaky://bucket/s .*identity\.model"):
            create(bucket("/s"), identity=IDENTITY | {"model": "e"})
    assert torch.equal(FeatureStore.open(bucket("/s")).read(), rows_of(10))
    with pytest.raises(ValueError, match="flaky://bucket/s is open for reading"):
        first.write_shard(0, rows_of(10)[:4])


def test_two_that_begin_different_stores_at_once_never_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of them saw a manifest, and the second replaces that of the first."""
    first = create(bucket("/s"))
    manifest = bucket("/s/manifest.json").read_bytes()
    bucket("/s/manifest.json").unlink()
    with create(bucket("/s"), identity=IDENTITY | {"model": "e"}) as second:
        first.write_shard(0, rows_of(10)[:4])
        assert second.missing_shards() == [0, 1, 2]
        assert "shard of another store" in verify_store(bucket("/s"))[0]
        fill(second)
    assert verify_store(bucket("/s")) == []
    with pytest.raises(ValueError, match=r"flaky://bucket/s .*model: expected"):
        FeatureStore.open(bucket("/s"), IDENTITY)
    assert bucket("/s/manifest.json").read_bytes() != manifest


def test_shards_are_copied_between_disk_and_storage_both_ways(tmp_path: Path) -> None:
    for source, target in [(tmp_path / "a", bucket("/a")), (bucket("/b"), bucket("/c")),
                           (bucket("/d"), tmp_path / "d")]:  # fmt: skip
        made(source)
        with create(target) as store:
            assert store.link_shards(source) == 3
            assert store.complete
        assert torch.equal(FeatureStore.open(target).read(), rows_of(10))


def test_a_search_counts_what_is_fetched_and_kept(tmp_path: Path) -> None:
    shard = 4 * 5 * 4  # rows, dim, bytes
    on_disk, fetched = (
        StoreRows(FeatureStore.open(made(folder / "s"))) for folder in (tmp_path, bucket())
    )
    assert (on_disk.mapped_bytes, on_disk.kept_bytes) == (shard, 0)
    assert (fetched.mapped_bytes, fetched.kept_bytes) == (2 * shard, 2 * shard)
    assert on_disk.key == fetched.key == sha256((tmp_path / "s/manifest.json").read_bytes())
    with pytest.raises(ValueError, match="memory: expected at least"):
        top_influences(rows_of(3), fetched, 2, memory=1000)
    expected = top_influences(rows_of(3), on_disk, 2)
    assert torch.equal(top_influences(rows_of(3), fetched, 2).indices, expected.indices)


# --- Failing storage -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("reset by peer"),
        DriverError("no credentials"),
        FileNotFoundError("no such bucket"),
    ],
)
@pytest.mark.parametrize(
    ("start", "work"),
    [
        (lambda path: None, made),
        (lambda path: grown(path, [10]), lambda path: grown(path, [17])),
        (lambda path: parts(path.parent), lambda path: merge_of(path)),
    ],
    ids=["make", "grow", "merge"],
)
def test_a_failed_put_names_the_url_and_the_same_call_resumes(
    start: Callable[[ObjectPath], Any], work: Callable[[ObjectPath], Any], error: Exception
) -> None:
    start(bucket("/undisturbed/s"))
    work(bucket("/undisturbed/s"))
    undisturbed = contents(bucket("/undisturbed/s"))
    for puts in range(1000):
        path = bucket(f"/after-{puts}/s")
        start(path)
        before = contents(path)
        FlakyFileSystem.fails, FlakyFileSystem.puts_left = {"put": error}, puts
        try:
            work(path)
            break
        except OSError as failed:
            message = str(failed)
        assert f"cannot write {path}/" in message
        assert str(error) in message
        FlakyFileSystem.fails = {}
        for problem in verify_store(path):
            assert "is missing" in problem or "no manifest.json" in problem
        now = contents(path)
        assert {name for name in before if now[name] != before[name]} <= {"manifest.json"}
        work(path)
        assert contents(path) == undisturbed
    assert puts == len(undisturbed.keys() - before.keys()) + ("manifest.json" in before) >= 4


def merge_of(path: ObjectPath) -> None:
    folders = [folder for folder in path.parent.iterdir() if folder.name.startswith("part-")]
    FeatureStore.merge(path, sorted(folders, key=str))


@pytest.mark.parametrize("operation", ["get", "info", "list"])
@pytest.mark.parametrize("error", [TimeoutError(), DriverError("throttled")])
def test_unreadable_storage_is_not_treated_as_empty(operation: str, error: Exception) -> None:
    path = made(bucket("/s"))
    before = contents(path)
    store = FeatureStore.open(path)
    FlakyFileSystem.fails = {operation: error}
    if operation != "list":
        with pytest.raises(OSError, match=r"cannot read flaky://bucket/s/manifest\.json"):
            FeatureStore.open(path)
    if operation == "get":
        cause = "TimeoutError" if isinstance(error, TimeoutError) else "throttled"
        with pytest.raises(OSError, match=f"cannot read flaky://bucket/s/shard-00000.*: {cause}"):
            store.read()
    with pytest.raises(OSError, match=r"cannot .* flaky://bucket/s"):
        create(path, identity=IDENTITY | {"model": "e"})
    FlakyFileSystem.fails = {}
    assert contents(path) == before


# --- Commands --------------------------------------------------------------------------------


def invoke(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def test_merge_and_verify_take_urls(tmp_path: Path) -> None:
    sources = parts(tmp_path)
    out = "flaky://bucket/merged"
    assert "17 examples of 3 stores" in invoke("merge", *sources, "--out", out)
    assert invoke("verify", out) == f"{out}: sound\n"
    assert torch.equal(FeatureStore.open(out).read(), rows_of(17))
    merge(tmp_path / "merged")
    assert contents(bucket("/merged")).items() <= contents(tmp_path / "merged").items()
    bucket("/merged/shard-00002.safetensors").unlink()
    assert f"{out}/shard-00002.safetensors is missing" in invoke("verify", out, code=1)
    assert "flaky://bucket" in invoke("verify", "flaky://bucket", code=2)
    invoke("merge", f"file://{sources[0]}", sources[1], "--out", f"file://{tmp_path}/two")
    assert invoke("verify", f"file://{tmp_path}/two").endswith(": sound\n")
    FlakyFileSystem.fails = {"put": DriverError("no credentials")}
    output = invoke("merge", sources[0], "--out", "flaky://bucket/other", code=1)
    assert output.strip().count("\n") == 0
    assert "cannot write flaky://bucket/other/ids.json: no credentials" in output
    assert "is a file" in invoke("merge", sources[0], "--out", __file__, code=2)
    for command in (["verify", tmp_path / "none"], ["merge", tmp_path / "none", "--out", out]):
        assert "does not exist" in invoke(*command, code=2)


# --- A run -----------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"finetune": {"epochs": 1}, "views": {"random": 0, "other": []}}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its features in its folder."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("storage") / "local"
    run_stages(RunFolder(folder, tiny_config(**SMALL)))
    return folder


def config_at(features: str) -> Any:
    return tiny_config(**SMALL, collect={"features": features})


def features_of(path: Any) -> dict[str, bytes]:
    """Return the content of all stores by relative path, without what exists on disk only."""
    stores = [file.parent for file in path.rglob("manifest.json")]
    return {
        f"{str(store).removeprefix(str(path))}/{name}": data
        for store in stores
        for name, data in contents(store).items()
        if name != "writer.lock"
    }


def test_a_run_with_features_elsewhere_is_the_local_run(local: Path, tmp_path: Path) -> None:
    own = tmp_path / "run"
    run = RunFolder(own, config_at("flaky://bucket/features"))
    FlakyFileSystem.fails, FlakyFileSystem.puts_left = {"put": ConnectionError("reset")}, 11
    with pytest.raises(OSError, match=r"cannot write flaky://bucket/features/.*: reset"):
        run_stages(run)
    FlakyFileSystem.fails = {}
    assert run.record["stages"]["collect"]["state"] == "interrupted"
    before = dict(MemoryFileSystem.store)
    run_stages(RunFolder(own))
    assert all(
        MemoryFileSystem.store[name] is before[name] for name in before
    )  # none written twice
    assert not (own / "features").exists()
    assert features_of(bucket("/features")) == features_of(local / "features")
    results = [pattern for pattern in RESULTS if not pattern.startswith("features")]
    assert files_of(own, *results) == files_of(local, *results)
    sums = [json.loads((folder / "checksums.json").read_text()) for folder in (own, local)]
    assert [name for name in sums[0] if "features/" in name]
    assert sums[0].keys() == sums[1].keys()
    assert all(sums[0][name] == sums[1][name] for name in sums[0] if "features/" in name)

    assert verify(own) == []
    everything = dict(MemoryFileSystem.store)
    store = bucket("/features/full/full/checkpoint-1/train")
    shard = store / "shard-00001.safetensors"
    flip(shard)
    assert [str(shard) in problem and "damaged" in problem for problem in verify(own)] == [True]
    for name in contents(store):
        (store / name).unlink()
    assert verify(own) == [f"{store}/manifest.json is missing"]
    MemoryFileSystem.store.update(everything)

    Attributor(own).build_index("flat")
    assert verify(own) == []
    with pytest.raises(ValueError, match=r"was begun with collect\.features=flaky"):
        RunFolder(own, config_at("flaky://bucket/other"))


def test_stages_and_features_are_reused_from_any_location(
    local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError("features were computed")

    monkeypatch.setattr(Collector, "collect", never)
    donor = RunFolder(local)
    for number, features in enumerate(["flaky://bucket/a", "flaky://bucket/b", None]):
        config = tiny_config(**SMALL, collect={"features": features})
        run = RunFolder(tmp_path / str(number), config)
        run_stages(run, donors=[donor])
        taken = {name for name, stage in run.record["stages"].items() if "taken_from" in stage}
        assert taken == {"data", "finetune", "prune", "sparse-finetune", "influence", "analyze"}
        assert features_of(run.features_path) == features_of(local / "features")
        assert verify(run.path) == []
        donor = run


def test_a_run_by_file_url_through_the_command(local: Path, tmp_path: Path) -> None:
    elsewhere, own, file = tmp_path / "elsewhere", tmp_path / "run", tmp_path / "tiny.yaml"
    file.write_text(json.dumps(tiny_config(**SMALL).model_dump(mode="json")))
    invoke("run", file, "--out", own, "--set", f"collect.features=file://{elsewhere}")
    assert features_of(elsewhere) == features_of(local / "features")
    assert files_of(own, "influence/**/*.parquet") == files_of(local, "influence/**/*.parquet")
    assert not (own / "features").exists()
    assert invoke("verify", own).endswith(": sound\n")
    (elsewhere / "sparse/full/checkpoint-1/test/ids.json").write_text("[]")
    assert "test/ids.json is damaged" in invoke("verify", own, code=1)


def test_a_folder_for_features_is_relative_to_where_the_run_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = config_at("big/features")
    assert config.collect.features == str(tmp_path / "big/features")
    monkeypatch.chdir("/")
    path = RunFolder("run", config).features("full", "subnetwork", "de", 2, "train")
    assert path == tmp_path / "big/features/full/subnetwork/de/checkpoint-2/train"
    with pytest.raises(ValueError, match=r"collect\.features"):
        config_at("")


def test_points_of_a_sweep_have_their_own_locations_for_features(tmp_path: Path) -> None:
    base = tiny_config(collect={"features": "s3://bucket/sweep/"}).model_dump(mode="json")
    file = tmp_path / "sweep.json"
    points = {"a": {}, "b": {"collect.features": "s3://bucket/own"}}
    file.write_text(json.dumps({"name": "tiny", "base": base, "points": points}))
    configs = load_sweep(file).points
    features = {name: config.collect.features for name, config in configs.items()}
    assert features == {"a": "s3://bucket/sweep/a", "b": "s3://bucket/own"}
