"""Build `tracmod._C` with CMake. Everything else about the package is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeExtension(Extension):
    """An extension whose sources are listed in CMakeLists.txt only."""

    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    """Configure and build CMakeLists.txt, writing the module where setuptools expects it.

    Reads the environment variables TRACMOD_CUDA (AUTO, the default, ON or OFF) and CMAKE_ARGS
    (additional arguments for CMake).
    """

    def build_extension(self, ext: Extension) -> None:
        if not isinstance(ext, CMakeExtension):
            super().build_extension(ext)
            return
        import pybind11  # a build requirement, which is absent while setuptools reads metadata

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # Not a temporary folder, so that a rebuild compiles only what has changed.
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            *("-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DTRACMOD_VERSION={self.distribution.get_version()}",
            f"-DTRACMOD_CUDA={os.environ.get('TRACMOD_CUDA', 'AUTO')}",
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]
        # The cache stores the paths of cmake and ninja, which change with every isolated build.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        # cmake and ninja from Python packages are beside this interpreter, others on the path.
        search = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
        environment = {**os.environ, "PATH": search}
        cmake = shutil.which("cmake", path=search) or "cmake"
        subprocess.run([cmake, *configure], check=True, env=environment)
        subprocess.run([cmake, "--build", str(build)], check=True, env=environment)


setup(
    packages=[
        *find_packages(include=["tracmod", "tracmod.*"]),
        "tracmod.bench",
        "tracmod.bench.peers",
        "tracmod.cli",
        "tracmod.configs",
    ],
    package_dir={
        "tracmod.bench": "bench",
        "tracmod.cli": "cli",
        "tracmod.configs": "configs",
    },
    package_data={
        "tracmod": ["py.typed", "_C.pyi"],
        "tracmod.attribution": ["*.css", "*.j2"],
        "tracmod.configs": ["*.yaml", "sweeps/*.yaml"],
        "tracmod.report.html": ["*.css", "*.js", "*.j2"],
    },
    ext_modules=[CMakeExtension("tracmod._C")],
    cmdclass={"build_ext": CMakeBuild},
)
