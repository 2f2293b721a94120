"""Rounding with searched scales, against a loop over every scale."""

from __future__ import annotations

import pytest
import torch

from transload.quantize.rtn import quantize_mse
from transload.reference import quantize_rtn
from transload.requantize import parse_spec

SCHEMES = ("int4-g16-fp32", "int4-g16-asym-fp32", "int8-channel-fp32", "int3-g32", "int4-g16-bf16")


def weight(n: int = 6, k: int = 64) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(n, k) * torch.randn(n, k).exp()


def loss(w: torch.Tensor, got: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    return ((got - w).double().square() * importance).sum()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_search_never_loses_to_the_largest_magnitude(scheme: str) -> None:
    w, spec = weight(), parse_spec(scheme)
    ones = torch.ones(64).double()
    searched, plain = quantize_mse(w, spec), quantize_rtn(w, spec)
    assert searched.spec == spec
    assert loss(w, searched.dequantize(), ones) <= loss(w, plain.dequantize(), ones) * (1 + 1e-9)


@pytest.mark.parametrize("asym", [False, True])
def test_the_search_finds_the_best_range_of_every_group(asym: bool) -> None:
    w = weight()
    importance = torch.rand(64).double()
    got = quantize_mse(w, parse_spec("int4-g16-asym-fp32" if asym else "int4-g16-fp32"), importance)
    found = ((got.dequantize() - w).double().square() * importance).reshape(6, 4, 16).sum(-1)
    x, weights = w.double().reshape(6, 4, 16), importance.reshape(4, 16)
    for step in range(24):  # the ranges that are tried, written out in float64
        shrink = 1 - step * 0.5 / 24
        if asym:
            low, high = x.amin(-1).clamp(max=0) * shrink, x.amax(-1).clamp(min=0) * shrink
            scale = (high - low) / 15
            zero = (-low / scale).round().unsqueeze(-1)
        else:
            scale, zero = x.abs().amax(-1) * shrink / 7.5, torch.full((6, 4, 1), 8.0)
        codes = ((x / scale.unsqueeze(-1)).round() + zero).clamp(0, 15)
        cost = (((codes - zero) * scale.unsqueeze(-1) - x).square() * weights).sum(-1)
        assert bool((found <= cost * (1 + 1e-5) + 1e-12).all())


def test_inputs_that_do_not_matter_do_not_widen_the_range() -> None:
    w = torch.full((1, 16), 0.1)
    w[0, 3] = 100.0
    importance = torch.ones(16)
    importance[3] = 0
    exact = quantize_mse(w[:, :3], parse_spec("int8-channel-fp32"))
    assert torch.allclose(exact.dequantize(), w[:, :3], atol=1e-3)
    spread = quantize_mse(w, parse_spec("int8-g16-fp32"), importance).dequantize()
    assert (
        abs(float(spread[0, 0]) - 0.1)
        < abs(float(quantize_rtn(w, parse_spec("int8-g16-fp32")).dequantize()[0, 0]) - 0.1) + 1e-9
    )


def test_weights_that_are_not_finite_are_refused() -> None:
    w = weight()
    w[2, 5] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        quantize_mse(w, parse_spec("int4-g16"))


def test_an_all_zero_weight_stays_zero() -> None:
    assert float(quantize_mse(torch.zeros(4, 32), parse_spec("int4-g16")).dequantize().abs().max()) == 0
