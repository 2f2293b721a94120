"""AWQ: inputs that carry much get finer steps, by scaling weights up before rounding and inputs down.

Lin et al. 2023: s = mean|x| ** alpha with alpha searched for the smallest error of the output, then the range of every
group clipped for its part of the output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from transload.quant import QuantSpec
from transload.quantize.fold import Fold, Pair, pairs_of
from transload.quantize.held import Filled, Held
from transload.quantize.rtn import codes_of, grouped, scales_of, values_of
from transload.quantize.smoothquant import produced
from transload.quantize.statistics import Watch

if TYPE_CHECKING:
    from transload.quantize.layerwise import Assigned

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
    absmean: Tensor, weights: Sequence[tuple[Tensor, Tensor, QuantSpec]], pair: Pair | None = None
) -> tuple[Tensor, float]:
    """The scale with the smallest output error, and its exponent, with and without the weights in it.

    The errors of several consumers count relative to what each of them puts out: attention's keys are so much larger
    than its values, in Qwen2 for one, that they alone would decide.

    absmean: mean magnitude of the producer's rows. weights: of every consumer its weight [N, K], sample inputs [S, K]
    and scheme. Exponent 0 without them is no scaling, so the result is never worse than plain rounding on the sample.
    """
    best, best_scale, best_exponent = float("inf"), torch.ones_like(absmean), 0.0
    sizes = torch.stack([weight.abs().mean(0) for weight, _, _ in weights]).mean(0)
    if pair is not None:
        sizes = pair.narrowed(sizes)
    outputs = [float((rows @ weight.T).square().sum()) or 1.0 for weight, rows, _ in weights]
    for exponent, duo in product([step / _GRID for step in range(_GRID)], (None, sizes)):
        scale = awq_scale(absmean, exponent, duo)
        wide = scale if pair is None else pair.widened(scale)
        error = sum(_error(w, x, wide, spec) / output for (w, x, spec), output in zip(weights, outputs, strict=True))
        if error < best:
            best, best_scale, best_exponent = error, scale, exponent
    return best_scale, best_exponent


def _error(weight: Tensor, rows: Tensor, scale: Tensor, spec: QuantSpec) -> float:
    """Squared error of the outputs when weight * scale is rounded and the inputs are divided by scale."""
    x = grouped(weight * scale, spec)
    scales, zeros = scales_of(x, spec)
    apart = values_of(codes_of(x, scales, zeros, spec), scales, zeros, spec) - x
    return float(((rows / scale) @ apart.flatten(-2).T).square().sum())


def fold_awq(
    filled: Filled, held: Sequence[tuple[str, Held]], assigned: Mapping[str, Assigned], watch: Watch
) -> list[Fold]:
    """A fold for every pair whose consumers are all quantized by AWQ."""
    folds = []
    for pair in pairs_of(filled, held):
        quantized = [c for c in pair.consumers if any(n in assigned for n in c.names)]
        methods = {assigned[n].method for c in quantized for n in c.names if n in assigned}
        seen = sorted((c for c in quantized if c in watch.of), key=lambda c: -watch.of[c].tokens)
        if methods != {"awq"} or not seen or not produced(pair.producer, filled, assigned):
            continue
        tokens = sum(watch.of[c].tokens for c in seen)
        absmean = torch.stack([watch.of[c].absmean * (watch.of[c].tokens / tokens) for c in seen]).sum(0)
        sample = [
            (c.rows(at), watch.of[c].rows[:_ROWS], assigned[n].spec)
            for c in (seen if len(seen) <= 2 * _EXPERTS else seen[:_EXPERTS])
            for n, at in c.parts()
            if n in assigned
        ]
        scale, exponent = search_scale(pair.narrowed(absmean), sample, pair)
        if not bool((scale == 1).all()):
            folds.append(Fold(pair, scale, f"AWQ exponent {exponent:g}"))
    return folds


def groups_gram(rows: Tensor, spec: QuantSpec) -> Tensor:
    """The Gram matrix of every group's inputs [G, S, S], from sample inputs [T, K]."""
    x = grouped(rows, spec).transpose(0, 1)
    return x.transpose(1, 2) @ x
