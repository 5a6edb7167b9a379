"""Where work runs: tasks that are independent of each other, in this process, in others, or on Ray.

A task's results are files that are written whole or not at all and do not depend on who writes
them. So what was done before is found by looking, and a task whose worker is lost is done again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol


class Worker(Protocol):
    """What does tasks; made once where it works, and kept, with the model it has loaded."""

    def do(self, task: Any, advance: Callable[[int], Any]) -> None:
        """Does a task; tells `advance` of every part (examples, scores) that is done."""


MakeWorker = Callable[[int], Worker]


class Engine(Protocol):
    """Does tasks.

    Attributes:
        workers: how many tasks are done at a time.
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
        """Do all tasks.

        Args:
            make_worker: called with a worker's place, from 0, where it will work; something that
                can be sent there, such as `functools.partial` of a class.
            tasks: likewise; in the order in which they are begun.
            advance: is told of parts that are done, in this process.
            logs: folder for a log of every worker.
            twice: whether two workers may do the same task at a time, so that one which falls
                behind is begun elsewhere.

        Raises:
            ValueError, OSError, ...: what a worker raised; the other tasks are given up.
            RuntimeError: a task lost its worker again and again.
        """

    def close(self) -> None:
        """Give back what it holds."""


def open_engine(
    name: str, address: str | None = None, workers: int | None = None, worker_cpus: int = 1
) -> Engine:
    """The engine of a name.

    Args:
        name: local or ray.
        address, worker_cpus: of Ray only; see `RayEngine`.
        workers: how many tasks at a time; None: local 1, on Ray as many as there is room for.

    Raises:
        ValueError: Ray is not installed or there is no cluster; options of the other engine.
    """
    if name == "ray":
        from tracmod.engine.ray import RayEngine  # here: Ray is an extra

        return RayEngine(address, workers, worker_cpus)
    if address is not None or worker_cpus != 1:
        raise ValueError("--address and --worker-cpus are for --engine ray")
    from tracmod.engine.local import LocalEngine

    return LocalEngine(workers or 1)
