"""Chooses the device of these tests: TRANSLOAD_NPU=simulator or TRANSLOAD_NPU=device."""

from __future__ import annotations

import os
import sys

import npu_under_test
import pytest


@pytest.fixture(scope="session")
def npu() -> npu_under_test.Npu:
    return npu_under_test.NPU


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[_STATUS] = int(exitstatus)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Leaves without the interpreter's shutdown: torch_npu's own calls into CANN, and the stubs are not made for it."""
    if os.environ.get("TRANSLOAD_NPU") == "simulator":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(config.stash.get(_STATUS, 1))


_STATUS = pytest.StashKey[int]()
