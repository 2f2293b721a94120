"""The CPU backend against the shipped cases, every kernel."""

from __future__ import annotations

from transload.testing import CASES, backend_tests, coverage

test_conformance = backend_tests("cpu")


def test_the_reference_kernel_takes_every_case() -> None:
    assert coverage("cpu")["reference"] == len(CASES)
