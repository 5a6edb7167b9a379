"""Short measurements from which `tracmod run --check` estimates how long a run takes.

On a machine that others use, a pass takes several times as long by the clock as on free cores, and
how long changes from second to second. So every kind of work is measured several times, for about a
second in all, by the clock and in CPU time of all threads, and the median counts. CPU time is not
lengthened by the work of others (but for threads that wait for each other, see
`tracmod.engine.waiting`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

# Numbers of parts that are timed, one after the other, until one takes long enough to be measured.
# The first call only warms up. The second tells what a call costs whatever its size, which a whole
# run pays once for thousands of parts: on a model of XLM-R's size, as much as six examples.
SIZES = (1, 1, 8, 64, 256)
LONG_ENOUGH = 0.3  # seconds, as on free cores
PROBES = 5  # measurements of a kind of work
LEAST_PROBES = 3  # however long they take
PROBES_SECONDS = 1.5  # no further measurement is begun after this time by the clock
# Of the time of all threads but one, the share in which they compute on free cores. Passes of the
# mini model of `bench/` computed for 1.5 to 1.9 times the time of the clock with two threads.
PARALLEL_SHARE = 0.75
# A product of large matrices gets at least this share of its threads' time on free cores.
FREE_SHARE = 0.85


class Cost(NamedTuple):
    """Seconds of one part of some work.

    Attributes:
        free: on free cores; the median of the probes.
        low, high: the same by the fastest and the slowest probe.
        now: by the clock, under the present load; the median of the probes.
    """

    free: float
    low: float
    high: float
    now: float

    def scaled(self, factor: float) -> Cost:
        """Return the cost of another number of parts."""
        return Cost(*(factor * seconds for seconds in self))

    def plus(self, other: Cost) -> Cost:
        """Return the cost of both, one after the other."""
        return Cost(*map(sum, zip(self, other, strict=True)))


@dataclass
class Stopwatch:
    """Measures work on one device.

    Attributes:
        device: the device.
        threads: number of threads on a CPU.
        cores: cores that this process gets of the machine now, at most `threads`.
        clock, cpu_clock: return the time, and the CPU time of all threads, in seconds.
    """

    device: str
    threads: int = field(default_factory=torch.get_num_threads)
    clock: Callable[[], float] = time.perf_counter
    cpu_clock: Callable[[], float] = time.process_time
    cores: float = 0.0

    def __post_init__(self) -> None:
        self.cores = float(self.threads)
        if not self.on_gpu:
            self.cores = min(self.cores, self._available_cores())

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU, whose time is that of the clock."""
        return torch.device(self.device).type == "cuda"

    @property
    def is_busy(self) -> bool:
        """Whether other processes use the cores."""
        return self.cores < FREE_SHARE * self.threads

    def probe(self, work: Callable[[int], Any], sizes: Sequence[int] = SIZES) -> Cost:
        """Measure work several times; return the cost of one of its parts.

        Args:
            work: does the number of parts that it is given.
            sizes: numbers of parts, growing, see `SIZES`. The last that is tried is repeated.
        """
        self.measure(work, sizes[0])
        single = measured = self.measure(work, sizes[1])
        size = sizes[1]
        for size in sizes[2:]:
            measured = self.measure(work, size)
            if self._on_free_cores(*measured) >= LONG_ENOUGH:
                break
        probes, spent = [measured], measured[0]
        while len(probes) < PROBES and (spent < PROBES_SECONDS or len(probes) < LEAST_PROBES):
            probes.append(self.measure(work, size))
            spent += probes[-1][0]
        free = sorted(
            _per_part(self._on_free_cores(*probe), self._on_free_cores(*single), size)
            for probe in probes
        )
        now = statistics.median(_per_part(wall, single[0], size) for wall, _ in probes)
        return Cost(statistics.median(free), free[0], free[-1], now)

    def measure(self, work: Callable[[int], Any], size: int) -> tuple[float, float]:
        """Return the seconds of one call, by the clock and of all threads together."""
        self._synchronize()
        wall, cpu = self.clock(), self.cpu_clock()
        work(size)
        self._synchronize()
        return self.clock() - wall, self.cpu_clock() - cpu

    def _on_free_cores(self, wall: float, cpu: float) -> float:
        if self.on_gpu or not self.is_busy:
            return wall
        return min(wall, cpu / (1 + PARALLEL_SHARE * (self.threads - 1)))

    def _synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def _available_cores(self) -> float:
        """Return how many cores products of matrices get, which divide among threads evenly."""
        a = torch.ones(768, 768)
        torch.mm(a, a)
        bursts = [self.measure(lambda size: [torch.mm(a, a) for _ in range(size)], 8)]
        while len(bursts) < PROBES:
            bursts.append(self.measure(lambda size: [torch.mm(a, a) for _ in range(size)], 8))
        return statistics.median(cpu / wall if wall > 0 else self.threads for wall, cpu in bursts)


def _per_part(seconds: float, single: float, size: int) -> float:
    """Return the seconds of one of `size` parts, without what a call costs whatever its size.

    Args:
        seconds: of a call with `size` parts.
        single: of a call with one part.
        size: number of parts.
    """
    if size == 1:
        return seconds
    # Never less than half of the plain quotient: a call with one part may have been disturbed.
    return max((seconds - single) / (size - 1), seconds / size / 2)
