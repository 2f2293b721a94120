"""Codes of b bits in little-endian words: the only shifting code in the repository.

A stream is LSB-first: code i occupies bits [b*i, b*i + b) of the concatenated words. For b = 4:

    codes   5  5  7  7 10 10  7  3
    bytes   0x55  0x77  0xaa  0x37        low nibble first
    int32   0x37aa7755
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_WORD_BYTES = {torch.uint8: 1, torch.int8: 1, torch.int16: 2, torch.int32: 4, torch.int64: 8}


def packed_len(count: int, bits: int, word: torch.dtype = torch.uint8) -> int:
    """Words needed for `count` codes of `bits` bits."""
    return -(-count * bits // (8 * _WORD_BYTES[word]))


def pack(codes: Tensor, bits: int, word: torch.dtype = torch.uint8) -> Tensor:
    """Packs the last axis LSB-first: uint8 [..., L] -> word [..., ceil(L * bits / word bits)], zero padded."""
    length = codes.shape[-1]
    size = packed_len(length, bits, word) * _WORD_BYTES[word]  # bytes per row
    if 8 % bits == 0:
        lanes = 8 // bits
        codes = _padded(codes, size * lanes)
        out = codes[..., 0::lanes].clone(memory_format=torch.contiguous_format)
        for lane in range(1, lanes):
            out |= codes[..., lane::lanes] << (bits * lane)
    else:
        out = _pack_eights(codes, bits)
        out = _padded(out, max(size, out.shape[-1]))[..., :size].clone(memory_format=torch.contiguous_format)
    return out.view(word)


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of every row: word [..., W] -> uint8 [..., count]. Inverse of `pack`."""
    data = words.contiguous().view(torch.uint8)
    if data.shape[-1] * 8 < count * bits:
        raise ValueError(f"{data.shape[-1]} bytes hold fewer than {count} codes of {bits} bits")
    if bits == 4:  # the common width, without the strided writes: a byte 0xHL becomes the pair 0x0H0L
        pairs = data.reshape(-1).to(torch.int16)  # flat, because a view needs strides that empty tensors may lack
        out = ((pairs | pairs << 4) & 0x0F0F).view(torch.uint8).reshape(*data.shape[:-1], 2 * data.shape[-1])
    elif 8 % bits == 0:
        lanes, mask = 8 // bits, (1 << bits) - 1
        out = torch.empty(*data.shape[:-1], data.shape[-1] * lanes, dtype=torch.uint8, device=data.device)
        for lane in range(lanes):
            out[..., lane::lanes] = (data >> (bits * lane)) & mask
    else:
        out = _unpack_eights(data, bits)
    return out[..., :count].contiguous()


def join(lanes: Sequence[Tensor], bits: int) -> Tensor:
    """Bytes of equal tensors laid over each other, the first lowest: uint8 each -> uint8. For b = 4: 3, 12 -> 0xc3."""
    out = lanes[0].clone(memory_format=torch.contiguous_format)
    for i, lane in enumerate(lanes[1:], 1):
        out |= lane << (bits * i)
    return out


def split(data: Tensor, bits: int) -> tuple[Tensor, ...]:
    """The 8 / bits fields of every byte, lowest first: uint8 -> uint8 each. Inverse of `join`."""
    mask = (1 << bits) - 1
    return tuple((data >> (bits * i)) & mask for i in range(8 // bits))


def _pack_eights(codes: Tensor, bits: int) -> Tensor:
    """Widths that straddle bytes: eight codes are exactly `bits` bytes. Code i goes into the byte where its bits begin,
    and what does not fit there (shifted out of the uint8) into the next one."""
    lanes = _padded(codes, -(-codes.shape[-1] // 8) * 8)
    out = [torch.zeros_like(lanes[..., 0::8]) for _ in range(bits)]
    for i in range(8):
        byte, shift = divmod(bits * i, 8)
        lane = lanes[..., i::8]
        out[byte] |= lane << shift
        if shift + bits > 8:
            out[byte + 1] |= lane >> (8 - shift)
    return torch.stack(out, dim=-1).flatten(-2)


def _unpack_eights(data: Tensor, bits: int) -> Tensor:
    eights = -(-data.shape[-1] // bits)
    data = _padded(data, eights * bits)
    out = torch.empty(*data.shape[:-1], eights * 8, dtype=torch.uint8, device=data.device)
    for i in range(8):
        byte, shift = divmod(bits * i, 8)
        lane = data[..., byte::bits] >> shift
        if shift + bits > 8:
            lane |= data[..., byte + 1 :: bits] << (8 - shift)
        out[..., i::8] = lane & ((1 << bits) - 1)
    return out


def _padded(t: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(t, (0, length - t.shape[-1])) if t.shape[-1] < length else t
