"""Everything a backend must prove."""

from transload.testing import backend_tests, coverage

test_conformance = backend_tests("acme")


def test_enough_is_supported() -> None:
    assert coverage("acme")["acme-int8"] >= 36
