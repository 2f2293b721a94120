"""The Triton layout on any machine: byte positions, exact round trips, refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transload.errors import ConfigError, Unsupported
from transload.quant import PER_CHANNEL, ActSpec, Grid, QTensor, QuantSpec, Zero
from transload.reference import quantize_rtn
from transload.testing import CASES, Case
from transload_cuda import layouts

PACKABLE = [c for c in CASES if layouts.refuses_weight(c.n, c.k, c.spec, 16) is None]


@pytest.mark.parametrize("case", PACKABLE, ids=lambda c: c.id)
def test_unpack_is_the_inverse_of_pack(case: Case) -> None:
    w = case.operands().weight
    assert layouts.unpack(layouts.pack("triton", w)).equal(w)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 8),
    st.sampled_from([16, 32, 48, 128, PER_CHANNEL]),
    st.sampled_from([z for z in Zero if z is not Zero.NONE]),
    st.integers(1, 9),
    st.integers(1, 300),
    st.sampled_from([None, 1, 3]),
)
def test_any_shape_round_trips(bits: int, group: int, zero: Zero, n: int, k: int, experts: int | None) -> None:
    spec = QuantSpec(bits, group, zero=zero)
    lead = (n,) if experts is None else (experts, n)
    w = quantize_rtn(torch.randn(*lead, k), spec)
    assert layouts.unpack(layouts.pack("triton", w)).equal(w)


def test_a_byte_holds_codes_of_both_halves_of_the_row() -> None:
    codes = (torch.arange(512) % 16).to(torch.uint8)[None]
    codes[0, 256 + 5] = 15
    p = layouts.pack("triton", QTensor(QuantSpec(4, PER_CHANNEL), codes, torch.ones(1, 1)))
    packed = p.tensors["codes"]
    assert packed.shape == (1, 256)
    assert packed[0, :4].tolist() == [0x00, 0x11, 0x22, 0x33]
    assert int(packed[0, 5]) == 0xF5


def test_wide_codes_have_a_byte_each() -> None:
    w = Case(QuantSpec(6, 16), k=48).operands().weight
    assert torch.equal(layouts.pack("triton", w).tensors["codes"], w.codes)


def test_four_bit_weights_take_half_a_byte_and_sides_lie_group_by_group() -> None:
    w = Case(QuantSpec(4, 128, zero=Zero.CODES), n=24, k=1024).operands().weight
    t = layouts.pack("triton", w).tensors
    assert t["codes"].shape == (24, 512)
    assert torch.equal(t["scales"], w.scales.T)
    assert w.zeros is not None
    assert torch.equal(t["zeros"], w.zeros.T)


def test_padding_groups_have_scale_zero() -> None:
    w = Case(QuantSpec(4, 128, zero=Zero.MINS), k=200 + 128).operands().weight
    t = layouts.pack("triton", w).tensors
    assert t["scales"].shape[0] == 4
    assert t["scales"][3].count_nonzero() == 0
    assert t["mins"][3].count_nonzero() == 0


@pytest.mark.parametrize(
    ("spec", "k", "step", "words"),
    [
        (QuantSpec(4, 64, Grid.NF4, Zero.NONE), 256, 16, "integer codes, not nf4"),
        (QuantSpec(4, 40), 256, 16, "groups of 40 are not a multiple of 16"),
        (QuantSpec(4, 16), 256, 32, "groups of 16 are not a multiple of 32"),
        (QuantSpec(4, 64, act=ActSpec(group_size=96)), 256, 32, "do not nest"),
        (QuantSpec(4, 64), 0, 16, "is empty"),
    ],
)
def test_refusals_say_what_was_found(spec: QuantSpec, k: int, step: int, words: str) -> None:
    assert words in str(layouts.refuses_weight(8, k, spec, step))


def test_one_group_over_the_whole_row_is_no_group() -> None:
    assert layouts.geometry(72, QuantSpec(4, 128)).group == 0
    assert layouts.refuses_weight(8, 40, QuantSpec(4, 40), 16) is None


def test_act_order_with_unequal_groups_is_refused() -> None:
    g_idx = torch.tensor([0] * 20 + [1] * 12, dtype=torch.int32)
    w = quantize_rtn(torch.randn(4, 32), QuantSpec(4, 16))
    uneven = QTensor(replace(w.spec, act_order=True), w.codes, w.scales, g_idx=g_idx)
    with pytest.raises(Unsupported, match="unequal sizes"):
        layouts.pack("triton", uneven)


def test_rows_are_those_of_unpack() -> None:
    w = Case(QuantSpec(4, 64, zero=Zero.CODES, act_order=True), n=12, k=200).operands().weight
    p = layouts.pack("triton", w)
    index = torch.tensor([11, 0, 0, 5])
    found, whole = layouts.rows(p, index), layouts.unpack(p)
    assert torch.equal(found.codes, whole.codes[index])
    assert torch.equal(found.scales, whole.scales[index])
    experts = layouts.pack("triton", Case(QuantSpec(4, 64), counts=(2, 3)).operands().weight)
    with pytest.raises(Unsupported, match="2 experts"):
        layouts.rows(experts, index)


def test_operands_that_do_not_fit_are_named() -> None:
    p = layouts.pack("t", Case(QuantSpec(4, 64), n=12, k=256).operands().weight)
    x = torch.randn(3, 256)
    layouts.check_x("t", x, p, torch.zeros(12), None)
    for wrong, words in (
        ((x[:, :100], p, None, None), r"x is \(3, 100\), expected \[M, 256\]"),
        ((x, p, torch.zeros(5), None), r"bias has shape \(5,\), expected \(12,\)"),
        ((x, p, None, torch.tensor([3])), "counts"),
        ((x.to("meta"), p, None, None), "move them to one device"),
    ):
        with pytest.raises(ConfigError, match=words):
            layouts.check_x("t", *wrong)
