"""What calibration keeps of the inputs of a linear: enough for every method, and of bounded size."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

_COLUMNS = 1024  # a Gram matrix is added up in blocks, and only on and below the diagonal
SAMPLE = 1024  # rows kept as they are


def stride_of(windows: int, tokens: int) -> int:
    """Between kept rows, so that SAMPLE of them are spread over windows of `tokens` each.

    A window's first token is unlike all others, and a stride that divides windows keeps it of each. Of many windows it
    would keep little else, so their stride is odd.
    """
    stride = max(1, windows * tokens // SAMPLE)
    return stride if stride <= tokens // 16 else stride | 1


class Statistics:
    """Sums over the rows x [T, K] that a linear was given.

    tokens: rows seen. gram: X^T X [K, K], lower triangle of blocks until `finish`, or None. absmax, abssum: [K].
    precision: of the products that are added up in gram.
    rows: up to SAMPLE of the inputs themselves [S, K], evenly spread where `stride` says so.
    """

    def __init__(self, k: int, gram: bool, stride: int = 1, precision: torch.dtype = torch.float32) -> None:
        self.tokens, self._stride, self._precision = 0, stride, precision
        self.gram = torch.zeros(k, k) if gram else None
        self.absmax, self.abssum = torch.zeros(k), torch.zeros(k, dtype=torch.float64)
        self._kept: list[Tensor] = []
        self._kept_rows = 0

    def add(self, x: Tensor) -> None:
        """Takes in rows [T, K], float."""
        x = x.detach().float()
        magnitude = x.abs()
        self.absmax = torch.maximum(self.absmax, magnitude.amax(0))
        self.abssum += magnitude.sum(0)
        first = -self.tokens % self._stride
        self.tokens += len(x)
        room = SAMPLE - self._kept_rows
        if room > 0 and first < len(x):
            rows = x[first :: self._stride][:room].clone()
            self._kept.append(rows)
            self._kept_rows += len(rows)
        if self.gram is not None:
            self._add_products(self.gram, x.to(self._precision))

    def _add_products(self, gram: Tensor, x: Tensor) -> None:
        for start in range(0, x.shape[1], _COLUMNS):
            rows, columns = x[:, start:].T, x[:, start : start + _COLUMNS]
            block = gram[start:, start : start + _COLUMNS]
            if x.dtype is gram.dtype:
                block.addmm_(rows, columns)
            else:
                block.add_(rows @ columns)

    def finish(self) -> None:
        """Completes the upper triangle of the Gram matrix."""
        if self.gram is not None:
            for start in range(0, len(self.gram), _COLUMNS):
                stop = start + _COLUMNS
                self.gram[start:stop, stop:] = self.gram[stop:, start:stop].T

    @property
    def rows(self) -> Tensor:
        """The kept inputs [S, K]."""
        if len(self._kept) > 1:
            self._kept = [torch.cat(self._kept)]
        return self._kept[0] if self._kept else torch.zeros(0, len(self.absmax))

    @property
    def absmean(self) -> Tensor:
        """Mean magnitude of every input [K]."""
        return (self.abssum / max(self.tokens, 1)).float()

    @property
    def finite(self) -> bool:
        """False when a NaN or an infinity came in."""
        return bool(torch.isfinite(self.absmax).all())

    def divide(self, by: Tensor) -> None:
        """Makes this the statistics of x / by [K]: what the linear sees after a scale was folded into its producer."""
        if self.gram is not None:
            self.gram.div_(by).div_(by.unsqueeze(1))
        self.absmax, self.abssum = self.absmax / by, self.abssum / by
        self._kept = [rows / by for rows in self._kept]


class Watch:
    """Collects statistics during a pass over the calibration text. Linears given the same tensor share them.

    grams: the linears whose Gram matrix is wanted; others get the cheap sums alone.
    """

    def __init__(self, grams: Collection[nn.Module], stride: int, precision: torch.dtype = torch.float32) -> None:
        self.of: dict[nn.Module, Statistics] = {}
        self._grams, self._stride, self._precision = grams, stride, precision
        self._last: Tensor | None = None
        self._given: dict[bool, Statistics] = {}  # of the last tensor: with a Gram matrix, without

    def see(self, linear: nn.Module, x: Tensor, stride: int | None = None) -> None:
        """Called with the input [..., K] of a linear. stride: of the kept rows, for linears that see few."""
        if self._last is not x:
            self._last, self._given = x, {}
        gram = linear in self._grams
        shared = self._given.get(gram) or (None if gram else self._given.get(True))
        if shared is not None:
            self.of.setdefault(linear, shared)
            return
        if linear not in self.of:
            self.of[linear] = Statistics(x.shape[-1], gram, stride or self._stride, self._precision)
        self.of[linear].add(x.reshape(-1, x.shape[-1]))
        self._given[gram] = self.of[linear]

    def finish(self) -> None:
        """Ends the pass."""
        self._last, self._given = None, {}
        for statistics in dict.fromkeys(self.of.values()):
            statistics.finish()
