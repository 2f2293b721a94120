"""The conformance suite: what every backend must compute, as data, and one line that runs it.

A vendor's whole test file:

    from transload.testing import backend_tests

    test_conformance = backend_tests("acme")

Cases that no kernel takes are reported as "not supported" with every kernel's reason, never as passed.
"""

from transload.testing.cases import CASES, Case, Operands
from transload.testing.conformance import backend_tests, coverage
from transload.testing.run import Result, nmse, run_case

__all__ = ["CASES", "Case", "Operands", "Result", "backend_tests", "coverage", "nmse", "run_case"]
