#!/usr/bin/env bash
# GLM-5 (w4a8) on two-a2
# Starts what node a2-1 runs.
# Rendered by transload from plan.json. Change the plan and render again rather than editing.
#
# engine-0: vllm-ascend==0.23, TP 8, DP 2, EP on 16 x Ascend-910B3, 485888 KV tokens
#   here: worker, device 0-7; joins a2-0, which serves http://10.0.0.20:8000/v1
#   a device of 60.96 GiB holds 25.86 GiB of weights, 24.85 GiB of KV cache and 5.36 GiB of buffers
#
# Usage: shell/a2-1.sh
# VLLM names another vllm program than the one on PATH.

set -euo pipefail

# This node's address, and the interface that has it; the environment may say otherwise.
HOST_IP=${HOST_IP:-10.0.0.21}
INTERFACE=${INTERFACE:-enp189s0f0}
[ -n "$INTERFACE" ] || { echo "no interface of this machine has the address '$HOST_IP'; set HOST_IP or INTERFACE" >&2; exit 1; }

engine_0_worker() {
  export VLLM_HOST_IP="$HOST_IP"
  export HCCL_IF_IP="$HOST_IP"
  export GLOO_SOCKET_IFNAME="$INTERFACE"
  export TP_SOCKET_IFNAME="$INTERFACE"
  export HCCL_SOCKET_IFNAME="$INTERFACE"
  export ASCEND_RT_VISIBLE_DEVICES=0,1,2,3,4,5,6,7
  export HCCL_BUFFSIZE=200
  export HCCL_OP_EXPANSION_MODE=AIV
  export OMP_PROC_BIND=false
  export OMP_NUM_THREADS=1
  export PYTORCH_NPU_ALLOC_CONF=expandable_segments:True
  export TASK_QUEUE_ENABLE=1
  export HCCL_INTRA_PCIE_ENABLE=1
  export HCCL_INTRA_ROCE_ENABLE=0
  export HCCL_CONNECT_TIMEOUT=1800
  exec "${VLLM:-vllm}" serve /models/GLM-5-w4a8 \
    --served-model-name glm-5 \
    --host 0.0.0.0 \
    --port 8000 \
    --tensor-parallel-size 8 \
    --data-parallel-size 2 \
    --enable-expert-parallel \
    --max-model-len 65536 \
    --max-num-seqs 4 \
    --max-num-batched-tokens 2048 \
    --gpu-memory-utilization 0.92 \
    --quantization ascend \
    --data-parallel-size-local 1 \
    --data-parallel-address 10.0.0.20 \
    --data-parallel-rpc-port 13389 \
    --data-parallel-start-rank 1 \
    --headless
}

engine_0_worker
