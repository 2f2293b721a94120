"""The neutral value: what a quantized weight is, whatever tool wrote it.

    w[n, k] = scales[n, g] * (grid[codes[n, k]] - zeros[n, g])      zero = MIDPOINT, CODES or FLOATS
    w[n, k] = scales[n, g] *  grid[codes[n, k]] + mins[n, g]        zero = MINS
    w[n, k] = scales[n, g] *  grid[codes[n, k]]                     zero = NONE (codebooks)

with g = g_idx[k] when there is a g_idx (act-order), else k // group_size. N is out features, K in features,
G = ceil(K / group_size) groups. A leading axis E holds the experts of a mixture-of-experts layer.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import EllipsisType

import torch
from torch import Tensor

from transload.errors import ConfigError, FormatError

PER_CHANNEL = -1  # group_size: one group per output row; ActSpec.group_size: one scale per token

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_DTYPE_WORDS = dict(zip(SCALE_DTYPES, ("fp16", "bf16", "fp32"), strict=True))


class Grid(enum.Enum):
    """What a code means before scale and zero are applied."""

    INT = "int"  # the code itself, unsigned: 0 .. 2**bits - 1
    NF4 = "nf4"  # bitsandbytes' 16 normal-float values
    FP4 = "fp4"  # bitsandbytes' own 16 float values
    E2M1 = "e2m1"  # OCP 4-bit float (MXFP4, NVFP4)
    E4M3 = "e4m3"  # torch.float8_e4m3fn, the code is its byte

    def values(self, bits: int) -> Tensor:
        """The value of every code: float32 [2**bits]."""
        if self is Grid.INT:
            return torch.arange(1 << bits, dtype=torch.float32)
        if self is Grid.E4M3:
            return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        return torch.tensor(_CODEBOOKS[self], dtype=torch.float32)


# NF4 and FP4: bitsandbytes 0.50 `functional.get_4bit_type`, checked against its golden files. E2M1: OCP MX 1.0.
_CODEBOOKS: dict[Grid, tuple[float, ...]] = {
    Grid.NF4: (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    Grid.FP4: (
        0.0, 1 / 192, 128 / 192, 1.0, 64 / 192, 0.5, 32 / 192, 48 / 192,
        -0.0, -1 / 192, -128 / 192, -1.0, -64 / 192, -0.5, -32 / 192, -48 / 192,
    ),
    Grid.E2M1: (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0),
}  # fmt: skip


class Zero(enum.Enum):
    """Where the value zero sits: how codes become signed."""

    NONE = "none"  # codebooks carry their own sign
    MIDPOINT = "midpoint"  # symmetric: 2**(bits - 1) for every group, not stored
    CODES = "codes"  # an integer per group, 0 .. 2**bits - 1
    FLOATS = "floats"  # a float per group (HQQ, MatMulNBits)
    MINS = "mins"  # an offset per group instead of a zero point (GGUF *_1 and *_K)


@dataclass(frozen=True, slots=True)
class ActSpec:
    """How activations are quantized at run time: symmetric integers, scale = absmax / 127.

    group_size PER_CHANNEL (-1) is one scale per token; G > 0 is one per token and G neighbouring features.
    static means that scales were calibrated and are stored beside the weight, one per tensor.
    """

    bits: int = 8
    group_size: int = PER_CHANNEL
    static: bool = False

    def __post_init__(self) -> None:
        if self.bits != 8:
            raise ConfigError(f"activations of {self.bits} bits: only 8 are supported")
        if self.group_size != PER_CHANNEL and self.group_size < 1:
            raise ConfigError(f"activation group_size {self.group_size}: give -1 (per token) or a positive size")

    def __str__(self) -> str:
        if self.static and self.group_size < 0:
            return f"int{self.bits} static per tensor"
        kind = "static" if self.static else "dynamic"
        return f"int{self.bits} {kind} per " + ("token" if self.group_size < 0 else f"token and {self.group_size}")


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """The scheme of one linear layer.

    bits: width of a code, 2 to 8. group_size: neighbouring K that share a scale, -1 = the whole row.
    scale_dtype: dtype of scales, and of float zeros and mins. act: None = 16-bit activations (W4A16).
    act_order: the groups of K are given by a g_idx, not by position; a writer that has no g_idx refuses it.
    """

    bits: int
    group_size: int
    grid: Grid = Grid.INT
    zero: Zero = Zero.MIDPOINT
    scale_dtype: torch.dtype = torch.float32
    act: ActSpec | None = None
    act_order: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ConfigError(f"{self.bits}-bit codes: 2 to 8 are supported")
        if self.group_size != PER_CHANNEL and self.group_size < 1:
            raise ConfigError(f"group_size {self.group_size}: give -1 (per channel) or a positive size")
        if self.scale_dtype not in SCALE_DTYPES:
            raise ConfigError(f"scale dtype {self.scale_dtype}: float16, bfloat16 or float32 are supported")
        if (self.grid is Grid.INT) == (self.zero is Zero.NONE):
            raise ConfigError(
                f"grid {self.grid.value} with zero {self.zero.value}: integers need a zero, codebooks none"
            )
        width = {Grid.INT: self.bits, Grid.E4M3: 8}.get(self.grid, 4)
        if self.bits != width:
            raise ConfigError(f"grid {self.grid.value} has {width}-bit codes, not {self.bits}")

    @property
    def scheme(self) -> str:
        """The field's short name: W4A16, W4A8, W8A8."""
        return f"W{self.bits}A{self.act.bits if self.act else 16}"

    @property
    def midpoint(self) -> int:
        """The zero point of symmetric codes."""
        return 1 << (self.bits - 1)

    def groups(self, k: int) -> int:
        """Number of groups G in a row of k values."""
        return 1 if self.group_size == PER_CHANNEL else -(-k // self.group_size)

    def weights_only(self) -> QuantSpec:
        """The same weight scheme with 16-bit activations."""
        return replace(self, act=None)

    def __str__(self) -> str:
        grid = "int" if self.grid is Grid.INT else self.grid.value + " "
        group = "channel" if self.group_size == PER_CHANNEL else f"g{self.group_size}"
        zero = {Zero.NONE: "", Zero.MIDPOINT: " sym", Zero.CODES: " asym"}.get(self.zero, f" {self.zero.value}")
        dtype = _DTYPE_WORDS[self.scale_dtype]
        order = " act-order" if self.act_order else ""
        return f"{grid}{self.bits} {group}{zero}{order} {dtype}" + (f" + {self.act}" if self.act else "")


@dataclass(frozen=True, slots=True, eq=False)
class QTensor:
    """A quantized weight. Checked once, here; everything downstream may trust it.

    codes: uint8 [..., N, K], one code per byte. scales: spec.scale_dtype [..., N, G].
    zeros: uint8 [..., N, G] for Zero.CODES, spec.scale_dtype for Zero.FLOATS, else None.
    mins: spec.scale_dtype [..., N, G] for Zero.MINS, else None. g_idx: int32 [K], values 0 .. G - 1, or None.
    Raises FormatError when a shape, dtype or value contradicts the spec.
    """

    spec: QuantSpec
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    mins: Tensor | None = None
    g_idx: Tensor | None = None

    def __post_init__(self) -> None:
        _check_codes(self)
        _check_side("scales", self.scales, self.spec.scale_dtype, self)
        zero_dtype = {Zero.CODES: torch.uint8, Zero.FLOATS: self.spec.scale_dtype}.get(self.spec.zero)
        _check_side("zeros", self.zeros, zero_dtype, self)
        _check_side("mins", self.mins, self.spec.scale_dtype if self.spec.zero is Zero.MINS else None, self)
        if self.g_idx is not None:
            _check_g_idx(self.g_idx, self)
        if self.spec.act_order != (self.g_idx is not None):
            raise FormatError(
                f"g_idx {'missing' if self.g_idx is None else 'given'}, but act_order is {self.spec.act_order}"
            )

    @property
    def n(self) -> int:
        """Out features."""
        return self.codes.shape[-2]

    @property
    def k(self) -> int:
        """In features."""
        return self.codes.shape[-1]

    @property
    def experts(self) -> int | None:
        """Length of the leading expert axis, None for a plain linear."""
        return self.codes.shape[0] if self.codes.dim() == 3 else None

    def group_of_k(self) -> Tensor:
        """The group of every input feature: int64 [K]."""
        if self.g_idx is not None:
            return self.g_idx.long()
        size = self.k if self.spec.group_size == PER_CHANNEL else self.spec.group_size
        return torch.arange(self.k, device=self.codes.device) // max(size, 1)

    def zero_points(self, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """Zero points as floats [..., N, G], or None where the spec has none (NONE, MINS)."""
        if self.spec.zero is Zero.MIDPOINT:
            return torch.full_like(self.scales, self.spec.midpoint, dtype=dtype)
        return None if self.zeros is None else self.zeros.to(dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as floats [..., N, K], computed in `dtype` by the formula at the top of this file."""
        if self.spec.grid is Grid.INT:
            values = self.codes.to(dtype)  # exact: no code is above 255
        else:
            values = self.spec.grid.values(self.spec.bits).to(self.codes.device, dtype)[self.codes.int()]
        zeros, size = self.zero_points(dtype), self.k if self.spec.group_size == PER_CHANNEL else self.spec.group_size
        which: tuple[EllipsisType, Tensor | None] = (..., None)
        if self.g_idx is None and size and self.k % size == 0:
            blocks = values.view(*values.shape[:-1], self.k // size, size)  # a group is a row of it
        else:
            blocks, which = values, (..., self.group_of_k())
        if zeros is not None:
            blocks -= zeros[which]
        blocks *= self.scales.to(dtype)[which]
        if self.mins is not None:
            blocks += self.mins.to(dtype)[which]
        return values

    def with_act(self, act: ActSpec | None) -> QTensor:
        """The same numbers, to be multiplied with other activations."""
        return replace(self, spec=replace(self.spec, act=act))

    def rows(self, start: int, stop: int) -> QTensor:
        """Output rows start .. stop - 1, numbers untouched (splitting fused layers)."""
        parts = {name: getattr(self, name) for name in ("codes", "scales", "zeros", "mins")}
        return replace(self, **{name: t[..., start:stop, :] for name, t in parts.items() if t is not None})

    def expert(self, index: int) -> QTensor:
        """One expert of a stacked weight, as a plain linear."""
        parts = {name: getattr(self, name) for name in ("codes", "scales", "zeros", "mins")}
        return replace(self, **{name: t[index] for name, t in parts.items() if t is not None})

    def equal(self, other: QTensor) -> bool:
        """True when spec and every number are identical."""
        mine, theirs = ((q.codes, q.scales, q.zeros, q.mins, q.g_idx) for q in (self, other))
        return self.spec == other.spec and all(
            (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
            for a, b in zip(mine, theirs, strict=True)
        )


def fuse_rows(parts: Sequence[QTensor]) -> QTensor:
    """Stacks linears with the same input along N (q, k, v -> qkv), numbers untouched.

    Raises ConfigError when specs or g_idx differ: such layers cannot share one packed matmul.
    """
    first = parts[0]
    for part in parts[1:]:
        same_order = (part.g_idx is None and first.g_idx is None) or (
            part.g_idx is not None and first.g_idx is not None and torch.equal(part.g_idx, first.g_idx)
        )
        if part.spec != first.spec or not same_order:
            raise ConfigError(f"cannot fuse layers of different schemes: {first.spec} and {part.spec}")
    return _combine(parts, lambda tensors: torch.cat(tensors, dim=-2))


def stack_experts(parts: Sequence[QTensor]) -> QTensor:
    """Stacks per-expert linears [N, K] of one spec into [E, N, K], numbers untouched."""
    if any(p.spec != parts[0].spec or p.g_idx is not None for p in parts):
        raise ConfigError("cannot stack experts of different schemes or with act-order")
    return _combine(parts, lambda tensors: torch.stack(tensors))


def _combine(parts: Sequence[QTensor], join: Callable[[list[Tensor]], Tensor]) -> QTensor:
    def joined(name: str) -> Tensor | None:
        return None if getattr(parts[0], name) is None else join([getattr(p, name) for p in parts])

    codes, scales = join([p.codes for p in parts]), join([p.scales for p in parts])
    return QTensor(parts[0].spec, codes, scales, joined("zeros"), joined("mins"), parts[0].g_idx)


def _check_codes(w: QTensor) -> None:
    if w.codes.dtype != torch.uint8 or w.codes.dim() not in (2, 3):
        raise FormatError(f"codes are {w.codes.dtype} {tuple(w.codes.shape)}, expected uint8 [N, K] or [E, N, K]")
    if w.codes.is_meta or w.codes.numel() == 0 or w.spec.bits == 8:
        return
    top = int(w.codes.max())
    if top >= 1 << w.spec.bits:
        raise FormatError(f"code {top} does not fit {w.spec.bits} bits")


def _check_side(name: str, t: Tensor | None, dtype: torch.dtype | None, w: QTensor) -> None:
    if (t is None) != (dtype is None):
        raise FormatError(f"{name} {'missing' if t is None else 'given'}, but zero is {w.spec.zero.value}")
    if t is None:
        return
    shape = (*w.codes.shape[:-1], w.spec.groups(w.k))
    if t.dtype != dtype or tuple(t.shape) != shape:
        raise FormatError(f"{name} are {t.dtype} {tuple(t.shape)}, expected {dtype} {shape} for {w.spec} and K={w.k}")
    if t.is_meta or t.numel() == 0:
        return
    if t.is_floating_point() and not bool(torch.isfinite(t).all()):
        raise FormatError(f"{name} contain NaN or infinity")
    if t.dtype == torch.uint8 and int(t.max()) >= 1 << w.spec.bits:
        raise FormatError(f"{name} reach {int(t.max())}, which does not fit {w.spec.bits} bits")


def _check_g_idx(g_idx: Tensor, w: QTensor) -> None:
    groups = w.spec.groups(w.k)
    if g_idx.dtype != torch.int32 or tuple(g_idx.shape) != (w.k,):
        raise FormatError(f"g_idx is {g_idx.dtype} {tuple(g_idx.shape)}, expected int32 ({w.k},)")
    if w.k and not g_idx.is_meta and (int(g_idx.min()) < 0 or int(g_idx.max()) >= groups):
        raise FormatError(f"g_idx spans {int(g_idx.min())}..{int(g_idx.max())}, but there are {groups} groups")
