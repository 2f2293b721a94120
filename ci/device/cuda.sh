#!/bin/sh
# Everything that is to be measured on an NVIDIA GPU: every conformance case, then the benchmark and its targets.
# Needs python with torch, triton and pytest; transload itself need not be installed: ci/device/cuda.sh [PYTHON] [OUT]
# Without a GPU, `ci/device/cuda.sh --interpret [PYTHON] [OUT]` walks through the same steps on tiny shapes.
set -eu
cd "$(dirname "$0")/../.."
mode=device
if [ "${1:-}" = --interpret ]; then mode=interpreter; shift; fi
python=${1:-python3} out=${2:-${OUT:-build/device}}
mkdir -p "$out"
PYTHONPATH=$PWD/sdk:$PWD/backends:$PWD/ci/device${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH TRANSLOAD_CUDA=$mode
if [ $mode = interpreter ]; then
  TRITON_INTERPRET=1; export TRITON_INTERPRET
  "$python" -m pytest tests/cuda/on_gpu -q -p no:cacheprovider -k "test_gpu_kernels or experts" --junitxml="$out/conformance.xml"
  exec "$python" ci/device/cuda_bench.py --out "$out" --interpret
fi
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$out/gpu.txt"
status=0
"$python" -m pytest tests/cuda/on_gpu -q -p no:cacheprovider --junitxml="$out/conformance.xml" > "$out/conformance.txt" 2>&1 || status=$?
tail -n 40 "$out/conformance.txt"
"$python" ci/device/cuda_bench.py --out "$out" ${TRANSLOAD_BENCH:-}
exit $status
