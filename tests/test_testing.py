"""The conformance suite itself: its data, and that it tells right from wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from transload import hal, reference
from transload.errors import NoBackend
from transload.hal import Packed, Problem
from transload.quant import ActSpec, QTensor
from transload.testing import CASES, Case, backend_tests, nmse, run_case
from transload_cpu.backend import backend as cpu
from transload_cpu.reference_kernel import ReferenceKernel

pytest_plugins = ["pytester"]

HOST = cpu.devices()[0]
FINITE = [case for case in CASES if case.m and not case.broken]


def test_ids_are_unique_and_read_like_the_case() -> None:
    assert len({case.id for case in CASES}) == len(CASES) >= 250
    ids = {case.id for case in CASES}
    assert {"W4A16-int4-g128-sym-1x40x256", "W4A8g32-int4-g32-asym-1x13x200"} <= ids


def test_the_cases_cover_what_they_promise() -> None:
    specs = [case.spec for case in CASES]
    assert {s.bits for s in specs} == {2, 3, 4, 5, 6, 8}
    assert {16, 32, 64, 128, -1} <= {s.group_size for s in specs}
    assert {s.act.group_size if s.act else None for s in specs} >= {None, -1, 32, 128}
    assert {case.m for case in CASES} >= {0, 1, 2, 17, 64, 512}
    assert {case.x_dtype for case in CASES} == {torch.float32, torch.bfloat16, torch.float16}
    assert any(case.n % 8 for case in CASES)
    assert any(case.k % case.spec.group_size for case in CASES if case.spec.group_size > 0)
    assert any(case.k == case.spec.group_size for case in CASES)
    assert any(case.counts and 0 in case.counts and case.m for case in CASES)
    assert any(case.spec.act_order for case in CASES)


def test_the_data_of_a_case_never_changes() -> None:
    for case in CASES[::17]:
        first, second = case.operands(), case.operands()
        assert torch.equal(first.x.nan_to_num(), second.x.nan_to_num())
        assert first.weight.equal(second.weight)
    # A number that was drawn once: another machine or release of torch must draw it again.
    assert CASES[0].operands().weight.codes[0, :12].tolist() == FIRST_CODES


FIRST_CODES = [14, 7, 10, 10, 14, 10, 2, 9, 7, 1, 11, 4]


@pytest.mark.parametrize("case", [c for c in FINITE if not c.counts][::3], ids=lambda c: c.id)
def test_the_tolerance_tells_8_bit_activations_from_16_bit_ones(case: Case) -> None:
    data = case.operands()
    act = None if case.spec.act else ActSpec(group_size=32 if not case.spec.act_order else -1)
    other = reference.matmul(data.x, data.weight.with_act(act), data.bias)
    truth = reference.matmul(data.x, data.weight, data.bias)
    assert nmse(other.to(case.x_dtype), truth) > case.tolerance


class Half(ReferenceKernel):
    """Says that it executes 16-bit activations whatever was asked."""

    def executed(self, p: Problem) -> str:
        return "W4A16"


class Shrinking(ReferenceKernel):
    """Gives a result of float32 whatever x is."""

    def matmul(self, x: Tensor, w: Packed, bias: Tensor | None = None) -> Tensor:
        return super().matmul(x, w, bias).float()


class Mutating(ReferenceKernel):
    """Changes the weight that it packs."""

    def pack(self, w: QTensor) -> Packed:
        packed = super().pack(w)
        w.scales.mul_(2)
        return packed


class Leaking(ReferenceKernel):
    """Lets a bad row spoil the others."""

    def matmul(self, x: Tensor, w: Packed, bias: Tensor | None = None) -> Tensor:
        return super().matmul(x, w, bias) + 0 * x.sum()


class Hiding(ReferenceKernel):
    """Turns NaN into numbers."""

    def matmul(self, x: Tensor, w: Packed, bias: Tensor | None = None) -> Tensor:
        return super().matmul(x.nan_to_num(), w, bias)


class Misreading(ReferenceKernel):
    """Looks up the wrong rows."""

    def rows(self, p: Packed, index: Tensor) -> QTensor:
        return super().rows(p, index.flip(0))


class Overrunning(ReferenceKernel):
    """Writes beside x where x is a window of a larger tensor."""

    def matmul(self, x: Tensor, w: Packed, bias: Tensor | None = None) -> Tensor:
        y = super().matmul(x, w, bias)
        if not x.is_contiguous():
            torch.as_strided(x, (1,), (1,), x.storage_offset() - 1).zero_()
        return y


A8 = next(case for case in CASES if case.spec.act)
A16 = next(case for case in CASES if not case.spec.act)
HALF_X = next(case for case in CASES if case.x_dtype is torch.bfloat16)
BROKEN = next(case for case in CASES if case.broken)
WRONG = [
    (Half, A8, "W4A8 was asked for, W4A16 is executed"),
    (Shrinking, HALF_X, "y is torch.float32"),
    (Mutating, A16, "pack changed the weight"),
    (Leaking, BROKEN, "where x has none"),
    (Hiding, BROKEN, "did not reach its row"),
    (Misreading, A16, "rows(pack(w), index) differs"),
    (Overrunning, A16, "memory around it, was written to"),
]


@pytest.mark.parametrize(("kernel", "case", "words"), WRONG, ids=[kernel.__name__ for kernel, *_ in WRONG])
def test_a_wrong_kernel_is_found_out(kernel: type[ReferenceKernel], case: Case, words: str) -> None:
    assert run_case(cpu, HOST, ReferenceKernel(), case).passed
    result = run_case(cpu, HOST, kernel(), case)
    assert not result.passed
    assert words in str(result.failed)


def test_a_refusal_is_a_result_and_no_pass() -> None:
    refused = replace(A8, spec=replace(A8.spec, act=ActSpec(static=True)))
    result = run_case(cpu, HOST, ReferenceKernel(), refused)
    assert not result.passed
    assert "static" in str(result.refused)


def test_without_the_hardware_packing_is_tested_alone() -> None:
    class Elsewhere(ReferenceKernel):
        def matmul(self, x: Tensor, w: Packed, bias: Tensor | None = None) -> Tensor:
            raise AssertionError("there is no such device here")

    result = run_case(cpu, HOST, Elsewhere(), A16, layout_only=True)
    assert result.passed
    assert result.nmse is None


def test_a_backend_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NoBackend, match="no backend 'tpu' is installed"):
        backend_tests("tpu")
    broken = hal.BrokenBackend("acme", "its package failed to load")
    monkeypatch.setattr("transload.testing.conformance.backends", lambda: {"acme": broken})
    with pytest.raises(NoBackend, match="failed to load"):
        backend_tests("acme")


SUITE = """
from transload.hal import Device
from transload.testing import CASES, backend_tests
from transload_cpu.backend import CpuBackend
from transload_cpu.reference_kernel import ReferenceKernel

class Acme(CpuBackend):
    name = "acme"
    kernels = (ReferenceKernel(),)
    def unavailable(self):
        return "no Acme driver"

test_conformance = backend_tests(Acme(){device}, cases=CASES[:6])
"""


def test_without_a_device_everything_is_skipped_with_the_reason(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(SUITE.format(device=""))
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["acme: no case run: no Acme driver"])


def test_with_a_device_to_ask_for_packing_is_tested_and_said_so(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(SUITE.format(device=", Device('acme', 0, 'One', 'a1', 8, 8)"))
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=6)
    result.stdout.fnmatch_lines(["acme (packing only, no Acme driver): 6 of 6 cases supported", "*6 by reference"])
