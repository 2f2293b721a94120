"""Putting together the weight of one parameter from the quantized modules that it is stored as."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from transload.errors import ConfigError, Unsupported
from transload.quant import QTensor, fuse_rows, stack_experts
from transload.runtime.below import Below
from transload.runtime.trace import Piece, Recipe


class SplitRows(Below[QTensor]):
    """Neighbouring rows of one parameter in different schemes: gate in 5 bits and up in 8, say. Offers what a QTensor
    offers to those who cut and multiply."""

    def expert(self, index: int) -> Weight:
        """One expert of a stacked weight."""
        return SplitRows(tuple(part.expert(index) for part in self.parts))

    def rows(self, start: int, stop: int) -> Weight:
        """Output rows start .. stop - 1."""
        taken, first = [], 0
        for part in self.parts:
            low, high = max(start - first, 0), min(stop - first, part.n)
            if low < high:
                taken.append(part.rows(low, high))
            first += part.n
        return taken[0] if len(taken) == 1 else SplitRows(tuple(taken))

    def dequantize(self) -> Tensor:
        """The weight as float32 [..., N, K]."""
        return torch.cat([part.dequantize() for part in self.parts], dim=-2)


Weight = QTensor | SplitRows


def assemble(name: str, recipe: Recipe, decode: Callable[[str], Weight]) -> Weight:
    """The weight of parameter `name` from its recipe, numbers untouched.

    decode: the quantized module of a name; a stack of experts is decoded once, everything else when its turn comes.
    Raises Unsupported when the experts of one parameter are of different schemes.
    """
    cache: dict[str, Weight] = {}

    def part(piece: Piece) -> Weight:
        if piece.source not in cache:
            if piece.expert is None:
                cache.clear()
            cache[piece.source] = decode(piece.source)
        w = cache[piece.source]
        w = w if piece.expert is None else w.expert(piece.expert)
        return w if (piece.start, piece.stop) == (0, w.n) else w.rows(piece.start, piece.stop)

    runs = [_joined([part(piece) for piece in run]) for run in recipe.runs]
    return _stacked(name, runs) if recipe.stacked else runs[0]


def _joined(weights: Sequence[Weight]) -> Weight:
    """Weights below each other; one QTensor where they are of one scheme."""
    parts = [p for w in weights for p in (w.parts if isinstance(w, SplitRows) else (w,))]
    if len(parts) == 1:
        return parts[0]
    try:
        return fuse_rows(parts)
    except ConfigError:
        return SplitRows(tuple(parts))


def _stacked(name: str, experts: Sequence[Weight]) -> Weight:
    try:
        if all(isinstance(w, QTensor) for w in experts):
            return stack_experts([w for w in experts if isinstance(w, QTensor)])
        columns = zip(*(w.parts if isinstance(w, SplitRows) else (w,) for w in experts), strict=True)
        return SplitRows(tuple(stack_experts(column) for column in columns))
    except (ConfigError, ValueError) as e:
        raise Unsupported(f"{name}: its experts are quantized differently and cannot run as one: {e}") from e
