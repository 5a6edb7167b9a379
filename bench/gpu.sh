#!/usr/bin/env bash
# Builds, tests and benchmarks on a machine with a GPU in one go, without a network, under 10 minutes. Needs Python with
# torch, transformers, pybind11, cmake, ninja, pyarrow, scipy, pytest and pytest-xdist, and nvcc.
# Writes JSON and one log to $OUT (default bench/results/); prints one line a part at the end.
# TRACMOD_COMMIT: the commit, where there is no git. PARTS: only these, such as PARTS="build kernels-bfloat16".
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-bench/results}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
# The installed layout, by links: tracmod.bench lies in bench/.
site=$PWD/build/site
mkdir -p "$site/tracmod"
ln -sfn "$PWD"/tracmod/* "$PWD/bench" "$PWD/cli" "$PWD/configs" "$site/tracmod/"
export PYTHONPATH=$site PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 TRACMOD_CUDA=ON TOKENIZERS_PARALLELISM=false
started=$SECONDS failed=0 summary=
run() {  # run SECONDS NAME COMMAND...: never beyond its time nor all parts' 590 s, its output kept
  local limit=$1 name=$2 begun=$SECONDS left=$((590 - SECONDS + started)) code=0
  shift 2
  [[ -n ${PARTS:-} && " $PARTS " != *" $name "* ]] && return
  echo "== $name: $*"
  if ((left < 5)); then
    code=124
  else
    timeout -k 5 $((limit < left ? limit : left)) "$@" > "$part" 2>&1 || code=$?
    { echo "== $name: $*"; cat "$part"; } >> "$OUT/gpu.log"
    tail -n 40 "$part" | cut -c1-200
  fi
  if ((code)); then failed=1; fi
  summary+="$name: $( ((code)) && echo "failed ($code)" || echo OK), $((SECONDS - begun)) s"$'\n'
}
part=$(mktemp)
trap 'rm -f "$part"' EXIT
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$OUT/gpu.log"
run 240 build python3 setup.py build_ext --inplace
ln -sfn "$PWD"/tracmod/* "$site/tracmod/"  # the module just built
run 150 tests python3 -m pytest -q -n 6 --dist loadfile -m 'not slow' tests/test_kernels_*.py tests/test_gradients.py \
  tests/test_features.py tests/test_influence.py tests/test_heads.py tests/test_store.py
kernels="python3 -m tracmod.bench.bench_kernels --device cuda --seconds 0.3"
tracin="python3 -m tracmod.bench.bench_tracin"
run 90 kernels-bfloat16 $kernels --dtype bfloat16 --json "$OUT/kernels-cuda-bfloat16.json"
run 90 collect $tracin collect --device cuda --shape base --examples 4096 --naive 100 --seconds 20 --out "$OUT"
run 150 exact $tracin exact --device cuda --bound 60 --out "$OUT"
run 60 kernels-float32 $kernels --dtype float32 --json "$OUT/kernels-cuda-float32.json"
if [[ -d runs/bench/models ]]; then
  run 60 fidelity $tracin fidelity --device cuda --out "$OUT"
fi
printf '\n%s%s s in all\n' "$summary" $((SECONDS - started)) | tee -a "$OUT/gpu.log"
exit $failed
