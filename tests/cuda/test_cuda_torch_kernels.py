"""The kernels that are torch's own operators: dequantize + cuBLAS runs on any device, int4pack on a stand-in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from transload import bits
from transload.errors import ConfigError
from transload.hal import Device, Kernel, Problem
from transload.quant import ActSpec, Grid, QuantSpec, Zero
from transload.testing import CASES, Case, backend_tests, coverage, run_case
from transload_cuda.backend import CudaBackend
from transload_cuda.dequantize_kernel import DequantizeKernel
from transload_cuda.int4pack_kernel import Int4PackKernel

H200 = Device("cuda", 0, "NVIDIA H200", "sm_90", 141 << 30, 140 << 30)
BF16 = torch.bfloat16
INT4 = QuantSpec(4, 64, scale_dtype=BF16)


class OnCpu(CudaBackend):
    """Kernels that are made of torch operators, with tensors in CPU memory."""

    name = "cuda-torch-operators"

    def __init__(self, kernel: Kernel) -> None:
        self.kernels: Sequence[Kernel] = (kernel,)

    def unavailable(self) -> str | None:
        return None

    def devices(self) -> Sequence[Device]:
        return (H200,)

    def torch_device(self, device: Device) -> torch.device:
        return torch.device("cpu")


LAST = OnCpu(DequantizeKernel())
test_dequantize_conformance = backend_tests(LAST, cases=[c for c in CASES if c.spec.act is None])


def test_dequantize_takes_every_scheme_with_16_bit_activations() -> None:
    wanted = sum(case.spec.act is None for case in CASES)
    assert coverage(LAST) == {"dequantize": wanted}


def test_dequantize_refuses_int8_activations() -> None:
    reason = DequantizeKernel().refuses(Problem(8, 64, replace(INT4, act=ActSpec())), H200)
    assert reason == "16-bit activations only, not int8 dynamic per token"


@pytest.fixture
def tinygemm() -> Iterator[None]:
    """The two operators as torch documents them, for CPU tensors: tiles hold the swapped bytes, unchanged."""

    def convert(codes: Tensor, inner: int) -> Tensor:
        assert inner in (2, 4, 8)
        return codes.view(torch.int32).clone()

    def multiply(x: Tensor, tiles: Tensor, group: int, scale_and_zero: Tensor) -> Tensor:
        n, k = tiles.shape[0], x.shape[1]
        codes = bits.unpack(tiles.view(torch.uint8), 4, k).reshape(n, k // 2, 2).flip(-1).reshape(n, k)
        scale, zero = scale_and_zero.repeat_interleave(group, 0).unbind(-1)
        return x @ ((codes.float() - 8) * scale.T.float() + zero.T.float()).to(x.dtype).T

    library = torch.library.Library("aten", "IMPL")
    library.impl("_convert_weight_to_int4pack", convert, "CPU")
    library.impl("_weight_int4pack_mm", multiply, "CPU")
    yield
    library._destroy()


INT4_CASES = [
    Case(replace(INT4, group_size=group), m=m, n=40, k=512, x_dtype=BF16, bias=bias)
    for group, m, bias in ((32, 1, False), (64, 17, True), (128, 0, False), (256, 3, True))
]


@pytest.mark.parametrize("case", INT4_CASES, ids=lambda c: c.id)
def test_int4pack_multiplies_and_packs_exactly(case: Case, tinygemm: None) -> None:
    kernel = Int4PackKernel()
    result = run_case(OnCpu(kernel), H200, kernel, case)
    assert result.passed, result
    w = case.operands().weight
    assert kernel.unpack(kernel.place(kernel.pack(w), torch.device("cpu"))).equal(w)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"spec": replace(INT4, act=ActSpec())}, "16-bit activations only"),
        ({"spec": replace(INT4, scale_dtype=torch.float16)}, "would round torch.float16 scales"),
        ({"spec": replace(INT4, zero=Zero.CODES)}, "would round codes to bfloat16"),
        ({"spec": replace(INT4, group_size=16)}, "groups of 32, 64, 128 or 256 only, not 16"),
        ({"spec": QuantSpec(4, 64, Grid.NF4, Zero.NONE, BF16)}, "4-bit nf4"),
        ({"x_dtype": torch.float16}, "x must be bfloat16"),
        ({"k": 192}, "K=192"),
        ({"n": 12}, "N=12"),
        ({"experts": 4}, "dense layers only"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_int4pack_refuses_what_it_would_round(change: dict[str, object], words: str) -> None:
    problem = replace(Problem(64, 512, INT4, BF16), **change)  # type: ignore[arg-type]
    assert words in str(Int4PackKernel().refuses(problem, H200))


def test_int4pack_names_a_wrong_dtype() -> None:
    w = INT4_CASES[0].operands().weight
    kernel = Int4PackKernel()
    with pytest.raises(ConfigError, match=r"x is torch\.float16, expected bfloat16"):
        kernel.matmul(torch.zeros(1, 512, dtype=torch.float16), kernel.pack(w))
