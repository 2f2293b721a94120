#!/bin/sh
# Downloads the torch_npu wheel that the NPU simulator's tests unpack, and prints its path last: ci/ascend_sim.sh [VENV]
# The wheel is never installed: beside torch and without CANN it makes every `import torch` fail.
set -eu
venv=${1:-.venv}
version=2.13.0
folder=${TRANSLOAD_CACHE:-$HOME/.cache/transload}/torch_npu
tag=$("$venv/bin/python" -c 'import sys; print(f"cp{sys.version_info.major}{sys.version_info.minor}")')
found() { ls "$folder/torch_npu-$version-$tag-"*.whl 2>/dev/null | head -n 1; }
if [ -z "$(found)" ]; then
  mkdir -p "$folder"
  "$venv/bin/python" -m pip download --quiet --no-deps --dest "$folder" "torch-npu==$version" >&2
fi
found
