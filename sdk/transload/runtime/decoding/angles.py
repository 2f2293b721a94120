"""Cosines and sines of positions, from the model's own rotary module, kept in a table where they never change."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Kinds of rotary positions whose angles do not depend on the length of the text.
_FIXED = ("default", "linear", "llama3", "yarn")
_BLOCK = 512  # positions that are computed together


class Angles:
    """cos and sin float32 [rotary / 2] of one position after the other."""

    def __init__(self, rotary: nn.Module) -> None:
        self._rotary = rotary
        self._fixed = getattr(rotary, "rope_type", None) in _FIXED
        self._table: tuple[Tensor, Tensor] | None = None

    def at(self, position: int) -> tuple[Tensor, Tensor]:
        """The angles of a position; kinds that look at the length of the text are asked every time, in turn."""
        if not self._fixed:
            cos, sin = self._compute(position, position + 1)
            return cos[0], sin[0]
        table = self._table
        if table is None or position >= len(table[0]):
            table = self._table = self._compute(0, (position // _BLOCK + 1) * _BLOCK)
        return table[0][position], table[1][position]

    def _compute(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False), torch.no_grad():
            positions = torch.arange(first, last).unsqueeze(0)
            cos, sin = self._rotary(torch.zeros(1), positions)
        half = cos.shape[-1] // 2
        return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
