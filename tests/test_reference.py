"""The truth, checked against formulas written down a second time in float64 and in Python's integers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transload import reference
from transload.errors import ConfigError, Unsupported
from transload.quant import PER_CHANNEL, ActSpec, Grid, QTensor, QuantSpec, Zero, stack_experts
from transload.testing import nmse

SCHEMES = [
    QuantSpec(bits, group, zero=zero, scale_dtype=dtype)
    for bits in (2, 4, 5, 8)
    for group, dtype in ((16, torch.float32), (32, torch.float16), (PER_CHANNEL, torch.bfloat16))
    for zero in (Zero.MIDPOINT, Zero.CODES, Zero.FLOATS, Zero.MINS)
] + [
    QuantSpec(4, 16, Grid.NF4, Zero.NONE),
    QuantSpec(4, 16, Grid.FP4, Zero.NONE),
    QuantSpec(4, 16, Grid.E2M1, Zero.NONE),
    QuantSpec(8, 16, Grid.E4M3, Zero.NONE),
]


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("spec", SCHEMES, ids=str)
def test_rtn_is_off_by_no_more_than_half_a_step(spec: QuantSpec) -> None:
    weight = gaussian(6, 72)
    w = reference.quantize_rtn(weight, spec)
    assert (w.n, w.k, w.spec) == (6, 72, spec)
    grid = spec.grid.values(spec.bits)
    steps = grid[grid.isfinite()].sort().values.diff().max() if spec.grid is not Grid.INT else torch.tensor(1.0)
    scales = w.scales.float()[:, w.group_of_k()]
    # Scales, float zeros and mins are rounded to their stored dtype, which moves the grid by a few parts of 2**bits
    # steps; the extreme of a symmetric group may be clamped, half a step past the end.
    slack = (1 << spec.bits) * torch.finfo(spec.scale_dtype).eps * 2 + 1e-4
    assert bool(((w.dequantize() - weight).abs() <= scales.abs() * (steps / 2 + slack)).all())


@pytest.mark.parametrize("spec", SCHEMES, ids=str)
def test_rtn_of_a_zero_weight_is_zero(spec: QuantSpec) -> None:
    w = reference.quantize_rtn(torch.zeros(2, 40), spec)
    assert bool((w.scales != 0).all())
    assert torch.equal(w.dequantize(), torch.zeros(2, 40))


@pytest.mark.parametrize("spec", SCHEMES, ids=str)
def test_rtn_of_tiny_numbers_has_no_zero_scale(spec: QuantSpec) -> None:
    w = reference.quantize_rtn(gaussian(2, 40) * 1e-9, spec)
    assert bool((w.scales.float() != 0).all())
    assert bool((w.dequantize().abs() < 1e-6 + float(torch.finfo(spec.scale_dtype).tiny) * 256).all())


def test_rtn_quantizes_each_expert_by_itself() -> None:
    weight = gaussian(3, 4, 40)
    spec = QuantSpec(4, 16, zero=Zero.CODES)
    stacked = stack_experts([reference.quantize_rtn(part, spec) for part in weight])
    assert reference.quantize_rtn(weight, spec).equal(stacked)


def test_rtn_refuses_what_is_not_finite() -> None:
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="NaN or infinity"):
            reference.quantize_rtn(torch.tensor([[1.0, bad]]), QuantSpec(4, 2))


@given(st.integers(1, 5), st.integers(1, 70), st.sampled_from((PER_CHANNEL, 1, 7, 16, 32, 100)), st.integers(0, 99))
def test_activations_are_quantized_as_defined(m: int, k: int, group: int, seed: int) -> None:
    x = gaussian(m, k, seed=seed) * 10
    x[0] = 0
    q, scales = reference.quantize_activation(x, ActSpec(group_size=group))
    size = k if group == PER_CHANNEL else group
    assert (q.dtype, q.shape, scales.dtype, scales.shape) == (torch.int8, x.shape, torch.float32, (m, -(-k // size)))
    for row in range(m):
        for g in range(scales.shape[1]):
            part = x[row, g * size : (g + 1) * size]
            scale = float(part.abs().max() / 127)
            assert float(scales[row, g]) == scale
            expected = [0 if scale == 0 else round(float(v / torch.tensor(scale))) for v in part]
            assert q[row, g * size : (g + 1) * size].tolist() == expected


def test_half_steps_round_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert reference.quantize_activation(x, ActSpec())[0].tolist() == [[127, 0, 2, 2, 0, -2]]


@pytest.mark.parametrize("act", [ActSpec(), ActSpec(group_size=16)], ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_stay_in_their_row(act: ActSpec, bad: float) -> None:
    x = gaussian(3, 40)
    w = reference.quantize_rtn(gaussian(5, 40), QuantSpec(4, 16, act=act))
    good = reference.matmul(x, w)
    x[1, 17] = bad
    y = reference.matmul(x, w)
    assert bool(y[1].isnan().all())
    assert torch.equal(y[[0, 2]], good[[0, 2]])


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 50), st.integers(1, 60), st.integers(0, 99))
@settings(max_examples=50)
def test_integer_sums_are_exact(m: int, n: int, k: int, segment: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    xq = torch.randint(-128, 128, (m, k), generator=random).to(torch.int8)
    codes = torch.randint(256, (n, k), generator=random, dtype=torch.uint8)
    sums = reference.integer_sums(xq, codes, segment)
    assert sums.dtype == torch.int64
    a, b = xq.tolist(), codes.tolist()
    for s, start in enumerate(range(0, k, segment)):
        part = range(start, min(start + segment, k))
        assert sums[s].tolist() == [[sum(a[i][t] * b[j][t] for t in part) for j in range(n)] for i in range(m)]


def test_integer_sums_are_exact_at_their_largest() -> None:
    k = 1 << 16
    xq, codes = torch.full((1, k), -128, dtype=torch.int8), torch.full((1, k), 255, dtype=torch.uint8)
    assert reference.integer_sums(xq, codes, k).item() == -128 * 255 * k


def in_float64(x: torch.Tensor, w: QTensor, act: ActSpec | None) -> torch.Tensor:
    """y = xq @ w.T with x rounded to its int8 grid, all in float64: independent of sums, segments and offsets."""
    x64 = x.double()
    if act is not None:
        size = x.shape[1] if act.group_size == PER_CHANNEL else act.group_size
        parts = []
        for part in x.split(size, dim=1):  # the scale is a float32 by definition, everything else is exact
            scale = part.abs().amax(1, keepdim=True) / 127
            parts.append((part / scale).nan_to_num().round().double() * scale.double())
        x64 = torch.cat(parts, dim=1)
    return x64 @ w.dequantize(torch.float64).T


ACTS = [None, ActSpec(), ActSpec(group_size=16), ActSpec(group_size=32), ActSpec(group_size=64)]


@pytest.mark.parametrize("act", ACTS, ids=str)
@pytest.mark.parametrize("spec", SCHEMES, ids=str)
def test_matmul_is_the_product_in_float64(spec: QuantSpec, act: ActSpec | None) -> None:
    x, bias = gaussian(4, 72, seed=1), gaussian(6, seed=2)
    x[2] = 0
    w = reference.quantize_rtn(gaussian(6, 72), spec)
    y = reference.matmul(x, w.with_act(act), bias)
    assert (y.dtype, y.shape) == (torch.float32, (4, 6))
    # With activations in int8 only the result is rounded to float32: 2**-24 relative, squared 4e-15. In float32 the
    # weight and the sums are rounded too, and zero points cancel.
    assert nmse(y, in_float64(x, w, act) + bias) < (1e-11 if act is None else 1e-13)


def test_act_order_multiplies_as_its_dequantized_weight() -> None:
    spec = QuantSpec(4, 16, zero=Zero.CODES, act_order=True)
    plain = reference.quantize_rtn(gaussian(6, 64), replace(spec, act_order=False))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    w = QTensor(spec, plain.codes[:, order], plain.scales, plain.zeros, g_idx=(order // 16).int())
    x = gaussian(4, 64, seed=1)
    for act in (None, ActSpec()):
        assert nmse(reference.matmul(x, w.with_act(act)), in_float64(x, w, act)) < 1e-11


UNDEFINED = [
    (QuantSpec(4, 16, act=ActSpec(group_size=24)), None, "one must divide the other"),
    (QuantSpec(4, 16, act=ActSpec(static=True)), None, "static"),
    (QuantSpec(4, 16, act=ActSpec(group_size=16), act_order=True), torch.arange(64).int() % 4, "per group"),
    (QuantSpec(4, 16, act=ActSpec(), act_order=True), torch.zeros(64).int(), "unequal"),
]


@pytest.mark.parametrize(("spec", "g_idx", "words"), UNDEFINED, ids=[words for *_, words in UNDEFINED])
def test_what_is_not_defined_is_refused(spec: QuantSpec, g_idx: torch.Tensor | None, words: str) -> None:
    w = QTensor(spec, torch.zeros(2, 64, dtype=torch.uint8), torch.ones(2, 4), g_idx=g_idx)
    with pytest.raises(Unsupported, match=words):
        reference.matmul(gaussian(1, 64), w)


@pytest.mark.parametrize("act", [None, ActSpec(), ActSpec(group_size=16)], ids=str)
def test_no_rows_give_no_rows(act: ActSpec | None) -> None:
    w = reference.quantize_rtn(gaussian(6, 72), QuantSpec(4, 16, act=act))
    assert reference.matmul(torch.zeros(0, 72), w).shape == (0, 6)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=5))
@settings(max_examples=25)
def test_grouped_matmul_is_one_matmul_an_expert(counts: list[int]) -> None:
    spec = QuantSpec(4, 16, zero=Zero.MINS)
    w = reference.quantize_rtn(gaussian(len(counts), 6, 40), spec)
    x, bias = gaussian(sum(counts), 40, seed=1), gaussian(len(counts), 6, seed=2)
    y = reference.grouped_matmul(x, w, torch.tensor(counts), bias)
    assert y.shape == (sum(counts), 6)
    owners = [e for e, count in enumerate(counts) for _ in range(count)]
    for row, e in enumerate(owners):
        alone = reference.matmul(x[row : row + 1], w.expert(e), bias[e])
        assert torch.allclose(y[row], alone[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("counts", [[2, 1], [2, 3], [4], [1, 1, 2], [5, -1]], ids=str)
def test_counts_that_do_not_match_x_or_the_experts_are_refused(counts: list[int]) -> None:
    w = reference.quantize_rtn(gaussian(2, 6, 40), QuantSpec(4, 16))
    with pytest.raises(ConfigError, match="counts"):
        reference.grouped_matmul(gaussian(4, 40), w, torch.tensor(counts))
