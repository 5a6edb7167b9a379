"""The wheel built from the source distribution is complete and runs without a compiler."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOT_COPIED = shutil.ignore_patterns(
    *(".git", ".venv", "build", "dist", "runs", "site", "htmlcov", ".*_cache", "__pycache__"),
    *("*.so", "*.egg-info"),
)
# Files of the package that may be read at run time, by their paths in the wheel.
DATA = [
    *(path.relative_to(ROOT) for path in (ROOT / "tracmod").rglob("*.*")),
    *("tracmod" / path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml")),
]
# Runs a kernel, compares it with its reference, loads an embedded config, and prints its own path.
KERNEL = """
import torch
import tracmod.kernels as kernels
from tracmod.config import load_config
from tracmod.kernels import reference

x, g = torch.randn(3, 5, 7), torch.randn(3, 5, 4)
arguments = dict(k_out=2, k_in=3, seed=1, input_key=2, output_key=3, bias=True)
features, expected = torch.zeros(3, 6), torch.zeros(3, 6, dtype=torch.float64)
kernels.project_gradients(x, g, features, **arguments)
reference.project_gradients(x.double(), g.double(), expected, **arguments)
torch.testing.assert_close(features.double(), expected, rtol=1e-5, atol=1e-5)
load_config("demo")
print(kernels.__file__)
"""

pytestmark = pytest.mark.slow


def run(*command: str | Path, **options: object) -> str:
    """Run a command that must succeed; return its output."""
    process = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, check=False, **options
    )  # type: ignore[call-overload]
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    return str(process.stdout)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The source distribution, built in a copy of the checkout without symbolic links."""
    pytest.importorskip("pybind11")
    source = tmp_path_factory.mktemp("source") / "tracmod"
    shutil.copytree(ROOT, source, ignore=NOT_COPIED, symlinks=True)
    for path in source.rglob("*"):
        if path.is_symlink():
            path.unlink()
    build = "from setuptools.build_meta import build_sdist; print(build_sdist('dist'))"
    name = run(sys.executable, "-c", build, cwd=source).splitlines()[-1]
    return source / "dist" / name


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """The wheel, built from the source distribution without network and without CUDA code."""
    folder = tmp_path_factory.mktemp("wheel")
    run(
        *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"),
        *("--wheel-dir", folder, sdist),
        env=os.environ | {"TRACMOD_CUDA": "OFF"},
    )
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def clean(wheel, tmp_path_factory):
    """The folder bin/ of an environment with the wheel and its dependencies, without a compiler."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=False)
    python = folder / "bin/python"
    run(
        *(sys.executable, "-m", "pip", "--python", python),
        *("install", "--no-deps", "--no-index", wheel),
    )
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # The dependencies are those of this environment. Its .pth files, such as that of an editable
    # tracmod, are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def in_clean(clean, *command, **variables):
    """Run a command with only the clean environment in PATH, so that there is no compiler."""
    assert shutil.which("g++", path=str(clean)) is None
    assert shutil.which("nvcc", path=str(clean)) is None
    environment = {
        "PATH": str(clean),
        "HOME": str(clean.parent),
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    return run(*command, env=environment, cwd=clean.parent)


def test_the_source_distribution_contains_the_files_of_the_build(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for path in (ROOT / "csrc").rglob("*.*"):
        assert str(path.relative_to(ROOT)) in names
    assert {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "README.md"} <= names


def test_the_wheel_contains_the_package_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in DATA:
        if path.suffix in (".py", ".pyi", ".yaml", ".html", ".css", ".js", ".j2", ".typed"):
            assert path.as_posix() in names
    for module in ("cli/__init__", "cli/__main__", "bench/bench_kernels", "configs/__init__"):
        assert f"tracmod/{module}.py" in names
    roots = {name.partition("/")[0] for name in names}
    assert {root for root in roots if not root.endswith(".dist-info")} == {"tracmod"}
    assert not [name for name in names if re.search(r"csrc|\btests?/|\.(cpp|cu|cuh|h)$", name)]
    assert len([name for name in names if name.endswith(".so")]) == 1


def test_the_wheel_imports_and_computes_without_a_compiler(clean):
    path = in_clean(clean, clean / "python", "-c", KERNEL)
    assert Path(path.strip()).is_relative_to(clean.parent)


def test_doctor_reports_the_build_of_the_wheel(clean):
    report = json.loads(in_clean(clean, clean / "tracmod", "doctor", "--json"))
    assert report["native cuda"] is None
    assert report["native version"] == report["tracmod"]


@pytest.mark.parametrize("instructions", ["baseline", "avx2", "avx512", "avx512_bf16"])
def test_the_wheel_has_code_for_every_instruction_set_and_requires_none(clean, instructions):
    try:
        in_clean(clean, clean / "python", "-c", KERNEL, TRACMOD_INSTRUCTIONS=instructions)
    except AssertionError as error:
        # A processor without these instructions raises an error; every processor has the baseline.
        if instructions == "baseline" or f"got {instructions}" not in str(error):
            raise
    build_files = (ROOT / "CMakeLists.txt").read_text() + (ROOT / "setup.py").read_text()
    assert not re.search(r"-march|-mtune|-mavx|-mfma", build_files)
