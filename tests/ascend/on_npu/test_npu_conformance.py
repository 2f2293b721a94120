"""Every shipped case that the operators can hold, on every Ascend kernel that takes it.

The operators take float16 and bfloat16 only, so cases of float32 x are asked in both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from npu_under_test import NPU

from transload.quant import PER_CHANNEL, ActSpec, QuantSpec, Zero
from transload.testing import CASES, Case, backend_tests, coverage

BF16, FP16 = torch.bfloat16, torch.float16
TOKEN = ActSpec()


def _in_half(case: Case) -> Iterator[Case]:
    """The case with 16-bit activations and scales of the same dtype, as 16-bit checkpoints have them."""
    if case.x_dtype != torch.float32:
        yield case
        return
    for dtype in (BF16, FP16):
        yield replace(case, x_dtype=dtype, spec=replace(case.spec, scale_dtype=dtype))


def _groups_and_shapes() -> Iterator[Case]:
    """Every group size that occurs, symmetric and not, on shapes that whole FRACTAL_NZ blocks fill and on others."""
    for dtype in (BF16, FP16):
        for group in (32, 64, 96, 128, 256, PER_CHANNEL):
            for zero in (Zero.MIDPOINT, Zero.CODES):
                spec = QuantSpec(4, group, zero=zero, scale_dtype=dtype)
                for m, n, k in ((1, 192, 512), (17, 64, 384), (33, 40, 320)):
                    yield Case(spec, m=m, n=n, k=k, x_dtype=dtype, bias=m > 1)
                yield Case(spec, m=9, n=192, k=768, counts=(4, 0, 5), x_dtype=dtype)
        for scale in (BF16, FP16):
            for m, n, k in ((1, 64, 256), (17, 72, 512), (64, 128, 1024)):
                yield Case(QuantSpec(4, 256, scale_dtype=scale, act=TOKEN), m=m, n=n, k=k, x_dtype=dtype)
        for zero in (Zero.MIDPOINT, Zero.CODES):
            yield Case(QuantSpec(4, 32, zero=zero, scale_dtype=dtype), m=3, n=65600, k=64, x_dtype=dtype, bias=True)
        for counts in ((3, 0, 6), (0, 9), (1,) * 9):
            for group in (256, PER_CHANNEL):
                spec = QuantSpec(4, group, scale_dtype=FP16, act=TOKEN)
                yield Case(spec, m=9, n=192, k=512, counts=counts, x_dtype=dtype)
            yield Case(QuantSpec(8, PER_CHANNEL, act=TOKEN), m=9, n=40, k=512, counts=counts, x_dtype=dtype)


HALVES = tuple(dict.fromkeys((*(half for case in CASES for half in _in_half(case)), *_groups_and_shapes())))

# Cases taken by each kernel, so that a kernel that refuses everything cannot pass unseen.
AT_LEAST = {
    "ascend-w4a8": 14,
    "ascend-w4a16": 120,
    "ascend-w4a16-nz": 26,
    "ascend-w4a16-wide": 4,
    "ascend-w8a8": 38,
    "ascend-grouped-w4a8": 12,
    "ascend-grouped-w4a16": 35,
    "ascend-grouped-w8a8": 8,
}

test_conformance = backend_tests(NPU.backend, cases=[
    case for case in HALVES if any(k.refuses(case.problem, NPU.device) is None for k in NPU.backend.kernels)
])  # fmt: skip


def test_every_kernel_takes_its_share_of_the_cases() -> None:
    taken = coverage(NPU.backend, cases=HALVES)
    assert {name: count for name, count in taken.items() if count < AT_LEAST[name]} == {}
