#!/bin/sh
# Qwen3-235B-A22B in int4 on eight H100. The planner picks the shape; --tp, --dp and --ep would fix it.
# Run it in this folder; MODEL may name the checkpoint, of which only config.json and tensor headers are read.
set -eu
transload plan "${MODEL:-../../../tests/golden/plan/configs/Qwen3-235B-A22B.json}" --cluster cluster.yaml \
  --recipe int4-g128 --context 32k --concurrency 64 --save plan.json
transload plan render plan.json --cluster cluster.yaml --model /models/Qwen3-235B-A22B-int4 --name qwen3-235b --out rendered
