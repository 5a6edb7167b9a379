#!/usr/bin/env bash
# Test and benchmark on a machine with a GPU, without a network, in two calls while the machine is warm:
#
#   bench/gpu.sh first     at most 4 minutes: a check of every op, the headline times, compute-sanitizer
#   bench/gpu.sh second    at most 9 minutes: CUDA tests, collection, exact influence, all times, ncu
#
# The most valuable evidence comes first, every part has a time limit, and JSON and the log in $OUT (default bench/results/) are
# written as results come, so that a call that is cut short still says something. A part that fails does not stop the next one;
# a native module that cannot be imported or built does.
#
# It needs Python with torch, transformers, pyarrow, scipy, pytest, and either the native module that bench/gpu_module.sh
# built beforehand in build/gpu/ (Python 3.12), or nvcc, pybind11, cmake and ninja. TRACMOD_COMMIT is the commit to record if there
# is no git. REHEARSE=1 runs every part on the CPU with few rows, and says which tools are missing.
set -uo pipefail
cd "$(dirname "$0")/.."
call=${1:-}
case $call in
  first) total=230 ;;
  second) total=540 ;;
  *) echo "usage: bench/gpu.sh first|second, got '$call'" >&2; exit 2 ;;
esac
OUT=${OUT:-bench/results}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
log=$OUT/gpu-$call.log
python=${PYTHON:-python3}
device=cuda rows=() collect=(--shape base --examples 4096 --naive 100 --seconds 20 --batch-tokens 16384)
exact=(--train 1000 --query 250 --bound 60) larger=(--train 10000 --query 2500 --bound 90) tests=cuda slower=1
if [[ -n ${REHEARSE:-} ]]; then
  device=cpu rows=(--rows 2) collect=(--shape tiny --examples 8 --naive 2 --seconds 1)
  exact=(--shape tiny --train 40 --query 20) larger=(--shape tiny --train 50 --query 20) tests=cpu slower=20
fi
((total *= slower))
# The layout of an installation, made of links: tracmod.bench is in bench/. A module built beforehand replaces one in tracmod/.
site=$PWD/build/site
rm -rf "$site"
mkdir -p "$site/tracmod"
ln -s "$PWD"/tracmod/* "$site/tracmod/"
ln -sfn "$PWD/bench" "$PWD/cli" "$PWD/configs" "$site/tracmod/"
export PYTHONPATH=$site PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 TRACMOD_CUDA=ON TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
started=$SECONDS failed=0 summary=
part=$(mktemp)
trap 'rm -f "$part"' EXIT
# run SECONDS NAME COMMAND...: run a part, stopped after SECONDS or at the end of the call; log its output.
run() {
  local limit=$(($1 * slower)) name=$2 begun=$SECONDS left=$((total - SECONDS + started)) code=0
  shift 2
  echo "== $name: $*" | tee -a "$log"
  if ((left < 5)); then
    code=124
  else
    timeout -k 5 $((limit < left ? limit : left)) "$@" > "$part" 2>&1 || code=$?
    cat "$part" >> "$log"
    tail -n 15 "$part" | cut -c1-220
  fi
  if ((code)); then failed=1; fi
  summary+="$name: $( ((code)) && echo "failed ($code)" || echo OK), $((SECONDS - begun)) s"$'\n'
  return $code
}
# has TOOL: whether the tool is there; says so if not.
has() {
  command -v "$1" > /dev/null && return
  echo "== $1: not installed, left out" | tee -a "$log"
  return 1
}
# together NAME=COMMAND...: run parts at the same time, each in its own process, because an error on a GPU spoils its process.
together() {
  local limit=$(($1 * slower)) pair code pids=() names=()
  shift
  for pair in "$@"; do
    names+=("${pair%%=*}")
    timeout -k 5 "$limit" bash -c "${pair#*=}" > "$OUT/${pair%%=*}.txt" 2>&1 &
    pids+=($!)
  done
  for i in "${!pids[@]}"; do
    code=0
    wait "${pids[$i]}" || code=$?
    { echo "== ${names[$i]}"; cat "$OUT/${names[$i]}.txt"; } >> "$log"
    if ((code)); then
      failed=1
      echo "== ${names[$i]}" && tail -n 12 "$OUT/${names[$i]}.txt" | cut -c1-220
    fi
    rm -f "$OUT/${names[$i]}.txt"
    summary+="${names[$i]}: $( ((code)) && echo "failed ($code)" || echo OK)"$'\n'
  done
}
finish() {
  printf '\n%s%s s in total\n' "$summary" $((SECONDS - started)) | tee -a "$log"
  exit $failed
}

: > "$log"
if has nvidia-smi; then
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm --format=csv | tee -a "$log"
fi

check="from tracmod import kernels; build = kernels.build_info(); print(build); assert '$device' == 'cpu' or build['cuda']"
prebuilt=(build/gpu/_C*.so)
if [[ -z ${REHEARSE:-} && -f ${prebuilt[0]} ]]; then
  rm -f "$site"/tracmod/_C*.so
  ln -s "$PWD/${prebuilt[0]}" "$site/tracmod/"
fi
if ! run 60 import "$python" -c "$check"; then
  summary+="the module built beforehand is not usable here, so it is built"$'\n'
  run 220 build env CMAKE_ARGS=-DCMAKE_CUDA_ARCHITECTURES=90a-real "$python" setup.py build_ext --inplace || finish
  rm -f "$site"/tracmod/_C*.so
  ln -s "$PWD"/tracmod/_C*.so "$site/tracmod/"
  failed=0
  run 60 import-built "$python" -c "$check" || finish
fi

kernels="$python -m tracmod.bench.bench_kernels --device $device ${rows[*]}"
tracin="$python -m tracmod.bench.bench_tracin"
ops="top_k_dot project_gradients gradient_dot quantize_rows"
smoke="$python -m tracmod.bench.bench_kernels --device $device --check-only --rows 3"
if [[ $call == first ]]; then
  parts=()
  for op in $ops; do
    for dtype in bfloat16 float32; do
      parts+=("smoke-$op-$dtype=$smoke --op $op --dtype $dtype")
    done
  done
  together 45 "${parts[@]}"
  run 90 headline $kernels --dtype bfloat16 --cases headline --seconds 0.3 --json "$OUT/headline-$device-bfloat16.json"
  if has compute-sanitizer; then
    parts=()
    for tool in memcheck racecheck synccheck initcheck; do
      parts+=("$tool=compute-sanitizer --tool $tool --print-limit 20 --error-exitcode 9 $smoke --cases short --dtype bfloat16")
    done
    parts+=("memcheck-float32=compute-sanitizer --print-limit 20 --error-exitcode 9 $smoke --cases short --dtype float32")
    together 90 "${parts[@]}"
  fi
  finish
fi

# Each file has a process of its own, because an error on a GPU spoils all later work of its process.
files=(tests/test_cuda_end_to_end.py tests/kernels/test_kernels_{top_k,project,dot,quantize}.py
  tests/features/test_features.py tests/influence/test_influence.py tests/gradients/test_gradients.py)
parts=()
for file in "${files[@]}"; do
  [[ -f $file ]] || continue
  parts+=("$(basename "$file" .py)=$python -m pytest -q --tb=short -p no:cacheprovider -m 'not slow' -k $tests $file; test \$? = 0 -o \$? = 5")
done
if [[ -n ${REHEARSE:-} ]]; then parts=("${parts[@]:0:2}"); fi
together 150 "${parts[@]}"
run 120 collect $tracin collect --device $device "${collect[@]}" --out "$OUT"
run 60 exact $tracin exact --device $device "${exact[@]}" --out "$OUT"
run 120 exact-larger $tracin exact --device $device "${larger[@]}" --out "$OUT/larger"
run 100 kernels-bfloat16 $kernels --dtype bfloat16 --seconds 0.3 --json "$OUT/kernels-$device-bfloat16.json"
if has ncu; then
  for kernel in project_tiles sketch_tiles sketch_products '^sketch$' score_tiles sum_token_pairs quantize; do
    op=project_gradients
    case $kernel in score_tiles) op=top_k_dot ;; sum_token_pairs) op=gradient_dot ;; quantize) op=quantize_rows ;; esac
    run 45 "ncu-${kernel//[^a-z_]/}" ncu --clock-control none --target-processes all -k "regex:$kernel" --launch-count 2 \
      --section SpeedOfLight --section LaunchStats --section Occupancy --section WarpStateStats \
      $kernels --dtype bfloat16 --cases short --op "$op" --check-only
  done
fi
run 80 kernels-float32 $kernels --dtype float32 --seconds 0.3 --json "$OUT/kernels-$device-float32.json"
finish
