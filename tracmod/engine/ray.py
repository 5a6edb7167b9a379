"""Engine for a Ray cluster: every worker is an actor that keeps its model and runs tasks."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tracmod.engine.dispatch import WorkerEvent, dispatch
from tracmod.engine.interface import MakeWorker
from tracmod.engine.local import do_logged, worker_log
from tracmod.engine.waiting import choose_waiting_policy, waiting_policy
from tracmod.files import progress

try:
    import ray as _ray
    from ray import exceptions
except ImportError as error:
    raise ValueError("--engine ray needs Ray: pip install 'tracmod[ray]'") from error

ray: Any = _ray


class RayEngine:
    """Runs tasks on a Ray cluster whose nodes share the file system of the run folder.

    Attributes:
        workers: number of actors.
    """

    def __init__(
        self, address: str | None = None, workers: int | None = None, worker_cpus: int = 1
    ) -> None:
        """Join a cluster, or start one on this machine.

        Args:
            address: address of the cluster, or `auto` for the one that `ray start` started on
                this machine. None starts a cluster on this machine that ends with this process.
            workers: number of actors; None for as many as the cluster has room for now.
            worker_cpus: cores, and threads, of each actor. In a cluster with GPUs each actor also
                gets one GPU.

        Raises:
            ValueError: there is no cluster at the address, no node has enough cores, or a number
                is below 1.
        """
        if worker_cpus < 1 or (workers is not None and workers < 1):
            raise ValueError(
                f"workers and worker_cpus: expected 1 or more, got {workers} and {worker_cpus}"
            )
        self._started_ray = not ray.is_initialized()
        if self._started_ray:
            _join(address)
        gpus = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0
        self.workers = workers or _count_fitting_workers(worker_cpus, gpus)
        self._team = _Actors(worker_cpus, gpus)

    def run(
        self,
        make_worker: MakeWorker,
        tasks: Sequence[Any],
        advance: Callable[[int], Any],
        logs: Path | None = None,
        twice: bool = True,
    ) -> None:
        """Run all tasks, see `Engine.run`."""
        if tasks:
            self._team.begin(make_worker, tasks, logs)
            dispatch(self._team, len(tasks), self.workers, advance, twice=twice)

    def close(self) -> None:
        """End the actors and leave the cluster, which ends if it was started here."""
        self._team.close()
        if self._started_ray:
            ray.shutdown()


def _join(address: str | None) -> None:
    """Connect this process to Ray.

    Raises:
        ValueError: there is no cluster at the address.
    """
    refusal = f"--address {address}: no Ray cluster there, start one with `ray start --head`"
    if address is not None and ":" in address and "://" not in address:
        host, _, port = address.rpartition(":")
        try:  # Ray itself would try to reach a silent address for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, ValueError) as error:
            raise ValueError(f"{refusal}: {error}") from None
    try:
        ray.init(
            address=address or "local",  # with None Ray would join any cluster on this machine
            include_dashboard=None if address else False,
            log_to_driver=False,
            logging_level="warning",
        )
    except ConnectionError as error:
        raise ValueError(f"{refusal}: {error}") from None


def _count_fitting_workers(cpus: int, gpus: int) -> int:
    """Return how many actors fit on the nodes that are alive.

    Raises:
        ValueError: no actor fits on any node.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fitting = [
        min(int(node.get("CPU", 0) // cpus), int(node.get("GPU", 0)) if gpus else 1 << 30)
        for node in nodes
    ]
    if not sum(fitting):
        largest = max((int(node.get("CPU", 0)) for node in nodes), default=0)
        raise ValueError(
            f"worker_cpus: expected at most {largest}, the cores of the largest node, got {cpus}"
        )
    return sum(fitting)


class _Actor:
    """A worker on a node of the cluster."""

    def __init__(self, number: int, threads: int) -> None:
        self._number, self._threads = number, threads
        self._log = worker_log(None, number)
        progress.write_lines_with(self._log.info)
        self._worker: Any = None

    def make(self, make_worker: MakeWorker, logs: Path | None) -> None:
        torch.set_num_threads(self._threads)
        self._log = worker_log(logs, self._number)
        self._worker = make_worker(self._number)

    def do(self, task: Any) -> int:
        return do_logged(self._worker, task, self._log)


class _Actors:
    """A `Team` of actors.

    Every call of an actor returns a reference; `_pending` says which event it will become.
    """

    def __init__(self, cpus: int, gpus: int) -> None:
        self._cpus = cpus
        # Ray's own retries are off: `dispatch` gives a lost task to any other actor at once.
        # An actor waits for its threads as this process does, on whatever node it runs.
        choose_waiting_policy()
        self._class = ray.remote(_Actor).options(
            num_cpus=cpus,
            num_gpus=gpus,
            max_restarts=0,
            max_task_retries=0,
            runtime_env={"env_vars": waiting_policy()},
        )
        self._actors: dict[int, Any] = {}
        self._pending: dict[Any, tuple[str, int]] = {}  # reference -> kind of event, worker
        self._make_worker: Any = None
        self._tasks: Sequence[Any] = ()
        self._logs: Path | None = None

    def begin(self, make_worker: MakeWorker, tasks: Sequence[Any], logs: Path | None) -> None:
        """Set what the next run consists of."""
        self._make_worker, self._tasks = ray.put(make_worker), tasks
        self._logs = None if logs is None else logs.absolute()

    def start(self, worker: int) -> None:
        if worker not in self._actors:
            self._actors[worker] = self._class.remote(worker, self._cpus)
        made = self._actors[worker].make.remote(self._make_worker, self._logs)
        self._forget(worker)  # it may still be getting ready for an earlier run
        self._pending[made] = ("ready", worker)

    def give(self, worker: int, task: int) -> None:
        self._pending[self._actors[worker].do.remote(self._tasks[task])] = ("done", worker)

    def events(self, seconds: float) -> list[WorkerEvent]:
        pending = list(self._pending)
        finished, _ = ray.wait(pending, num_returns=1, timeout=seconds, fetch_local=False)
        if finished:  # others may have finished as well
            finished, _ = ray.wait(pending, num_returns=len(pending), timeout=0, fetch_local=False)
        return [self._event(reference) for reference in finished]

    def stop(self, worker: int) -> None:
        if worker in self._actors:
            ray.kill(self._actors.pop(worker))
            self._forget(worker)

    def close(self) -> None:
        for worker in list(self._actors):
            self.stop(worker)

    def _forget(self, worker: int) -> None:
        self._pending = {ref: event for ref, event in self._pending.items() if event[1] != worker}

    def _event(self, reference: Any) -> WorkerEvent:
        kind, worker = self._pending.pop(reference)
        try:
            return WorkerEvent(kind, worker, ray.get(reference))  # type: ignore[arg-type]
        except exceptions.RayTaskError as error:
            return WorkerEvent("failed", worker, error.cause or error)
        except exceptions.RayError as error:
            self.stop(worker)
            return WorkerEvent("lost", worker, " ".join(str(error).split())[:300])
