"""Codes of b bits in little-endian words: the only shifting code in the repository.

A stream is LSB-first: code i occupies bits [b*i, b*i + b) of the concatenated words. For b = 4:

    codes   5  5  7  7 10 10  7  3
    bytes   0x55  0x77  0xaa  0x37        low nibble first
    int32   0x37aa7755
"""

from __future__ import annotations

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
    if 8 % bits == 0:
        lanes, mask = 8 // bits, (1 << bits) - 1
        out = torch.empty(*data.shape[:-1], data.shape[-1] * lanes, dtype=torch.uint8, device=data.device)
        for lane in range(lanes):
            out[..., lane::lanes] = (data >> (bits * lane)) & mask
    else:
        out = _unpack_eights(data, bits)
    return out[..., :count].contiguous()


def _pack_eights(codes: Tensor, bits: int) -> Tensor:
    """Widths that straddle bytes: eight codes are exactly `bits` bytes, gathered in an int64."""
    eights = -(-codes.shape[-1] // 8)
    lanes = _padded(codes, eights * 8).reshape(*codes.shape[:-1], eights, 8).long()
    shifts = torch.arange(8, device=codes.device) * bits
    words = (lanes << shifts).sum(-1, keepdim=True)
    return words.view(torch.uint8)[..., :bits].reshape(*codes.shape[:-1], eights * bits)


def _unpack_eights(data: Tensor, bits: int) -> Tensor:
    eights = -(-data.shape[-1] // bits)
    rows = _padded(data, eights * bits).reshape(*data.shape[:-1], eights, bits)
    words = _padded(rows, 8).contiguous().view(torch.int64)
    shifts = torch.arange(8, device=data.device) * bits
    return ((words >> shifts) & ((1 << bits) - 1)).to(torch.uint8).reshape(*data.shape[:-1], eights * 8)


def _padded(t: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(t, (0, length - t.shape[-1])) if t.shape[-1] < length else t
