"""One model under two sets of names: which rows of which modules make up the modules of another layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rows:
    """Output rows start .. stop - 1 of a module; stop None stands for all of them."""

    module: str
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True, slots=True)
class Frequencies:
    """A buffer that a layout stores although it follows from config.json: 1 / base ** ((0, 2, .. dim - 2) / dim)."""

    name: str
    base: float
    dim: int
    dtype: str  # as in config.json: bfloat16, float16, float32


@dataclass(frozen=True, slots=True)
class Relayout:
    """Another layout of a checkpoint.

    config: its config.json. modules: every module of it, from top to bottom, with the rows of the stored modules that
    it is made of. biased: those of them that have a bias. dropped: stored tensors that the layout does not have, and
    why. made: a buffer that it has and the stored layout has not. notes: sentences for a report.
    """

    config: Mapping[str, object]
    modules: Mapping[str, tuple[Rows, ...]]
    biased: frozenset[str]
    dropped: Mapping[str, str]
    made: Frequencies | None = None
    notes: tuple[str, ...] = ()
