"""The tests of on_npu need an NPU or the simulator: test_on_simulator.py starts them in a process that has it.

On a machine with NPUs they run directly: TRANSLOAD_NPU=device pytest tests/ascend/on_npu.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "on_npu")]

collect_ignore = [] if os.environ.get("TRANSLOAD_NPU") else ["on_npu"]
