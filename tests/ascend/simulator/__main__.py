"""Runs Python inside the simulator: PYTHONPATH=tests/ascend python -m simulator FILE-OR-OPTIONS..."""

from __future__ import annotations

import os
import sys

from simulator import process

if __name__ == "__main__":
    reason = process.missing()
    if reason is not None:
        raise SystemExit(f"the simulator cannot run: {reason}")
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], dict(process.environment()))
