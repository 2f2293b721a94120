#!/bin/sh
# GLM-5 on two Atlas 800 A2, one engine over both: TP 8 inside a server, DP 2 across, experts spread over all 16 devices.
# Run it in this folder; MODEL may name the checkpoint, of which only config.json and tensor headers are read.
set -eu
transload plan "${MODEL:-../../../tests/golden/plan/configs/GLM-5.json}" --cluster cluster.yaml --recipe w4a8 \
  --context 64k --concurrency 8 --tp 8 --dp 2 --ep --save plan.json
transload plan render plan.json --cluster cluster.yaml --model /models/GLM-5-w4a8 --name glm-5 --out rendered
