"""Clipping judged by the whole output, against the largest magnitude, against groups alone, and against a loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from transload.quant import QTensor
from transload.quantize.clip import quantize_clipped
from transload.quantize.rtn import as_qtensor, codes_of, grouped, scales_of, searched_scales
from transload.reference import quantize_rtn
from transload.requantize import parse_spec

SCHEMES = ("int4-g16-fp32", "int4-g16-asym-fp32", "int4-g16-bf16")


def problem() -> tuple[Tensor, Tensor]:
    """A weight [24, 64] and the Gram matrix of inputs that depend on each other, as activations do."""
    torch.manual_seed(0)
    w = torch.randn(24, 64) * torch.randn(24, 64).exp()
    rows = torch.randn(200, 64) @ torch.diag(torch.rand(64) * 3) + torch.randn(200, 3) @ torch.randn(3, 64)
    return w, rows.T @ rows


def error(w: Tensor, got: Tensor, gram: Tensor) -> Tensor:
    """e @ gram @ e of every row [N], float64."""
    e, g = (got - w).double(), gram.double()
    return ((e @ g) * e).sum(1)


def groups_alone(w: Tensor, gram: Tensor, scheme: str) -> QTensor:
    """Every group with the range that is best for its own part of the output."""
    spec = parse_spec(scheme)
    x = grouped(w, spec)
    scales, zeros = searched_scales(x, spec, torch.stack([gram[a : a + 16, a : a + 16] for a in range(0, 64, 16)]))
    return as_qtensor(codes_of(x, scales, zeros, spec).flatten(1), scales, zeros, spec)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_groups_together_lose_less_than_groups_alone(scheme: str) -> None:
    w, gram = problem()
    got = quantize_clipped(w, parse_spec(scheme), gram)
    assert got.spec == parse_spec(scheme)
    together, alone = (error(w, q.dequantize(), gram) for q in (got, groups_alone(w, gram, scheme)))
    nearest = error(w, quantize_rtn(w, parse_spec(scheme)).dequantize(), gram)
    assert bool((together <= alone * 1.05).all())  # of no row is the error larger, but for the inputs' own share
    assert float(together.sum()) < 0.75 * float(alone.sum())
    assert float(alone.sum()) < float(nearest.sum())


@pytest.mark.parametrize("asym", [False, True])
def test_no_range_of_the_last_group_is_better_with_any_scale(asym: bool) -> None:
    w, gram = problem()
    spec = parse_spec("int4-g16-asym-fp32" if asym else "int4-g16-fp32")
    got = quantize_clipped(w, spec, gram).dequantize()
    gram = gram.double().clone()
    gram[48:, 48:].diagonal().mul_(1.02)
    found = error(w, got, gram)
    last = w[:, 48:].double().unsqueeze(1)
    for step in range(24):
        scale, zero = scales_of(last.float(), spec, 1 - step * 0.5 / 24)
        codes = codes_of(last.float(), scale, zero, spec)[:, 0] - (8.0 if zero is None else zero)
        for factor in torch.linspace(0.8, 1.2, 9):
            tried = got.clone()
            tried[:, 48:] = codes * (scale * factor)
            assert bool((found <= error(w, tried, gram) * (1 + 1e-4)).all())


def test_the_gram_matrix_has_no_unit() -> None:
    w, gram = problem()
    spec = parse_spec("int4-g16")
    assert torch.equal(quantize_clipped(w, spec, gram).codes, quantize_clipped(w, spec, gram * 2.0**20).codes)


def test_parts_of_a_weight_are_rounded_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    w, gram = problem()
    whole = quantize_clipped(w, parse_spec("int4-g16-asym"), gram)
    monkeypatch.setattr("transload.quantize.clip._ROWS", 5)
    parts = quantize_clipped(w, parse_spec("int4-g16-asym"), gram)
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.scales, parts.scales)


def test_inputs_that_were_never_used_do_no_harm() -> None:
    w, gram = problem()
    gram[16:32] = 0
    gram[:, 16:32] = 0
    got = quantize_clipped(w, parse_spec("int4-g16"), gram).dequantize()
    assert bool(torch.isfinite(got).all())
    assert float((got - w)[:, 16:32].norm()) < 0.3 * float(w[:, 16:32].norm())


def test_an_all_zero_weight_stays_zero() -> None:
    _, gram = problem()
    assert float(quantize_clipped(torch.zeros(4, 64), parse_spec("int4-g16"), gram).dequantize().abs().max()) == 0


def test_weights_that_are_not_finite_are_refused() -> None:
    w, gram = problem()
    w[2, 5] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        quantize_clipped(w, parse_spec("int4-g16"), gram)
