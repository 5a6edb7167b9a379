"""Tasks of a run, and the worker that does them where an engine puts it.

A task is a part of a stage that is independent of the others: a frozen dataclass beside its stage,
small enough to be sent to another process, with a method `run`. Its results are files in the run
folder, each written whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from tracmod.gradients.capture import frozen_as_configured
from tracmod.models.modes import device_of_worker
from tracmod.study.context import RunContext
from tracmod.study.run_folder import RunFolder

Advance = Callable[[int], Any]  # called with the number of parts done (examples, scores, models)


class StudyTask(Protocol):
    """A part of a stage."""

    def run(self, context: RunContext, advance: Advance) -> None:
        """Do the task."""


class StudyWorker:
    """Does tasks of one run, and keeps what its context has loaded between them."""

    def __init__(self, path: Path, device: str, number: int) -> None:
        """Open the run folder.

        Args:
            path: The run folder, on a file system that all workers share.
            device: The device to compute on; of several GPUs of a machine, each worker has its own.
            number: The number of the worker, from 0.
        """
        self._context = RunContext(RunFolder(path))
        self._context.device = device_of_worker(device, number)

    def do(self, task: StudyTask, advance: Advance) -> None:
        """See `Worker.do`."""
        with frozen_as_configured():
            task.run(self._context, advance)


def run_tasks(
    context: RunContext, tasks: Sequence[StudyTask], advance: Advance, twice: bool = True
) -> None:
    """Have the context's engine do tasks, and return when all are done.

    Args:
        context: The run.
        tasks: The tasks, in the order in which they are begun.
        advance: Called in this process for parts that are done.
        twice: Whether a task that falls behind may be begun a second time elsewhere.
    """
    context.engine.run(
        partial(StudyWorker, context.run.path.absolute(), context.device),
        tasks,
        advance,
        context.run.logs,
        twice,
    )
