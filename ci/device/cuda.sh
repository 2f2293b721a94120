#!/bin/sh
# Everything that is to be proved and measured on an NVIDIA GPU, in three steps of at most ten minutes:
#   ci/device/cuda.sh tests [PYTHON] [OUT]    every test of the backend on the GPU: conformance, models, graphs
#   ci/device/cuda.sh tune  [PYTHON] [OUT]    searches configurations; OUT/measured.txt goes into measured.py
#   ci/device/cuda.sh bench [PYTHON] [OUT]    the benchmark and its targets; OUT/bench.md goes into docs/benchmarks.md
# PYTHON needs torch, triton and pytest; transload itself need not be installed. OUT is build/device by default.
# Without a GPU, `ci/device/cuda.sh --interpret STEP ...` walks through the same steps on tiny shapes.
set -eu
cd "$(dirname "$0")/../.."
mode=device
if [ "${1:-}" = --interpret ]; then mode=interpreter; shift; fi
step=${1:-} python=${2:-python3} out=${3:-${OUT:-build/device}}
minutes=${TRANSLOAD_MINUTES:-8.5}
mkdir -p "$out"
out=$(cd "$out" && pwd)
PYTHONPATH=$PWD/sdk:$PWD/backends${PYTHONPATH:+:$PYTHONPATH}
TRANSLOAD_CACHE=${TRANSLOAD_CACHE:-$out/cache}
export PYTHONPATH TRANSLOAD_CACHE TRANSLOAD_CUDA=$mode
dry= some=
if [ $mode = interpreter ]; then
  TRITON_INTERPRET=1 dry=--interpret some="-k counts"; export TRITON_INTERPRET
else
  if "$python" -c "import xdist" 2>/dev/null; then some="-n 8"; fi # kernels compile in parallel
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$out/gpu.txt"
fi
case $step in
  tests)
    status=0
    # An interrupted pytest still reports what it has done.
    timeout -s INT 570 "$python" -m pytest tests/cuda/on_gpu -q -p no:cacheprovider $some --junitxml="$out/tests.xml" > "$out/tests.txt" 2>&1 || status=$?
    tail -n 40 "$out/tests.txt"
    exit $status ;;
  tune) exec "$python" ci/device/cuda_bench.py --out "$out" --minutes "$minutes" --tune $dry ;;
  bench) exec "$python" ci/device/cuda_bench.py --out "$out" --minutes "$minutes" $dry ;;
  *) echo "give a step: tests, tune or bench" >&2; exit 2 ;;
esac
