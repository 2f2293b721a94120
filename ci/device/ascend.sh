#!/bin/sh
# Proves Transload on this machine's Ascend NPUs and writes a report: ci/device/ascend.sh [VENV] [REPORT.md]
#
# Runs every test of the Ascend backend on the device (operators, conformance, whole models) and a benchmark of every
# kernel. Source CANN's set_env.sh before. Without an NPU, a dry run on the simulator: TRANSLOAD_NPU=simulator.
set -eu
cd "$(dirname "$0")/../.."
venv=${1:-.venv} report=${2:-ascend-report.md}
export TRANSLOAD_NPU="${TRANSLOAD_NPU:-device}"
export PYTHONPATH="$PWD/tests/ascend${PYTHONPATH:+:$PYTHONPATH}"
if [ "$TRANSLOAD_NPU" = simulator ]; then
  TRANSLOAD_TORCH_NPU_WHEEL=${TRANSLOAD_TORCH_NPU_WHEEL:-$(ci/ascend_sim.sh "$venv" | tail -n 1)}
  export TRANSLOAD_TORCH_NPU_WHEEL
  exec "$venv/bin/python" -m simulator ci/device/ascend_report.py "$report"
fi
exec "$venv/bin/python" ci/device/ascend_report.py "$report"
