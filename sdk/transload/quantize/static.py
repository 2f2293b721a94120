"""Static activation scales: one scale for everything that a linear will ever be given, from calibration text.

They are found while text runs through the layer as it will be used, folded and quantized, and stored beside the weight
as `input_scale`, the name that compressed-tensors and msModelSlim give them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from transload.errors import ConfigError
from transload.quantize.held import Filled, Held, held_of
from transload.quantize.layerwise import Assigned
from transload.quantize.statistics import Statistics, Watch, stride_of

INPUT_SCALE = "input_scale"
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


class StaticInputs:
    """The linears of a filled layer whose activations are static; true when there are any.

    windows, tokens: how many of how many tokens the layer will be given between `watch` and `scales`.
    """

    def __init__(self, label: str, filled: Filled, assigned: Mapping[str, Assigned], windows: int, tokens: int) -> None:
        self._label = label
        self._names = {
            held: names
            for _, held in held_of(filled.layer)
            if (names := [n for n in held.names if n in assigned and is_static(assigned[n])])
        }
        self._watch = Watch((), stride=stride_of(windows, tokens))

    def watch(self) -> None:
        """From now on inputs are collected."""
        for held in self._names:
            held.watch = self._watch

    def __bool__(self) -> bool:
        return bool(self._names)

    def scales(self) -> dict[str, Tensor]:
        """float32 [1] by stored module. Raises ConfigError for a linear that got nothing, or only zeros."""
        for held in self._names:
            held.watch = None
        self._watch.finish()
        found: dict[Statistics, Tensor] = {}
        return {name: self._scale(held, found) for held, names in self._names.items() for name in names}

    def _scale(self, held: Held, found: dict[Statistics, Tensor]) -> Tensor:
        """Linears with the same input share one scale, as engines that stack q, k and v want it."""
        seen = self._watch.of.get(held)
        if seen is None or not seen.tokens:
            raise ConfigError(
                f"{self._label}: no calibration token reached {', '.join(self._names[held])}, so that it has no static "
                "activation scale: give more text, or make its activations dynamic"
            )
        if seen not in found:
            try:
                scale = static_scale(seen.rows, float(seen.absmax.max()))
            except ValueError as e:
                raise ConfigError(f"{self._label}: {', '.join(self._names[held])}: {e}") from e
            # Ascend's engine loads the scale in the model's dtype, and multiplies with one of float32 afterwards.
            found[seen] = torch.tensor([scale]).bfloat16().float()
        return found[seen].clone()


def is_static(assigned: Assigned) -> bool:
    """Whether a module's activations have one stored scale."""
    return assigned.spec.act is not None and assigned.spec.act.static
