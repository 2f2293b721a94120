"""Starts the tests of on_npu in a process that has the simulator, and demands that every one of them ran."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from simulator import process

LEAST_TESTS = 330


def test_every_npu_test_passes_on_the_simulator(tmp_path: Path) -> None:
    reason = process.missing()
    if reason is not None:
        pytest.skip(reason)
    report = tmp_path / "report.xml"
    done = process.run(["-m", "pytest", "tests/ascend/on_npu", "-p", "no:cacheprovider", f"--junitxml={report}"])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    (suite,) = ET.parse(report).getroot().iter("testsuite")
    assert int(suite.attrib["tests"]) >= LEAST_TESTS
    assert int(suite.attrib["skipped"]) == 0, done.stdout[-3000:]
