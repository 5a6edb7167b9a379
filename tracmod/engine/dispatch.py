"""Scheduler for tasks whose workers may become ready late, fall behind or be lost.

All engines with several workers share `dispatch`, which reaches its workers only through a `Team`.
Its rules are:

1. Every worker runs one task at a time. Tasks are started in order.
2. When a worker is lost, another one replaces it, and its task is the next to be started. The run
   stops when the same task has lost `TRIES` workers.
3. When no task is left to start, an idle worker repeats the task that has been running longest, if
   that task has taken more than `SLOW` times the mean. The first of the two to finish counts.

Libraries lack some of this. `concurrent.futures` and loky give up a whole pool when one of its
processes dies, and never start a task twice. Ray repeats a method (`max_task_retries`) on the same
actor only, and a cluster that has lost a node may have no room to restart it. Measured with 18
tasks of one second on three single-core nodes, one of which is removed: here all 18 are finished
after 8 s; with `max_restarts=-1, max_task_retries=2`, 4 of them raise ActorUnavailableError; with
unlimited retries, 4 of them still wait after 150 s.

Rule 3 is worth its lines where workers differ in speed. In the virtual time of
`tests/engine/test_engine.py`, 1,000 shards of about 10 s on 64 workers take

    1 task in 100 is 10 times as slow at its first start     254 s without rule 3, 181 s with it
    1 worker of 64 is 10 times as slow                       199 s                 165 s
    64 tasks only, 1 in 50 is 10 times as slow                93 s                  29 s
    all workers are equally fast                             163 s                 163 s

with about 1 to 5 extra starts. Scheduling itself costs about 3 us of CPU time per task.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

TRIES = 3  # workers that a task may lose before the run stops
SLOW = 2.0  # a task that takes longer than this many times the mean may be started again


class WorkerEvent(NamedTuple):
    """A change in the state of a worker.

    Attributes:
        kind: "ready" (it accepts tasks), "advanced" (it did a part of its task), "done" (it
            finished its task), "failed" (its task, or the creation of the worker, raised an error)
            or "lost" (it no longer exists).
        worker: number of the worker.
        value: for "advanced" the number of parts done so far, for "done" that of all parts of the
            task, for "failed" the exception, for "lost" the reason.
    """

    kind: Literal["ready", "advanced", "done", "failed", "lost"]
    worker: int
    value: Any = None


class Team(Protocol):
    """The workers of an engine. They outlive one call of `dispatch`."""

    def start(self, worker: int) -> None:
        """Start a worker, or prepare an existing one for new tasks.

        Exactly one event follows: the worker is ready, failed or lost. The worker may still be
        busy getting ready for an earlier run, whose own event must then be suppressed.
        """

    def give(self, worker: int, task: int) -> None:
        """Let a worker that is ready run the task with this number."""

    def events(self, seconds: float) -> list[WorkerEvent]:
        """Return the events since the last call, waiting up to `seconds` for the first one."""

    def stop(self, worker: int) -> None:
        """End a worker, even in the middle of a task; no event of it follows."""


def dispatch(
    team: Team,
    count: int,
    workers: int,
    advance: Callable[[int], Any],
    *,
    twice: bool = True,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Let a team run the tasks 0 to count - 1.

    Args:
        team: workers that have nothing to do.
        count: number of tasks.
        workers: number of workers to use; no more than tasks are started.
        advance: called with numbers of parts that were done; each part counts once, also if its
            task is run several times.
        twice: whether a slow task may be started a second time.
        clock: returns the time in seconds.

    Raises:
        Exception: the error that a task, or the creation of a worker, raised.
        RuntimeError: a task lost `TRIES` workers, or as many workers in a row were lost before
            they were ready.
    """
    schedule = _Schedule(team, count, twice, clock)
    numbers = range(min(workers, count))
    try:
        for worker in numbers:
            team.start(worker)
        while schedule.unfinished:
            for event in team.events(1.0):
                advance(schedule.handle(event))
            schedule.assign_tasks()
    except BaseException:
        for worker in numbers:  # their next events would belong to this run
            team.stop(worker)
        raise
    for worker in schedule.running:  # each repeats a task that another worker has finished
        team.stop(worker)


class _Schedule:
    """State of one call of `dispatch`.

    Attributes:
        unfinished: numbers of the tasks that nobody has finished.
        running: worker -> its task, and when it was started.
    """

    def __init__(self, team: Team, count: int, twice: bool, clock: Callable[[], float]) -> None:
        self.unfinished = set(range(count))
        self.running: dict[int, tuple[int, float]] = {}
        self._team, self._twice, self._clock = team, twice, clock
        self._queue = deque(range(count))
        self._idle: list[int] = []
        self._losses: Counter[int] = Counter()  # task -> workers lost while they ran it
        self._advanced: Counter[int] = Counter()  # task -> parts of it that were reported as done
        self._ready: set[int] = set()
        self._lost_unready = 0  # workers lost before they were ready, since the last was ready
        self._seconds, self._finished = 0.0, 0  # over all finished tasks, for their mean

    def handle(self, event: WorkerEvent) -> int:
        """Update the state and return the number of parts that the event completes."""
        if event.kind == "lost":
            self._replace(event.worker, event.value)
            return 0
        if event.kind == "advanced":
            return self._new_parts(self.running[event.worker][0], event.value)
        task, started = self.running.pop(event.worker, (None, 0.0))
        if event.kind == "failed" and (task is None or task in self.unfinished):
            raise event.value
        self._idle.append(event.worker)
        if event.kind == "ready":
            self._ready.add(event.worker)
            self._lost_unready = 0
        elif event.kind == "done":
            self._seconds += self._clock() - started
            self._finished += 1
            if task in self.unfinished:
                parts = self._new_parts(task, event.value)
                self.unfinished.remove(task)
                return parts
        return 0  # it is ready, or another worker has finished the same task before

    def _new_parts(self, task: int, parts: int) -> int:
        """Return how many of a task's parts no attempt at it has reported before."""
        new = max(0, parts - self._advanced[task])
        self._advanced[task] += new
        return new

    def assign_tasks(self) -> None:
        """Give a task to every idle worker, as long as there are tasks to start."""
        while self._idle and (task := self._next_task()) is not None:
            worker = self._idle.pop()
            self.running[worker] = (task, self._clock())
            self._team.give(worker, task)

    def _next_task(self) -> int | None:
        if self._queue:
            return self._queue.popleft()
        if not self._twice or not self._finished:
            return None
        latest = self._clock() - SLOW * self._seconds / self._finished
        workers_of = Counter(task for task, _ in self.running.values())
        slow = [
            (started, task)
            for task, started in self.running.values()
            if started < latest and workers_of[task] == 1 and task in self.unfinished
        ]
        return min(slow)[1] if slow else None

    def _replace(self, worker: int, reason: Any) -> None:
        """Queue the task of a lost worker again and start a worker with the same number."""
        if worker in self._idle:
            self._idle.remove(worker)
        if worker in self.running:
            task, _ = self.running.pop(worker)
            self._losses[task] += 1
            if task in self.unfinished:
                if self._losses[task] >= TRIES:
                    raise RuntimeError(
                        f"task {task} lost its worker {TRIES} times; the last reason: {reason}"
                    )
                if all(task != other for other, _ in self.running.values()):
                    self._queue.appendleft(task)
        elif worker not in self._ready:
            self._lost_unready += 1
            if self._lost_unready >= TRIES:
                raise RuntimeError(
                    f"{TRIES} workers in a row were lost before they were ready; the last reason: "
                    f"{reason}"
                )
        self._ready.discard(worker)
        self._team.start(worker)
