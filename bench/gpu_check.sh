#!/usr/bin/env bash
# Every GPU test and benchmark that the repository has, in one call of under ten minutes, on a bare machine: Python with
# torch, triton, cupy, transformers and pytest, no network, nothing of Headrace installed. What cannot run says why.
#
#   bash bench/gpu_check.sh        writes gpu.json and gpu.md into $OUT (gpu-report unless set) and prints the latter
#
# PYTHON: the interpreter (python3). GPU_CHECK_SECONDS: when no further step is begun (570). Exits with 1 if a test failed.
set -u
cd "$(dirname "$0")/.." || exit 2
PYTHON=${PYTHON:-python3}
OUT=${OUT:-gpu-report}
RAW=$(mktemp -d)
trap 'rm -rf "$RAW"' EXIT
DEADLINE=$((SECONDS + ${GPU_CHECK_SECONDS:-570}))
mkdir -p "$OUT" || exit 2
unset TRITON_INTERPRET
LACK=$("$PYTHON" -c 'import torch, triton
if not torch.cuda.is_available(): print("torch sees no GPU")' 2>&1 | tail -n 1)

# step NAME LIMIT_S COMMAND...: standard output goes to NAME.out, and how it ended to NAME.status.
step() {
  local name=$1 limit=$2 left=$((DEADLINE - SECONDS)) began=$SECONDS
  shift 2
  if [ -n "$LACK" ] || [ "$left" -lt 15 ]; then
    echo "not begun: ${LACK:-no time was left} 0" >"$RAW/$name.status"
    return
  fi
  echo "== $name" >&2
  timeout -k 5 "$((limit < left ? limit : left))" "$@" >"$RAW/$name.out" 2>"$RAW/$name.err"
  echo "$? $((SECONDS - began))" >"$RAW/$name.status"
}

# tests NAME LIMIT_S FILES...: without conftest.py, which needs what only Headrace's own environment has.
tests() {
  local name=$1 limit=$2
  shift 2
  step "tests.$name" "$limit" "$PYTHON" -m pytest --noconftest -q --junitxml="$RAW/tests.$name.xml" "$@"
}

# Mostly compiling, which many processes do at once.
PARALLEL=()
"$PYTHON" -c 'import xdist' 2>/dev/null && PARALLEL=(-n 8)

# Benchmarks first of all, so that a slow test takes no time from them; alone on the GPU.
step bench.kernels 240 "$PYTHON" -m bench.gpu --seconds 200
step bench.nccl 60 "$PYTHON" -m kernels.nccl_tests all_reduce -b 1M -e 256M -f 4 --json "$RAW/bench.nccl.json"
tests triton 240 ${PARALLEL[@]+"${PARALLEL[@]}"} tests/kernels/triton/*_cases.py
# All other files with tests marked gpu; those of triton above are run there by processes of their own.
while read -r file; do
  tests "$(basename "$file" .py)" 90 -m gpu "$file"
done < <(grep -rlE '^@pytest\.mark\.gpu|^pytestmark = .*mark\.gpu' tests --include='test_*.py' | grep -v '^tests/kernels/triton/' | sort)

"$PYTHON" -m bench.gpu.report "$RAW" "$OUT"
