"""Every task counts once, whichever worker falls behind or is lost; workers are local or on Ray."""

from __future__ import annotations

import heapq
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import pytest

from tracmod.engine import open_engine
from tracmod.engine.dispatch import SLOW, TRIES, WorkerEvent, dispatch
from tracmod.engine.local import LocalEngine

# --- the scheduler, with workers in virtual time ---------------------------------------------


class FakeTeam:
    """Workers in virtual time; every task has 10 parts.

    Args:
        seconds: (worker, task) -> duration of the task; infinity for one that never ends.
        lost: (worker, task) -> whether the worker is lost half way through the task.
    """

    def __init__(self, seconds, lost=lambda worker, task: False):
        self.now = 0.0
        self.begun = []  # (worker, task)
        self.stopped = []
        self._seconds, self._lost = seconds, lost
        self._coming = []

    def start(self, worker):
        self.schedule(1.0, WorkerEvent("ready", worker))

    def give(self, worker, task):
        self.begun.append((worker, task))
        seconds = self._seconds(worker, task)
        event = WorkerEvent("done", worker, 10)
        if self._lost(worker, task):
            seconds, event = seconds / 2, WorkerEvent("lost", worker, "the node went away")
        if seconds < float("inf"):
            self.schedule(seconds, event)

    def schedule(self, seconds, event):
        heapq.heappush(self._coming, (self.now + seconds, event.worker, event))

    def events(self, seconds):
        if not self._coming or self._coming[0][0] > self.now + seconds:
            self.now += seconds
            return []
        self.now, _, event = heapq.heappop(self._coming)
        return [event]

    def stop(self, worker):
        self.stopped.append(worker)


def dispatched(team, count, workers, twice=True):
    """Run the tasks; return how many parts were counted."""
    parts = []
    dispatch(team, count, workers, parts.append, twice=twice, clock=lambda: team.now)
    return sum(parts)


@pytest.mark.parametrize(("count", "workers"), [(1, 1), (1, 4), (7, 2), (100, 8)])
def test_every_task_is_done_once(count, workers):
    team = FakeTeam(lambda worker, task: 5.0)
    assert dispatched(team, count, workers) == 10 * count
    assert [task for _, task in team.begun] == list(range(count))
    assert team.stopped == []
    assert team.now == pytest.approx(1 + 5 * -(-count // workers))


def test_tasks_of_lost_workers_are_done_by_others_and_counted_once():
    generator = random.Random(0)
    team = FakeTeam(lambda worker, task: 1 + task % 3, lambda *_: generator.random() < 0.1)
    assert dispatched(team, 200, 5) == 2000
    assert len(team.begun) > 200
    assert {task for _, task in team.begun} == set(range(200))


def test_parts_reported_within_a_task_count_once_whoever_does_them():
    """Worker 0 reports 7 of 10 parts and is lost; the next attempt reports 4, then all."""
    team = FakeTeam(lambda worker, task: 4.0, lambda worker, task: len(team.begun) == 1)
    real = team.give

    def give(worker, task):
        team.schedule(1.0, WorkerEvent("advanced", worker, 4 if team.begun else 7))
        real(worker, task)

    team.give = give
    parts = []
    dispatch(team, 1, 1, parts.append, clock=lambda: team.now)
    assert [count for count in parts if count] == [7, 3]


def test_a_straggler_is_started_a_second_time_elsewhere():
    def seconds(worker, task):
        return float("inf") if (worker, task) == (0, 0) else 4.0

    team = FakeTeam(seconds)
    assert dispatched(team, 12, 2) == 120
    assert [worker for worker, task in team.begun if task == 0] == [0, 1]
    assert team.now < 1 + 12 * 4.0 + SLOW * 4.0 + 4.0


def test_a_straggler_that_finishes_after_all_is_not_counted_twice():
    team = FakeTeam(lambda worker, task: 30.0 if (worker, task) == (0, 0) else 4.0)
    assert dispatched(team, 12, 2) == 120
    late = FakeTeam(lambda worker, task: 45.0 if worker == 0 else 5.0)
    assert dispatched(late, 30, 3) == 300


def test_a_task_that_loses_every_worker_stops_the_run():
    team = FakeTeam(lambda *_: 1.0, lambda worker, task: task == 3)
    with pytest.raises(RuntimeError, match=rf"task 3\b.*\b{TRIES} times.*the node went away"):
        dispatched(team, 9, 2)
    assert sorted(set(team.stopped)) == [0, 1]


def test_workers_that_never_get_ready_stop_the_run():
    class Hopeless(FakeTeam):
        def start(self, worker):
            self.schedule(1.0, WorkerEvent("lost", worker, "no memory"))

    with pytest.raises(RuntimeError, match=f"{TRIES} workers.*no memory"):
        dispatched(Hopeless(lambda *_: 1.0), 9, 2)


def test_an_error_in_the_slower_of_two_starts_is_ignored():
    class Failing(FakeTeam):
        def give(self, worker, task):
            if (worker, task) != (0, 0):
                return super().give(worker, task)
            self.begun.append((worker, task))
            return self.schedule(60.0, WorkerEvent("failed", 0, ValueError("too late")))

    team = Failing(lambda worker, task: 90.0 if task == 11 else 4.0)
    assert dispatched(team, 12, 3) == 120
    assert [task for _, task in team.begun].count(0) == 2
    assert team.now > 61


def test_without_twice_no_task_runs_on_two_workers():
    team = FakeTeam(lambda worker, task: 90.0 if task == 0 else 4.0)
    assert dispatched(team, 12, 3, twice=False) == 120
    assert [task for _, task in team.begun] == list(range(12))


def test_losing_idle_workers_does_not_stop_the_run():
    class Leaving(FakeTeam):
        def give(self, worker, task):
            super().give(worker, task)
            for other in range(1, 5) if task == 0 else ():  # without a task by then
                self.schedule(30.0, WorkerEvent("lost", other, "gone"))

    team = Leaving(lambda worker, task: 100.0 if task == 0 else 4.0)
    assert dispatched(team, 5, 5, twice=False) == 50
    assert team.now > 100


def test_an_error_of_a_task_stops_the_run():
    class Failing(FakeTeam):
        def give(self, worker, task):
            self.schedule(1.0, WorkerEvent("failed", worker, ValueError("example 7 is NaN")))

    team = Failing(lambda *_: 1.0)
    with pytest.raises(ValueError, match="example 7 is NaN"):
        dispatched(team, 9, 2)
    assert sorted(set(team.stopped)) == [0, 1]


@pytest.mark.parametrize(
    ("count", "slow_tasks", "slow_workers", "seconds_once", "seconds_twice"),
    [
        pytest.param(1000, 0.01, 0, 254, 181, id="1 task in 100 is slow"),
        pytest.param(1000, 0, 1, 199, 165, id="1 worker of 64 is slow"),
        pytest.param(64, 0.02, 0, 93, 29, id="as many tasks as workers, 1 in 50 is slow"),
        pytest.param(1000, 0, 0, 163, 163, id="none is slow"),
    ],
)
def test_second_starts_save_time(count, slow_tasks, slow_workers, seconds_once, seconds_twice):
    """The measurement in the docstring of `dispatch`: shards of 8 to 12 s on 64 workers.

    A slow task takes 10 times as long at its first start, a slow worker always does. Means over 20
    random draws.
    """

    def wall_time(seed, twice):
        draw = random.Random(seed)
        durations = [draw.uniform(8, 12) for _ in range(count)]
        slow = {task for task in range(count) if draw.random() < slow_tasks}

        def seconds(worker, task):
            is_slow = task in slow or worker < slow_workers
            slow.discard(task)  # at its first start only
            return durations[task] * (10 if is_slow else 1)

        team = FakeTeam(seconds)
        assert dispatched(team, count, 64, twice) == 10 * count
        assert len(team.begun) <= count + 12
        return team.now

    for twice, expected in ((False, seconds_once), (True, seconds_twice)):
        mean = sum(wall_time(seed, twice) for seed in range(20)) / 20
        assert mean == pytest.approx(expected, abs=0.6)


def test_a_hundred_thousand_tasks_cost_next_to_nothing():
    """Shards of 10 s on 64 workers, one in a thousand lost, against a hundredth of one core's."""
    generator = random.Random(0)
    team = FakeTeam(lambda *_: generator.uniform(8, 12), lambda *_: generator.random() < 1e-3)
    start = time.process_time()
    assert dispatched(team, 100_000, 64) == 1_000_000
    cost = time.process_time() - start
    assert cost < 0.01 * team.now  # of the time that it takes, all workers together


# --- engines ---------------------------------------------------------------------------------


class Writer:
    """Writes a file for every task, slowly, and logs the number and process of the worker."""

    def __init__(self, folder, number):
        self.folder, self.number = Path(folder), number

    def do(self, task, advance):
        with (self.folder / "log.txt").open("a") as log:
            log.write(f"{task} {self.number} {os.getpid()}\n")
        if task == "fail":
            raise ValueError("task fail: expected something else")
        if str(task).startswith("die") and not (self.folder / f"{task}.died").exists():
            (self.folder / f"{task}.died").touch()
            os._exit(3)
        time.sleep(0.05)
        (self.folder / f"{task}.out").write_text(f"result of {task}")
        advance(2)
        advance(1)


@pytest.fixture(params=["in-process", "processes", "ray"])
def engine(request):
    if request.param == "ray":
        ray = pytest.importorskip("ray")
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # not installed there
        opened = open_engine("ray", workers=2)
    else:
        opened = LocalEngine(1 if request.param == "in-process" else 2)
    yield opened
    opened.close()


def log_of(folder):
    """(task, worker, process) of every task that was started."""
    return [line.split() for line in (folder / "log.txt").read_text().splitlines()]


def test_engines_run_every_task_and_report_its_parts(engine, tmp_path):
    parts = []
    tasks = [f"task-{number}" for number in range(9)]
    engine.run(partial(Writer, str(tmp_path)), tasks, parts.append, tmp_path / "logs")
    assert sorted(path.stem for path in tmp_path.glob("*.out")) == sorted(tasks)
    assert sum(parts) == 27
    assert sorted(task for task, _, _ in log_of(tmp_path)) == sorted(tasks)
    done_by = {(number, process) for _, number, process in log_of(tmp_path)}
    assert 1 <= len(done_by) <= engine.workers  # one may have been ready too late
    for number, process in done_by if engine.workers > 1 else ():
        text = (tmp_path / f"logs/worker-{number}.log").read_text()
        assert f"begun: process {process}" in text
        assert "task task-" in text
        assert "done, 3 parts" in text
    engine.run(partial(Writer, str(tmp_path)), [], parts.append)


def test_workers_stay_for_the_next_run(engine, tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        engine.run(partial(Writer, str(tmp_path / name)), ["a", "b", "c", "d"], lambda _: None)
    processes = {
        process for name in ("first", "second") for _, _, process in log_of(tmp_path / name)
    }
    assert len(processes) <= engine.workers
    with pytest.raises(ValueError, match="task fail"):
        engine.run(partial(Writer, str(tmp_path)), ["fail", "a", "b"], lambda _: None)
    engine.run(partial(Writer, str(tmp_path)), ["e", "f"], lambda _: None)
    assert (tmp_path / "e.out").exists()


def test_a_worker_that_dies_costs_its_task_alone(engine, tmp_path):
    if engine.workers == 1:
        pytest.skip("this process is the worker")
    parts, tasks = [], ["a", "die-1", "b", "c", "die-2", "d"]
    engine.run(partial(Writer, str(tmp_path)), tasks, parts.append)
    assert sum(parts) == 18
    assert sorted(path.stem for path in tmp_path.glob("*.out")) == sorted(tasks)
    counts = [task for task, _, _ in log_of(tmp_path)]
    assert counts.count("die-1") == counts.count("die-2") == 2
    assert len(counts) == 8


def test_an_error_of_a_worker_is_raised_here(engine, tmp_path):
    with pytest.raises(ValueError, match="task fail: expected something else"):
        engine.run(partial(Writer, str(tmp_path)), ["fail", "a", "b"], lambda _: None)


class Unmakeable:
    """A worker whose creation raises an error of a type that engines do not know."""

    def __init__(self, folder, number):
        raise KeyError("no such thing")


def test_after_a_failure_the_engine_works_again(engine, tmp_path):
    for _ in range(2):
        with pytest.raises((RuntimeError, KeyError), match="no such thing"):
            engine.run(partial(Unmakeable, str(tmp_path)), ["a", "b", "c"], lambda _: None)
    engine.run(partial(Writer, str(tmp_path)), ["a", "b", "c"], lambda _: None)
    assert sorted(path.stem for path in tmp_path.glob("*.out")) == ["a", "b", "c"]


class SlowToBegin(Writer):
    """Worker 1 takes longer to begin than all the work."""

    def __init__(self, folder, number):
        super().__init__(folder, number)
        time.sleep(3 * number)


def test_a_worker_that_was_not_ready_in_time_serves_the_next_run(engine, tmp_path):
    if engine.workers == 1:
        pytest.skip("this process is the worker")
    for run in range(3):
        tasks = [f"{run}-{letter}" for letter in "abc"]
        engine.run(partial(SlowToBegin, str(tmp_path)), tasks, lambda _: None)
    engine.run(partial(Writer, str(tmp_path)), [str(task) for task in range(300)], lambda _: None)
    done_by = [number for task, number, _ in log_of(tmp_path) if "-" not in task]
    assert set(done_by) == {"0", "1"}
    assert len(done_by) == 300


def test_worker_processes_end_with_the_main_process(tmp_path):
    """After kill -9; workers that stay would hold their models for ever."""
    main = textwrap.dedent(f"""
        import sys, time
        from functools import partial
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_engine import Writer
        from tracmod.engine.local import LocalEngine
        if __name__ == "__main__":
            engine = LocalEngine(2)
            tasks = [str(task) for task in range(100)]
            engine.run(partial(Writer, {str(tmp_path)!r}), tasks, lambda _: None)
            print("idle", flush=True)
            time.sleep(1000)
    """)
    (tmp_path / "main.py").write_text(main)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "main.py"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "idle\n"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()

    def running(worker):
        try:
            return Path(f"/proc/{worker}/stat").read_text().split()[2] != "Z"
        except (FileNotFoundError, ProcessLookupError):
            return False

    workers, deadline = {worker for _, _, worker in log_of(tmp_path)}, time.monotonic() + 60
    assert len(workers) >= 1
    while any(map(running, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_options_of_another_engine_are_refused():
    with pytest.raises(ValueError, match=r"--address.*--worker-cpus"):
        open_engine("local", address="auto")
    with pytest.raises(ValueError, match=r"workers.*got 0"):
        LocalEngine(0)


def test_workers_that_fit_on_no_node_are_refused():
    pytest.importorskip("ray")
    with pytest.raises(ValueError, match=r"worker_cpus.* \d+.* got 4096"):
        open_engine("ray", worker_cpus=4096)
