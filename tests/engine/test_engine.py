"""Tasks are done once each, whoever falls behind or is lost; workers are processes or on Ray."""

from __future__ import annotations

import heapq
import os
import random
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from tracmod.engine import open_engine
from tracmod.engine.dispatch import SLOW, TRIES, Event, dispatch
from tracmod.engine.local import LocalEngine

# --- dispatch, with workers that are made up ------------------------------------------------


class FakeTeam:
    """Workers in virtual time.

    Args:
        seconds: of a task on a worker; infinity for one that never ends.
        lost: whether a worker is lost with a task, half way through it.
    """

    def __init__(self, seconds, lost=lambda worker, task: False):
        self.now = 0.0
        self.begun = []  # (worker, task)
        self.stopped = []
        self._seconds, self._lost = seconds, lost
        self._coming = []
        self._started = {}

    def start(self, worker):
        self._started[worker] = self._started.get(worker, 0) + 1
        heapq.heappush(self._coming, (self.now + 1.0, worker, Event("ready", worker)))

    def give(self, worker, task):
        self.begun.append((worker, task))
        seconds = self._seconds(worker, task)
        event = Event("done", worker, 10)
        if self._lost(worker, task):
            seconds, event = seconds / 2, Event("lost", worker, "the node went away")
        if seconds < float("inf"):
            heapq.heappush(self._coming, (self.now + seconds, worker, event))

    def events(self, seconds):
        if not self._coming or self._coming[0][0] > self.now + seconds:
            self.now += seconds
            return []
        self.now, _, event = heapq.heappop(self._coming)
        return [event]

    def stop(self, worker):
        self.stopped.append(worker)


def dispatched(team, count, workers):
    parts = []
    dispatch(team, count, workers, parts.append, clock=lambda: team.now)
    return sum(parts)


@pytest.mark.parametrize(("count", "workers"), [(1, 1), (1, 4), (7, 2), (100, 8)])
def test_every_task_is_done_once(count, workers):
    team = FakeTeam(lambda worker, task: 5.0)
    assert dispatched(team, count, workers) == 10 * count
    assert [task for _, task in team.begun] == list(range(count))
    assert team.stopped == []
    assert team.now == pytest.approx(1 + 5 * -(-count // workers))


def test_what_lost_workers_had_is_done_by_others_and_counted_once():
    generator = random.Random(0)
    team = FakeTeam(lambda worker, task: 1 + task % 3, lambda *_: generator.random() < 0.1)
    assert dispatched(team, 200, 5) == 2000
    assert len(team.begun) > 200
    assert {task for _, task in team.begun} == set(range(200))


def test_a_straggler_is_begun_a_second_time_elsewhere():
    def seconds(worker, task):
        return float("inf") if (worker, task) == (0, 0) else 4.0

    team = FakeTeam(seconds)
    assert dispatched(team, 12, 2) == 120
    assert [worker for worker, task in team.begun if task == 0] == [0, 1]
    assert team.now < 1 + 12 * 4.0 + SLOW * 4.0 + 4.0


def test_a_straggler_that_comes_after_all_is_not_counted_twice():
    team = FakeTeam(lambda worker, task: 30.0 if (worker, task) == (0, 0) else 4.0)
    assert dispatched(team, 12, 2) == 120
    late = FakeTeam(lambda worker, task: 45.0 if worker == 0 else 5.0)
    assert dispatched(late, 30, 3) == 300


def test_a_task_that_ends_every_worker_stops_the_run():
    team = FakeTeam(lambda *_: 1.0, lambda worker, task: task == 3)
    with pytest.raises(RuntimeError, match=f"task 3 lost its worker {TRIES} times.*went away"):
        dispatched(team, 9, 2)
    assert sorted(set(team.stopped)) == [0, 1]


def test_workers_that_never_get_ready_stop_the_run():
    class Hopeless(FakeTeam):
        def start(self, worker):
            heapq.heappush(self._coming, (self.now + 1, worker, Event("lost", worker, "no memory")))

    with pytest.raises(RuntimeError, match="before they are ready; the last: no memory"):
        dispatched(Hopeless(lambda *_: 1.0), 9, 2)


def test_what_the_slower_of_two_raises_does_not_matter():
    class Failing(FakeTeam):
        def give(self, worker, task):
            if (worker, task) != (0, 0):
                return super().give(worker, task)
            self.begun.append((worker, task))
            error = ValueError("too late")
            return heapq.heappush(self._coming, (self.now + 60, 0, Event("failed", 0, error)))

    team = Failing(lambda worker, task: 90.0 if task == 11 else 4.0)
    assert dispatched(team, 12, 3) == 120
    assert [task for _, task in team.begun].count(0) == 2
    assert team.now > 61


def test_what_must_not_be_done_twice_at_a_time_is_not():
    team = FakeTeam(lambda worker, task: 90.0 if task == 0 else 4.0)
    parts = []
    dispatch(team, 12, 3, parts.append, twice=False, clock=lambda: team.now)
    assert [task for _, task in team.begun] == list(range(12))


def test_idle_workers_that_are_lost_are_not_taken_for_hopeless_ones():
    class Leaving(FakeTeam):
        def give(self, worker, task):
            super().give(worker, task)
            for other in range(1, 5) if task == 0 else ():  # without a task by then
                heapq.heappush(self._coming, (self.now + 30, other, Event("lost", other, "gone")))

    team = Leaving(lambda worker, task: 100.0 if task == 0 else 4.0)
    parts = []
    dispatch(team, 5, 5, parts.append, twice=False, clock=lambda: team.now)
    assert sum(parts) == 50
    assert team.now > 100


def test_what_a_task_raises_stops_the_run():
    class Failing(FakeTeam):
        def give(self, worker, task):
            error = ValueError("example 7 is NaN")
            heapq.heappush(self._coming, (self.now + 1, worker, Event("failed", worker, error)))

    team = Failing(lambda *_: 1.0)
    with pytest.raises(ValueError, match="example 7 is NaN"):
        dispatched(team, 9, 2)
    assert sorted(set(team.stopped)) == [0, 1]


def test_a_hundred_thousand_tasks_cost_next_to_nothing():
    """Shards of 10 s on 64 workers, one in a thousand lost, against a hundredth of one core's."""
    generator = random.Random(0)
    team = FakeTeam(lambda *_: generator.uniform(8, 12), lambda *_: generator.random() < 1e-3)
    start = time.process_time()
    assert dispatched(team, 100_000, 64) == 1_000_000
    cost = time.process_time() - start
    assert cost < 0.01 * team.now  # of the time that it takes, all workers together


# --- engines --------------------------------------------------------------------------------


class Writer:
    """Writes a file for every task, slowly; who, and how often, is in a log."""

    def __init__(self, folder, place):
        self.folder, self.place = Path(folder), place

    def do(self, task, advance):
        with (self.folder / "log.txt").open("a") as log:
            log.write(f"{task} {self.place} {os.getpid()}\n")
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
    return [line.split() for line in (folder / "log.txt").read_text().splitlines()]


def test_engines_do_every_task_and_tell_of_it(engine, tmp_path):
    parts = []
    tasks = [f"task-{number}" for number in range(9)]
    engine.run(partial(Writer, str(tmp_path)), tasks, parts.append, tmp_path / "logs")
    assert sorted(path.stem for path in tmp_path.glob("*.out")) == sorted(tasks)
    assert sum(parts) == 27
    assert sorted(task for task, _, _ in log_of(tmp_path)) == sorted(tasks)
    done_by = {(place, process) for _, place, process in log_of(tmp_path)}
    assert 1 <= len(done_by) <= engine.workers  # one may have been ready too late
    for place, process in done_by if engine.workers > 1 else ():
        text = (tmp_path / f"logs/worker-{place}.log").read_text()
        assert f"begun: process {process}" in text
        assert "task task-" in text
        assert "done, 3 parts" in text
    engine.run(partial(Writer, str(tmp_path)), [], parts.append)


def test_workers_stay_for_what_comes_next(engine, tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        engine.run(partial(Writer, str(tmp_path / name)), ["a", "b", "c", "d"], lambda _: None)
    processes = [{one for _, _, one in log_of(tmp_path / name)} for name in ("first", "second")]
    assert len(processes[0] | processes[1]) <= engine.workers
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


def test_what_a_worker_raises_is_raised_here(engine, tmp_path):
    with pytest.raises(ValueError, match="task fail: expected something else"):
        engine.run(partial(Writer, str(tmp_path)), ["fail", "a", "b"], lambda _: None)


class Unmakeable:
    """What cannot be made, and says so in an error of an unusual kind."""

    def __init__(self, folder, place):
        raise KeyError("no such thing")


def test_after_a_failure_the_engine_works_again(engine, tmp_path):
    for _ in range(2):
        with pytest.raises((RuntimeError, KeyError), match="no such thing"):
            engine.run(partial(Unmakeable, str(tmp_path)), ["a", "b", "c"], lambda _: None)
    engine.run(partial(Writer, str(tmp_path)), ["a", "b", "c"], lambda _: None)
    assert sorted(path.stem for path in tmp_path.glob("*.out")) == ["a", "b", "c"]


class SlowToBegin(Writer):
    """Worker 1 takes longer to begin than all the work."""

    def __init__(self, folder, place):
        super().__init__(folder, place)
        time.sleep(3 * place)


def test_a_worker_that_was_not_ready_in_time_is_there_for_what_comes_next(engine, tmp_path):
    if engine.workers == 1:
        pytest.skip("this process is the worker")
    for number in range(3):
        tasks = [f"{number}-{letter}" for letter in "abc"]
        engine.run(partial(SlowToBegin, str(tmp_path)), tasks, lambda _: None)
    engine.run(
        partial(Writer, str(tmp_path)), [f"{number}" for number in range(300)], lambda _: None
    )
    done_by = [place for task, place, _ in log_of(tmp_path) if "-" not in task]
    assert set(done_by) == {"0", "1"}
    assert len(done_by) == 300


def test_options_of_another_engine_are_refused():
    with pytest.raises(ValueError, match="--address and --worker-cpus are for --engine ray"):
        open_engine("local", address="auto")
    with pytest.raises(ValueError, match="expected at least 1, got 0"):
        LocalEngine(0)


def test_workers_that_fit_on_no_node_are_refused():
    pytest.importorskip("ray")
    with pytest.raises(ValueError, match=r"worker_cpus: expected at most \d+.* got 4096"):
        open_engine("ray", worker_cpus=4096)
