"""The operators' wrappers on tensors: right calls compute the formula, wrong ones are refused before they are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from npu_under_test import NPU
from torch import Tensor

from transload.errors import Unsupported
from transload.quant import PER_CHANNEL, ActSpec, QTensor, QuantSpec
from transload.testing import nmse
from transload_ascend import grouped_ops, layouts, ops

BF16, FP16 = torch.bfloat16, torch.float16
RANDOM = torch.Generator().manual_seed(3)


def _on(t: Tensor) -> Tensor:
    return t.to(NPU.torch_device)


def _codes(*shape: int) -> Tensor:
    return torch.randint(16, shape, dtype=torch.uint8, generator=RANDOM)


def _float(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=RANDOM).to(dtype)


def _int8(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, generator=RANDOM)


def test_the_device_packs_int4_like_the_host() -> None:
    codes = _codes(32, 128)
    packed = ops.convert_weight_to_int4pack(_on(codes.int() - 8))
    assert torch.equal(packed.cpu(), layouts.int4pack(codes))


def test_the_device_makes_scale_words_like_the_host() -> None:
    scales = torch.cat([_float(100), torch.tensor([1e-30, 3e30, 2.0**-126])])
    assert torch.equal(ops.trans_quant_param(_on(scales)).cpu(), layouts.fp19_scale(scales))


@pytest.mark.parametrize("shape", [(32, 16), (48, 24), (3, 32, 48)], ids=str)
def test_a_weight_cast_to_nz_is_read_in_the_same_order(shape: tuple[int, ...]) -> None:
    words = layouts.int4pack(_codes(*shape[:-1], 8 * shape[-1]))
    cast = ops.to_nz_int4(_on(words))
    assert ops.is_nz(cast)
    assert not ops.is_nz(_on(words))
    assert torch.equal(ops.from_nz_int4(cast).cpu(), words)


@pytest.mark.skipif(not NPU.simulated, reason="a real NPU does not show its storage order")
def test_the_cast_puts_bytes_where_the_layout_says() -> None:
    words = layouts.int4pack(_codes(48, 192))
    stored = ops.to_nz_int4(words).view(torch.int8).flatten()
    assert torch.equal(stored, layouts.to_nz(words.view(torch.int8)).flatten())
    assert not torch.equal(stored, words.view(torch.int8).flatten())


@pytest.mark.parametrize("nz", [False, True], ids=["nd", "nz"])
@pytest.mark.parametrize("offset", [False, True], ids=["symmetric", "offset"])
def test_weight_quant_matmul_adds_the_offset_before_scaling(nz: bool, offset: bool) -> None:
    x, codes, scale = _float(5, 256, dtype=FP16) - 0.5, _codes(192, 256), _float(4, 192, dtype=FP16)
    shift = torch.randint(-7, 8, (4, 192), generator=RANDOM).half() if offset else None
    weight = _on(layouts.pack_along_n(codes))
    y = ops.weight_quant_matmul(
        _on(x), ops.to_nz_int4(weight) if nz else weight, _on(scale),
        offset=None if shift is None else _on(shift), group_size=64,
    )  # fmt: skip
    added = 0 if shift is None else shift.float().repeat_interleave(64, 0)
    expected = x.float() @ ((codes.T.float() - 8 + added) * scale.float().repeat_interleave(64, 0))
    assert nmse(y.cpu(), expected) < 1e-6  # weights and output are rounded to float16


def test_quant_matmul_scales_per_channel_and_token_and_then_adds_the_bias() -> None:
    x, w, s, t, b = _int8(5, 256), _int8(256, 64), _float(64) * 0.01, _float(5), _float(64)
    y = ops.quant_matmul(_on(x), _on(w), _on(s), _on(t), FP16, _on(b * 1000))
    assert nmse(y.cpu(), (x.double() @ w.double()) * s * t[:, None] + b * 1000) < 1e-6


def _a8w4(groups: int, n: int = 64) -> QTensor:
    scales = (_float(n, groups) * 0.01 + 0.001).to(FP16)
    return QTensor(QuantSpec(4, 256, scale_dtype=FP16, act=ActSpec()), _codes(n, 256 * groups), scales)


def test_quant_matmul_a8w4_needs_eight_times_the_weight_sums() -> None:
    w, x, token = _a8w4(2), _int8(5, 512), _float(5, 1) * 0.01
    weight, scale = layouts.pack_along_n(w.codes), layouts.fp19_scale(w.scales.T)
    y = ops.quant_matmul_a8w4(_on(x), _on(weight), _on(scale), _on(layouts.scale_bias(w)), _on(token), BF16)
    expected = x.double() @ w.dequantize(torch.float64).T * token
    assert nmse(y.cpu(), expected) < 6e-6
    without = ops.quant_matmul_a8w4(_on(x), _on(weight), _on(scale), _on(torch.zeros(64)), _on(token), BF16)
    assert nmse(without.cpu(), expected) > 1e-3


def test_dynamic_quant_rounds_half_to_even_and_gives_zero_rows_scale_zero() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5], [0.0, 0.0, 0.0, 0.0]], dtype=FP16)
    q, scale = (t.cpu() for t in ops.dynamic_quant(_on(x)))
    assert q[0].tolist() == [127, 0, 2, -2]
    assert scale.tolist() == [1.0, 0.0]


def test_dynamic_quant_gives_the_numbers_that_its_page_prints() -> None:
    x = torch.tensor([[0.7261, 0.3726, 0.9126], [0.9023, 0.9990, 0.1279], [0.8628, 0.6240, 0.9028]], dtype=FP16)
    q, scale = (t.cpu() for t in ops.dynamic_quant(_on(x)))
    assert q.tolist() == [[101, 52, 127], [115, 127, 16], [121, 88, 127]]
    assert [round(v, 4) for v in scale.tolist()] == [0.0072, 0.0079, 0.0071]


def test_fused_swiglu_equals_the_two_steps() -> None:
    experts, k, h, counts = 3, 256, 64, torch.tensor([2, 0, 5])
    w = QTensor(
        QuantSpec(4, PER_CHANNEL, act=ActSpec()), _codes(experts, 2 * h, k), _float(experts, 2 * h, 1) * 0.001 + 1e-4
    )
    x, token = _int8(7, k), _float(7) * 0.1
    weight, scale = _on(layouts.pack_along_n(w.codes)), _on(layouts.scale_bits(w.scales.transpose(1, 2)))
    bias = _on(layouts.scale_bias(w))
    q, s = grouped_ops.grouped_w4a8_swiglu(_on(x), weight, scale.squeeze(1), bias, _on(token), _on(counts))
    y = grouped_ops.grouped_w4a8(_on(x), weight, scale, bias, _on(token), _on(counts), BF16).float().cpu()
    expected = torch.nn.functional.silu(y[:, :h]) * y[:, h:]
    assert nmse(q.cpu().float() * s.cpu()[:, None], expected) < 2e-4  # int8 of the result, bfloat16 of the two steps


def test_dequant_swiglu_quant_equals_its_formula() -> None:
    counts, h = torch.tensor([3, 0, 4]), 64
    sums = torch.randint(-30000, 30000, (7, 2 * h), dtype=torch.int32, generator=RANDOM)
    scale, token = _float(3, 2 * h) * 1e-3, _float(7, 1) * 0.1
    q, s = grouped_ops.dequant_swiglu_quant(_on(sums), _on(scale), _on(token), _on(counts))
    y = sums.float() * scale.repeat_interleave(counts, 0) * token
    expected = torch.nn.functional.silu(y[:, :h]) * y[:, h:]
    assert nmse(q.cpu().float() * s.cpu()[:, None], expected) < 2e-4  # int8 of the result


X, W = _float(5, 256, dtype=BF16), layouts.pack_along_n(_codes(64, 256))
S = _float(2, 64, dtype=BF16)
Q8, C = _int8(5, 256), torch.tensor([2, 3])
E4 = layouts.pack_along_n(_codes(2, 64, 256))
EB, EW, T5 = _float(2, 64), torch.zeros(2, 1, 64, dtype=torch.int64), _float(5)

WRONG: dict[str, tuple[str, Callable[[], Any]]] = {
    "x with three axes": ("x has two axes", lambda: ops.weight_quant_matmul(
        _on(X[None]), _on(W), _on(S), group_size=128)),
    "float32 x": ("x is float16", lambda: ops.weight_quant_matmul(_on(X.float()), _on(W), _on(S), group_size=128)),
    "group of 48": ("multiple of 32", lambda: ops.weight_quant_matmul(_on(X), _on(W), _on(S), group_size=48)),
    "scales as [N, G]": ("[ceil(K", lambda: ops.weight_quant_matmul(_on(X), _on(W), _on(S.T), group_size=128)),
    "float32 scales": ("dtype of x", lambda: ops.weight_quant_matmul(_on(X), _on(W), _on(S.float()), group_size=128)),
    "bfloat16 bias": ("the bias is float16", lambda: ops.weight_quant_matmul(
        _on(X), _on(W), _on(S), bias=_on(S[0]), group_size=128)),
    "K of 128 against 256": ("same K", lambda: ops.weight_quant_matmul(_on(X[:, :128]), _on(W), _on(S), group_size=64)),
    "nz in groups of 32": ("64 or 128", lambda: ops.weight_quant_matmul(
        _on(X), ops.to_nz_int4(_on(W)), _on(_float(8, 64, dtype=BF16)), group_size=32)),
    "no rows": ("empty", lambda: ops.weight_quant_matmul(_on(X[:0]), _on(W), _on(S), group_size=128)),
    "a8w4 scales as floats": ("npu_trans_quant_param", lambda: ops.quant_matmul_a8w4(
        _on(Q8), _on(W), _on(S[:1].float()), _on(_float(64)), _on(T5[:, None]), BF16)),
    "a8w4 token scale [M]": ("[M, 1]", lambda: ops.quant_matmul_a8w4(
        _on(Q8), _on(W), _on(torch.zeros(1, 64, dtype=torch.int64)), _on(_float(64)), _on(T5), BF16)),
    "w8a8 scale [1, N]": ("[1] or [N]", lambda: ops.quant_matmul(
        _on(Q8), _on(_int8(256, 64)), _on(_float(1, 64)), _on(T5), BF16)),
    "w8a8 float32 output": ("the output is", lambda: ops.quant_matmul(
        _on(Q8), _on(_int8(256, 64)), _on(_float(64)), _on(T5), torch.float32)),
    "values beyond int4": ("-8 .. 7", lambda: ops.convert_weight_to_int4pack(_on(torch.full((8, 8), 9).int()))),
    "seven columns": ("multiple of 8", lambda: ops.convert_weight_to_int4pack(_on(torch.zeros(8, 7).int()))),
    "scale words of a matrix": ("flatten", lambda: ops.trans_quant_param(_on(_float(4, 8)))),
    "nz of 24 rows": ("multiple of 16", lambda: ops.to_nz_int4(_on(layouts.int4pack(_codes(24, 64))))),
    "dynamic quant of float32": ("float16 or bfloat16", lambda: ops.dynamic_quant(_on(X.float()))),
    "expert scales [E, N]": ("[E, 1, N]", lambda: grouped_ops.grouped_w4a8(
        _on(Q8), _on(E4), _on(EW.squeeze(1)), _on(EB), _on(T5), _on(C), BF16)),
    "expert counts of another length": ("one entry per expert", lambda: grouped_ops.grouped_w4a8(
        _on(Q8), _on(E4), _on(EW), _on(EB), _on(T5), _on(torch.tensor([1, 1, 3])), BF16)),
    "expert offsets missing a group": ("shape and dtype of the scale", lambda: grouped_ops.grouped_w4a16(
        _on(X), _on(E4), _on(_float(2, 2, 64, dtype=BF16)), _on(_float(2, 1, 64, dtype=BF16)), _on(C))),
    "expert scales beside bfloat16": ("bfloat16 for bfloat16", lambda: grouped_ops.grouped_w8a8(
        _on(Q8), _on(_int8(2, 256, 64)), _on(_float(2, 64)), _on(T5), _on(C), BF16)),
    "a gate of 63": ("multiple of 64", lambda: grouped_ops.dequant_swiglu_quant(
        _on(torch.zeros(5, 126, dtype=torch.int32)), _on(_float(2, 126)), _on(T5[:, None]), _on(C))),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_call_is_refused_before_torch_npu_sees_it(case: str) -> None:
    words, call = WRONG[case]
    before = _matmuls()
    with pytest.raises(Unsupported, match=r"found .* \(.*(OPDOC|OPSRC|OPTEST|META|VA|PTA)") as refusal:
        call()
    assert words in str(refusal.value)
    assert _matmuls() == before


def _matmuls() -> dict[str, int]:
    """Calls that reached an operator, those aside that only prepare a wrong call."""
    if not NPU.simulated:
        return {}
    from simulator.meta import CALLS

    return {name: count for name, count in CALLS.items() if name not in ("get_npu_format", "npu_format_cast")}
