"""A run on several workers gives the local run's files, whatever is killed meanwhile."""

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
SPREAD = ("collect", "influence")


def config():
    """Many small shards, two seeds to prune, several checkpoints."""
    return tiny_config(collect={"shard_rows": 4}, prune={"seeds": 2, "combine": "union"})


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A finished run of one process."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("local") / "run"
    run_stages(RunFolder(folder, config()))
    return folder


@pytest.fixture
def begun(local, tmp_path):
    """The run as it is before the stages that are spread."""
    folder = tmp_path / "run"
    shutil.copytree(local, folder)
    for name in ("features", *SPREAD, "analysis", "report", "logs"):
        shutil.rmtree(folder / name, ignore_errors=True)
    run = RunFolder(folder)
    for stage in (*SPREAD, "analyze", "report"):
        del run.record["stages"][stage]
    run.save()
    return folder


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one core each, begun on this machine."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    made.add_node(num_cpus=1)
    yield made
    made.shutdown()


def same(folder, local):
    patterns = [one for one in RESULTS if not one.startswith("analysis")]
    found, expected = files_of(folder, *patterns), files_of(local, *patterns)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.parametrize("name", ["processes", "ray"])
def test_a_whole_run_on_several_workers_is_the_local_run(local, tmp_path, name):
    if name == "ray":
        pytest.importorskip("ray")
    engine = LocalEngine(2) if name == "processes" else open_engine("ray", workers=2)
    with closing(engine):
        run_stages(RunFolder(tmp_path / "run", config()), engine=engine)
    same(tmp_path / "run", local)
    logs = [path.read_text() for path in sorted((tmp_path / "run/logs").iterdir())]
    assert logs
    for does in ("prune_language", "collect_shards", "rank_queries"):
        assert any(f"task {does}" in log for log in logs)


def when_collecting(folder, least, act):
    """Act, in a thread, once so many shards are there."""

    def watch():
        while len(list(folder.glob("features/**/shard-*"))) < least:
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def processes_of(folder):
    """Of every worker, the processes that it has been, in order."""
    logs = [file.read_text() for file in folder.glob("logs/worker-*.log")]
    return [list(dict.fromkeys(map(int, re.findall(r"begun: process (\d+)", log)))) for log in logs]


def kill_a_worker(folder, killed):
    killed.append(processes_of(folder)[0][-1])
    os.kill(killed[0], signal.SIGKILL)


@pytest.mark.parametrize("name", ["processes", "ray"])
def test_a_killed_worker_costs_its_task_alone(local, begun, name, cluster):
    engine = LocalEngine(2) if name == "processes" else open_engine("ray", cluster.address, 2)
    killed: list[int] = []
    killer = when_collecting(begun, 8, lambda: kill_a_worker(begun, killed))
    with closing(engine):
        run_stages(RunFolder(begun), SPREAD, engine=engine)
    killer.join(timeout=1)
    assert not killer.is_alive()
    same(begun, local)
    followed = [one for one in processes_of(begun) if killed[0] in one[:-1]]
    assert len(followed) == 1  # another process in its place


def test_a_node_that_goes_away_costs_the_tasks_it_had(local, begun, cluster):
    spare = cluster.add_node(num_cpus=1)
    engine = open_engine("ray", cluster.address, 3)
    remove = partial(cluster.remove_node, spare, allow_graceful=False)
    remover = when_collecting(begun, 8, remove)
    with closing(engine):
        run_stages(RunFolder(begun), SPREAD, engine=engine)
    remover.join(timeout=60)
    assert not remover.is_alive()
    same(begun, local)


def test_the_driver_killed_and_begun_again(local, begun, cluster):
    file = begun.parent / "config.yaml"
    file.write_text(yaml.safe_dump(config().model_dump(mode="json")))
    command = [sys.executable, "-m", "tracmod.cli", "run", str(file), "--out", str(begun)]
    command += ["--engine", "ray", "--address", cluster.address, "--workers", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for least in (3, 40):
        driver = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
        when_collecting(begun, least, driver.kill).join(timeout=120)
        driver.communicate()
        assert driver.returncode == -signal.SIGKILL
        status = run_status(begun)
        assert not status.working
        assert {name: state for name, state, _ in status.stages}["collect"] == "running"
        assert least <= status.shards < status.shards_wanted
        assert {"worker-0", "worker-1"}.issuperset(status.logs)
        assert status.logs
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    same(begun, local)
    status = run_status(begun)
    assert {state for _, state, _ in status.stages} == {"done"}
    assert status.shards == status.shards_wanted


def test_an_address_without_a_cluster_is_one_sentence(begun):
    pytest.importorskip("ray")
    command = [sys.executable, "-m", "tracmod.cli", "collect", str(begun), "--engine", "ray"]
    done = subprocess.run(
        [*command, "--address", "127.0.0.1:1"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert "no Ray cluster there" in done.stderr.splitlines()[-1]
