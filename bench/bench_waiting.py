"""Time small and large passes under each waiting policy of OpenMP threads, quiet and busy.

    python bench/bench_waiting.py [--seconds 60] [--threads N]

Every policy has a process of its own, because OpenMP reads it once. The processes take turns, so
that other work on the machine disturbs all of them alike; those whose turn it is not sleep. Then
the same with one busy loop per core, started here and ended after a bounded time. A process counts
only if its results agree with those of one thread. Times are wall-clock times, medians over the
rounds, and CPU times beside them, which include spinning.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

from tracmod.engine.waiting import SPINCOUNT, VARIABLES, choose_waiting_policy

CHOSEN = "tracmod's choice"
POLICIES: dict[str, dict[str, str]] = {
    "sleep at once": {"OMP_WAIT_POLICY": "PASSIVE"},
    CHOSEN: {},
    "OpenMP's default": {},  # nothing set
    **{
        f"{count} spins": {"GOMP_SPINCOUNT": str(count)}
        for count in (1000, 5000, 10000, 20000)
        if str(count) != SPINCOUNT
    },
}
# Largest relative error of a result on several threads, which add in another order than one does.
TOLERANCE = 1e-4


class Times(NamedTuple):
    """Seconds of one call: of the clock, and of all cores together."""

    wall: float
    cpu: float


# --- a process with one policy --------------------------------------------------------------


def work_functions() -> dict[str, Callable[[], Any]]:
    """Return the calls that are timed, by name; each returns a tensor."""
    import torch

    import tracmod as tm
    from tracmod.bench.models import random_examples, random_model

    torch.manual_seed(0)
    projection = tm.Projection(dim=1024)
    functions: dict[str, Callable[[], Any]] = {}
    for shape, count in (("tiny", 64), ("mini", 16)):
        collect = partial(tm.collect_features, random_model(shape), random_examples(count))
        functions[f"features of {count}, {shape}"] = partial(collect, projection)
    query, train = torch.randn(16, 1024), torch.randn(20_000, 1024)
    functions["native op: ranking 20,000"] = lambda: tm.top_influences(query, train, 10).scores
    # Many small native ops in a row, between operations of torch: the threads wait most here.
    functions["native op: 100 small rankings"] = lambda: torch.stack(
        [tm.top_influences(query, train[:500] + 0.0, 10).scores for _ in range(100)]
    )
    return functions


def serve(threads: int) -> None:
    """Compute the functions named on standard input, a line each; answer with their times."""
    import torch

    functions = work_functions()
    torch.set_num_threads(1)
    expected = {name: function() for name, function in functions.items()}
    torch.set_num_threads(threads)
    errors = {
        name: float((function() - expected[name]).norm() / expected[name].norm())
        for name, function in functions.items()
    }
    del expected
    print(json.dumps(errors), flush=True)
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        functions[line.strip()]()
        print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu]), flush=True)


class PolicyProcess:
    """A process in which OpenMP's threads wait by one policy."""

    def __init__(self, policy: str, threads: int) -> None:
        environment = {name: os.environ[name] for name in os.environ if name not in VARIABLES}
        environment |= POLICIES[policy] | {"OMP_NUM_THREADS": str(threads)}
        if policy == CHOSEN:
            choose_waiting_policy(environment)
        command = [sys.executable, __file__, "--serve", "--threads", str(threads)]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    @cached_property
    def errors(self) -> dict[str, float]:
        """The relative error of every function, when the process is ready."""
        errors: dict[str, float] = self._answer()
        return errors

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def time(self, function: str) -> Times:
        """Call a function once."""
        assert self._process.stdin is not None
        self._process.stdin.write(function + "\n")
        self._process.stdin.flush()
        return Times(*self._answer())

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


# --- measuring ------------------------------------------------------------------------------


@contextmanager
def busy_loops(count: int, seconds: float) -> Iterator[None]:
    """Keep cores busy within the context, and for no longer than some seconds."""
    loop = f"import time\nend = time.time() + {seconds}\nwhile time.time() < end: pass"
    loops = [subprocess.Popen([sys.executable, "-c", loop]) for _ in range(count)]
    try:
        yield
    finally:
        for process in loops:
            process.kill()
            process.wait()


def take_turns(
    processes: dict[str, PolicyProcess], functions: list[str], seconds: float
) -> dict[str, dict[str, Times]]:
    """Return the median times of every function and policy, from rounds for some seconds."""
    times: dict[str, dict[str, list[Times]]] = {
        function: {policy: [] for policy in processes} for function in functions
    }
    start, rounds = time.perf_counter(), 0
    while rounds < 3 or time.perf_counter() - start < seconds:
        for function in functions:
            for policy, process in processes.items():
                times[function][policy].append(process.time(function))
        rounds += 1
        if rounds >= 2 and time.perf_counter() - start > 2 * seconds:
            break
    return {
        function: {
            policy: Times(*map(statistics.median, zip(*measured, strict=True)))
            for policy, measured in by_policy.items()
        }
        for function, by_policy in times.items()
    }


def measure(threads: int, seconds: float) -> dict[str, Any]:
    """Measure every policy on the machine as it is, then with a busy loop per core.

    Raises:
        WrongResult: results differ from those of one thread.
    """
    from tracmod.bench.collect import require

    with ExitStack() as stack:
        processes = {policy: PolicyProcess(policy, threads) for policy in POLICIES}
        for process in processes.values():
            stack.callback(process.close)
        for policy, process in processes.items():
            for function, error in process.errors.items():
                require(error < TOLERANCE, f"{policy}: {function}: error {error:.1e}")
        functions = list(processes[CHOSEN].errors)
        load_before = os.getloadavg()[0]
        quiet = take_turns(processes, functions, seconds)
        with busy_loops(os.cpu_count() or 1, 10 * seconds):
            busy = take_turns(processes, functions, seconds)
    result = {"functions": functions, "quiet": quiet, "busy": busy}
    print_table(result)
    return {**result, "load_before": load_before}


def print_table(result: dict[str, Any]) -> None:
    """Print the times of every function and policy, in milliseconds."""
    for function in result["functions"]:
        print(f"\n{function:28} {'quiet':>9} {'CPU':>9} {'busy':>9} {'CPU':>9}")
        for policy in POLICIES:
            row = (*result["quiet"][function][policy], *result["busy"][function][policy])
            print(f"  {policy:26} " + " ".join(f"{1000 * value:9.1f}" for value in row))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = Path(__file__).resolve().parent
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=60, help="for the quiet half; busy alike")
    parser.add_argument("--out", type=Path, default=here / "results")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.threads)
        return
    result = {"part": "waiting", **measure(options.threads, options.seconds)}
    import torch

    from tracmod.bench.measure import environment, write_json

    torch.set_num_threads(options.threads)
    machine = environment(torch.device("cpu"))
    write_json(options.out / "waiting-cpu.json", {**result, "environment": machine})


if __name__ == "__main__":
    main()
