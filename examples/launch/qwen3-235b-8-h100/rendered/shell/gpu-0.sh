#!/usr/bin/env bash
# Qwen3-235B-A22B (int4-g128) on eight-h100
# Starts what node gpu-0 runs.
# Rendered by transload from plan.json. Change the plan and render again rather than editing.
#
# engine-0: vllm==0.32, TP 1, DP 8, EP on 8 x H100, 2129408 KV tokens
#   here: head, device 0-7; serves http://10.0.0.31:8000/v1
#   a device of 79.16 GiB holds 19.26 GiB of weights, 47.72 GiB of KV cache and 5.84 GiB of buffers
#
# Usage: shell/gpu-0.sh
# VLLM names another vllm program than the one on PATH.

set -euo pipefail

engine_0() {
  export CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7
  exec "${VLLM:-vllm}" serve /models/Qwen3-235B-A22B-int4 \
    --served-model-name qwen3-235b \
    --host 0.0.0.0 \
    --port 8000 \
    --tensor-parallel-size 1 \
    --data-parallel-size 8 \
    --enable-expert-parallel \
    --max-model-len 32768 \
    --max-num-seqs 8 \
    --max-num-batched-tokens 8192 \
    --gpu-memory-utilization 0.92
}

engine_0
