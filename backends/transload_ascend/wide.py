"""Dense W4A16 wider than one call takes: output heads, whose N is the vocabulary."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from transload.hal import Device, Packed, Problem
from transload.quant import QTensor, fuse_rows
from transload_ascend.limits import INNER
from transload_ascend.w4a16 import W4A16

PIECE = INNER // 64 * 64  # widest part whose packed rows are whole


class W4A16Wide(W4A16):
    """N in parts of at most 65472 outputs, each packed and multiplied as W4A16 does; vllm-ascend splits them too.

    The tensors of part i are W4A16's with `_i` after their names.
    """

    name = "ascend-w4a16-wide"

    def refuses(self, p: Problem, device: Device) -> str | None:
        """None for layers that W4A16 takes but for their width."""
        if p.n <= INNER:
            return f"layers of more than {INNER} outputs only; narrower ones are W4A16's"
        widths = (PIECE, p.n % PIECE or PIECE)
        reasons = (super(W4A16Wide, self).refuses(replace(p, n=n), device) for n in widths)
        return next((reason for reason in reasons if reason is not None), None)

    def pack(self, w: QTensor) -> Packed:
        """Every part as W4A16 packs it."""
        packed = {
            f"{name}_{i}": t
            for i, (start, stop) in enumerate(_parts(w.n))
            for name, t in super(W4A16Wide, self).pack(w.rows(start, stop)).tensors.items()
        }
        return Packed(self.name, w.spec, w.n, w.k, packed)

    def unpack(self, p: Packed) -> QTensor:
        """The exact inverse of `pack`."""
        return fuse_rows([super(W4A16Wide, self).unpack(part) for part in _split(p)])

    def matmul(self, x: Tensor, w: Packed, bias: Tensor | None = None) -> Tensor:
        """The parts' products side by side."""
        biases = [None if bias is None else bias[start:stop] for start, stop in _parts(w.n)]
        rows = [super(W4A16Wide, self).matmul(x, part, b) for part, b in zip(_split(w), biases, strict=True)]
        return torch.cat(rows, dim=-1)


def _parts(n: int) -> list[tuple[int, int]]:
    return [(start, min(start + PIECE, n)) for start in range(0, n, PIECE)]


def _split(p: Packed) -> list[Packed]:
    """The parts of a packed weight, as W4A16 knows them."""
    names = {name.rpartition("_")[0] for name in p.tensors}
    return [
        Packed(W4A16.name, p.spec, stop - start, p.k, {name: p.tensors[f"{name}_{i}"] for name in names})
        for i, (start, stop) in enumerate(_parts(p.n))
    ]
