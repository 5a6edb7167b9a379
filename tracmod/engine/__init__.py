"""Engines run independent tasks in this process, in several local processes, or on a Ray cluster.

A task writes its results to files. Each file is written whole or not at all, and its content does
not depend on the worker that writes it. Finished work is therefore found by looking at the files,
and a task whose worker is lost is simply run again by another worker.
"""

from __future__ import annotations

from tracmod.engine.interface import Engine, MakeWorker, Worker

__all__ = ["Engine", "MakeWorker", "Worker", "open_engine"]


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
