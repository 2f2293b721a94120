"""Packed weights from a file, in the place of the numbers that they were packed from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from transload.quant import QTensor, QuantSpec, Zero

ROWS = "rows-1"  # the layout of RowStore: codes packed row by row, scales, zeros and mins beside them


@dataclass(frozen=True, slots=True, eq=False)
class KeptPart:
    """A packed weight: its scheme with the checkpoint's own activations, its layout, and the tensors of that layout."""

    spec: QuantSpec
    n: int
    k: int
    experts: int | None
    layout: str
    tensors: Mapping[str, Tensor]

    def blank(self) -> QTensor:
        """The weight without numbers (on the meta device): enough to choose a kernel for it."""
        lead = () if self.experts is None else (self.experts,)
        sides = (*lead, self.n, self.spec.groups(self.k))

        def side(dtype: torch.dtype) -> Tensor:
            return torch.empty(sides, dtype=dtype, device="meta")

        scale, zero = self.spec.scale_dtype, self.spec.zero
        zeros = {Zero.CODES: torch.uint8, Zero.FLOATS: scale}.get(zero)
        return QTensor(
            self.spec,
            torch.empty(*lead, self.n, self.k, dtype=torch.uint8, device="meta"),
            side(scale),
            None if zeros is None else side(zeros),
            side(scale) if zero is Zero.MINS else None,
            torch.empty(self.k, dtype=torch.int32, device="meta") if self.spec.act_order else None,
        )
