"""Every op is complete: public function, reference, sizes of the tests, benchmark and stub."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import SIZES

import tracmod
from tracmod import kernels
from tracmod.bench.cases import cases
from tracmod.kernels import reference

NO_OPS = {"build_info", "projection_matrix"}  # small functions with tests of their own
REFERENCES = {name: name for name in SIZES} | {"top_k_dot": "top_k"}


def test_every_op_has_sizes_a_reference_and_a_benchmark() -> None:
    ops = {name for name in kernels.__all__ if name.islower()} - NO_OPS
    assert SIZES.keys() == ops
    assert all(hasattr(reference, REFERENCES[op]) for op in ops)
    timed = {case.op.split()[0] for case in cases(torch.device("cpu"), torch.float32, rows=1)}
    assert timed == ops


def signatures(stub: Path) -> dict[str, list[tuple[str, bool]]]:
    """Return the arguments of every function of a stub, and whether they may be None."""
    return {
        function.name: [
            (argument.arg, "None" in ast.unparse(argument.annotation or ast.Constant("")))
            for argument in function.args.args
        ]
        for function in ast.parse(stub.read_text()).body
        if isinstance(function, ast.FunctionDef)
    }


def test_the_stub_has_the_signatures_of_the_built_module(tmp_path: Path) -> None:
    pytest.importorskip("mypy.stubgen")
    script = "from mypy.stubgen import main; main()"
    options = ["-q", "-m", "tracmod._C", "-o", str(tmp_path)]
    subprocess.run([sys.executable, "-c", script, *options], check=True)
    built = signatures(tmp_path / "tracmod" / "_C.pyi")
    assert signatures(Path(tracmod.__file__).parent / "_C.pyi") == built, "run `make stubs`"
    assert built.keys() >= SIZES.keys()
