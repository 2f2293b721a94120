"""How msModelSlim lays out one linear: nibbles of two's complement, and the scale_bias that Ascend's W4A8 needs.

Codes here are the library's, unsigned 0 .. 15 with 8 for zero; on disk nibbles are signed, -8 .. 7. Byte n' of column k
holds rows 2n' (low nibble) and 2n' + 1 (high): rows 3, -1 -> byte 0xf3. Source: msModelSlim 26.1 `save/utils/pack.py`,
checked against its files in tests/golden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transload import bits
from transload.errors import FormatError

CHUNKS = (
    16  # scale_bias of row-parallel layers: one sum for every sixteenth of K, so that tensor parallel ranks slice it
)

# Row-parallel layers by their last name; engines split these along K.
_ROW_PARALLEL = ("down_proj", "o_proj", "w2", "out_proj", "dense", "dense_4h_to_h")


def unpack_rows(packed: Tensor) -> Tensor:
    """Codes of nibbles packed along N: int8 [N/2, K] -> uint8 [N, K]."""
    half, k = packed.shape
    codes = torch.empty(2 * half, k, dtype=torch.uint8, device=packed.device)
    codes[0::2], codes[1::2] = map(_flipped, bits.split(packed.view(torch.uint8), 4))
    return codes


def pack_rows(codes: Tensor) -> Tensor:
    """Nibbles packed along N: uint8 [N, K] -> int8 [N/2, K]. Inverse of `unpack_rows`."""
    return bits.join((_flipped(codes[0::2]), _flipped(codes[1::2])), 4).view(torch.int8)


def unpack_columns(packed: Tensor) -> Tensor:
    """Codes of nibbles packed along K: int8 [N, K/2] -> uint8 [N, K]."""
    return _flipped(bits.unpack(packed, 4, 2 * packed.shape[1]))


def pack_columns(codes: Tensor) -> Tensor:
    """Nibbles packed along K: uint8 [N, K] -> int8 [N, K/2]. Inverse of `unpack_columns`."""
    return bits.pack(_flipped(codes), 4, torch.int8)


def from_bytes(values: Tensor, width: int) -> Tensor:
    """Codes of one signed value a byte: int8 [N, K] -> uint8 [N, K]. Raises FormatError when one needs more bits."""
    half = 1 << (width - 1)
    if width < 8 and values.numel() and not -half <= int(values.min()) <= int(values.max()) < half:
        raise FormatError(f"weight spans {int(values.min())}..{int(values.max())}, beyond {width} bits")
    return (values.to(torch.int16) + half).to(torch.uint8)


def to_bytes(codes: Tensor) -> Tensor:
    """One signed value a byte: uint8 codes of 8 bits [N, K] -> int8 [N, K]. Inverse of `from_bytes`."""
    return (codes.to(torch.int16) - 128).to(torch.int8)


def scale_bias(name: str, weight: Tensor) -> Tensor:
    """What the kernel adds back because it multiplies the low half of an int8 activation minus 8: 8 * sum of w over K.

    weight: the dequantized float32 [N, K]. Returns float32 [N, 1], or [N, 16] for row-parallel names (sums of
    sixteenths of K, which needs K to be a multiple of 16).
    """
    chunks = CHUNKS if name.rpartition(".")[2] in _ROW_PARALLEL else 1
    return chunked_bias(weight, chunks)


def chunked_bias(weight: Tensor, chunks: int) -> Tensor:
    """8 times the sums over `chunks` equal parts of K: float32 [N, K] -> [N, chunks]."""
    n, k = weight.shape
    return 8 * weight.reshape(n, chunks, k // chunks).sum(-1)


def check_scale_bias(stored: Tensor, weight: Tensor, scales: Tensor) -> None:
    """FormatError when a stored scale_bias [N, C] is not 8 * sum of w over C parts of K.

    scales: float32 [N, G]. One of the tool's two savers rounds scales to bfloat16 first, so 1 % of what a sum of codes
    of medium size would be is allowed.
    """
    chunks = stored.shape[1]
    part = weight.shape[1] // chunks
    reach = 8 * part * 4 * scales.abs().amax(1, keepdim=True)
    worst = float(((stored.float() - chunked_bias(weight, chunks)).abs() - 0.01 * reach).max())
    if not worst <= 1e-6:
        raise FormatError(
            "scale_bias is not 8 * the sum of the dequantized weight over K; kernels would add a wrong number"
        )


def _flipped(codes: Tensor) -> Tensor:
    """Unsigned codes to nibbles of two's complement, and back: 8 is added modulo 16."""
    return (codes + 8) & 15
