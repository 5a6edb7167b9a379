"""The local engine: in this process, or one process for every device."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from tracmod.engine import MakeWorker
from tracmod.engine.dispatch import Event, dispatch


class LocalEngine:
    """Tasks one after the other in this process; with several workers, in processes of their own.

    Several share the threads that torch has in this process.

    Attributes:
        workers: 1, or how many processes.
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
        """See `Engine.run`; without other processes there are no logs."""
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
        """End the processes."""
        self._team.close()


class _Processes:
    """A team of processes of this machine."""

    def __init__(self, workers: int) -> None:
        self._workers = workers  # which share this process's threads
        # Not forked: threads and a GPU do not survive that.
        self._context = multiprocessing.get_context("spawn")
        self._pipes: dict[int, Connection] = {}
        self._processes: dict[int, Any] = {}
        self._making: Counter[int] = Counter()  # how often a worker is yet to say that it is ready
        self._make_worker: MakeWorker
        self._tasks: Sequence[Any] = ()
        self._logs: Path | None = None

    def begin(self, make_worker: MakeWorker, tasks: Sequence[Any], logs: Path | None) -> None:
        """What the numbers of tasks mean from now on, and who does them."""
        self._make_worker, self._tasks, self._logs = make_worker, tasks, logs

    def start(self, worker: int) -> None:
        if worker not in self._pipes:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs, worker), daemon=True)
            process.start()
            theirs.close()
            self._pipes[worker], self._processes[worker] = ours, process
        self._making[worker] += 1
        threads = max(1, torch.get_num_threads() // self._workers)
        self._send(worker, ("make", (self._make_worker, self._logs, threads)))

    def give(self, worker: int, task: int) -> None:
        self._send(worker, ("do", self._tasks[task]))

    def events(self, seconds: float) -> list[Event]:
        worker_of = {pipe: worker for worker, pipe in self._pipes.items()}
        found = [self._event(worker_of[pipe]) for pipe in wait(list(worker_of), seconds)]  # type: ignore[index]
        return [event for event in found if event.kind != "ready" or not self._making[event.worker]]

    def stop(self, worker: int) -> None:
        if worker not in self._pipes:
            return
        self._pipes.pop(worker).close()
        self._processes[worker].kill()
        self._processes.pop(worker).join()
        del self._making[worker]

    def close(self) -> None:
        for worker in list(self._pipes):
            self.stop(worker)

    def _send(self, worker: int, message: tuple[str, Any]) -> None:
        with contextlib.suppress(OSError):  # it is lost, as `events` will say
            self._pipes[worker].send(message)

    def _event(self, worker: int) -> Event:
        try:
            kind, value = self._pipes[worker].recv()
            self._making[worker] -= kind == "ready"
            return Event(kind, worker, value)
        except (EOFError, OSError):
            process = self._processes[worker]
            process.join()
            why = f"process of worker {worker} ended with code {process.exitcode}"
            self.stop(worker)
            return Event("lost", worker, why)


def _serve(pipe: Connection, number: int) -> None:
    """The life of a process: a worker, made as it is told, that does the tasks that come."""
    worker, log = None, worker_log(None, number)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            what, value = pipe.recv()
            try:
                if what == "make":
                    make_worker, logs, threads = value
                    torch.set_num_threads(threads)
                    log = worker_log(logs, number)
                    worker = make_worker(number)
                    pipe.send(("ready", None))
                else:
                    pipe.send(("done", do_logged(worker, value, log)))
            except Exception as error:
                log.error("failed: %s", traceback.format_exc())
                pipe.send(("failed", _sendable(error)))


def _sendable(error: Exception) -> Exception:
    """The error as one of a kind that another process can take."""
    for kind in (ValueError, OSError, RuntimeError):
        if isinstance(error, kind):
            return kind(str(error))
    return RuntimeError(f"{type(error).__name__}: {error}")


def worker_log(logs: Path | None, number: int) -> logging.Logger:
    """The log of a worker: `worker-<number>.log` in the folder, appended to; else none."""
    log = logging.getLogger(f"tracmod.worker-{number}")
    log.setLevel(logging.INFO)
    log.propagate = False
    for handler in list(log.handlers):  # of what it did before
        log.removeHandler(handler)
        handler.close()
    if logs is not None:
        logs.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(logs / f"worker-{number}.log", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        log.addHandler(handler)
    log.info("begun: process %d on %s", os.getpid(), os.uname().nodename)
    return log


def do_logged(worker: Any, task: Any, log: logging.Logger) -> int:
    """Have a worker do a task; how many parts it had."""
    parts = 0

    def advance(count: int) -> None:
        nonlocal parts
        parts += count

    log.info("task %s", task)
    worker.do(task, advance)
    log.info("done, %d parts", parts)
    return parts
