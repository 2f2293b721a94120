"""What the conformance suite cannot ask: placing as FRACTAL_NZ, biases, and what really reached the operators."""

from __future__ import annotations

import pytest
import torch
from npu_under_test import NPU

from transload import reference
from transload.hal import Kernel
from transload.quant import PER_CHANNEL, ActSpec, QTensor, QuantSpec, Zero
from transload.testing import nmse

BF16, FP16 = torch.bfloat16, torch.float16
KERNELS = {kernel.name: kernel for kernel in NPU.backend.kernels}


def _weight(spec: QuantSpec, *shape: int) -> QTensor:
    random = torch.Generator().manual_seed(5)
    codes = torch.randint(1 << spec.bits, shape, dtype=torch.uint8, generator=random)
    scales = (torch.rand(*shape[:-1], spec.groups(shape[-1]), generator=random) * 0.01 + 0.001).to(spec.scale_dtype)
    zeros = torch.randint(16, scales.shape, dtype=torch.uint8, generator=random) if spec.zero is Zero.CODES else None
    return QTensor(spec, codes, scales, zeros)


def _x(rows: int, k: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(6)).to(dtype)


@pytest.mark.parametrize("group", [64, 128, PER_CHANNEL])
@pytest.mark.parametrize("zero", [Zero.MIDPOINT, Zero.CODES])
def test_nz_weights_multiply_alike_and_come_back_unchanged(group: int, zero: Zero) -> None:
    plain, nz = KERNELS["ascend-w4a16"], KERNELS["ascend-w4a16-nz"]
    w, x = _weight(QuantSpec(4, group, zero=zero, scale_dtype=BF16), 192, 512), _x(5, 512).to(NPU.torch_device)
    placed = nz.place(nz.pack(w), NPU.torch_device)
    assert "weight_nz" in placed.tensors
    expected = plain.matmul(x, plain.place(plain.pack(w), NPU.torch_device))
    assert nmse(nz.matmul(x, placed).cpu(), expected.cpu()) < 1e-6
    assert nz.unpack(placed).equal(w)


@pytest.mark.parametrize("name", ["ascend-w4a16", "ascend-w8a8", "ascend-w4a8"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_the_layers_bias_is_added_and_not_dropped(name: str, dtype: torch.dtype) -> None:
    spec = {
        "ascend-w4a16": QuantSpec(4, 128, scale_dtype=dtype),
        "ascend-w8a8": QuantSpec(8, PER_CHANNEL, act=ActSpec()),
        "ascend-w4a8": QuantSpec(4, 256, scale_dtype=dtype, act=ActSpec()),
    }[name]
    kernel, w, x = KERNELS[name], _weight(spec, 64, 512), _x(5, 512, dtype)
    bias = (torch.randn(64, generator=torch.Generator().manual_seed(7)) * 5).to(dtype)
    y = kernel.matmul(x.to(NPU.torch_device), _placed(kernel, w), bias.to(NPU.torch_device)).cpu()
    # The output and, after the operator, the sum with the bias are rounded to 16 bits.
    assert nmse(y, reference.matmul(x, w, bias)) < 1.2e-5


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("scheme", ["w4a8", "w4a16", "w8a8"])
def test_experts_with_a_bias_each(scheme: str, dtype: torch.dtype) -> None:
    spec = {
        "w4a8": QuantSpec(4, PER_CHANNEL, act=ActSpec()),
        "w4a16": QuantSpec(4, 64, scale_dtype=dtype),
        "w8a8": QuantSpec(8, PER_CHANNEL, act=ActSpec()),
    }[scheme]
    kernel, w, x, counts = KERNELS[f"ascend-grouped-{scheme}"], _weight(spec, 3, 64, 256), _x(9, 256, dtype), (4, 0, 5)
    bias, rows = torch.randn(3, 64).to(dtype), torch.tensor(counts)
    to = NPU.torch_device
    y = kernel.grouped_matmul(x.to(to), _placed(kernel, w), rows.to(to), bias.to(to)).cpu()
    assert nmse(y, reference.grouped_matmul(x, w, rows, bias)) < 1.2e-5


def test_float32_scales_beside_bfloat16_x_cost_one_more_rounding() -> None:
    kernel, w, x = KERNELS["ascend-w4a16"], _weight(QuantSpec(4, 128), 192, 512), _x(64, 512)
    error = nmse(kernel.matmul(x.to(NPU.torch_device), _placed(kernel, w)).cpu(), reference.matmul(x, w))
    # Scale, weight and output are each rounded to 8 significant bits: a relative variance of at most 3.3e-6 each.
    assert 1e-6 < error < 1e-5


def test_a_row_of_zeros_gives_zeros_whatever_its_codes_are() -> None:
    for name, spec in (
        ("ascend-w8a8", QuantSpec(8, PER_CHANNEL, act=ActSpec())),
        ("ascend-w4a8", QuantSpec(4, 256, scale_dtype=BF16, act=ActSpec())),
    ):
        x = _x(3, 256)
        x[1] = 0
        y = KERNELS[name].matmul(x.to(NPU.torch_device), _placed(KERNELS[name], _weight(spec, 64, 256))).cpu()
        assert not bool(y[1].any())
        assert bool(y[0].any())


def test_x_is_left_alone_by_the_operator_that_works_in_place() -> None:
    kernel, w = KERNELS["ascend-grouped-w4a8"], _weight(QuantSpec(4, PER_CHANNEL, act=ActSpec()), 2, 64, 256)
    x = _x(6, 256).to(NPU.torch_device)
    before = x.clone()
    counts = torch.tensor([2, 4]).to(NPU.torch_device)
    first, second = (kernel.grouped_matmul(x, _placed(kernel, w), counts) for _ in range(2))
    assert torch.equal(x, before)
    assert torch.equal(first, second)


@pytest.mark.parametrize("group", [PER_CHANNEL, 256])
@pytest.mark.parametrize("counts", [(4, 0, 5), (0, 9, 0)], ids=str)
def test_fused_experts_agree_with_three_steps(group: int, counts: tuple[int, ...]) -> None:
    kernel = KERNELS["ascend-grouped-w4a8"]
    spec = QuantSpec(4, group, scale_dtype=FP16, act=ActSpec())
    gate_up, down, x = _weight(spec, 3, 512, 256), _weight(spec, 3, 64, 256), _x(9, 256)
    rows = torch.tensor(counts)
    packed = [_placed(kernel, w) for w in (gate_up, down)]
    fused = kernel.swiglu_experts(x.to(NPU.torch_device), *packed, rows.to(NPU.torch_device))
    assert fused is not None
    assert fused.dtype == BF16
    gate, up = reference.grouped_matmul(x, gate_up, rows).chunk(2, -1)
    expected = reference.grouped_matmul(torch.nn.functional.silu(gate) * up, down, rows)
    # A code of the quantized values between the two may round the other way, one in a hundred, and shows as 1e-5.
    assert nmse(fused.cpu(), expected) < 3e-5


def test_wider_experts_are_not_fused() -> None:
    wide = _weight(QuantSpec(4, PER_CHANNEL, act=ActSpec()), 2, 10248, 16)
    kernel, x, counts = KERNELS["ascend-grouped-w4a8"], _x(2, 16), torch.tensor([1, 1])
    packed = kernel.pack(wide)
    assert kernel.swiglu_experts(x, packed, packed, counts) is None


def _placed(kernel: Kernel, w: QTensor):  # type: ignore[no-untyped-def]
    return kernel.place(kernel.pack(w), NPU.torch_device)
