"""bench/gpu.sh with stand-ins for Python and NVIDIA's tools: its order, limits and exit codes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tracmod.bench import bench_kernels, bench_tracin

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "gpu.sh"
# Writes down how it was called, and fails if the call contains $FAIL.
STAND_IN = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$CALLS"
if [[ -n ${FAIL:-} && "$*" == *"$FAIL"* ]]; then echo "no such thing"; exit 1; fi
if [[ $(basename "$0") == ncu || $(basename "$0") == compute-sanitizer ]]; then
  while [[ $# -gt 0 && $1 != */python3 ]]; do shift; done
  "$@"
fi
"""


class Machine:
    """A copy of the script's surroundings without the project itself."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tools = folder / "tools"
        for name in ("bench", "tracmod", "cli", "configs", "tests", "build/gpu", "tools"):
            (folder / name).mkdir(parents=True)
        (folder / "build" / "gpu" / "_C.cpython-312-x86_64-linux-gnu.so").touch()
        shutil.copy(SCRIPT, folder / "bench")
        for test in ("test_cuda_end_to_end.py", "kernels/test_kernels_top_k.py"):
            (folder / "tests" / test).parent.mkdir(exist_ok=True)
            (folder / "tests" / test).touch()
        for tool in ("python3", "nvidia-smi", "compute-sanitizer", "ncu"):
            (self.tools / tool).write_text(STAND_IN)
            (self.tools / tool).chmod(0o755)

    def run(self, *arguments: str, **environment: str) -> tuple[int, str, list[str]]:
        """Run the script; return its exit code, its output and the calls of the stand-ins."""
        calls = self.folder / "calls"
        calls.write_text("")
        done = subprocess.run(
            ["bash", str(self.folder / "bench" / "gpu.sh"), *arguments],
            env={
                **os.environ, "PATH": f"{self.tools}:{os.environ['PATH']}", "CALLS": str(calls),
                "OUT": str(self.folder / "out"), "PYTHON": str(self.tools / "python3"),
                **environment,
            },
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert "command not found" not in done.stderr
        assert "unbound variable" not in done.stderr
        return done.returncode, done.stdout + done.stderr, calls.read_text().splitlines()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def first_with(calls: list[str], text: str) -> int:
    return next(i for i, call in enumerate(calls) if text in call)


def check_options(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the benchmarks parse the options that the script gave them."""
    for call in calls:
        match = re.search(r"python3 -m tracmod\.bench\.(bench_\w+) (.*)", call)
        if match is None:
            continue
        module = {"bench_kernels": bench_kernels, "bench_tracin": bench_tracin}[match[1]]
        monkeypatch.setattr("sys.argv", [match[1], *match[2].split()])
        assert module.parse_options().device in ("cuda", "cpu")


def test_the_first_call(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    code, output, calls = machine.run("first")
    assert code == 0, output
    check_options(calls, monkeypatch)
    order = ["nvidia-smi", "build_info", "--check-only --rows 3", "headline", "compute-sanitizer"]
    positions = [first_with(calls, text) for text in order]
    assert positions == sorted(positions)
    smokes = [call for call in calls if "--op" in call]
    assert len(smokes) == 2 * 4  # two dtypes, a process per op
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        assert first_with(calls, f"--tool {tool}")
    module = machine.folder / "build" / "site" / "tracmod" / "_C.cpython-312-x86_64-linux-gnu.so"
    assert module.is_symlink()
    assert len(list((machine.folder / "out").iterdir())) <= 8  # more might not come back
    assert not any("build_ext" in call for call in calls)
    assert "headline: OK" in (machine.folder / "out" / "gpu-first.log").read_text()


def test_the_second_call(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    code, output, calls = machine.run("second")
    assert code == 0, output
    check_options(calls, monkeypatch)
    order = ["tests/test_cuda_end_to_end.py", "collect --device cuda", "exact --device cuda",
             "--train 10000", "kernels-cuda-bfloat16.json", "ncu --clock-control none",
             "kernels-cuda-float32.json"]  # fmt: skip
    positions = [first_with(calls, text) for text in order]
    assert positions == sorted(positions)
    profiled = [call for call in calls if call.startswith("ncu")]
    for kernel in ("project_tiles", "sketch_tiles", "sketch_products", "^sketch$"):
        assert len([call for call in profiled if f"regex:{kernel} " in call]) == 1
        assert "--op project_gradients" in profiled[first_with(profiled, f"regex:{kernel} ")]
    assert len(profiled) == 7


def test_a_part_that_fails_does_not_stop_the_next(machine: Machine) -> None:
    code, output, calls = machine.run("first", FAIL="headline")
    assert code == 1
    assert "headline: failed (1)" in output
    assert any(call.startswith("compute-sanitizer") for call in calls)
    code, output, calls = machine.run("first", FAIL="top_k_dot")
    assert code == 1
    assert "smoke-top_k_dot-float32: failed (1)" in output
    assert "headline: OK" in output


def test_without_a_usable_module_it_is_built_and_a_failed_build_ends_the_call(
    machine: Machine,
) -> None:
    code, output, calls = machine.run("first", FAIL="-c from tracmod")
    assert code == 1
    assert "build: OK" in output
    assert not any("bench_kernels" in call for call in calls)  # it cannot be imported either
    (machine.tools / "python3").write_text("#!/usr/bin/env bash\nexit 1\n")
    code, output, _ = machine.run("first")
    assert code == 1
    assert "build: failed (1)" in output
    assert "headline" not in output


def test_missing_tools_are_named_and_a_rehearsal_uses_the_cpu(machine: Machine) -> None:
    for tool in ("nvidia-smi", "compute-sanitizer", "ncu"):
        (machine.tools / tool).unlink()
    for call in ("first", "second"):
        code, output, calls = machine.run(call, REHEARSE="1")
        assert code == 0, output
        assert not any("--device cuda" in text for text in calls)
    assert "ncu: not installed, left out" in output


def test_another_argument_is_refused(machine: Machine) -> None:
    code, output, calls = machine.run("third")
    assert (code, calls) == (2, [])
    assert "third" in output
