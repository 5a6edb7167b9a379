"""A run on several workers writes the files of a local run, even if processes are killed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from functools import partial

import pytest
import torch
import yaml
from tiny_study import RESULTS, files_of, tiny_config

from tracmod.engine import open_engine
from tracmod.engine.local import LocalEngine
from tracmod.study.pipeline import run_stages
from tracmod.study.run_folder import RunFolder
from tracmod.study.status import run_status

pytestmark = pytest.mark.slow
DISTRIBUTED = ("collect", "influence")


def config():
    """Return a config with many small shards, two seeds to prune and several checkpoints."""
    return tiny_config(collect={"shard_rows": 4}, prune={"seeds": 2, "combine": "union"})


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A run finished by one process."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("local") / "run"
    run_stages(RunFolder(folder, config()))
    return folder


@pytest.fixture
def begun(local, tmp_path):
    """A copy of the run without the stages DISTRIBUTED and those after them."""
    folder = tmp_path / "run"
    shutil.copytree(local, folder)
    for name in ("features", *DISTRIBUTED, "analysis", "report", "logs"):
        shutil.rmtree(folder / name, ignore_errors=True)
    run = RunFolder(folder)
    for stage in (*DISTRIBUTED, "analyze", "report"):
        del run.record["stages"][stage]
    run.save()
    return folder


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster on this machine: two nodes of one core each."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


def check_same_files(folder, local):
    """The results of two runs are the same bytes, and no temporary file is left."""
    patterns = [pattern for pattern in RESULTS if not pattern.startswith("analysis")]
    files, expected = files_of(folder, *patterns), files_of(local, *patterns)
    assert files.keys() == expected.keys()
    assert [name for name in files if files[name] != expected[name]] == []
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.parametrize("name", ["processes", "ray"])
def test_a_run_on_several_workers_writes_the_files_of_the_local_run(local, tmp_path, name):
    if name == "ray":
        pytest.importorskip("ray")
    engine = LocalEngine(2) if name == "processes" else open_engine("ray", workers=2)
    with closing(engine):
        run_stages(RunFolder(tmp_path / "run", config()), engine=engine)
    check_same_files(tmp_path / "run", local)
    logs = [path.read_text() for path in sorted((tmp_path / "run/logs").iterdir())]
    assert logs
    for task in ("PruneLanguage", "CollectShards", "RankQueries"):
        assert any(task in log for log in logs)


def when_collecting(folder, num_shards, act):
    """Start a thread that calls `act` once the run has this number of shards."""

    def watch():
        while len(list(folder.glob("features/**/shard-*"))) < num_shards:
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def processes_of(folder):
    """Return the ids of the processes that each worker has had, in order."""
    logs = [file.read_text() for file in folder.glob("logs/worker-*.log")]
    return [list(dict.fromkeys(map(int, re.findall(r"process (\d+)", log)))) for log in logs]


def kill_a_worker(folder, killed):
    killed.append(processes_of(folder)[0][-1])
    os.kill(killed[0], signal.SIGKILL)


@pytest.mark.parametrize("name", ["processes", "ray"])
def test_a_killed_worker_is_replaced_and_the_files_are_the_same(local, begun, name, cluster):
    engine = LocalEngine(2) if name == "processes" else open_engine("ray", cluster.address, 2)
    killed: list[int] = []
    killer = when_collecting(begun, 8, lambda: kill_a_worker(begun, killed))
    with closing(engine):
        run_stages(RunFolder(begun), DISTRIBUTED, engine=engine)
    killer.join(timeout=1)
    assert not killer.is_alive()
    check_same_files(begun, local)
    replaced = [processes for processes in processes_of(begun) if killed[0] in processes[:-1]]
    assert len(replaced) == 1


def test_a_removed_node_leaves_the_files_the_same(local, begun, cluster):
    spare = cluster.add_node(num_cpus=1)
    engine = open_engine("ray", cluster.address, 3)
    remove = partial(cluster.remove_node, spare, allow_graceful=False)
    remover = when_collecting(begun, 8, remove)
    with closing(engine):
        run_stages(RunFolder(begun), DISTRIBUTED, engine=engine)
    remover.join(timeout=60)
    assert not remover.is_alive()
    check_same_files(begun, local)


def test_a_killed_driver_resumes_and_the_files_are_the_same(local, begun, cluster):
    file = begun.parent / "config.yaml"
    file.write_text(yaml.safe_dump(config().model_dump(mode="json")))
    command = [sys.executable, "-m", "tracmod.cli", "run", str(file), "--out", str(begun)]
    command += ["--engine", "ray", "--address", cluster.address, "--workers", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for num_shards in (3, 40):
        driver = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
        when_collecting(begun, num_shards, driver.kill).join(timeout=120)
        driver.communicate()
        assert driver.returncode == -signal.SIGKILL
        status = run_status(begun)
        assert not status.working
        assert {name: state for name, state, _ in status.stages}["collect"] == "running"
        assert num_shards <= status.shards < status.shards_wanted
        assert {"worker-0", "worker-1"}.issuperset(status.logs)
        assert status.logs
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check_same_files(begun, local)
    status = run_status(begun)
    assert {state for _, state, _ in status.stages} == {"done"}
    assert status.shards == status.shards_wanted


def test_an_address_without_a_cluster_is_named_in_the_last_line(begun):
    pytest.importorskip("ray")
    command = [sys.executable, "-m", "tracmod.cli", "collect", str(begun), "--engine", "ray"]
    done = subprocess.run(
        [*command, "--address", "127.0.0.1:1"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert "127.0.0.1:1" in done.stderr.splitlines()[-1]
