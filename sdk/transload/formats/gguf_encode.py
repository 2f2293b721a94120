"""QTensors as GGUF blocks: the inverse of `gguf_blocks` for types whose block is one group of 32 with its own scale.

    Q4_0  d fp16 | 16 bytes of nibbles                    Q4_1  d, m fp16 | 16 bytes of nibbles
    Q5_0  d fp16 | 32 high bits | 16 bytes of nibbles     Q5_1  d, m fp16 | 32 high bits | 16 bytes of nibbles
    Q8_0  d fp16 | 32 int8

Nibbles are in split halves: byte j holds value j (low) and value j + 16 (high). K-quants are read only: their scales
are products of two numbers, and which two is not in a QTensor any more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transload.bits import join, pack, split
from transload.formats.gguf_blocks import BLOCKS, SLAB
from transload.quant import QTensor, QuantSpec

GROUP = 32
_WRITTEN = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
TYPES: dict[QuantSpec, str] = {BLOCKS[name].spec: name for name in _WRITTEN}


def encode_blocks(w: QTensor) -> Tensor:
    """The blocks of a weight whose spec is one of TYPES: uint8 [N, K / 32 * bytes per block]."""
    block = BLOCKS[TYPES[w.spec]]
    out = torch.empty(w.n, w.k // GROUP, block.nbytes, dtype=torch.uint8)
    step = max(1, SLAB // w.k)
    for start in range(0, w.n, step):
        stop = min(start + step, w.n)
        _fill(out[start:stop], w.rows(start, stop))
    return out.reshape(w.n, -1)


def _fill(out: Tensor, w: QTensor) -> None:
    """Writes whole blocks [R, B, nbytes] for R rows."""
    codes = w.codes.reshape(*out.shape[:2], GROUP)
    parts = [_bytes(w.scales)] + ([] if w.mins is None else [_bytes(w.mins)])
    if w.spec.bits == 8:
        parts.append(codes + 128)  # 0..255 becomes int8 -128..127: uint8 addition wraps
    else:
        low, high = split(codes, 4)
        if w.spec.bits == 5:
            parts.append(pack(high, 1))
        parts.append(join(low.reshape(*low.shape[:-1], 2, GROUP // 2).unbind(-2), 4))
    torch.cat(parts, dim=-1, out=out)


def _bytes(scales: Tensor) -> Tensor:
    """float16 [R, B] as uint8 [R, B, 2]."""
    return scales.contiguous().unsqueeze(-1).view(torch.uint8)
