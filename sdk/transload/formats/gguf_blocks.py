"""GGUF block types, decoded into codes, scales and mins. No float value of a weight is ever computed here.

A row of K values is stored as K / elems blocks of `nbytes` bytes. Layouts: ggml's `ggml-common.h`; every decoder is
checked bit for bit against the gguf package. All products of a half-precision scale and a 6- or 8-bit factor fit
float32's 24-bit significand, so the decoded numbers are exact.

Nibbles are stored in split halves: byte j of a run of 32 values holds value j (low) and value j + 16 (high).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from transload.bits import unpack
from transload.errors import FormatError
from transload.quant import Grid, QTensor, QuantSpec, Zero

SLAB = 1 << 20  # values decoded at a time

Parts = tuple[Tensor, Tensor, Tensor | None]  # codes [R, B, elems], scales [R, B, groups], mins like scales or None


@dataclass(frozen=True, slots=True)
class Block:
    """One block type: how many values, how many bytes, and what they mean."""

    elems: int
    nbytes: int
    spec: QuantSpec
    decode: Callable[[Tensor], Parts]  # uint8 [R, B, nbytes]


def decode_blocks(ggml_type: str, raw: Tensor, k: int) -> QTensor:
    """The exact numbers of a block-quantized tensor.

    raw: uint8, [..., N, K / elems * nbytes] or flat bytes in that order; k: values in a row. Returns [N, K] when `raw`
    is flat, else raw's leading axes. Raises FormatError for unknown types and for bytes that do not make whole rows.
    """
    block = block_of(ggml_type)
    if k < 1 or k % block.elems:
        raise FormatError(f"rows of {k} values are not whole {ggml_type} blocks of {block.elems}")
    row_bytes = k // block.elems * block.nbytes
    if raw.numel() % row_bytes:
        raise FormatError(f"{raw.numel()} bytes are not whole rows of {row_bytes} bytes ({ggml_type}, K={k})")
    lead = (raw.numel() // row_bytes,) if raw.dim() == 1 else tuple(raw.shape[:-1])
    codes, scales, mins = _decode_rows(block, raw.reshape(-1, k // block.elems, block.nbytes), k)
    return QTensor(
        block.spec,
        codes.reshape(*lead, k),
        scales.reshape(*lead, -1),
        mins=None if mins is None else mins.reshape(*lead, -1),
    )


def _decode_rows(block: Block, rows: Tensor, k: int) -> Parts:
    """codes [R, K], scales and mins [R, G], decoded slab by slab so that the temporaries stay in the cache."""
    groups, dtype = k // block.spec.group_size, block.spec.scale_dtype
    codes = torch.empty(len(rows), k, dtype=torch.uint8)
    scales = torch.empty(len(rows), groups, dtype=dtype)
    mins = torch.empty(len(rows), groups, dtype=dtype) if block.spec.zero is Zero.MINS else None
    step = max(1, SLAB // k)
    for start in range(0, len(rows), step):
        slab = slice(start, start + step)
        c, s, m = block.decode(rows[slab])
        codes[slab] = c.reshape(-1, k)
        scales[slab] = s.reshape(-1, groups)
        if mins is not None and m is not None:
            mins[slab] = m.reshape(-1, groups)
    return codes, scales, mins


def block_of(ggml_type: str) -> Block:
    """The block type of that name. Raises FormatError when it is not one that we decode."""
    if ggml_type not in BLOCKS:
        raise FormatError(f"GGUF type {ggml_type} cannot be decoded; known types are {', '.join(BLOCKS)}")
    return BLOCKS[ggml_type]


def _half(raw: Tensor, start: int) -> Tensor:
    """The fp16 at byte `start` of every block: [R, B, 1]."""
    return raw[..., start : start + 2].contiguous().view(torch.float16)


def _lanes(raw: Tensor, bits: int) -> Tensor:
    """Codes of every byte, lowest first: uint8 [..., L] -> [..., L, 8 / bits]."""
    return unpack(raw, bits, raw.shape[-1] * (8 // bits)).reshape(*raw.shape, 8 // bits)


def _runs(raw: Tensor, run: int) -> Tensor:
    """uint8 [R, B, L] -> [R, B, L / run, run]."""
    return raw.reshape(*raw.shape[:-1], -1, run)


def _halves(raw: Tensor, run: int) -> Tensor:
    """4-bit codes in split halves: each run of `run` bytes is `run` low nibbles, then `run` high ones."""
    lanes = _lanes(_runs(raw, run), 4)  # [R, B, runs, run, 2]
    return lanes.transpose(-1, -2).flatten(-3)


def _q4_0(raw: Tensor) -> Parts:
    return _halves(raw[..., 2:18], 16), _half(raw, 0), None


def _q4_1(raw: Tensor) -> Parts:
    return _halves(raw[..., 4:20], 16), _half(raw, 0), _half(raw, 2)


def _q5_0(raw: Tensor) -> Parts:
    high = unpack(raw[..., 2:6], 1, 32)
    return _halves(raw[..., 6:22], 16) + high * 16, _half(raw, 0), None


def _q5_1(raw: Tensor) -> Parts:
    high = unpack(raw[..., 4:8], 1, 32)
    return _halves(raw[..., 8:24], 16) + high * 16, _half(raw, 0), _half(raw, 2)


def _q8_0(raw: Tensor) -> Parts:
    return raw[..., 2:34] + 128, _half(raw, 0), None  # int8 -128..127 becomes 0..255: uint8 addition wraps


def _q2_k(raw: Tensor) -> Parts:
    # 16 bytes of (scale, min) nibbles, 64 bytes of 2-bit codes, d, dmin. Byte l of each 32 holds the values
    # l, l + 32, l + 64, l + 96 of its 128.
    factors = _lanes(raw[..., :16], 4).float()
    codes = _lanes(_runs(raw[..., 16:80], 32), 2).transpose(-1, -2).flatten(-3)
    return codes, _half(raw, 80).float() * factors[..., 0], -(_half(raw, 82).float() * factors[..., 1])


def _q3_k(raw: Tensor) -> Parts:
    # 32 bytes of third bits, 64 of 2-bit codes (as in Q2_K), 12 of 6-bit scales (biased by 32), d.
    third = _lanes(raw[..., :32], 1).transpose(-1, -2).flatten(-2)
    low = _lanes(_runs(raw[..., 32:96], 32), 2).transpose(-1, -2).flatten(-3)
    nibbles = _lanes(raw[..., 96:104], 4).transpose(-1, -2).flatten(-2)
    tops = _lanes(raw[..., 104:108], 2).transpose(-1, -2).flatten(-2)
    factors = (nibbles + tops * 16).float() - 32
    return low + third * 4, _half(raw, 108).float() * factors, None


def _k_factors(raw: Tensor) -> tuple[Tensor, Tensor]:
    """The eight 6-bit scales and mins of Q4_K and Q5_K, float32 [R, B, 8] each.

    raw: uint8 [R, B, 12]. Bytes 0..3 and 4..7 hold factors 0..3 of scales and mins in their low 6 bits; their top
    2 bits complete factors 4..7, whose low nibbles are bytes 8..11 (scales low, mins high).
    """
    pairs = _lanes(raw, 2)  # [R, B, 12, 4]
    six = pairs[..., 0] + pairs[..., 1] * 4 + pairs[..., 2] * 16
    top = pairs[..., 3] * 16
    late = _lanes(raw[..., 8:12], 4)
    scales = torch.cat([six[..., :4], late[..., 0] + top[..., :4]], -1)
    mins = torch.cat([six[..., 4:8], late[..., 1] + top[..., 4:8]], -1)
    return scales.float(), mins.float()


def _q4_k(raw: Tensor) -> Parts:
    scales, mins = _k_factors(raw[..., 4:16])
    return _halves(raw[..., 16:144], 32), _half(raw, 0).float() * scales, -(_half(raw, 2).float() * mins)


def _q5_k(raw: Tensor) -> Parts:
    scales, mins = _k_factors(raw[..., 4:16])
    high = _lanes(raw[..., 16:48], 1).transpose(-1, -2).flatten(-2)  # bit j of byte l: value l of sub-block j
    codes = _halves(raw[..., 48:176], 32) + high * 16
    return codes, _half(raw, 0).float() * scales, -(_half(raw, 2).float() * mins)


def _q6_k(raw: Tensor) -> Parts:
    # Two halves of 128 values: 64 bytes of low nibbles each (low, then high), 32 bytes of 2-bit tops.
    high = _lanes(_runs(raw[..., 128:192], 32), 2).transpose(-1, -2).flatten(-3)
    codes = _halves(raw[..., :128], 64) + high * 16
    factors = raw[..., 192:208].contiguous().view(torch.int8).float()
    return codes, _half(raw, 208).float() * factors, None


def _mxfp4(raw: Tensor) -> Parts:
    # An E8M0 exponent, then E2M1 codes: the scale is 2 ** (e - 127); e = 255 is NaN, which QTensor refuses.
    scales = torch.exp2(raw[..., :1].double() - 127).float()
    return _halves(raw[..., 1:17], 16), torch.where(raw[..., :1] == 255, torch.nan, scales), None


def _spec(bits: int, group: int, zero: Zero = Zero.MIDPOINT, dtype: torch.dtype = torch.float16) -> QuantSpec:
    return QuantSpec(bits, group, zero=zero, scale_dtype=dtype)


_F32 = torch.float32

BLOCKS: dict[str, Block] = {
    "Q4_0": Block(32, 18, _spec(4, 32), _q4_0),
    "Q4_1": Block(32, 20, _spec(4, 32, Zero.MINS), _q4_1),
    "Q5_0": Block(32, 22, _spec(5, 32), _q5_0),
    "Q5_1": Block(32, 24, _spec(5, 32, Zero.MINS), _q5_1),
    "Q8_0": Block(32, 34, _spec(8, 32), _q8_0),
    "Q2_K": Block(256, 84, _spec(2, 16, Zero.MINS, _F32), _q2_k),
    "Q3_K": Block(256, 110, _spec(3, 16, dtype=_F32), _q3_k),
    "Q4_K": Block(256, 144, _spec(4, 32, Zero.MINS, _F32), _q4_k),
    "Q5_K": Block(256, 176, _spec(5, 32, Zero.MINS, _F32), _q5_k),
    "Q6_K": Block(256, 210, _spec(6, 16, dtype=_F32), _q6_k),
    "MXFP4": Block(32, 17, QuantSpec(4, 32, Grid.E2M1, Zero.NONE, _F32), _mxfp4),
}
