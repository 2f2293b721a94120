"""Puts this folder on the path: its tests share gpu_under_test."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
