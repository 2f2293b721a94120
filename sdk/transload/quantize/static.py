"""Static activation scales: one scale for everything that a linear will ever be given, from calibration text."""

from __future__ import annotations

import torch
from torch import Tensor

_STEPS = 40
_SMALLEST = 0.2


def static_scale(rows: Tensor, absmax: float, bits: int = 8) -> float:
    """The scale of symmetric integers with the smallest squared error on sample inputs.

    rows: float [S, K]. absmax: the largest magnitude that was seen anywhere; the whole range is tried first, then ever
    more of it is clipped, down to a fifth. Returns a positive number. Raises ValueError for inputs that are not finite,
    or that are all zero.
    """
    if not (0 < absmax < float("inf")) or not bool(torch.isfinite(rows).all()):
        raise ValueError(f"inputs with the largest magnitude {absmax:g} have no static scale")
    top = (1 << (bits - 1)) - 1
    x = rows.double()
    best, best_scale = float("inf"), absmax / top
    for step in range(_STEPS):
        scale = absmax / top * (1 - step * (1 - _SMALLEST) / _STEPS)
        error = float(((x / scale).round().clamp(-top, top) * scale - x).square().sum())
        if error < best:
            best, best_scale = error, scale
    return best_scale
