#!/usr/bin/env bash
# Every GPU test and benchmark that the repository has, in one call of under ten minutes, on a bare machine: Python with
# torch, triton, cupy, transformers and pytest, no network, nothing of Headrace installed. What cannot run says why.
#
#   bash bench/gpu_check.sh        writes gpu.json and gpu.md into $OUT (gpu-report unless set) and prints the latter
#
# PYTHON: the interpreter (python3). GPU_CHECK_SECONDS: when no further step is begun and what runs is ended (570).
# GPU_CHECK_STEPS: a regular expression of the steps wanted (all). GPU_CHECK_REHEARSE=1: the benchmarks at tiny sizes on
# the CPU, without times and tests, to try this program where there is no GPU. Exits with 1 if a test or a part of a
# benchmark failed.
set -u
cd "$(dirname "$0")/.." || exit 2
PYTHON=${PYTHON:-python3}
OUT=${OUT:-gpu-report}
STEPS=${GPU_CHECK_STEPS:-.}
DEADLINE=$((SECONDS + ${GPU_CHECK_SECONDS:-570}))
RAW=$(mktemp -d)
MODEL=
trap 'rm -rf "$RAW" "$MODEL"' EXIT
mkdir -p "$OUT" || exit 2
unset TRITON_INTERPRET
LACK=$("$PYTHON" -c 'import torch, triton
if not torch.cuda.is_available(): print("torch sees no GPU")' 2>"$RAW/lack") || LACK=$(tail -n 1 "$RAW/lack")
REHEARSE=()
if [ -n "${GPU_CHECK_REHEARSE:-}" ]; then
  REHEARSE=(--rehearse) LACK= STEPS="^bench\.($STEPS)"
  export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES=
fi
# The engine's records and settings, where their packages are not installed: see these folders.
for package in msgspec pydantic; do
  "$PYTHON" -c "import $package" 2>"$RAW/lack" || export PYTHONPATH="$PWD/bench/gpu/bare/$package${PYTHONPATH:+:$PYTHONPATH}"
done

# step NAME LIMIT_S COMMAND...: standard output goes to NAME.out, and how it ended to NAME.status.
step() {
  local name=$1 limit=$2 left=$((DEADLINE - SECONDS)) began=$SECONDS
  shift 2
  [[ $name =~ $STEPS ]] || return
  if [ -n "$LACK" ] || [ "$left" -lt 15 ]; then
    echo "not begun: ${LACK:-no time was left} 0" >"$RAW/$name.status"
    return
  fi
  echo "== $name" >&2
  timeout -k 5 "$((limit < left ? limit : left))" "$@" >"$RAW/$name.out" 2>"$RAW/$name.err"
  echo "$? $((SECONDS - began))" >"$RAW/$name.status"
}

# bench NAME LIMIT_S MODULE OPTION...: its figures go to NAME.json while it runs, so that a limit loses only the rest.
bench() {
  local name=$1 limit=$2 module=$3
  shift 3
  step "bench.$name" "$limit" "$PYTHON" -m "$module" --json "$RAW/bench.$name.json" ${REHEARSE[@]+"${REHEARSE[@]}"} "$@"
}

# tests NAME LIMIT_S OPTION... FILE...: without conftest.py, which needs what only Headrace's own environment has.
tests() {
  local name=$1 limit=$2
  shift 2
  step "tests.$name" "$limit" "$PYTHON" -m pytest --noconftest -q --junitxml="$RAW/tests.$name.xml" "$@"
}
MANY=() # processes, for tests that mostly compile
"$PYTHON" -c 'import xdist' 2>"$RAW/lack" && MANY=(-n 8)

# First what needs processors more than the GPU, side by side: a model of 8 billion parameters is written, which every
# benchmark after it loads; kernels are compiled; the tests, which mostly compile, too.
if [ -z "$LACK" ]; then
  "$PYTHON" -m bench.gpu.model ${REHEARSE[@]+"${REHEARSE[@]}"} >"$RAW/model" &
  WRITER=$!
fi
bench compile 100 bench.gpu.warm &
EQUALS=tests/workers/engine/test_cuda_equals_cpu.py
tests "$(basename "$EQUALS" .py)" 170 "${MANY[@]}" -m gpu "$EQUALS" &
# The cases of kernels, decoder and runner, compiled; on CPUs Triton's interpreter runs them in processes of their own.
mapfile -t CASES < <(find tests -name '*_cases.py' | sort)
tests triton 170 "${MANY[@]}" -m "not slow" "${CASES[@]}" &
# All other files with tests marked gpu, but for those that only run the cases.
while read -r file; do
  [ "$file" = "$EQUALS" ] || grep -q '_cases\.py' "$file" || tests "$(basename "$file" .py)" 60 -m gpu "$file"
done < <(grep -rlE '^@pytest\.mark\.gpu|^pytestmark = .*mark\.gpu' tests --include='test_*.py' | sort) &
if [ -z "$LACK" ]; then
  wait "$WRITER" || LACK="no model could be written"
  MODEL=$(cat "$RAW/model")
fi
wait

# Then benchmarks, alone on the GPU, the most valuable first.
bench engine 130 bench.gpu.engine --model "$MODEL"
bench kernels 75 bench.gpu --seconds 60
bench peers 100 bench.gpu.peers --model "$MODEL" --each 25
bench engine_fp8 70 bench.gpu.engine --model "$MODEL" --quantization fp8 --parts decode,prefill,profile
bench disaggregation 80 bench.gpu.disaggregation --model "$MODEL"
bench endurance 60 bench.gpu.endurance
step bench.nccl 30 "$PYTHON" -m kernels.nccl_tests all_reduce -b 1M -e 64M -f 8 --json "$RAW/bench.nccl.json"
bench sanitizer 60 bench.gpu.sanitizer --each 28
tests triton_slow 200 "${MANY[@]}" -m slow "${CASES[@]}"

"$PYTHON" -m bench.gpu.report "$RAW" "$OUT"
