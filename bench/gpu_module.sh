#!/usr/bin/env bash
# Build the native module for a machine with a Hopper GPU and Python 3.12, without a GPU: bench/gpu.sh takes it from build/gpu/
# and saves the minutes of building there. This needs nvcc, and cmake, ninja and pybind11 in the Python named by PYTHON.
# PYTHON312 is a Python 3.12 with its headers; only they are used, so it needs no packages.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python} PYTHON312=${PYTHON312:-python3.12}
bin=$(dirname "$(command -v "$PYTHON")")
version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' tracmod/__init__.py)
PATH=$bin:$PATH cmake -S . -B build/gpu-cmake -G Ninja -DCMAKE_BUILD_TYPE=Release \
  -DPython_EXECUTABLE="$("$PYTHON312" -c 'import sys; print(sys.executable)')" \
  -Dpybind11_DIR="$("$PYTHON" -c 'import pybind11; print(pybind11.get_cmake_dir())')" -DTRACMOD_CUDA=ON \
  -DCMAKE_CUDA_ARCHITECTURES=90a-real -DTRACMOD_VERSION="$version" -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$PWD/build/gpu"
PATH=$bin:$PATH cmake --build build/gpu-cmake
ls -l build/gpu/
