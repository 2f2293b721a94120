"""A weight whose codes stay in their words: formats that pack alike exchange it without unpacking.

GPTQ's qweight and compressed-tensors' weight_packed hold the same int32 words, transposed. Where both ends of a port
know packed rows, a transpose replaces unpacking and packing; tests prove that the bytes are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from transload import bits
from transload.errors import ConfigError
from transload.quant import PER_CHANNEL, QTensor, QuantSpec


@dataclass(frozen=True, slots=True, eq=False)
class PackedRows:
    """words: int32 [N, K * bits / 32], codes low first along K with no bits left over; the rest as in QTensor.

    Raises FormatError when scales, zeros or g_idx contradict the spec.
    """

    spec: QuantSpec
    words: Tensor
    k: int
    scales: Tensor
    zeros: Tensor | None = None
    g_idx: Tensor | None = None

    def __post_init__(self) -> None:
        # QTensor's checks of everything but the codes.
        codes = torch.empty(self.words.shape[0], self.k, dtype=torch.uint8, device="meta")
        QTensor(self.spec, codes, self.scales, self.zeros, g_idx=self.g_idx)

    def group_of_k(self) -> Tensor:
        """The group of every input feature: int64 [K]."""
        if self.g_idx is not None:
            return self.g_idx.long()
        size = self.k if self.spec.group_size == PER_CHANNEL else self.spec.group_size
        return torch.arange(self.k) // max(size, 1)

    def rows(self, start: int, stop: int) -> PackedRows:
        """Output rows start .. stop - 1, numbers untouched."""
        zeros = None if self.zeros is None else self.zeros[start:stop]
        return replace(self, words=self.words[start:stop], scales=self.scales[start:stop], zeros=zeros)

    @staticmethod
    def possible(spec: QuantSpec, k: int) -> bool:
        """True when a row fills its words, so that no padding can differ."""
        return k * spec.bits % 32 == 0 and spec.bits in (2, 4, 8)

    def unpacked(self) -> QTensor:
        """The weight with one code per byte."""
        return QTensor(
            self.spec, bits.unpack(self.words, self.spec.bits, self.k), self.scales, self.zeros, g_idx=self.g_idx
        )


def join_rows(parts: Sequence[PackedRows]) -> PackedRows:
    """Weights with the same input below each other, numbers untouched. Raises ConfigError when schemes differ."""
    first = parts[0]
    for part in parts[1:]:
        same_order = (part.g_idx is None and first.g_idx is None) or (
            part.g_idx is not None and first.g_idx is not None and torch.equal(part.g_idx, first.g_idx)
        )
        if part.spec != first.spec or part.k != first.k or not same_order:
            raise ConfigError(f"cannot join rows of different schemes: {first.spec} and {part.spec}")
    zeros = [p.zeros for p in parts if p.zeros is not None]
    return replace(
        first,
        words=torch.cat([p.words for p in parts]),
        scales=torch.cat([p.scales for p in parts]),
        zeros=torch.cat(zeros) if zeros else None,
    )
