"""Ranges of groups searched for the smallest error of the output, over all groups of a row together.

AWQ's clipping (Lin et al. 2023, section 3.2 and its code) judges every group by its own part of the output. Clipping
makes all parts smaller, so what it loses adds up; here each group answers for what the others leave over.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transload.quant import QTensor, QuantSpec
from transload.quantize.rtn import (
    as_qtensor,
    codes_of,
    in_slabs,
    scales_of,
    searched_scales,
    shrinks,
    stored,
    values_of,
)

_SWEEPS = 2
_LONE = 0.02  # of an input's mean square that is taken to come without the others, where the text is short
_ROWS = 256  # at a time, so that all tries of a group stay in the processor's caches


_Rounded = tuple[Tensor, Tensor, Tensor | None]  # codes [..., S], scales and zeros [...]


def quantize_clipped(weight: Tensor, spec: QuantSpec, gram: Tensor) -> QTensor:
    """Rounds a weight [N, K] so that e @ gram @ e is small, e being the error of a row.

    gram: X^T X [K, K] of the inputs, of any scale. Every group starts with the range that is best for it alone. Then,
    group by group, the codes of every range are tried with the scale that fits them best beside the other groups'
    errors. Codes are always those nearest to some range, so an error is never moved from one weight to another.
    """
    ones = torch.ones(len(gram), device=gram.device)
    parts = [_search(rows, spec, gram, ones, _SWEEPS) for rows in in_slabs(weight, spec, _ROWS * len(gram))]
    zeros = [p[2] for p in parts if p[2] is not None]
    codes, scales = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    return as_qtensor(codes.flatten(1), scales, torch.cat(zeros) if zeros else None, spec)


def clipped_values(weight: Tensor, spec: QuantSpec, gram: Tensor, scale: Tensor) -> Tensor:
    """What a weight [N, K] becomes when it is rounded so while scaled [K], in one sweep: in its own units, float32."""
    parts = [_search(rows, spec, gram, scale, 1) for rows in in_slabs(weight * scale, spec, _ROWS * len(gram))]
    return torch.cat([values_of(*part, spec).flatten(1) for part in parts]) / scale


def _search(x: Tensor, spec: QuantSpec, gram: Tensor, scale: Tensor, sweeps: int) -> _Rounded:
    """Codes [N, G, S], scales and zeros [N, G] of groups x [N, G, S]. gram: of inputs before division by `scale`."""
    size = x.shape[2]
    places = [slice(start, start + size) for start in range(0, len(gram), size)]
    blocks = torch.stack([gram[at, at] / scale[at] / scale[at].unsqueeze(1) for at in places])
    blocks.diagonal(dim1=1, dim2=2).mul_(1 + _LONE)
    scales, zeros = searched_scales(x, spec, blocks)
    codes = codes_of(x, scales, zeros, spec)
    apart = (values_of(codes, scales, zeros, spec) - x).flatten(1) / scale  # in the units of `gram`
    for _ in range(sweeps):
        for g, (at, block) in enumerate(zip(places, blocks, strict=True)):
            apart[:, at] = 0
            pull = apart @ gram[:, at] / scale[at]
            zero = None if zeros is None else zeros[:, g]
            best = _best(x[:, g], spec, block, pull, (codes[:, g], scales[:, g], zero))
            codes[:, g], scales[:, g] = best[0], best[1]
            if zeros is not None and best[2] is not None:
                zeros[:, g] = best[2]
            apart[:, at] = (values_of(*best, spec) - x[:, g]) / scale[at]
    return codes, scales, zeros


def _best(x: Tensor, spec: QuantSpec, block: Tensor, pull: Tensor, now: _Rounded) -> _Rounded:
    """The rounding of one group x [N, S] that makes (v - x) @ block @ (v - x) + 2 (v - x) @ pull least, v its values.

    pull: the other groups' errors as they meet this group's inputs [N, S]. now: the rounding to be improved.
    """
    scales, zeros = scales_of(x, spec, torch.tensor(shrinks(), device=x.device).unsqueeze(1))  # [tried, N]
    codes = torch.cat([now[0].unsqueeze(0), codes_of(x, scales, zeros, spec)])
    scales = torch.cat([now[1].unsqueeze(0), scales])
    if zeros is not None and now[2] is not None:
        zeros = torch.cat([now[2].unsqueeze(0), zeros])
    steps = values_of(codes, torch.ones_like(scales), zeros, spec)
    along, square = (steps * (x @ block - pull)).sum(-1), ((steps @ block) * steps).sum(-1)
    fitted = torch.where(square > 0, along / square, scales)
    fitted = stored(fitted.clamp(scales / 2, scales * 2), spec)
    cost = fitted * (fitted * square - 2 * along)
    least, at = cost.min(0)
    at = torch.where(least < cost[0], at, 0)
    rows = torch.arange(len(x), device=x.device)
    return codes[at, rows], fitted[at, rows], None if zeros is None else zeros[at, rows]
