"""SmoothQuant: outliers of the activations are moved into the weights, as far as both can bear.

Xiao et al. 2022, equation 4: s[k] = max|x[k]| ** alpha / max|w[:, k]| ** (1 - alpha).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from transload.quantize.fold import Fold, pairs_of
from transload.quantize.held import Filled, Held
from transload.quantize.statistics import Watch

if TYPE_CHECKING:
    from transload.quantize.layerwise import Assigned


def smooth_scale(act_absmax: Tensor, weight_absmax: Tensor, alpha: float) -> Tensor:
    """The scale by which inputs are divided, for largest magnitudes [K] of inputs and of weights.

    Inputs that are always zero, and unused weights, keep scale 1. The scale's geometric mean is made 1, so that nothing
    drifts.
    """
    used = (act_absmax > 0) & (weight_absmax > 0)
    raw = act_absmax.clamp(min=1e-5) ** alpha / weight_absmax.clamp(min=1e-5) ** (1 - alpha)
    if not bool(used.any()):
        return torch.ones_like(raw)
    raw = raw / raw[used].log().mean().exp()
    return torch.where(used, raw.clamp(1e-4, 1e4), 1.0)


def fold_smooth(
    filled: Filled, held: Sequence[tuple[str, Held]], assigned: Mapping[str, Assigned], watch: Watch, alpha: float
) -> list[Fold]:
    """A fold for every pair whose consumers quantize their activations."""
    folds = []
    for pair in pairs_of(filled, held):
        watched = [c for c in pair.consumers if c in watch.of]
        acts = [assigned[n].spec.act for c in watched for n in c.names if n in assigned]
        if not watched or not any(act is not None for act in acts) or not produced(pair.producer, filled, assigned):
            continue
        act = torch.stack([watch.of[c].absmax for c in watched]).amax(0)
        weights = torch.stack([c.rows(slice(None)).abs().amax(0) for c in pair.consumers]).amax(0)
        scale = smooth_scale(pair.narrowed(act), pair.narrowed(weights), alpha)
        folds.append(Fold(pair, scale, f"SmoothQuant {alpha:g}"))
    return folds


def produced(producer: str, filled: Filled, assigned: Mapping[str, Assigned]) -> bool:
    """Whether a producer may change: norms, and linears that are quantized anyway."""
    module = filled.layer.get_submodule(producer)
    return not isinstance(module, Held) or all(name in assigned for name in module.names)
