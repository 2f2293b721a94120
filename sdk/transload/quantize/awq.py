"""AWQ: inputs that carry much get finer steps, by scaling weights up before rounding and inputs down.

Lin et al. 2023: s = mean|x| ** alpha with alpha searched for the smallest error of the output, then the range of every
group clipped for its part of the output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from transload.quant import QuantSpec
from transload.quantize.block import Block
from transload.quantize.fold import Fold, Pair, pairs_of
from transload.quantize.held import Filled, Held
from transload.quantize.rtn import codes_of, grouped, scales_of, values_of
from transload.quantize.smoothquant import produced
from transload.quantize.statistics import Watch

if TYPE_CHECKING:
    from transload.quantize.layerwise import Assigned

METHODS = ("awq", "awq+gptq")  # both fold scales; the second rounds as GPTQ does
_GRID = 12  # exponents tried, from 0 to 1
_ROWS = 256  # inputs that the error is measured on
_EXPERTS = 8  # experts that the error of a mixture is measured on, those that saw most tokens


def awq_scale(absmean: Tensor, exponent: float, weights: Tensor | None = None) -> Tensor:
    """absmean ** exponent [K], scaled so that the smallest and the largest are each other's inverse.

    weights: mean magnitudes of the weights [K]; the scale is then divided by weights ** (1 - exponent), as in AutoAWQ's
    "duo scaling", which also evens out the weights.
    """
    raw = absmean.clamp(min=1e-4) ** exponent
    if weights is not None:
        raw = raw / weights.clamp(min=1e-4) ** (1 - exponent)
    return raw / (raw.max() * raw.min()).sqrt()


def search_scale(
    absmean: Tensor, sizes: Tensor, cost: Callable[[Tensor], float], pair: Pair | None = None
) -> tuple[Tensor, float]:
    """The scale with the least cost, and its exponent, with and without the weights in it.

    absmean: mean magnitude of the producer's rows. sizes: mean magnitude of the weights that read them. cost: of a
    scale of the consumers' inputs [K]. Exponent 0 without sizes is no scaling, so the result is never worse than that.
    """
    best, best_scale, best_exponent = float("inf"), torch.ones_like(absmean), 0.0
    for exponent, duo in product([step / _GRID for step in range(_GRID)], (None, sizes)):
        scale = awq_scale(absmean, exponent, duo)
        found = cost(scale if pair is None else pair.widened(scale))
        if found < best:
            best, best_scale, best_exponent = found, scale, exponent
    return best_scale, best_exponent


def scaled_and_rounded(weight: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """What a weight [N, K] becomes when it is rounded while scaled [K]: in its own units, float32."""
    x = grouped(weight * scale, spec)
    scales, zeros = scales_of(x, spec)
    return values_of(codes_of(x, scales, zeros, spec), scales, zeros, spec).flatten(-2) / scale


@dataclass(frozen=True, slots=True)
class Sample:
    """Rows of a linear that one scheme is for: which, their weight [R, K] and sample inputs [S, K]."""

    held: Held
    at: slice
    weight: Tensor
    rows: Tensor
    spec: QuantSpec


def cost_of_linears(samples: Sequence[Sample]) -> Callable[[Tensor], float]:
    """Squared errors of the outputs, each relative to that linear's own output."""
    outputs = [float((s.rows @ s.weight.T).square().sum()) or 1.0 for s in samples]

    def cost(scale: Tensor) -> float:
        apart = (scaled_and_rounded(s.weight, scale, s.spec) - s.weight for s in samples)
        return sum(
            float((s.rows @ a.T).square().sum()) / out for s, a, out in zip(samples, apart, outputs, strict=True)
        )

    return cost


def cost_of_block(samples: Sequence[Sample], block: Block) -> Callable[[Tensor], float]:
    """The squared error of what attention or the MLP puts out."""

    def cost(scale: Tensor) -> float:
        weights = {s.held: s.held.current().float().clone() for s in samples}
        for s in samples:
            weights[s.held][s.at] = scaled_and_rounded(s.weight, scale, s.spec)
        return block.cost(list(weights.items()))

    return cost


def fold_awq(
    filled: Filled,
    held: Sequence[tuple[str, Held]],
    assigned: Mapping[str, Assigned],
    watch: Watch,
    block_of: Callable[[Sequence[Held]], Block | None],
) -> list[Fold]:
    """A fold for every pair whose consumers are all quantized by AWQ.

    block_of: the part of the layer that some linears are in. Routed experts see too few of its tokens, so their scales
    are judged by their own outputs.
    """
    folds = []
    for pair in pairs_of(filled, held):
        quantized = [c for c in pair.consumers if any(n in assigned for n in c.names)]
        methods = {assigned[n].method for c in quantized for n in c.names if n in assigned}
        seen = sorted((c for c in quantized if c in watch.of), key=lambda c: -watch.of[c].tokens)
        if not methods <= set(METHODS) or not seen or not produced(pair.producer, filled, assigned):
            continue
        tokens = sum(watch.of[c].tokens for c in seen)
        absmean = torch.stack([watch.of[c].absmean * (watch.of[c].tokens / tokens) for c in seen]).sum(0)
        samples = [
            Sample(c, at, c.rows(at), _spread(watch.of[c].rows), assigned[n].spec)
            for c in (seen if len(seen) <= 2 * _EXPERTS else seen[:_EXPERTS])
            for n, at in c.parts()
            if n in assigned
        ]
        sizes = pair.narrowed(torch.stack([s.weight.abs().mean(0) for s in samples]).mean(0))
        block = None if any(c.routed for c in seen) else block_of(seen)
        cost = cost_of_linears(samples) if block is None else cost_of_block(samples, block)
        scale, exponent = search_scale(pair.narrowed(absmean), sizes, cost, pair)
        if not bool((scale == 1).all()):
            folds.append(Fold(pair, scale, f"AWQ exponent {exponent:g}"))
    return folds


def _spread(rows: Tensor) -> Tensor:
    """About _ROWS of the sample rows, from all of the text."""
    return rows[:: max(1, len(rows) // _ROWS)]


def groups_gram(rows: Tensor, spec: QuantSpec) -> Tensor:
    """The Gram matrix of every group's inputs [G, S, S], from sample inputs [T, K]."""
    x = grouped(rows, spec).transpose(0, 1)
    return x.transpose(1, 2) @ x
