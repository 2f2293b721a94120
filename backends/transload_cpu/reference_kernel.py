"""The last choice: transload.reference on the packed bytes. It takes everything, and it is slow."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from transload import reference
from transload.hal import Device, Kernel, Packed, Problem
from transload.quant import PER_CHANNEL, QTensor
from transload_cpu.storage import pack_tight, take_rows, unpack_tight


class ReferenceKernel(Kernel):
    """Dequantizes (or sums integers) on every call. For schemes without a fast kernel, and as the truth."""

    name: ClassVar[str] = "reference"

    def refuses(self, p: Problem, device: Device) -> str | None:
        """Only what the reference itself cannot define."""
        act = p.spec.act
        if act is None:
            return None
        if act.static:
            return "static activation scales belong to the engine; activations are quantized dynamically here"
        if act.group_size == PER_CHANNEL or p.spec.group_size == PER_CHANNEL:
            return None
        if p.spec.act_order:
            return "act-order weights with activation scales per group: use scales per token"
        small, large = sorted((act.group_size, p.spec.group_size))
        if large % small and large < p.k:
            return f"activation groups of {act.group_size} and weight groups of {p.spec.group_size} do not nest"
        return None

    def pack(self, w: QTensor) -> Packed:
        """Codes at their own width, everything else as it is."""
        return pack_tight(self.name, w)

    def unpack(self, p: Packed) -> QTensor:
        """The exact inverse of `pack`."""
        return unpack_tight(p)

    def rows(self, p: Packed, index: Tensor) -> QTensor:
        """Output rows `index` (int64 [R]); only these are unpacked."""
        return take_rows(p, index)

    def matmul(self, x: Tensor, w: Packed, bias: Tensor | None = None) -> Tensor:
        """x [M, K] times w.T plus bias [N]: [M, N] in x's dtype, computed in float32 or in exact integer sums."""
        return reference.matmul(x, unpack_tight(w), bias).to(x.dtype)

    def grouped_matmul(self, x: Tensor, w: Packed, counts: Tensor, bias: Tensor | None = None) -> Tensor:
        """Rows sorted by expert, counts int64 [E] rows each: [M, N] in x's dtype."""
        y: Tensor = reference.grouped_matmul(x, unpack_tight(w), counts, bias)
        return y.to(x.dtype) if len(x) else torch.zeros(0, w.n, dtype=x.dtype)
