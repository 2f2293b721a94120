"""The shipped conformance cases: all of them on a GPU, a reduced list under Triton's slow interpreter."""

from __future__ import annotations

from gpu_under_test import GPU, INTERPRETED

from transload.testing import CASES, Case, backend_tests, coverage

# Cases taken by each kernel out of all of them, so that a kernel that refuses everything cannot pass unseen.
AT_LEAST = {"triton-a16": 100, "triton-a8": 150}


def _reduced() -> list[Case]:
    """Every third plain scheme, and what is special in shape, dtype, data, order or experts, up to 9 rows."""
    schemes = [case for case in CASES if case.id.endswith("-5x24x256")]
    special = [case for case in CASES if case not in schemes and case.m <= 9 and case.k <= 400]
    return schemes[::3] + special


USED = _reduced() if INTERPRETED else list(CASES)
test_conformance = backend_tests(GPU.backend, cases=[
    case for case in USED if any(k.refuses(case.problem, GPU.device) is None for k in GPU.backend.kernels)
])  # fmt: skip


def test_every_kernel_takes_its_share_of_the_cases() -> None:
    taken = coverage(GPU.backend, cases=CASES)
    assert {name: count for name, count in taken.items() if count < AT_LEAST.get(name, 0)} == {}
