"""Engine for one machine: tasks run in this process, or in several worker processes.

The processes are managed here because the libraries for it leave processes behind.
`concurrent.futures`, with one pool of one process per worker, passes all other tests of engines in
as many lines. But when the main process is killed with SIGKILL, its idle workers stay for ever with
the models they hold, and so do those of loky; and it has no public way to end a worker in the
middle of a task. A worker here reads from a pipe whose other end only the main process holds, so it
ends when the main process does.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from tracmod.engine.dispatch import WorkerEvent, dispatch
from tracmod.engine.interface import MakeWorker
from tracmod.engine.waiting import choose_waiting_policy
from tracmod.files import progress

REPORT_SECONDS = 1.0  # between two reports of a worker within its task


class LocalEngine:
    """Runs tasks in this process or, with several workers, in processes of their own.

    Worker processes divide the threads that torch has in this process among themselves.

    Attributes:
        workers: 1 for this process, otherwise the number of worker processes.
    """

    def __init__(self, workers: int = 1) -> None:
        if workers < 1:
            raise ValueError(f"workers: expected at least 1, got {workers}")
        self.workers = workers
        self._team = _Processes(workers)

    def run(
        self,
        make_worker: MakeWorker,
        tasks: Sequence[Any],
        advance: Callable[[int], Any],
        logs: Path | None = None,
        twice: bool = True,
    ) -> None:
        """Run all tasks, see `Engine.run`; there are no logs with a single worker."""
        if not tasks:
            return
        if self.workers == 1:
            worker = make_worker(0)
            for task in tasks:
                worker.do(task, advance)
            return
        self._team.begin(make_worker, tasks, logs)
        dispatch(self._team, len(tasks), self.workers, advance, twice=twice)

    def close(self) -> None:
        """End the worker processes."""
        self._team.close()


class _Processes:
    """A `Team` of processes on this machine, each with a pipe.

    A process outlives the run it was started for. For every run it receives a message "make" and
    answers "ready"; a worker that is slow to load may have several of these messages waiting, of
    which only the last answer belongs to the current run.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        # Started afresh, because neither threads nor a CUDA context survive a fork.
        self._context = multiprocessing.get_context("spawn")
        self._pipes: dict[int, Connection] = {}
        self._processes: dict[int, Any] = {}
        self._unanswered: Counter[int] = Counter()  # worker -> messages "make" without an answer
        self._make_worker: MakeWorker
        self._tasks: Sequence[Any] = ()
        self._logs: Path | None = None

    def begin(self, make_worker: MakeWorker, tasks: Sequence[Any], logs: Path | None) -> None:
        """Set what the next run consists of."""
        self._make_worker, self._tasks, self._logs = make_worker, tasks, logs

    def start(self, worker: int) -> None:
        if worker not in self._pipes:
            choose_waiting_policy()  # the process loads OpenMP anew
            own_end, workers_end = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(workers_end, worker), daemon=True)
            process.start()
            workers_end.close()
            self._pipes[worker], self._processes[worker] = own_end, process
        self._unanswered[worker] += 1
        threads = max(1, torch.get_num_threads() // self._workers)
        self._send(worker, ("make", (self._make_worker, self._logs, threads)))

    def give(self, worker: int, task: int) -> None:
        self._send(worker, ("do", self._tasks[task]))

    def events(self, seconds: float) -> list[WorkerEvent]:
        worker_of = {pipe: worker for worker, pipe in self._pipes.items()}
        readable = wait(list(worker_of), seconds)
        events = [self._receive(worker_of[pipe]) for pipe in readable]  # type: ignore[index]
        return [
            event for event in events if event.kind != "ready" or not self._unanswered[event.worker]
        ]

    def stop(self, worker: int) -> None:
        if worker not in self._pipes:
            return
        self._pipes.pop(worker).close()
        self._processes[worker].kill()
        self._processes.pop(worker).join()
        del self._unanswered[worker]

    def close(self) -> None:
        for worker in list(self._pipes):
            self.stop(worker)

    def _send(self, worker: int, message: tuple[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the process is lost; `events` reports it
            self._pipes[worker].send(message)

    def _receive(self, worker: int) -> WorkerEvent:
        try:
            kind, value = self._pipes[worker].recv()
            self._unanswered[worker] -= kind == "ready"
            return WorkerEvent(kind, worker, value)
        except (EOFError, OSError):
            process = self._processes[worker]
            process.join()
            reason = f"process of worker {worker} ended with exit code {process.exitcode}"
            self.stop(worker)
            return WorkerEvent("lost", worker, reason)


def _serve(pipe: Connection, number: int) -> None:
    """Run the main loop of a worker process, until the main process closes its end of the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C reaches the main process, which ends this one
    worker, log = None, worker_log(None, number)
    progress.write_lines_with(log.info)  # the main process shows the progress of all workers

    def report(parts: int) -> None:
        pipe.send(("advanced", parts))

    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            request, value = pipe.recv()
            try:
                if request == "make":
                    make_worker, logs, threads = value
                    torch.set_num_threads(threads)
                    log = worker_log(logs, number)
                    worker = make_worker(number)
                    pipe.send(("ready", None))
                else:
                    pipe.send(("done", do_logged(worker, value, log, report)))
            except Exception as error:
                log.error("failed: %s", traceback.format_exc())
                pipe.send(("failed", _picklable(error)))


def _picklable(error: Exception) -> Exception:
    """Return an error of a built-in type with the same message.

    Errors whose constructor takes several arguments pickle well but cannot be unpickled.
    """
    for kind in (ValueError, OSError, RuntimeError):
        if isinstance(error, kind):
            return kind(str(error))
    return RuntimeError(f"{type(error).__name__}: {error}")


def worker_log(logs: Path | None, number: int) -> logging.Logger:
    """Return the logger of a worker, which appends to `worker-<number>.log` in the folder.

    Args:
        logs: the folder, created if necessary; None to discard the messages.
        number: number of the worker.
    """
    log = logging.getLogger(f"tracmod.worker-{number}")
    log.setLevel(logging.INFO)
    log.propagate = False
    for handler in list(log.handlers):  # of an earlier run
        log.removeHandler(handler)
        handler.close()
    if logs is not None:
        logs.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(logs / f"worker-{number}.log", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        log.addHandler(handler)
    log.info("begun: process %d on %s", os.getpid(), os.uname().nodename)
    return log


def do_logged(
    worker: Any, task: Any, log: logging.Logger, report: Callable[[int], Any] = lambda parts: None
) -> int:
    """Let a worker run a task, log it, and return the number of its parts.

    Args:
        worker: the worker.
        task: the task.
        log: its log.
        report: called from time to time with the number of parts done so far.
    """
    parts, reported = 0, time.monotonic()

    def advance(count: int) -> None:
        nonlocal parts, reported
        parts += count
        if time.monotonic() - reported >= REPORT_SECONDS:
            report(parts)
            reported = time.monotonic()

    log.info("task %s", task)
    worker.do(task, advance)
    log.info("done, %d parts", parts)
    return parts
