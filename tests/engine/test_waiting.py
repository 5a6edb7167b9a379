"""OpenMP's threads wait briefly, unless the user has chosen how they wait."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tracmod.engine.waiting import VARIABLES, choose_waiting_policy

UNSET = {name: value for name, value in os.environ.items() if name not in VARIABLES}


@pytest.mark.parametrize("name", VARIABLES)
def test_what_the_user_has_set_stays(name):
    environment = {name: "17"}
    choose_waiting_policy(environment)
    assert environment == {name: "17"}


def test_gnu_and_llvm_openmp_spin_briefly():
    environment = {}
    choose_waiting_policy(environment)
    assert environment.keys() == {"GOMP_SPINCOUNT", "KMP_BLOCKTIME"}
    assert all(int(value) > 0 for value in environment.values())


def test_the_command_chooses_before_torch_is_loaded():
    """libgomp prints the settings that it has read when it is loaded."""
    environment = UNSET | {"OMP_DISPLAY_ENV": "VERBOSE"}
    command = [sys.executable, "-m", "tracmod.cli", "doctor"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("torch uses another OpenMP than GNU's")
    chosen: dict[str, str] = {}
    choose_waiting_policy(chosen)
    assert f"GOMP_SPINCOUNT = '{chosen['GOMP_SPINCOUNT']}'" in done.stderr
