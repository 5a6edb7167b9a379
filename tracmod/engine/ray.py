"""The Ray engine: actors on a cluster that keep their model and take tasks."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tracmod.engine import MakeWorker
from tracmod.engine.dispatch import Event, dispatch
from tracmod.engine.local import do_logged, worker_log

try:
    import ray as _ray
    from ray import exceptions
except ImportError as error:
    raise ValueError("--engine ray needs Ray: pip install 'tracmod[ray]'") from error

ray: Any = _ray


class RayEngine:
    """Tasks on a Ray cluster whose nodes share the run folder's file system.

    Attributes:
        workers: actors; as many as the cluster has room for when it is begun, if not given.
    """

    def __init__(
        self, address: str | None = None, workers: int | None = None, worker_cpus: int = 1
    ) -> None:
        """Join a cluster, or begin one on this machine.

        Args:
            address: of a cluster, `auto` for the one that `ray start` began here; None: a cluster
                of this machine alone, which ends with this process.
            workers: how many; None: as many as fit.
            worker_cpus: cores, and threads, of each. Where the cluster has GPUs each also has one.

        Raises:
            ValueError: no cluster there.
        """
        if worker_cpus < 1 or (workers is not None and workers < 1):
            raise ValueError(
                f"workers and their cores: expected 1 or more, got {workers}, {worker_cpus}"
            )
        self._began = not ray.is_initialized()
        if self._began:
            _join(address)
        there = ray.cluster_resources()
        gpus = 1 if there.get("GPU", 0) >= 1 else 0
        self.workers = workers or _room(worker_cpus, gpus)
        self._team = _Actors(worker_cpus, gpus)

    def run(
        self,
        make_worker: MakeWorker,
        tasks: Sequence[Any],
        advance: Callable[[int], Any],
        logs: Path | None = None,
        twice: bool = True,
    ) -> None:
        """See `Engine.run`."""
        if tasks:
            self._team.begin(make_worker, tasks, logs)
            dispatch(self._team, len(tasks), self.workers, advance, twice=twice)

    def close(self) -> None:
        """End the actors and leave the cluster; one that was begun here ends."""
        self._team.close()
        if self._began:
            ray.shutdown()


def _join(address: str | None) -> None:
    if address is not None and ":" in address and "://" not in address:
        _knock(address)
    try:
        ray.init(
            address=address or "local",  # else Ray would join any cluster that it finds here
            include_dashboard=None if address else False,
            log_to_driver=False,
            logging_level="warning",
        )
    except ConnectionError as error:
        raise ValueError(
            f"--address {address}: no Ray cluster there, begin one with `ray start --head`: {error}"
        ) from None


def _room(cpus: int, gpus: int) -> int:
    """How many workers the nodes have room for.

    Raises:
        ValueError: none.
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


def _knock(address: str) -> None:
    """Ray itself would go on trying for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--address {address}: no Ray cluster there, begin one with `ray start --head`: {error}"
        ) from None


class _Actor:
    """A worker where Ray puts it."""

    def __init__(self, number: int, threads: int) -> None:
        self._number, self._threads = number, threads
        self._log = worker_log(None, number)
        self._worker: Any = None

    def make(self, make_worker: MakeWorker, logs: Path | None) -> None:
        torch.set_num_threads(self._threads)
        self._log = worker_log(logs, self._number)
        self._worker = make_worker(self._number)

    def do(self, task: Any) -> int:
        return do_logged(self._worker, task, self._log)


class _Actors:
    """A team of actors."""

    def __init__(self, cpus: int, gpus: int) -> None:
        self._cpus = cpus
        # Begun again elsewhere at once where a node ends: by `dispatch`, not by Ray.
        self._class = ray.remote(_Actor).options(
            num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0
        )
        self._actors: dict[int, Any] = {}
        self._awaited: dict[Any, tuple[str, int]] = {}
        self._make_worker: Any = None
        self._tasks: Sequence[Any] = ()
        self._logs: Path | None = None

    def begin(self, make_worker: MakeWorker, tasks: Sequence[Any], logs: Path | None) -> None:
        """What the numbers of tasks mean from now on, and who does them."""
        self._make_worker, self._tasks = ray.put(make_worker), tasks
        self._logs = None if logs is None else logs.absolute()

    def start(self, worker: int) -> None:
        if worker not in self._actors:
            self._actors[worker] = self._class.remote(worker, self._cpus)
        made = self._actors[worker].make.remote(self._make_worker, self._logs)
        # One that was asked for before and is not there yet tells nothing any more.
        self._forget(worker)
        self._awaited[made] = ("ready", worker)

    def give(self, worker: int, task: int) -> None:
        self._awaited[self._actors[worker].do.remote(self._tasks[task])] = ("done", worker)

    def events(self, seconds: float) -> list[Event]:
        awaited = list(self._awaited)
        found, _ = ray.wait(awaited, num_returns=1, timeout=seconds, fetch_local=False)
        if found:  # and all others that are there by now
            found, _ = ray.wait(awaited, num_returns=len(awaited), timeout=0, fetch_local=False)
        return [self._event(one) for one in found]

    def stop(self, worker: int) -> None:
        if worker in self._actors:
            ray.kill(self._actors.pop(worker))
            self._forget(worker)

    def _forget(self, worker: int) -> None:
        self._awaited = {one: who for one, who in self._awaited.items() if who[1] != worker}

    def close(self) -> None:
        for worker in list(self._actors):
            self.stop(worker)

    def _event(self, awaited: Any) -> Event:
        kind, worker = self._awaited.pop(awaited)
        try:
            return Event(kind, worker, ray.get(awaited))  # type: ignore[arg-type]
        except exceptions.RayTaskError as error:
            return Event("failed", worker, error.cause or error)
        except exceptions.RayError as error:
            self.stop(worker)
            return Event("lost", worker, " ".join(str(error).split())[:300])
