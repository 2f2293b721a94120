"""Requantizing: what the short texts mean, and errors against a direct computation."""

from __future__ import annotations

import math

import pytest
import torch
from memory_source import random_weight

import transload.requantize
from transload.errors import ConfigError
from transload.quant import PER_CHANNEL, ActSpec, QuantSpec, Zero
from transload.reference import quantize_rtn
from transload.requantize import difference, parse_spec, requantize


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("int4-g128", QuantSpec(4, 128, scale_dtype=torch.float16)),
        ("int8-g32", QuantSpec(8, 32, scale_dtype=torch.float16)),
        ("INT4", QuantSpec(4, 128, scale_dtype=torch.float16)),
        ("int4-g32-asym-bf16", QuantSpec(4, 32, zero=Zero.CODES, scale_dtype=torch.bfloat16)),
        ("int8-channel-a8-fp32", QuantSpec(8, PER_CHANNEL, act=ActSpec())),
    ],
)
def test_schemes_in_short(text: str, spec: QuantSpec) -> None:
    assert parse_spec(text) == spec


@pytest.mark.parametrize("text", ["", "4bit", "int9-g32", "int4-g0", "int4-g128-fp16-bf16", "int4-sym-asym", "nf4"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_spec(text)


def test_slabs_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    w = random_weight(QuantSpec(4, 16, zero=Zero.MINS), 33, 64)
    spec = parse_spec("int4-g32-asym")
    whole, apart = requantize(w, spec)
    assert whole.equal(quantize_rtn(w.dequantize(), spec))
    monkeypatch.setattr(transload.requantize, "_SLAB", 200)
    pieces, same = requantize(w, spec)
    assert pieces.equal(whole)
    assert same.max_error == apart.max_error
    assert same.sqnr_db == pytest.approx(apart.sqnr_db)


def test_the_error_is_that_of_the_values() -> None:
    w = random_weight(QuantSpec(8, 16), 8, 64)
    new, apart = requantize(w, parse_spec("int4-g32"))
    error = (new.dequantize() - w.dequantize()).double()
    signal = w.dequantize().double()
    assert apart.max_error == pytest.approx(float(error.abs().max()))
    assert apart.rms_error == pytest.approx(float(error.square().mean().sqrt()))
    assert apart.sqnr_db == pytest.approx(10 * math.log10(float(signal.square().sum() / error.square().sum())))


def test_equal_weights_are_infinitely_close() -> None:
    w = random_weight(QuantSpec(4, 16), 8, 64)
    assert difference(w, w.dequantize()).sqnr_db == math.inf
    assert difference(torch.ones(3), torch.ones(3)).max_error == 0
