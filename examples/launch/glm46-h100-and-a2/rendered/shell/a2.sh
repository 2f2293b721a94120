#!/usr/bin/env bash
# GLM-4.6 (int4-g64-experts on cuda, w4a8 on ascend) on h100-and-a2
# Starts what node a2 runs.
# Rendered by transload from plan.json. Change the plan and render again rather than editing.
#
# engine-1: vllm-ascend==0.23, TP 8, EP on 8 x Ascend-910B3, 674688 KV tokens
#   here: head, device 0-7; serves http://10.0.0.42:8000/v1
#   a device of 60.96 GiB holds 22.13 GiB of weights, 29.60 GiB of KV cache and 4.35 GiB of buffers
#
# Usage: shell/a2.sh
# VLLM names another vllm program than the one on PATH.

set -euo pipefail

engine_1() {
  export ASCEND_RT_VISIBLE_DEVICES=0,1,2,3,4,5,6,7
  export HCCL_BUFFSIZE=200
  export HCCL_OP_EXPANSION_MODE=AIV
  export OMP_PROC_BIND=false
  export OMP_NUM_THREADS=1
  export PYTORCH_NPU_ALLOC_CONF=expandable_segments:True
  export TASK_QUEUE_ENABLE=1
  exec "${VLLM:-vllm}" serve /models/GLM-4.6-w4a8 \
    --served-model-name glm-4.6 \
    --host 0.0.0.0 \
    --port 8000 \
    --tensor-parallel-size 8 \
    --enable-expert-parallel \
    --max-model-len 32768 \
    --max-num-seqs 64 \
    --max-num-batched-tokens 2048 \
    --gpu-memory-utilization 0.92 \
    --quantization ascend
}

engine_1
