#!/bin/sh
# GLM-5 on one Atlas 800 A3. W4A8 is what msModelSlim and `transload quantize` write: experts in 4 bits, the rest in 8.
# Run it in this folder; MODEL may name the checkpoint, of which only config.json and tensor headers are read.
set -eu
transload plan "${MODEL:-../../../tests/golden/plan/configs/GLM-5.json}" --cluster cluster.yaml --recipe w4a8 \
  --context 128k --concurrency 16 --tp 16 --ep --save plan.json
transload plan render plan.json --cluster cluster.yaml --model /models/GLM-5-w4a8 --name glm-5 \
  --additional-config '{"multistream_overlap_shared_expert": true}' --out rendered
