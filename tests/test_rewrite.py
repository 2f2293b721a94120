"""Exact rewriting: every form means the same numbers, and nothing else is offered."""

from __future__ import annotations

import pytest
import torch
from memory_source import random_weight

from transload.errors import ConfigError
from transload.quant import Grid, QTensor, QuantSpec, Zero
from transload.rewrite import exact_forms, rewrite

SPECS = [
    QuantSpec(bits, group, zero=zero, scale_dtype=dtype)
    for bits in (2, 4, 5, 8)
    for group in (-1, 16)
    for zero in (Zero.MIDPOINT, Zero.CODES, Zero.FLOATS, Zero.MINS)
    for dtype in (torch.float16, torch.float32)
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_form_means_the_same_numbers(spec: QuantSpec) -> None:
    w = random_weight(spec, 8, 32)
    w.scales[0] *= -1  # scales of Q6_K are negative as often as not
    forms = list(exact_forms(spec))
    assert forms[0] == spec
    assert len(set(forms)) == len(forms)
    for form in forms:
        assert torch.equal(rewrite(w, form).dequantize(), w.dequantize()), form


def test_four_bit_floats_are_exact_in_eight_bit_integers() -> None:
    spec = QuantSpec(4, 32, Grid.E2M1, Zero.NONE)
    codes = torch.arange(16, dtype=torch.uint8).repeat(4, 2)
    w = QTensor(spec, codes, torch.rand(4, 1) + 0.1)
    (form,) = [f for f in exact_forms(spec) if f.bits == 8 and f.zero is Zero.MIDPOINT]
    assert torch.equal(rewrite(w, form).dequantize(), w.dequantize())


def test_groups_are_split_by_repeating_scales() -> None:
    for whole in (QuantSpec(4, 32), QuantSpec(4, -1, zero=Zero.MINS)):
        w = random_weight(whole, 8, 96)
        smaller = QuantSpec(4, 16, zero=whole.zero)
        assert torch.equal(rewrite(w, smaller).dequantize(), w.dequantize())


def test_act_order_survives_wider_codes() -> None:
    spec = QuantSpec(4, 16, act_order=True)
    w = random_weight(spec, 8, 64)
    wide = rewrite(w, QuantSpec(8, 16, act_order=True))
    assert torch.equal(wide.dequantize(), w.dequantize())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (QuantSpec(8, 32), QuantSpec(4, 32)),
        (QuantSpec(4, 32), QuantSpec(4, 64)),
        (QuantSpec(4, 48), QuantSpec(4, 32)),
        (QuantSpec(4, 32), QuantSpec(4, -1)),
        (QuantSpec(4, 32, zero=Zero.CODES), QuantSpec(4, 32)),
        (QuantSpec(4, 32, zero=Zero.MINS), QuantSpec(4, 32, zero=Zero.FLOATS)),
        (QuantSpec(4, 32), QuantSpec(4, 32, scale_dtype=torch.float16)),
        (QuantSpec(4, 32, Grid.NF4, Zero.NONE), QuantSpec(8, 32)),
        (QuantSpec(4, 32, act_order=True), QuantSpec(4, 32)),
    ],
    ids=str,
)
def test_what_would_change_numbers_is_refused(old: QuantSpec, new: QuantSpec) -> None:
    with pytest.raises(ConfigError):
        rewrite(random_weight(old, 8, 192), new)


def test_zero_points_fit_symmetric_codes_of_one_bit_more() -> None:
    spec = QuantSpec(4, 32, zero=Zero.CODES)
    w = random_weight(spec, 16, 64)
    assert QuantSpec(5, 32) in exact_forms(spec)
    assert torch.equal(rewrite(w, QuantSpec(5, 32)).dequantize(), w.dequantize())


def test_a_target_with_one_group_size_is_offered_it_first() -> None:
    assert next(exact_forms(QuantSpec(4, 128), 32)).group_size == 32
    assert next(exact_forms(QuantSpec(8, -1), 32)).group_size == 32
    assert next(exact_forms(QuantSpec(4, 16), 32)).group_size == 16
    assert next(exact_forms(QuantSpec(4, 128, act_order=True), 32)).group_size == 128
