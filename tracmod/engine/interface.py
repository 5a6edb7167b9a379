"""Protocols of engines and workers, which every kind of engine follows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol


class Worker(Protocol):
    """Runs tasks one after the other and keeps what it has loaded, such as a model, in between."""

    def do(self, task: Any, advance: Callable[[int], Any]) -> None:
        """Run a task; call `advance` with the number of parts (examples, scores) just finished."""


MakeWorker = Callable[[int], Worker]


class Engine(Protocol):
    """Runs tasks.

    Attributes:
        workers: number of tasks that run at the same time.
    """

    workers: int

    def run(
        self,
        make_worker: MakeWorker,
        tasks: Sequence[Any],
        advance: Callable[[int], Any],
        logs: Path | None = None,
        twice: bool = True,
    ) -> None:
        """Run all tasks and return when they are finished.

        Args:
            make_worker: creates a worker, given its number from 0. It is called in the worker's
                own process, so it must be picklable, for example a `functools.partial` of a class.
            tasks: picklable tasks, in the order in which they are started.
            advance: called in this process with the number of parts that were finished.
            logs: folder in which each worker writes a log; None for no logs.
            twice: whether two workers may run the same task at the same time, so that a task that
                takes much longer than others can be started again elsewhere.

        Raises:
            ValueError, OSError, ...: the error that a task raised; the other tasks are abandoned.
            RuntimeError: a task lost its worker several times.
        """

    def close(self) -> None:
        """Stop the workers and release their resources."""
