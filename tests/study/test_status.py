"""`tracmod status` and termination, with real processes that are stopped within a stage."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from click.testing import CliRunner
from tiny_study import tiny_config

from tracmod.cli import main
from tracmod.files.progress import read_progress
from tracmod.study.run_folder import RunFolder
from tracmod.study.status import run_status, sweep_status

HOUR = 3600.0


def status_text(folder) -> str:
    """Return what the command prints."""
    result = CliRunner().invoke(main, ["status", str(folder)], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


class Training:
    """A command whose fine-tuning takes minutes, begun in a process of its own."""

    def __init__(self, tmp_path, *options):
        config = tiny_config(finetune={"epochs": 1000, "batch_size": 2}, name="long")
        file = tmp_path / "long.yaml"
        file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        self.out = tmp_path / "run"
        command = [sys.executable, "-m", "tracmod.cli", "run", str(file), "--out", str(self.out)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TRACMOD_PROGRESS_SECONDS": "0.2"}
        self.process = subprocess.Popen(
            [*command, *options], env=environment, stderr=subprocess.PIPE, text=True
        )

    def wait_for_steps(self) -> None:
        """Return when the file of progress has steps of the training."""
        end = time.monotonic() + 120
        while time.monotonic() < end and self.process.poll() is None:
            state = read_progress(self.out / ".progress.json") or {"bars": []}
            if any(bar["description"] == "fine-tune full" and bar["done"] for bar in state["bars"]):
                return
            time.sleep(0.05)
        raise AssertionError(f"no progress: {self.process.communicate()[1]}")

    def stop(self, number: int) -> str:
        """Send a signal and return what was written to standard error."""
        self.process.send_signal(number)
        return self.process.communicate(timeout=60)[1]


def test_the_progress_of_a_training_is_seen_while_it_runs_and_after_it_was_killed(tmp_path):
    training = Training(tmp_path)
    try:
        training.wait_for_steps()
        status = run_status(training.out)
        text = status_text(training.out)
    finally:
        errors = training.stop(signal.SIGKILL)
    assert status.working
    assert status.unchanged < 60
    outer, steps = status.progress
    assert outer["description"] == "stage 2 of 8, finetune"
    assert 0 < steps["done"] < steps["total"] == 18_000
    assert "epoch" in steps["note"]
    assert "loss" in steps["note"]
    assert "running, last change " in text
    assert f" of 18,000 steps ({100 * steps['done'] // 18_000}%)" in text
    # What was printed: the folder and how to resume first, then lines without control characters.
    lines = errors.splitlines()
    assert str(training.out) in lines[0]
    assert "again to resume" in lines[0]
    assert any("fine-tune full: " in line and " left" in line for line in lines[1:])
    assert not {"\r", "\x1b"} & set(errors)
    # After kill -9
    later = run_status(training.out, clock=lambda: time.time() + 3 * HOUR)
    assert not later.working
    assert 3 * HOUR <= later.unchanged < 3 * HOUR + 300
    assert later.progress[1]["done"] >= steps["done"]
    text = status_text(training.out)
    assert "not running, last change " in text
    assert "run the same command again to resume" in text
    assert "finetune         stopped" in text
    assert " of 18,000 steps" in text


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_asked_to_end_says_how_to_resume(tmp_path, number):
    training = Training(tmp_path, "--quiet")
    training.wait_for_steps()
    errors = training.stop(number)
    word = "interrupted" if number == signal.SIGINT else "terminated"
    assert errors == f"tracmod: {word}; run the same command again to resume\n"
    assert training.process.returncode == (130 if number == signal.SIGINT else 143)
    states = {stage: state for stage, state, _ in run_status(training.out).stages}
    assert states["data"] == "done"
    assert states["finetune"] == "interrupted"


@pytest.mark.slow
def test_hangups_that_are_ignored_stay_ignored(tmp_path):
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        training = Training(tmp_path, "--quiet")
        training.wait_for_steps()
        training.process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert training.process.poll() is None
    finally:
        signal.signal(signal.SIGHUP, before)
        training.stop(signal.SIGKILL)


def test_a_sweep_lists_its_points(tmp_path):
    assert sweep_status(tmp_path) is None
    (tmp_path / "sweep.json").write_text(json.dumps({"name": "s", "points": ["a", "b", "c"]}))
    for name, stages in (("a", 8), ("b", 2)):
        run = RunFolder(tmp_path / name, tiny_config())
        for stage in run.stages[:stages]:
            with run.stage(stage):
                pass
    points = sweep_status(tmp_path)
    assert points["c"] is None
    assert [state for _, state, _ in points["b"].stages][:3] == ["done", "done", "to do"]
    text = status_text(tmp_path)
    assert "1 of 3 points done" in text
    assert "a: done\n" in text
    assert "b: not running, " in text
    assert "(2 of 8 stages done)" in text
    assert "c: to do\n" in text
    tree = json.loads(CliRunner().invoke(main, ["status", str(tmp_path), "--json"]).output)
    assert tree["c"] is None
    assert tree["b"]["working"] is False
