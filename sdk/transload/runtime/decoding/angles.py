"""Cosines and sines of positions, from the model's own rotary module, kept in a table where they never change."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Kinds of rotary positions whose angles do not depend on the length of the text.
_FIXED = ("default", "linear", "llama3", "yarn")
_BLOCK = 512  # positions that are computed together


class Angles:
    """cos and sin float32 [rotary / 2] of positions."""

    def __init__(self, rotary: nn.Module) -> None:
        self._rotary = rotary
        self._fixed = getattr(rotary, "rope_type", None) in _FIXED
        self._table: tuple[Tensor, Tensor] | None = None

    def at(self, position: int) -> tuple[Tensor, Tensor]:
        """The angles of a position; kinds that look at the length of the text are asked every time, in turn."""
        if not self._fixed:
            cos, sin = self._compute(position, position + 1)
            return cos[0], sin[0]
        cos, sin = self._until(position + 1)
        return cos[position], sin[position]

    def between(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """The angles [last - first, rotary / 2] of positions [first, last) that are asked for together."""
        if not self._fixed:
            return self._compute(first, last)
        cos, sin = self._until(last)
        return cos[first:last], sin[first:last]

    def _until(self, last: int) -> tuple[Tensor, Tensor]:
        """The table, long enough for positions below `last`."""
        if self._table is None or last > len(self._table[0]):
            self._table = self._compute(0, (last + _BLOCK - 1) // _BLOCK * _BLOCK)
        return self._table

    def _compute(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False), torch.no_grad():
            positions = torch.arange(first, last).unsqueeze(0)
            cos, sin = self._rotary(torch.zeros(1), positions)
        half = cos.shape[-1] // 2
        return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
