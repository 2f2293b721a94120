#!/usr/bin/env bash
# GLM-4.6 (int4-g64-experts on cuda, w4a8 on ascend) on h100-and-a2
# Starts what node h100 runs.
# Rendered by transload from plan.json. Change the plan and render again rather than editing.
#
# engine-0: vllm==0.32, TP 8, EP on 8 x H100, 1014096 KV tokens
#   here: head, device 0-7; serves http://10.0.0.41:8000/v1
#   a device of 79.16 GiB holds 24.95 GiB of weights, 44.49 GiB of KV cache and 3.39 GiB of buffers
#
# Usage: shell/h100.sh
# VLLM names another vllm program than the one on PATH.

set -euo pipefail

engine_0() {
  export CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7
  exec "${VLLM:-vllm}" serve /models/GLM-4.6-int4 \
    --served-model-name glm-4.6 \
    --host 0.0.0.0 \
    --port 8000 \
    --tensor-parallel-size 8 \
    --enable-expert-parallel \
    --max-model-len 32768 \
    --max-num-seqs 64 \
    --max-num-batched-tokens 8192 \
    --gpu-memory-utilization 0.92
}

engine_0
