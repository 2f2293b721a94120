"""AWQ: inputs that carry much get finer steps, by scaling weights up before rounding and inputs down.

Lin et al. 2023: s = mean|x| ** alpha with alpha searched for the smallest error of the output; then ranges of
groups are clipped (`clip`).
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
from transload.quantize.clip import clipped_values
from transload.quantize.fold import Fold, Pair, pairs_of
from transload.quantize.held import Filled, Held
from transload.quantize.rtn import codes_of, grouped, scales_of, values_of
from transload.quantize.smoothquant import produced
from transload.quantize.statistics import Watch

if TYPE_CHECKING:
    from transload.quantize.layerwise import Assigned

METHODS = ("awq", "awq+gptq")  # both fold scales; the second rounds as GPTQ does
_GRID = 12  # exponents tried, from 0 to 1
_COARSE = 8  # the same where every try is rounded with searched ranges
_INPUTS = 256  # that the error is measured on where there is no Gram matrix
_OUTPUTS = 128  # that it is measured on where there is one
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
    absmean: Tensor, sizes: Tensor, cost: Callable[[Tensor], float], pair: Pair | None = None, grid: int = _GRID
) -> tuple[Tensor, float]:
    """The scale with the least cost, and its exponent, with and without the weights in it.

    absmean: mean magnitude of the producer's rows. sizes: mean magnitude of the weights that read them. cost: of a
    scale of the consumers' inputs [K]. grid: exponents tried. Exponent 0 without sizes is no scaling, so the result is
    never worse than that.
    """
    best, best_scale, best_exponent = float("inf"), torch.ones_like(absmean), 0.0
    for exponent, duo in product([step / grid for step in range(grid)], (None, sizes)):
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
    """Rows of a linear that one scheme is for: which, their weight [R, K], sample inputs [S, K], and the Gram matrix of
    all inputs [K, K] where there is one."""

    held: Held
    at: slice
    weight: Tensor
    rows: Tensor
    spec: QuantSpec
    gram: Tensor | None = None

    def square(self, weight: Tensor) -> float:
        """The squared norm of all inputs' products with a weight [*, K]."""
        if self.gram is None:
            return float((self.rows @ weight.T).square().sum())
        return float(((weight @ self.gram) * weight).sum())

    def rounded(self, weight: Tensor, scale: Tensor) -> Tensor:
        """What a weight [*, K] becomes when it is scaled, rounded as it will be in the end, and scaled back."""
        if self.gram is None:
            return scaled_and_rounded(weight, scale, self.spec)
        return clipped_values(weight, self.spec, self.gram, scale)


def cost_of_linears(samples: Sequence[Sample]) -> Callable[[Tensor], float]:
    """Squared errors of the outputs, each relative to that linear's own output."""
    weights = [s.weight if s.gram is None else _spread(s.weight, _OUTPUTS) for s in samples]
    outputs = [s.square(w) or 1.0 for s, w in zip(samples, weights, strict=True)]

    def cost(scale: Tensor) -> float:
        return sum(s.square(s.rounded(w, scale) - w) / out for s, w, out in zip(samples, weights, outputs, strict=True))

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

    With Gram matrices a scale is judged by the outputs of linears that are rounded as they will be: for rounding to
    nearest other scales are best. Without (GPTQ rounds in the end, or they are added up later) it is judged by rounding
    to nearest and what block_of gives: the part of the layer that some linears are in. Routed experts see too few of
    its tokens, and are judged by their own outputs.
    """
    folds = []
    for pair in pairs_of(filled, held):
        quantized = [c for c in pair.consumers if any(n in assigned for n in c.names)]
        methods = {assigned[n].method for c in quantized for n in c.names if n in assigned}
        seen = sorted((c for c in quantized if c in watch.of), key=lambda c: -watch.of[c].tokens)
        if not methods <= set(METHODS) or not seen or not produced(pair.producer, filled, assigned):
            continue
        clipped = methods == {"awq"} and all(watch.of[c].gram is not None for c in seen)
        tokens = sum(watch.of[c].tokens for c in seen)
        absmean = torch.stack([watch.of[c].absmean * (watch.of[c].tokens / tokens) for c in seen]).sum(0)
        samples = [
            Sample(c, at, c.rows(at), _spread(stats.rows, _INPUTS), assigned[n].spec, stats.gram if clipped else None)
            for c in (seen if len(seen) <= 2 * _EXPERTS else seen[:_EXPERTS])
            for n, at in c.parts()
            for stats in (watch.of[c],)
            if n in assigned
        ]
        sizes = pair.narrowed(torch.stack([s.weight.abs().mean(0) for s in samples]).mean(0))
        block = None if clipped or any(c.routed for c in seen) else block_of(seen)
        cost = cost_of_linears(samples) if block is None else cost_of_block(samples, block)
        scale, exponent = search_scale(pair.narrowed(absmean), sizes, cost, pair, _COARSE if clipped else _GRID)
        if not bool((scale == 1).all()):
            folds.append(Fold(pair, scale, f"AWQ exponent {exponent:g}"))
    return folds


def _spread(rows: Tensor, count: int) -> Tensor:
    """About `count` of the rows, from everywhere among them."""
    return rows[:: max(1, len(rows) // count)]
