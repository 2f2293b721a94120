"""Round to nearest with searched scales: every group takes the range that loses least.

The plain form, whose range is the largest magnitude, is `reference.quantize_rtn`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from transload.errors import ConfigError
from transload.quant import PER_CHANNEL, Grid, QTensor, QuantSpec, Zero

_SHRINKS = 24  # ranges tried, evenly between the whole range and _SMALLEST of it
_SMALLEST = 0.5
_SLAB = 1 << 22  # values searched at a time


def quantize_mse(weight: Tensor, spec: QuantSpec, importance: Tensor | None = None) -> QTensor:
    """Rounds a weight to scales that make the squared error of every group least.

    weight: float [N, K]. importance: float [K], how much an error at each input counts (the diagonal of the Hessian);
    None counts all alike. Raises ConfigError for schemes other than integers with a stored or implied zero point.
    """
    weighting = None if importance is None else grouped(importance.unsqueeze(0), spec)[0]
    parts = []
    for rows in in_slabs(weight, spec):
        scales, zeros = searched_scales(rows, spec, weighting)
        parts.append((codes_of(rows, scales, zeros, spec).to(torch.uint8).flatten(-2), scales, zeros))
    codes, scales = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    zeros = None if spec.zero is Zero.MIDPOINT else torch.cat([p[2] for p in parts if p[2] is not None])
    return as_qtensor(codes, scales, zeros, spec)


def grouped(weight: Tensor, spec: QuantSpec) -> Tensor:
    """A weight [N, K] as float32 [N, G, S]. Raises ConfigError when S does not divide K."""
    k = weight.shape[-1]
    size = k if spec.group_size == PER_CHANNEL else spec.group_size
    if k % size:
        raise ConfigError(f"groups of {size} do not divide {k} inputs")
    return weight.float().reshape(-1, k // size, size)


def scales_of(x: Tensor, spec: QuantSpec, shrink: float | Tensor = 1.0) -> tuple[Tensor, Tensor | None]:
    """Scales as they are stored, in float32, and zero points, for groups x [..., S] whose range is shrunk.

    shrink: a factor, or one per group. An all-zero group gets the smallest normal scale.
    """
    if spec.grid is not Grid.INT or spec.zero not in (Zero.MIDPOINT, Zero.CODES):
        raise ConfigError(f"{spec}: only integer codes with integer zero points are quantized with calibration")
    if spec.zero is Zero.MIDPOINT:
        return stored(x.abs().amax(-1) * shrink / (spec.midpoint - 0.5), spec), None
    top = 2 * spec.midpoint - 1
    low, high = x.amin(-1).clamp(max=0) * shrink, x.amax(-1).clamp(min=0) * shrink
    scales = stored((high - low) / top, spec)
    return scales, (-low / scales).round().clamp(0, top)


def codes_of(x: Tensor, scales: Tensor, zeros: Tensor | None, spec: QuantSpec) -> Tensor:
    """The nearest codes, still as floats. x: [..., S]; scales and zeros: [...]."""
    zero = spec.midpoint if zeros is None else zeros.unsqueeze(-1)
    return (x / scales.unsqueeze(-1)).round().add_(zero).clamp_(0, 2 * spec.midpoint - 1)


def values_of(codes: Tensor, scales: Tensor, zeros: Tensor | None, spec: QuantSpec) -> Tensor:
    """What codes stand for. Shapes as for `codes_of`."""
    zero = spec.midpoint if zeros is None else zeros.unsqueeze(-1)
    return (codes - zero) * scales.unsqueeze(-1)


def shrinks() -> list[float]:
    """The parts of a group's range that are tried, the whole first."""
    return [1 - step * (1 - _SMALLEST) / _SHRINKS for step in range(_SHRINKS)]


def searched_scales(x: Tensor, spec: QuantSpec, weighting: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Scales and zeros of the shrink that loses least, for groups x [N, G, S].

    weighting: None, [G, S] factors of squared errors, or [G, S, S] Gram matrices.
    """
    best = torch.full(x.shape[:-1], torch.inf, device=x.device)
    shrink = torch.ones_like(best)
    for factor in shrinks():
        scales, zeros = scales_of(x, spec, factor)
        cost = _cost(values_of(codes_of(x, scales, zeros, spec), scales, zeros, spec) - x, weighting)
        better = cost < best
        best, shrink = torch.where(better, cost, best), torch.where(better, factor, shrink)
    return scales_of(x, spec, shrink)


def _cost(error: Tensor, weighting: Tensor | None) -> Tensor:
    if weighting is None:
        return error.square_().sum(-1)
    if weighting.dim() == 2:
        return (error.square_() * weighting).sum(-1)
    return (torch.einsum("ngs,gst->ngt", error, weighting) * error).sum(-1)


def in_slabs(weight: Tensor, spec: QuantSpec, values: int = _SLAB) -> Sequence[Tensor]:
    """The groups [N, G, S] of a weight [N, K], in parts of about `values`. Raises ValueError when it is not finite."""
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("the weight contains NaN or infinity")
    x = grouped(weight, spec)
    return torch.split(x, max(1, values // max(x[0].numel(), 1)))


def as_qtensor(codes: Tensor, scales: Tensor, zeros: Tensor | None, spec: QuantSpec) -> QTensor:
    """A QTensor of codes [N, K] (any dtype), stored scales and zeros [N, G]."""
    stored = None if zeros is None else zeros.to(torch.uint8)
    return QTensor(spec, codes.to(torch.uint8).contiguous(), scales.to(spec.scale_dtype), stored)


def stored(scales: Tensor, spec: QuantSpec) -> Tensor:
    """Scales rounded to the dtype that is stored, so that everything after it sees the scale that will be used."""
    info = torch.finfo(spec.scale_dtype)
    return scales.clamp(info.tiny, info.max).to(spec.scale_dtype).float()
