"""Engines run independent tasks in this process, in several local processes, or on a Ray cluster.

A task writes its results to files. Each file is written whole or not at all, and its content does
not depend on the worker that writes it. Finished work is therefore found by looking at the files,
and a task whose worker is lost is simply run again by another worker.
"""

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


def open_engine(
    name: str, address: str | None = None, workers: int | None = None, worker_cpus: int = 1
) -> Engine:
    """Return the engine called `name`.

    Args:
        name: "local" or "ray".
        address, worker_cpus: for Ray only, see `RayEngine`.
        workers: number of tasks that run at the same time. None means 1 for the local engine, and
            as many as the cluster has room for on Ray.

    Raises:
        ValueError: Ray is not installed, there is no cluster at the address, or an option of Ray
            was given to the local engine.
    """
    if name == "ray":
        from tracmod.engine.ray import RayEngine  # Ray is an optional dependency

        return RayEngine(address, workers, worker_cpus)
    if address is not None or worker_cpus != 1:
        raise ValueError("--address and --worker-cpus are for --engine ray")
    from tracmod.engine.local import LocalEngine

    return LocalEngine(workers or 1)
