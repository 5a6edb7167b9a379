"""Handing tasks out to workers that come, finish, fall behind and are lost.

The scheduler of every engine with several workers; it knows a `Team`, not how its workers are
reached. Each worker has one task at a time. A task whose worker is lost is given to another; when
nothing is left to begin, what takes much longer than tasks do is begun a second time elsewhere, and
the first to finish counts. Its own cost is constant per task.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

TRIES = 3  # workers that a task may lose
SLOW = 2.0  # times the mean: a task that takes longer is begun a second time


class Event(NamedTuple):
    """What became of a worker.

    Attributes:
        kind: ready (it takes tasks), done (with its task), failed (its task raised), lost.
        worker: its number.
        value: done: how many parts the task had; failed: the exception; lost: why.
    """

    kind: Literal["ready", "done", "failed", "lost"]
    worker: int
    value: Any = None


class Team(Protocol):
    """Workers, and how they are reached; they stay from one `dispatch` to the next."""

    def start(self, worker: int) -> None:
        """Begin a worker, unless it is there; one event says when it is ready, or it is lost.

        It may have been begun before, and not be ready since.
        """

    def give(self, worker: int, task: int) -> None:
        """Have a worker do the task of this number."""

    def events(self, seconds: float) -> list[Event]:
        """What happened, waiting at most so long for something to."""

    def stop(self, worker: int) -> None:
        """End a worker, whatever it does; no event of it comes any more."""


def dispatch(
    team: Team,
    count: int,
    workers: int,
    advance: Callable[[int], Any],
    *,
    twice: bool = True,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Have a team do the tasks 0 to count - 1.

    Args:
        team: its workers have nothing to do.
        count: how many tasks.
        workers: how many workers to have; no more than tasks.
        advance: told the parts of every task, once.
        twice: whether a task that takes long may be begun a second time.
        clock: seconds.

    Raises:
        what a task raised; RuntimeError where a task, or the beginning of workers, fails too often.
    """
    state = _Dispatch(team, count, twice, clock)
    try:
        for worker in range(min(workers, count)):
            team.start(worker)
        while state.left:
            for event in team.events(1.0):
                advance(state.take(event))
            state.hand_out()
        for worker in state.busy:  # the slower of two
            team.stop(worker)
    except BaseException:
        for worker in range(min(workers, count)):  # whatever they are about to say
            team.stop(worker)
        raise


class _Dispatch:
    """Who does what."""

    def __init__(self, team: Team, count: int, twice: bool, clock: Callable[[], float]) -> None:
        self.team = team
        self._twice = twice
        self.left = set(range(count))
        self.busy: set[int] = set()  # workers that do a task
        self._clock = clock
        self._pending = deque(range(count))
        self._idle: list[int] = []
        self._doing: dict[int, tuple[int, float]] = {}  # worker -> task, since when
        self._workers_of: dict[int, int] = {}  # task -> how many do it
        self._losses: dict[int, int] = {}
        self._ready: set[int] = set()
        self._unready = 0  # workers lost before they were ready, since one was
        self._seconds, self._finished = 0.0, 0

    def take(self, event: Event) -> int:
        """What an event changes; how many parts were done."""
        worker = event.worker
        if event.kind == "failed" and self._is_wanted(worker):
            raise event.value
        if event.kind == "lost":
            self._lose(worker, event.value)
            return 0
        self.busy.discard(worker)
        self._idle.append(worker)
        if event.kind == "ready":
            self._ready.add(worker)
            self._unready = 0
            return 0
        task, since = self._doing.pop(worker)
        self._release(task)
        if event.kind == "failed":
            return 0  # the other of two has done it
        self._seconds += self._clock() - since
        self._finished += 1
        if task not in self.left:
            return 0  # the other of two was first
        self.left.remove(task)
        return int(event.value)

    def _is_wanted(self, worker: int) -> bool:
        """Whether what a worker does is not done yet; a worker without a task is always wanted."""
        return worker not in self._doing or self._doing[worker][0] in self.left

    def hand_out(self) -> None:
        """A task for every worker that has none, as long as there are some."""
        while self._idle and self.left:
            task = self._next()
            if task is None:
                return
            worker = self._idle.pop()
            self.busy.add(worker)
            self._doing[worker] = (task, self._clock())
            self._workers_of[task] = self._workers_of.get(task, 0) + 1
            self.team.give(worker, task)

    def _next(self) -> int | None:
        while self._pending:
            task = self._pending.popleft()
            if task in self.left:
                return task
        if self._finished == 0 or not self._twice:
            return None
        late = self._clock() - SLOW * self._seconds / self._finished
        slow = [
            (since, task)
            for task, since in self._doing.values()
            if since < late and self._workers_of[task] == 1 and task in self.left
        ]
        return min(slow)[1] if slow else None

    def _release(self, task: int) -> None:
        self._workers_of[task] -= 1
        if not self._workers_of[task]:
            del self._workers_of[task]

    def _lose(self, worker: int, why: Any) -> None:
        """Give its task to another, and begin a worker in its place."""
        if worker in self._idle:
            self._idle.remove(worker)
        if worker in self._doing:
            task, _ = self._doing.pop(worker)
            self._release(task)
            self._losses[task] = self._losses.get(task, 0) + 1
            if self._losses[task] >= TRIES and task in self.left:
                raise RuntimeError(f"task {task} lost its worker {TRIES} times; the last: {why}")
            if task not in self._workers_of:
                self._pending.appendleft(task)
        elif worker not in self._ready:
            self._unready += 1
            if self._unready >= TRIES:
                raise RuntimeError(f"workers end before they are ready; the last: {why}")
        self.busy.discard(worker)
        self._ready.discard(worker)
        self.team.start(worker)
