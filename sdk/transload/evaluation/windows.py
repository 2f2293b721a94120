"""A long text in windows that a model can read, so that every token is predicted once with enough before it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from transload.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Window:
    """ids: int64 [T] at position `start` of the text; tokens from `first` on (of the window) are scored."""

    ids: Tensor
    start: int
    first: int

    @property
    def scored(self) -> int:
        """How many tokens are predicted."""
        return len(self.ids) - self.first


def windows(ids: Tensor, length: int, stride: int) -> Iterator[Window]:
    """Windows of at most `length` tokens, `stride` apart; each token but the text's first is scored once.

    Every scored token of a later window has at least length - stride tokens before it.
    Raises ConfigError unless 1 <= stride < length.

    >>> import torch
    >>> [(w.start, w.first, len(w.ids)) for w in windows(torch.arange(10), 6, 3)]
    [(0, 1, 6), (3, 3, 6), (6, 3, 4)]
    """
    if length < 2 or not 1 <= stride < length:
        raise ConfigError(f"window {length} with stride {stride}: give a window of 2 or more and a stride below it")
    start, done = 0, 1
    while done < len(ids):
        piece = ids[start : start + length]
        yield Window(piece, start, done - start)
        done = start + len(piece)
        start += stride
