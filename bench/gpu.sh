#!/usr/bin/env bash
# Builds, tests and benchmarks on a machine with a GPU in one go, without a network. Needs Python with
# torch, transformers, pybind11, cmake, ninja, pyarrow, scipy and pytest, and nvcc.
# Writes logs and JSON to $OUT (default bench/results/).
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-bench/results}
mkdir -p "$OUT"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 TRACMOD_CUDA=ON
failed=0
run() {  # run SECONDS NAME COMMAND...: never beyond its time, its output kept
  local seconds=$1 name=$2
  shift 2
  echo "== $name: $*"
  timeout "$seconds" "$@" > "$OUT/$name.log" 2>&1 || { failed=1; echo "   failed"; }
  tail -n 25 "$OUT/$name.log"
}
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$OUT/gpu.csv"
run 240 build python3 setup.py build_ext --inplace
run 200 tests python3 -m pytest -q -m 'not slow' tests/test_kernels_*.py tests/test_gradients.py \
  tests/test_features.py tests/test_influence.py tests/test_heads.py tests/test_store.py
for dtype in float32 bfloat16; do
  run 60 "bench-$dtype" python3 bench/bench_kernels.py --device cuda --dtype "$dtype" \
    --json "$OUT/kernels-$dtype.json"
done
exit $failed
