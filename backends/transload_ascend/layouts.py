"""Ascend's weight layouts, exactly: int4 in int32, FRACTAL_NZ block order, scale bit patterns, the 8 * sum(W) term.

A 4-bit code in the middle is unsigned with midpoint 8; on Ascend a nibble is two's complement, -8 .. 7, the low nibble
first. Both are the same four bits with the top one flipped: code 0 is -8 (0b1000), code 15 is 7 (0b0111).

Everything here is plain torch on the host. No torch_npu and no device is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transload import bits
from transload.quant import QTensor, QuantSpec, Zero

LANES = 8  # int4 values in an int32
CUBE = 16  # rows of a FRACTAL_NZ block
BLOCK_BYTES = 32  # bytes of a row of a FRACTAL_NZ block
NEGATIVE = 8  # the bit that tells an unsigned code from a two's complement nibble

_FP19 = 0xFFFFE000  # the sign, exponent and 10 mantissa bits that int64 scales keep
_FP19_FLAG = 1 << 46


def group_length(spec: QuantSpec, k: int) -> int:
    """Neighbouring K that share a scale."""
    return k if spec.groups(k) == 1 else spec.group_size


def int4pack(codes: Tensor) -> Tensor:
    """Packs the last axis as npu_convert_weight_to_int4pack does: uint8 [..., L], 0 .. 15 -> int32 [..., L / 8].

    Element i of eight lies in bits 4 * i .. 4 * i + 3, as two's complement of code - 8:

        codes   8  9 10 11 12 13 14 15     values  0 1 2 3 4 5 6 7     int32  0x76543210

    Source: op-plugin 517f2e7d, ConvertWeightToINT4PackKernelNpuOpApi.cpp, `convert_to_int4_pack`. L is a multiple of 8.
    """
    return bits.pack(codes ^ NEGATIVE, 4, torch.int32)


def int4unpack(words: Tensor) -> Tensor:
    """The inverse of `int4pack`: int32 [..., W] -> uint8 codes [..., 8 * W]."""
    return bits.unpack(words, 4, words.shape[-1] * LANES) ^ NEGATIVE


def pack_along_n(codes: Tensor) -> Tensor:
    """The layout of non-transposed weights: codes [..., N, K] -> int32 [..., K, N / 8]. N is a multiple of 8."""
    return int4pack(codes.transpose(-1, -2).contiguous())


def unpack_along_n(words: Tensor) -> Tensor:
    """The inverse of `pack_along_n`: int32 [..., K, N / 8] -> uint8 codes [..., N, K]."""
    return int4unpack(words).transpose(-1, -2).contiguous()


def to_nz(matrix: Tensor) -> Tensor:
    """The FRACTAL_NZ storage of matrices: [..., R, C] -> [..., ceil(C / C0), ceil(R / 16), 16, C0], zero padded.

    C0 is 32 bytes: 32 for int8, 8 for int32. Element (r, c) goes to block column c // C0 (outermost), block row
    r // 16, row r % 16, column c % C0. For int4 in int32 a block is 16 x 64 weights, the same bytes as in an int8 view.
    Source: op-plugin 517f2e7d, `trans_nd_to_nz`; pytorch 9e73e708, FormatHelper.cpp `InferShapeNDToNZ`.
    """
    c0 = BLOCK_BYTES // matrix.element_size()
    rows, columns = matrix.shape[-2:]
    padded = torch.nn.functional.pad(matrix, (0, -columns % c0, 0, -rows % CUBE))
    blocks = padded.reshape(*matrix.shape[:-2], -(-rows // CUBE), CUBE, -(-columns // c0), c0)
    return blocks.movedim(-2, -4).contiguous()


def from_nz(blocks: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `to_nz`: [..., C1, R1, 16, C0] -> [..., rows, columns]."""
    return blocks.movedim(-4, -2).flatten(-2).flatten(-3, -2)[..., :rows, :columns].contiguous()


def signed8(codes: Tensor) -> Tensor:
    """Unsigned 8-bit codes with midpoint 128 as int8 values: uint8 [...] -> int8 [...]."""
    return (codes ^ 0x80).view(torch.int8)


def unsigned8(values: Tensor) -> Tensor:
    """The inverse of `signed8`: int8 [...] -> uint8 codes [...]."""
    return values.view(torch.uint8) ^ 0x80


def scale_bits(scales: Tensor) -> Tensor:
    """Float scales as the grouped matmul reads them: float [...] -> int64 [...], the float32 bits zero-extended.

    1.0 becomes 0x000000003F800000. Nothing is lost. Source: vllm-ascend 182b75ea, w4a8.py `_process_scale`.
    """
    return scales.float().contiguous().view(torch.int32).long() & 0xFFFFFFFF


def scale_from_bits(words: Tensor) -> Tensor:
    """The inverse of `scale_bits`: int64 [...] -> float32 [...], from the low half, so `fp19_scale` words work too."""
    return words.contiguous().view(torch.int32)[..., 0::2].contiguous().view(torch.float32)


def fp19_scale(scales: Tensor) -> Tensor:
    """Float scales as npu_trans_quant_param writes them: float [...] -> int64 [...].

    The low half is the float32 with its low 13 mantissa bits cut off, bit 46 is set: 1.0 becomes
    0x0000_4000_3F80_0000. float16 and bfloat16 values fit exactly, float32 ones in general do not.
    Source: op-plugin 517f2e7d, torch_npu-npu_trans_quant_param.md (round_mode 0, no offset).
    """
    return (scale_bits(scales) & _FP19) | _FP19_FLAG


def scale_bias(w: QTensor) -> Tensor:
    """8 times the sum of each row of the dequantized weight: float32 [..., N], for symmetric 4-bit codes.

    The int8 x int4 kernels split an activation into x = 16 * hi + lo with lo in 0 .. 15 and multiply hi and lo - 8,
    which fit in four bits: x @ W = 16 * (hi @ W) + (lo - 8) @ W + 8 * sum(W). The caller hands in that last term;
    leaving it out gives wrong numbers and no error. Source: op-plugin 517f2e7d, golden functions of
    test_npu_quant_matmul.py and test_npu_grouped_matmul.py; vllm-ascend 182b75ea, w4a8.py. Summed here as integers
    inside a group, so the only rounding is the last one.
    """
    assert w.spec.zero is Zero.MIDPOINT
    assert w.g_idx is None
    groups = w.spec.groups(w.k)
    size = group_length(w.spec, w.k)
    codes = torch.nn.functional.pad(w.codes, (0, groups * size - w.k), value=w.spec.midpoint)
    sums = codes.reshape(*codes.shape[:-1], groups, size).sum(-1, dtype=torch.int64) - w.spec.midpoint * size
    return (8.0 * (sums.double() * w.scales.double()).sum(-1)).float()
