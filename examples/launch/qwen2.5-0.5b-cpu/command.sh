#!/bin/sh
# Qwen2.5-0.5B on a CPU: the smallest deployment, to try everything with.
# Run it in this folder; MODEL may name the checkpoint, of which only config.json and tensor headers are read.
set -eu
transload plan "${MODEL:-Qwen2.5-0.5B.json}" --cluster cluster.yaml --recipe int4-g32-asym --context 8k --concurrency 8 \
  --save plan.json
transload plan render plan.json --model /models/Qwen2.5-0.5B-int4 --name qwen2.5-0.5b --out rendered
