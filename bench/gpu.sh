#!/usr/bin/env bash
# Build, test and benchmark on a machine with a GPU, without a network, in under 10 minutes. This needs nvcc and Python with
# torch, transformers, pybind11, cmake, ninja, pyarrow, scipy, pytest and pytest-xdist.
# Writes JSON and one log to $OUT (default bench/results/) and prints one line per part at the end.
# TRACMOD_COMMIT is the commit to record if there is no git. PARTS="build kernels-bfloat16" runs these parts only.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-bench/results}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
# The layout of an installation, made of links: tracmod.bench is in bench/.
site=$PWD/build/site
mkdir -p "$site/tracmod"
ln -sfn "$PWD"/tracmod/* "$PWD/bench" "$PWD/cli" "$PWD/configs" "$site/tracmod/"
export PYTHONPATH=$site PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 TRACMOD_CUDA=ON TOKENIZERS_PARALLELISM=false
started=$SECONDS failed=0 summary=
# run SECONDS NAME COMMAND...: run a part, stopped after SECONDS or when all parts have taken 590 s; log its output.
run() {
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
run 150 tests python3 -m pytest -q -n 6 --dist loadfile -m 'not slow' tests/kernels/test_kernels_*.py \
  tests/gradients/test_gradients.py tests/features tests/influence/test_influence.py tests/subnetworks/test_heads.py
kernels="python3 -m tracmod.bench.bench_kernels --device cuda --seconds 0.3"
tracin="python3 -m tracmod.bench.bench_tracin"
run 90 kernels-bfloat16 $kernels --dtype bfloat16 --json "$OUT/kernels-cuda-bfloat16.json"
run 90 collect $tracin collect --device cuda --shape base --examples 4096 --naive 100 --seconds 20 --out "$OUT"
run 150 exact $tracin exact --device cuda --bound 60 --out "$OUT"
run 60 kernels-float32 $kernels --dtype float32 --json "$OUT/kernels-cuda-float32.json"
if [[ -d runs/bench/models ]]; then
  run 60 fidelity $tracin fidelity --device cuda --out "$OUT"
fi
printf '\n%s%s s in total\n' "$summary" $((SECONDS - started)) | tee -a "$OUT/gpu.log"
exit $failed
