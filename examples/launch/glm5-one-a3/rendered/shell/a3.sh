#!/usr/bin/env bash
# GLM-5 (w4a8) on one-a3
# Starts what node a3 runs.
# Rendered by transload from plan.json. Change the plan and render again rather than editing.
#
# engine-0: vllm-ascend==0.23, TP 16, EP on 16 x Ascend-A3-die, 261760 KV tokens
#   here: head, device 0-15; serves http://10.0.0.11:8000/v1
#   a device of 60.96 GiB holds 24.62 GiB of weights, 26.77 GiB of KV cache and 4.67 GiB of buffers
#
# Usage: shell/a3.sh
# VLLM names another vllm program than the one on PATH.

set -euo pipefail

engine_0() {
  export ASCEND_RT_VISIBLE_DEVICES=0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
  export HCCL_BUFFSIZE=200
  export HCCL_OP_EXPANSION_MODE=AIV
  export OMP_PROC_BIND=false
  export OMP_NUM_THREADS=1
  export PYTORCH_NPU_ALLOC_CONF=expandable_segments:True
  export TASK_QUEUE_ENABLE=1
  exec "${VLLM:-vllm}" serve /models/GLM-5-w4a8 \
    --served-model-name glm-5 \
    --host 0.0.0.0 \
    --port 8000 \
    --tensor-parallel-size 16 \
    --enable-expert-parallel \
    --max-model-len 131072 \
    --max-num-seqs 16 \
    --max-num-batched-tokens 2048 \
    --gpu-memory-utilization 0.92 \
    --quantization ascend \
    --additional-config '{"multistream_overlap_shared_expert": true}'
}

engine_0
