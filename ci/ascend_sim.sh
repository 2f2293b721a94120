#!/bin/sh
# Downloads what the NPU simulator's tests unpack, and prints the path of torch_npu's wheel last: ci/ascend_sim.sh [VENV]
# torch_npu is never installed: beside torch and without CANN it makes every `import torch` fail. Of vllm-ascend only the
# quantization classes are read, which judge the checkpoints that ports write.
set -eu
venv=${1:-.venv}
cache=${TRANSLOAD_CACHE:-$HOME/.cache/transload}
tag=$("$venv/bin/python" -c 'import sys; print(f"cp{sys.version_info.major}{sys.version_info.minor}")')
found() { ls "$cache/$1/$1-$2-$tag-"*.whl 2>/dev/null | head -n 1; }
fetch() { # fetch PACKAGE VERSION
  if [ -z "$(found "$1" "$2")" ]; then
    mkdir -p "$cache/$1"
    "$venv/bin/python" -m pip download --quiet --no-deps --dest "$cache/$1" "$1==$2" >&2
  fi
}
fetch vllm_ascend 0.23.0 || echo "ci/ascend_sim.sh: no vllm-ascend 0.23.0, its classes are not asked" >&2
fetch torch_npu 2.13.0
found torch_npu 2.13.0
