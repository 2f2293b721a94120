"""SmoothQuant's formula, AWQ's search, statistics, and Hadamard matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from transload.errors import ConfigError
from transload.quantize.awq import Sample, awq_scale, cost_of_block, cost_of_linears, search_scale
from transload.quantize.block import block_of
from transload.quantize.clip import clipped_values, quantize_clipped
from transload.quantize.hadamard import Turn, block_size, hadamard
from transload.quantize.held import Held
from transload.quantize.smoothquant import smooth_scale
from transload.quantize.static import static_scale
from transload.quantize.statistics import SAMPLE, Statistics, stride_of
from transload.reference import quantize_rtn
from transload.requantize import parse_spec
from transload.runtime.trace import Piece


def test_smoothquant_is_the_formula_of_the_paper() -> None:
    act, weight = torch.tensor([8.0, 2.0, 0.5]), torch.tensor([0.5, 2.0, 1.0])
    want = act.double() ** 0.7 / weight.double() ** 0.3
    want /= want.prod() ** (1 / 3)
    assert torch.allclose(smooth_scale(act, weight, 0.7).double(), want, rtol=1e-5)


def test_smoothquant_leaves_unused_inputs_alone() -> None:
    scale = smooth_scale(torch.tensor([4.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 0.0]), 0.5)
    assert scale[1:].tolist() == [1.0, 1.0]


def test_awq_takes_the_exponent_with_the_smallest_output_error() -> None:
    torch.manual_seed(0)
    w = torch.randn(16, 64)
    rows = torch.randn(100, 64) * torch.tensor([1.0] * 60 + [30.0] * 4)
    spec, absmean = parse_spec("int4-g32-fp32"), rows.abs().mean(0)
    linear = Held(w, None, (Piece("w", None, 0, 16),))
    cost = cost_of_linears([Sample(linear, slice(0, 16), w, rows, spec)])
    scale, _ = search_scale(absmean, w.abs().mean(0), cost)

    def error(s: torch.Tensor) -> float:  # in float64, with the plain quantizer
        s = s.double()
        rounded = quantize_rtn((w * s).float(), spec).dequantize().double() / s
        return float((rows.double() @ (rounded - w).T).square().sum())

    tried = [awq_scale(absmean, step / 12, duo) for step in range(12) for duo in (None, w.abs().mean(0))]
    assert error(scale) <= min(map(error, tried)) * 1.001
    assert error(scale) < 0.8 * error(torch.ones(64))


class _Attention(nn.Module):
    """Queries and keys whose product is a gate for values: errors of queries matter as far as keys are large."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = (Held(torch.randn(32, 32), None, (Piece(n, None, 0, 32),)) for n in "qk")

    def forward(self, x: Tensor, *, factor: float) -> tuple[Tensor, None]:
        return factor * torch.tanh(self.q(x) * self.k(x)), None


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.out = _Attention(), Held(torch.randn(32, 32), None, (Piece("o", None, 0, 32),))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.attn(x, factor=2.0)[0])


def test_the_cost_of_a_block_is_the_error_of_its_output_relative_to_the_residual_stream() -> None:
    torch.manual_seed(0)
    layer, x = _Layer(), torch.randn(2, 5, 32)
    block = block_of(layer, [layer.attn.q, layer.attn.k], layer, x)
    assert block is not None
    assert block.module is layer.attn
    samples = [
        Sample(h, slice(0, 16), h.rows(slice(0, 16)), x[0], parse_spec("int4-g32-fp32"))
        for h in (layer.attn.q, layer.attn.k)
    ]
    found = cost_of_block(samples, block)(torch.full((32,), 2.0))  # a power of two changes no rounding
    before, after = layer.attn(x, factor=2.0)[0], layer(x)
    for sample in samples:  # only the first half of the rows is quantized
        assert sample.held.weight is not None
        rounded = quantize_rtn(sample.weight, sample.spec).dequantize()
        sample.held.set(torch.cat([rounded, sample.held.weight[16:]]))
    error = (layer.attn(x, factor=2.0)[0] - before).square().sum(-1)
    assert found == pytest.approx(float((error / after.square().sum(-1)).sum()), rel=1e-4)
    assert found > 0


def test_one_linear_or_the_whole_layer_is_no_block() -> None:
    layer, x = _Layer(), torch.randn(1, 5, 32)
    assert block_of(layer, [layer.out], layer, x) is None
    assert block_of(layer, [layer.out, layer.attn.q], layer, x) is None


def test_a_scale_is_judged_by_the_rounding_that_is_used_in_the_end() -> None:
    torch.manual_seed(0)
    w, rows, spec = torch.randn(16, 64), torch.randn(50, 64), parse_spec("int4-g32-fp32")
    gram, scale = rows.T @ rows, torch.rand(64) + 0.5
    linear = Held(w, None, (Piece("w", None, 0, 16),))
    cost = cost_of_linears([Sample(linear, slice(0, 16), w, rows, spec, gram)])
    rounded = clipped_values(w, spec, gram, scale)
    want = (rows @ (rounded - w).T).square().sum() / (rows @ w.T).square().sum()
    assert cost(scale) == pytest.approx(float(want), rel=1e-3)
    whole = quantize_clipped(w * scale, spec, gram / scale / scale.unsqueeze(1)).dequantize() / scale
    assert float((rows @ (whole - w).T).square().sum()) == pytest.approx(
        float((rows @ (rounded - w).T).square().sum()), rel=0.05
    )


def test_products_of_bfloat16_rows_are_near_the_exact_ones() -> None:
    torch.manual_seed(0)
    x = torch.randn(3000, 1100)
    exact, rounded = Statistics(1100, gram=True), Statistics(1100, gram=True, precision=torch.bfloat16)
    for part in x.split(700):
        exact.add(part)
        rounded.add(part)
    for found in (exact, rounded):
        found.finish()
    assert exact.gram is not None
    assert rounded.gram is not None
    assert torch.equal(rounded.gram, rounded.gram.T)
    apart = (rounded.gram - exact.gram).abs().max() / exact.gram.diagonal().mean()
    assert 0 < apart < 4e-3


def test_statistics_are_those_of_all_rows() -> None:
    torch.manual_seed(0)
    x = torch.randn(3000, 1100)
    found = Statistics(1100, gram=True, stride=5)
    for part in x.split(700):
        found.add(part)
    found.finish()
    assert found.tokens == 3000
    assert torch.allclose(found.absmax, x.abs().amax(0))
    assert torch.allclose(found.absmean, x.abs().mean(0), rtol=1e-4)
    assert found.gram is not None
    assert float((found.gram - x.T @ x).norm() / (x.T @ x).norm()) < 1e-5
    assert torch.equal(found.rows, x[::5][:SAMPLE])
    by = torch.rand(1100) + 0.5
    found.divide(by)
    assert float((found.gram - (x / by).T @ (x / by)).norm() / found.gram.norm()) < 1e-4
    assert torch.allclose(found.absmean, (x / by).abs().mean(0), rtol=1e-4)


@pytest.mark.parametrize(("windows", "tokens"), [(5, 512), (64, 512), (512, 512), (1024, 512), (4096, 256), (3, 8)])
def test_kept_rows_are_not_only_the_first_tokens_of_windows(windows: int, tokens: int) -> None:
    stride = stride_of(windows, tokens)
    places = torch.arange(0, windows * tokens, stride)[:SAMPLE] % tokens
    assert len(places) == min(SAMPLE, windows * tokens) or len(places) > SAMPLE // 2
    assert int((places == 0).sum()) <= max(len(places) // 16, windows)
    assert len(places.unique()) >= min(16, tokens)


@pytest.mark.parametrize("n", [1, 2, 4, 12, 20, 28, 36, 64, 76, 896])
def test_hadamard_matrices_are_orthogonal_with_entries_of_one(n: int) -> None:
    h = hadamard(n)
    assert h is not None
    assert bool((h.abs() == 1).all())
    assert torch.equal(h @ h.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", [3, 92, 6, 1022])
def test_orders_without_a_known_matrix_give_none(n: int) -> None:
    assert hadamard(n) is None


# 11008 = 43 * 256 has no matrix of this kind; its largest blocks are powers of two.
@pytest.mark.parametrize(("n", "block"), [(896, 896), (4864, 4864), (576, 576), (11008, 256), (14336, 14336)])
def test_odd_sizes_are_cut_into_blocks(n: int, block: int) -> None:
    assert block_size(n) == block


def test_rotations_are_orthogonal_and_follow_the_seed() -> None:
    r = Turn(96, 3).rows(torch.eye(96)).double()
    assert float((r @ r.T - torch.eye(96)).abs().max()) < 1e-6
    assert float((r.abs() - 96**-0.5).abs().max()) < 1e-6  # one block
    x = torch.randn(5, 96)
    assert torch.allclose(Turn(96, 3).rows(x), (x.double() @ r).float(), atol=1e-5)
    assert torch.allclose(Turn(96, 3).back(Turn(96, 3).rows(x)), x, atol=1e-5)
    assert not torch.allclose(Turn(96, 4).rows(x), Turn(96, 3).rows(x), atol=1e-2)


def test_a_size_that_cannot_be_rotated_is_an_error() -> None:
    with pytest.raises(ConfigError, match="97 features"):
        Turn(97, 0)


def test_a_static_scale_covers_everything_unless_clipping_is_better() -> None:
    torch.manual_seed(0)
    rows = torch.randn(200, 32)
    whole = static_scale(rows, float(rows.abs().max()))
    assert 0.8 * float(rows.abs().max()) / 127 < whole <= float(rows.abs().max()) / 127
    assert static_scale(rows, 100.0) < 0.3 * 100 / 127  # one outlier elsewhere does not coarsen all the rest


@pytest.mark.parametrize("absmax", [0.0, float("nan"), float("inf")])
def test_inputs_without_a_scale_are_refused(absmax: float) -> None:
    with pytest.raises(ValueError, match="no static scale"):
        static_scale(torch.zeros(2, 4), absmax)
