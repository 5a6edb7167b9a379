"""The waiting policy of OpenMP threads, chosen before torch loads OpenMP. Imports no torch.

A matrix product is divided among threads, and each of them waits for the others at its end. A
thread that waits awake ("spins") goes on at once, but on a machine whose cores are busy it uses up
the time that the thread it waits for would need: GNU OpenMP spins for several milliseconds, which
is longer than the time slice of a core. A thread that sleeps has to be woken, which costs more than
a small matrix product takes. So threads spin for about the time that waking takes, and then sleep.
`bench/bench_waiting.py` measures the choices.

The ops of `csrc/` run on the same OpenMP threads, and so wait in the same way.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

# GNU OpenMP: rounds of spinning, each some nanoseconds. Torch's wheels for Linux bring it.
SPINCOUNT = "10000"
# LLVM's and Intel's OpenMP, of other builds of torch: milliseconds; their default is 200.
BLOCKTIME = "1"
# Each decides how threads wait, so that a user who sets any of them has chosen.
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def choose_waiting_policy(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let OpenMP threads spin briefly, in this process and in those that it starts.

    This must happen before torch is imported: OpenMP reads its variables when it is loaded. Nothing
    is changed if one of `VARIABLES` is set.

    Args:
        environment: the environment variables to set.
    """
    if any(name in environment for name in VARIABLES):
        return
    environment["GOMP_SPINCOUNT"] = SPINCOUNT
    environment["KMP_BLOCKTIME"] = BLOCKTIME


def waiting_policy() -> dict[str, str]:
    """Return the variables that decide how threads wait, as far as they are set."""
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}
