"""How one weight [N, K] lies in an engine's memory: the bytes of its codes, scales, zero points and side tensors.

A Scheme says what the engine holds while it serves, which is not what the file holds: GPTQ's constant zero points are
dropped, msModelSlim's one-int4-per-byte files are packed, Ascend's scales grow to 64 bits.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass


class Kind(enum.Enum):
    """Families of storage."""

    FLOAT = "float"
    INT = "int"  # groups or channels of integers, 16-bit activations
    INT_ACT = "int-act"  # integers with dynamic int8 activations
    FP8 = "fp8"
    FP4 = "fp4"  # E2M1 with small block scales
    BLOCKS = "blocks"  # self-contained blocks along K (GGUF, bitsandbytes)


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a weight is stored.

    name: shown to people (bf16, int4 g128). bits: width of a code. group: values along K that share a scale, -1 = one
    per row, 0 = none. zeros: bits of a stored zero point per group. scale_bytes: width of a scale.
    rows: rows that share a scale (128 for blocks of FP8). block: (values, bytes) of Kind.BLOCKS.
    experts_only: engines hold this scheme for routed experts alone.
    """

    name: str
    kind: Kind
    bits: int
    group: int = 0
    zeros: int = 0
    scale_bytes: int = 2
    rows: int = 1
    block: tuple[int, int] = (1, 2)
    act_order: bool = False

    @property
    def grouped(self) -> bool:
        """True when scales cut K into groups that a tensor-parallel cut must respect."""
        return self.group > 0

    def groups(self, k: int) -> int:
        """Scales in a row of k values."""
        return -(-k // self.group) if self.group > 0 else 1


@dataclass(frozen=True, slots=True)
class Parts:
    """Bytes of one weight by what they are. codes of a float weight are its numbers."""

    codes: int = 0
    scales: int = 0
    zeros: int = 0
    side: int = 0  # g_idx, scale_bias, copies of scales

    @property
    def total(self) -> int:
        """All bytes."""
        return self.codes + self.scales + self.zeros + self.side

    def times(self, count: int) -> Parts:
        """The same, count times (experts)."""
        return Parts(self.codes * count, self.scales * count, self.zeros * count, self.side * count)

    def plus(self, other: Parts) -> Parts:
        """Both together."""
        return Parts(
            self.codes + other.codes, self.scales + other.scales, self.zeros + other.zeros, self.side + other.side
        )


BF16 = Scheme("bf16", Kind.FLOAT, 16)
FP32 = Scheme("fp32", Kind.FLOAT, 32)


def integer(bits: int, group: int, asymmetric: bool = False, act_order: bool = False) -> Scheme:
    """Weight-only integers as GPTQ, AWQ and compressed-tensors store them; group -1 = per channel."""
    size = "channel" if group == -1 else f"g{group}"
    name = f"int{bits} {size}" + (" asym" if asymmetric else "") + (" act-order" if act_order else "")
    return Scheme(name, Kind.INT, bits, group, zeros=bits if asymmetric else 0, act_order=act_order)


def integer_act(bits: int, group: int = -1) -> Scheme:
    """Integers multiplied with dynamic int8 activations: W8A8, W4A8."""
    size = "channel" if group == -1 else f"g{group}"
    return Scheme(f"w{bits}a8 {size}", Kind.INT_ACT, bits, group, scale_bytes=4)


def fp8_block(rows: int = 128, group: int = 128) -> Scheme:
    """FP8 in blocks of rows x group with float32 scales."""
    return Scheme(f"fp8 {rows}x{group}", Kind.FP8, 8, group, scale_bytes=4, rows=rows)


FP8_CHANNEL = Scheme("fp8 channel", Kind.FP8, 8, -1, scale_bytes=4)
NVFP4 = Scheme("nvfp4 g16", Kind.FP4, 4, 16, scale_bytes=1)
MXFP4 = Scheme("mxfp4 g32", Kind.FP4, 4, 32, scale_bytes=1)


def blocks(name: str, values: int, size: int) -> Scheme:
    """Self-contained blocks of `values` numbers in `size` bytes (GGUF types, bitsandbytes with its absmax)."""
    return Scheme(name, Kind.BLOCKS, max(1, round(8 * size / values)), values, block=(values, size))


def held(scheme: Scheme, n: int, k: int, platform: str, experts: bool) -> Parts:
    """Bytes of one rank's piece [n, k] of a weight in an engine's memory.

    platform is "cuda", "ascend" or "cpu". Marlin pads pieces on CUDA (vLLM 0.32, marlin_utils.marlin_padded_nk and
    marlin_moe_padded_intermediate); Ascend keeps W8A8 scales three times and W4A8 scales as int64 with a float32
    scale_bias (vllm-ascend, quantization/methods/w8a8.py and w4a8.py).
    """
    if scheme.kind is Kind.FLOAT:
        return Parts(codes=n * k * scheme.bits // 8)
    if scheme.kind is Kind.BLOCKS:
        values, size = scheme.block
        return Parts(codes=n * -(-k // values) * size)
    if scheme.kind is Kind.INT:
        return _held_int(scheme, n, k, platform, experts)
    if scheme.kind is Kind.INT_ACT:
        return _held_int_act(scheme, n, k, platform)
    scales = -(-n // scheme.rows) * scheme.groups(k) * scheme.scale_bytes
    return Parts(codes=n * k * scheme.bits // 8, scales=scales, side=4 if scheme is NVFP4 else 0)


def _held_int(s: Scheme, n: int, k: int, platform: str, experts: bool) -> Parts:
    if platform == "cuda" and not experts and s.bits in (4, 8):
        n, k = marlin_padded(n, k, s.group)
    scales = n * s.groups(k) * s.scale_bytes
    # The Ascend W4A16 kernel wants an explicit zero offset per group in the model's dtype.
    zeros = n * s.groups(k) * 2 if platform == "ascend" else n * s.groups(k) * s.zeros // 8
    return Parts(codes=n * k * s.bits // 8, scales=scales, zeros=zeros, side=held_order(k) if s.act_order else 0)


def held_order(k: int) -> int:
    """Bytes that act-order adds to a matmul with k inputs: g_idx and the order that sorts it, int32 each."""
    return 8 * k


def _held_int_act(s: Scheme, n: int, k: int, platform: str) -> Parts:
    codes, groups = n * k * s.bits // 8, s.groups(k)
    if platform != "ascend":
        return Parts(codes=codes, scales=n * groups * 4)
    if s.bits == 4:
        return Parts(codes=codes, scales=n * groups * 8, side=n * 4)
    return Parts(codes=codes, scales=n * groups * 2, side=n * groups * 6)


def marlin_padded(n: int, k: int, group: int) -> tuple[int, int]:
    """(n, k) after Marlin's zero padding to its thread tiles: (64, 128) or (128, 64), whichever is smaller."""
    g = max(group, 1)
    options = ((_up(n, 64), _up(k, math.lcm(128, g))), (_up(n, 128), _up(k, math.lcm(64, g))))
    return min(options, key=lambda nk: (nk[0] * nk[1], nk[0] + nk[1]))


def _up(value: int, step: int) -> int:
    return -(-value // step) * step
