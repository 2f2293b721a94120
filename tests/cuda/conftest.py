"""The tests of on_gpu need a GPU or Triton's interpreter: test_in_interpreter.py starts them in a process that has it.

On a machine with an NVIDIA GPU they run directly: TRANSLOAD_CUDA=device pytest tests/cuda/on_gpu.
"""

from __future__ import annotations

import os

collect_ignore = [] if os.environ.get("TRANSLOAD_CUDA") else ["on_gpu"]
