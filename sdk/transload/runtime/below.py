"""Weights of one parameter that lie below each other in schemes of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from transload.quant import QTensor
from transload.runtime.kept import KeptPart

Part = TypeVar("Part", QTensor, KeptPart)


@dataclass(frozen=True, slots=True, eq=False)
class Below(Generic[Part]):
    """The shape of all parts together. They share K and the experts."""

    parts: tuple[Part, ...]

    @property
    def n(self) -> int:
        """Out features of all parts."""
        return sum(part.n for part in self.parts)

    @property
    def k(self) -> int:
        """In features."""
        return self.parts[0].k

    @property
    def experts(self) -> int | None:
        """Length of the leading expert axis, None for a plain linear."""
        return self.parts[0].experts


class KeptWeight(Below[KeptPart]):
    """A weight from a file of packed weights: one part, or several."""
