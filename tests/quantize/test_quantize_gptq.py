"""GPTQ against optimal brain surgery written out in float64, and against every rounding of a small problem."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from transload.errors import ConfigError
from transload.quant import QTensor
from transload.quantize.gptq import factor, gptq, group_aware_order
from transload.reference import quantize_rtn
from transload.requantize import parse_spec


def problem(n: int, k: int, rows: int = 400, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [n, k] and the Hessian of correlated inputs."""
    torch.manual_seed(seed)
    x = torch.randn(rows, k) @ (torch.eye(k) + 0.3 * torch.randn(k, k)) * torch.rand(k).mul(2).exp()
    return torch.randn(n, k), x.T @ x


def error(w: torch.Tensor, q: QTensor | torch.Tensor, gram: torch.Tensor) -> float:
    apart = ((q.dequantize() if isinstance(q, QTensor) else q) - w).double()
    return float((apart @ gram.double() * apart).sum())


def surgeon(w: torch.Tensor, gram: torch.Tensor, order: list[int], scale: torch.Tensor, damping: float) -> torch.Tensor:
    """Inputs rounded one by one in `order`; those left are changed to the best answer to each error.

    The inverse Hessian of the inputs that are left is computed anew at every step. scale: [N, K], fixed.
    """
    h = gram.double() / gram.double().diagonal().mean()
    h.diagonal().add_(damping)
    rest, out = w.double().clone(), torch.zeros_like(w, dtype=torch.float64)
    left = list(order)
    for k in order:
        inverse = torch.linalg.inv(h[left][:, left])
        out[:, k] = ((rest[:, k] / scale[:, k]).round().clamp(-8, 7)) * scale[:, k]
        step = (rest[:, k] - out[:, k]) / inverse[0, 0]
        rest[:, left] -= step.unsqueeze(1) * inverse[0]
        left = left[1:]
    return out


@pytest.mark.parametrize(("k", "act_order"), [(12, False), (48, True), (300, True)])
def test_gptq_is_optimal_brain_surgery(k: int, act_order: bool) -> None:
    w, gram = problem(5, k, seed=k)
    prepared = factor(gram, -1, 0.01, act_order)
    got = gptq(w, parse_spec("int4-channel-fp32"), prepared, search=False)
    scale = got.scales.double().expand(-1, k)
    want = surgeon(w, gram, prepared.order.flip(0).tolist(), scale, 0.01)
    assert float((got.dequantize() - want).abs().max()) < 1e-4


def test_the_factor_is_the_inverse_of_a_cholesky_factor() -> None:
    _, gram = problem(1, 700)
    prepared = factor(gram, 100, 0.01)
    h = gram.double()[prepared.order][:, prepared.order] / gram.double().diagonal().mean()
    h.diagonal().add_(0.01)
    want = torch.linalg.inv(torch.linalg.cholesky(h))
    assert float((prepared.inverse - want).norm() / want.norm()) < 1e-4
    assert float(prepared.inverse.triu(1).abs().max()) == 0


def test_every_rounding_of_a_small_problem() -> None:
    w, gram = problem(1, 5)
    spec = parse_spec("int2-channel-fp32")
    prepared = factor(gram, -1, 1e-4)
    got = gptq(w, spec, prepared, search=False)
    scale = float(got.scales[0, 0])
    best = min(error(w, torch.tensor([codes]) * scale, gram) for codes in product((-2.0, -1.0, 0.0, 1.0), repeat=5))
    nearest = error(w, quantize_rtn(w, spec), gram)
    assert best - 1e-6 <= error(w, got, gram) <= nearest
    assert error(w, got, gram) < best + 0.5 * (nearest - best) + 1e-6


@pytest.mark.parametrize(
    "scheme", ["int4-g32-fp32", "int4-g32-asym", "int4-g128", "int3-g64-fp32", "int8-channel-bf16"]
)
def test_gptq_beats_rounding_and_searching_helps(scheme: str) -> None:
    w, gram = problem(24, 384)
    spec = parse_spec(scheme)
    prepared = factor(gram, spec.group_size)
    plain, searched = gptq(w, spec, prepared, search=False), gptq(w, spec, prepared)
    nearest = error(w, quantize_rtn(w, spec), gram)
    assert plain.g_idx is None
    assert error(w, plain, gram) < 0.6 * nearest
    assert error(w, searched, gram) < 1.02 * error(w, plain, gram)


def test_groups_stay_together_in_the_order() -> None:
    torch.manual_seed(1)
    diagonal = torch.rand(96)
    order = group_aware_order(diagonal, 32)
    assert sorted(order.tolist()) == list(range(96))
    runs = (order // 32).reshape(3, 32)
    assert bool((runs == runs[:, :1]).all())
    sums = diagonal.reshape(3, 32).sum(1)[runs[:, 0]]
    assert bool((sums.diff() >= 0).all())
    assert bool((diagonal[order].reshape(3, 32).diff() >= 0).all())


def test_act_order_helps_where_inputs_differ() -> None:
    w, gram = problem(24, 256, seed=3)
    spec = parse_spec("int3-g64-fp32")
    ordered = gptq(w, spec, factor(gram, 64, act_order=True))
    as_stored = gptq(w, spec, factor(gram, 64, act_order=False))
    assert error(w, ordered, gram) < error(w, as_stored, gram)


def test_a_singular_hessian_gets_more_damping() -> None:
    w, _ = problem(4, 64)
    x = torch.ones(3, 64)
    prepared = factor(x.T @ x, 32, damping=0.0)
    assert prepared.damping > 0
    assert torch.isfinite(gptq(w, parse_spec("int4-g32"), prepared).dequantize()).all()


def test_an_input_that_was_never_used_is_rounded_to_nearest() -> None:
    w, gram = problem(4, 64)
    gram[:, 7] = gram[7] = 0
    got = gptq(w, parse_spec("int8-channel-fp32"), factor(gram, -1))
    assert float((got.dequantize()[:, 7] - w[:, 7]).abs().max()) <= float(got.scales.max()) / 2 + 1e-6


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_hessian_of_nothing_is_an_error(value: float) -> None:
    with pytest.raises(ConfigError, match="Hessian"):
        factor(torch.full((8, 8), value), -1)


def test_weights_that_are_not_finite_are_refused() -> None:
    w, gram = problem(4, 32)
    w[0, 0] = float("inf")
    with pytest.raises(ValueError, match="infinity"):
        gptq(w, parse_spec("int4-g32"), factor(gram, 32))


@pytest.mark.parametrize("act_order", [True, False])
def test_a_consumed_hessian_gives_the_same_factor_also_after_damping_was_raised(act_order: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 1100)  # fewer rows than inputs: singular, and wider than a panel
    x[:, 7] = x[:, 900]
    gram = x.T @ x
    kept = gram.clone()
    want = factor(gram, 100, 0.0, act_order)
    assert torch.equal(gram, kept)
    got = factor(gram, 100, 0.0, act_order, consume=True)
    assert want.damping == got.damping > 0
    assert torch.equal(want.inverse, got.inverse)
    assert got.inverse.data_ptr() == gram.data_ptr()
    matrix = kept[got.order][:, got.order].double() / float(kept.diagonal().mean())
    matrix.diagonal().add_(got.damping)
    inverse = got.inverse.double().tril()
    assert (inverse @ matrix @ inverse.T - torch.eye(1100)).abs().max() < 1e-2
