"""Runs the tests of on_gpu in a process of their own under Triton's interpreter, and demands that all of them ran."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LEAST_TESTS = 150


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed; it interprets the GPU kernels")
def test_every_gpu_test_passes_in_the_interpreter(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "tests/cuda/on_gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TRANSLOAD_CUDA": "interpreter"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    (suite,) = ET.parse(report).getroot().iter("testsuite")
    assert int(suite.attrib["tests"]) >= LEAST_TESTS
    assert int(suite.attrib["skipped"]) == 0, done.stdout[-3000:]
