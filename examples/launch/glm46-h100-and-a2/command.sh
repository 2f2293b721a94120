#!/bin/sh
# GLM-4.6 on one H100 server and one Atlas 800 A2, one model under one address: experts in int4 for vLLM, W4A8 for
# vllm-ascend, both made from the same checkpoint by `transload port` or `transload quantize`.
# Run it in this folder; MODEL may name the checkpoint, of which only config.json and tensor headers are read.
set -eu
transload plan "${MODEL:-../../../tests/golden/plan/configs/GLM-4.6.json}" --cluster cluster.yaml \
  --recipe cuda=int4-g64-experts,ascend=w4a8 --context 32k --concurrency 64 --tp 8 --ep --save plan.json
transload plan render plan.json --cluster cluster.yaml --name glm-4.6 \
  --model cuda=/models/GLM-4.6-int4 --model ascend=/models/GLM-4.6-w4a8 --out rendered
