"""`tracmod attribute` on several workers: the files of one, also after kills and errors."""

from __future__ import annotations

import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from own_model import save_model, write_examples
from tiny_study import files_of

from tracmod.attribution.attribute import attribute
from tracmod.attribution.options import AttributionOptions
from tracmod.cli import main
from tracmod.engine import open_engine
from tracmod.engine.local import LocalEngine
from tracmod.features.store import FeatureStore
from tracmod.validation.integrity import verify

# All results; run.json also has the seconds.
RESULTS = ("features/**/*", "exact/*", "preconditioners/*", "*.parquet", "fidelity.json", "check*")
TRAIN, QUERY, SHARD = 37, 18, 8


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return {
        "model": str(save_model(folder / "first")),
        "checkpoints": [folder / "first", save_model(folder / "second", seed=1)],
        "train": write_examples(folder / "train.tsv", TRAIN),
        "query": write_examples(folder / "query.tsv", QUERY),
        "projection_dim": 256,
        "k": 9,
    }


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Shards of eight rows, so that every worker has several."""
    monkeypatch.setattr(FeatureStore, "grow", partial(FeatureStore.grow, shard_rows=SHARD))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Copies:
    """An engine whose workers are copies in this process, made as those of other processes are."""

    def __init__(self, workers):
        self.workers, self.tasks = workers, []

    def run(self, make_worker, tasks, advance, logs=None, twice=True):
        self.tasks += tasks
        workers = [pickle.loads(pickle.dumps(make_worker))(n) for n in range(self.workers)]
        for number, task in reversed(list(enumerate(tasks))):  # in another order, too
            workers[number % self.workers].do(pickle.loads(pickle.dumps(task)), advance)

    def close(self):
        pass


def run(inputs, out, engine, **options):
    with closing(engine):
        attribute(AttributionOptions(**inputs | options, out=out), engine)
    return files_of(out, *RESULTS)


def logs(out):
    return [file.read_text() for file in sorted((out / "logs").glob("worker-*.log"))]


@pytest.mark.parametrize(
    "options",
    [{}, {"exact": True}, {"preconditioner": "ekfac", "parameters": ["*.query", "classifier"]}],
    ids=["projected", "exact", "ekfac"],
)
def test_several_workers_write_the_files_of_one(inputs, tmp_path, options):
    expected = run(inputs, tmp_path / "one", LocalEngine(), **options)
    assert not (tmp_path / "one/logs").exists()
    for workers in (1, 2) if options else (1, 3):
        engine = Copies(workers)
        out = tmp_path / str(workers)
        files = run(inputs, out, engine, **options)
        assert files.keys() == expected.keys()
        assert [name for name in files if files[name] != expected[name]] == []
        kinds = Counter(type(task).__name__ for task in engine.tasks)
        if "exact" in options:
            assert kinds == {"ScoreExactly": 2}
            continue
        assert kinds["RankQueries"] == workers
        assert (
            kinds["CollectShards"] == 4 if workers == 1 else kinds["CollectShards"] >= 4 * workers
        )
        assert kinds["ScoreSample"] == (0 if workers == 1 else 2)
        assert kinds["FitPreconditioner"] == (2 if options and workers > 1 else 0)
        assert not list(out.rglob("*.tmp"))
        assert not (out / "progress").exists()
    assert verify(out) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two processes", "ray"])
def test_other_engines_write_the_files_of_one(inputs, tmp_path, monkeypatch, name):
    expected = run(inputs, tmp_path / "one", LocalEngine())
    if name == "ray":
        pytest.importorskip("ray")
        engine = open_engine("ray", workers=2)
    else:
        engine = LocalEngine(2)
    monkeypatch.chdir(tmp_path)  # a relative path is made absolute for the workers
    files = run(inputs, Path("other"), engine)
    assert files == expected
    text = "".join(logs(Path("other")))
    assert all(task in text for task in ("CollectShards", "ScoreSample", "RankQueries"))
    assert verify(Path("other")) == []


def test_appended_examples_are_collected_by_workers_alone(inputs, tmp_path):
    def grown(name, engine):
        train = write_examples(tmp_path / "train.tsv", 24)
        run(inputs, tmp_path / name, engine, train=train)
        engine.tasks = []
        write_examples(train, TRAIN)
        return run(inputs, tmp_path / name, engine, train=train)

    copies = Copies(2)
    files = grown("two", copies)
    expected = grown("one", Copies(1))
    assert files == expected
    collected = [task for task in copies.tasks if type(task).__name__ == "CollectShards"]
    assert {task.split for task in collected} == {"train"}
    assert {shard for task in collected for shard in task.shards} == {3, 4}


def command(inputs, out, *options):
    checkpoints = [x for path in inputs["checkpoints"] for x in ("--checkpoint", path)]
    arguments = [
        "attribute", "--model", inputs["model"], *checkpoints, "--train", inputs["train"],
        "--query", inputs["query"], "--projection-dim", 256, "-k", 9, "--out", out, *options,
    ]  # fmt: skip
    return [str(argument) for argument in arguments]


SMALL_SHARDS = """
import sys
from functools import partial
from tracmod.features.store import FeatureStore
from tracmod.cli import main
if __name__ == "__main__":
    FeatureStore.grow = partial(FeatureStore.grow, shard_rows=8)
    main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_command_killed_in_the_middle_leaves_no_process_and_resumes(inputs, tmp_path):
    expected = run(inputs, tmp_path / "one", LocalEngine())
    script = tmp_path / "script.py"
    script.write_text(SMALL_SHARDS)
    out = tmp_path / "killed"
    start = partial(
        subprocess.Popen,
        [sys.executable, script, *command(inputs, out, "--workers", "2")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    for shards in (1, 9):
        process = start()
        while len(list(out.glob("features/*/*/shard-*"))) < shards:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    workers = {int(number) for log in logs(out) for number in re.findall(r"process (\d+)", log)}
    assert len(workers) == 4
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{number}").exists() for number in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    kept = {file: file.stat().st_mtime_ns for file in out.glob("features/*/*/shard-*")}
    process = start()
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert [file for file, time_ns in kept.items() if file.stat().st_mtime_ns != time_ns] == []
    assert files_of(out, *RESULTS) == expected


def test_a_file_that_changed_since_the_command_read_it_is_refused(inputs, tmp_path):
    train = write_examples(tmp_path / "train.tsv", TRAIN)

    class Late(Copies):
        def run(self, *arguments):
            write_examples(train, TRAIN + 1)
            super().run(*arguments)

    with pytest.raises(ValueError, match=r"train\.tsv: .*has changed since"):
        run(inputs, tmp_path / "out", Late(2), train=train)


@pytest.mark.slow
def test_an_error_of_a_worker_is_one_sentence(inputs, tmp_path, monkeypatch):
    plain = LocalEngine.run

    def without_checkpoint(self, *arguments):
        (tmp_path / "last/model.safetensors").unlink(missing_ok=True)
        plain(self, *arguments)

    monkeypatch.setattr(LocalEngine, "run", without_checkpoint)
    last = save_model(tmp_path / "last", seed=2)
    arguments = command({**inputs, "checkpoints": [last]}, tmp_path / "out", "--workers", 2)
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert re.search(r"last.*model\.safetensors", result.stderr.splitlines()[-1])
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--workers", 0), "--workers"),
        (("--worker-cpus", 2), "--engine ray"),
        (("--address", "auto"), "--engine ray"),
    ],
)
def test_wrong_options_of_the_engine_are_refused(inputs, tmp_path, options, message):
    result = CliRunner().invoke(main, command(inputs, tmp_path / "out", *options))
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()
