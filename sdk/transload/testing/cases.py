"""The conformance cases: every scheme once on a small shape, then shapes, dtypes and hard inputs on a few schemes."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from transload.hal import Problem
from transload.quant import PER_CHANNEL, ActSpec, Grid, QTensor, QuantSpec, Zero

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

# Normalised mean square error that 16-bit activations may cost, by dtype of x. A rounding to bf16 has a relative
# variance of 2**-16 / 12 = 1.3e-6; x, weight and result may each be rounded once, and float32 x may be multiplied in
# bf16 or as two int8 halves. All are below the 2e-5 that int8 activations cost, so that a silent W4A8 fails.
TOLERANCE_A16 = {FP32: 1e-5, BF16: 1e-5, FP16: 1e-5}

# 8-bit activations are compared with the reference of the same scheme: the integer sums are equal, and what remains is
# the float32 scaling and the rounding of the result to x's dtype. One activation rounded the other way would show as
# 1e-6 or more in float32.
TOLERANCE_A8 = {FP32: 1e-9, BF16: 5e-6, FP16: 5e-7}


@dataclass(frozen=True, slots=True, eq=False)
class Operands:
    """The inputs of a case, on the host. counts: int64 [E], rows of each expert."""

    x: Tensor
    weight: QTensor
    bias: Tensor | None
    counts: Tensor | None


@dataclass(frozen=True, slots=True)
class Case:
    """One problem with its data: y[m, n] = x[m, k] @ weight[n, k].T + bias.

    scales: "signed" has negative ones (GGUF's Q4_0 does), "zeros" has groups whose scale is 0. counts: rows of each
    expert. broken: the first row of x holds a NaN, the second an infinity; other rows must not change.
    """

    spec: QuantSpec
    m: int = 5
    n: int = 24
    k: int = 256
    x_dtype: torch.dtype = FP32
    bias: bool = False
    counts: tuple[int, ...] | None = None
    scales: Literal["positive", "signed", "zeros"] = "positive"
    broken: bool = False

    @property
    def id(self) -> str:
        """The case in one word: W4A16-int4-g128-sym-1x24x256 (M x N x K), then what is special."""
        spec = self.spec
        per_group = f"g{spec.act.group_size}" if spec.act and spec.act.group_size > 0 else ""
        grid = f"{spec.grid.value}{spec.bits}" if spec.grid is Grid.INT else spec.grid.value
        group = "channel" if spec.group_size == PER_CHANNEL else f"g{spec.group_size}"
        zero = {Zero.MIDPOINT: "sym", Zero.CODES: "asym"}.get(spec.zero, spec.zero.value)
        words = [spec.scheme + per_group, grid, group, zero, f"{self.m}x{self.n}x{self.k}"]
        words += ["order"] * spec.act_order
        words += [_short(spec.scale_dtype) + "scales"] * (spec.scale_dtype is not FP32)
        words += [_short(self.x_dtype)] * (self.x_dtype is not FP32)
        words += ["bias"] * self.bias
        words += [self.scales] * (self.scales != "positive")
        words += ["experts" + "_".join(map(str, self.counts))] if self.counts else []
        words += ["broken"] * self.broken
        return "-".join(words)

    @property
    def problem(self) -> Problem:
        """What a kernel is asked."""
        return Problem(self.n, self.k, self.spec, self.x_dtype, self.m, len(self.counts) if self.counts else None)

    @property
    def tolerance(self) -> float:
        """The largest normalised mean square error against the reference of the same scheme."""
        return (TOLERANCE_A8 if self.spec.act else TOLERANCE_A16)[self.x_dtype]

    def operands(self) -> Operands:
        """The data: the same on every machine, drawn from a generator that the id seeds."""
        random = torch.Generator().manual_seed(zlib.crc32(self.id.encode()))
        lead = (len(self.counts), self.n) if self.counts else (self.n,)
        x = torch.randn(self.m, self.k, generator=random).to(self.x_dtype)
        if self.broken:
            x[0, self.k // 2], x[1, self.k // 3] = torch.nan, torch.inf
        bias = torch.randn(lead, generator=random).to(self.x_dtype) if self.bias else None
        counts = torch.tensor(self.counts, dtype=torch.int64) if self.counts else None
        return Operands(x, self._weight(lead, random), bias, counts)

    def _weight(self, lead: tuple[int, ...], random: torch.Generator) -> QTensor:
        """Codes over their whole range, so that the extreme ones occur in every case."""
        spec, top = self.spec, 1 << self.spec.bits
        side = (*lead, spec.groups(self.k))
        codes = torch.randint(top, (*lead, self.k), generator=random, dtype=torch.uint8)
        if spec.grid is Grid.E4M3:
            codes[(codes & 0x7F) == 0x7F] = 0  # the two NaNs
        scales = torch.rand(side, generator=random) * 0.02 + 0.001
        if self.scales == "signed":
            scales *= torch.randint(2, side, generator=random) * 2 - 1
        if self.scales == "zeros":
            scales *= torch.randint(2, side, generator=random)
        position = torch.rand(side, generator=random) * (top - 1)
        zeros = {Zero.CODES: position.round().to(torch.uint8), Zero.FLOATS: position.to(spec.scale_dtype)}.get(
            spec.zero
        )
        mins = (-position * scales).to(spec.scale_dtype) if spec.zero is Zero.MINS else None
        g_idx = None
        if spec.act_order:
            size = self.k if spec.group_size == PER_CHANNEL else spec.group_size
            g_idx = (torch.arange(self.k) // size)[torch.randperm(self.k, generator=random)].int()
        return QTensor(spec, codes, scales.to(spec.scale_dtype), zeros, mins, g_idx)


def _short(dtype: torch.dtype) -> str:
    return {FP32: "fp32", BF16: "bf16", FP16: "fp16"}[dtype]


TOKEN = ActSpec()


def _per_group(spec: QuantSpec, size: int = 32) -> QuantSpec:
    """int8 activations with one scale per token and weight group (per channel: per `size` features)."""
    return replace(spec, act=ActSpec(group_size=size if spec.group_size == PER_CHANNEL else spec.group_size))


def _schemes() -> Iterator[Case]:
    """Bits, groups, zero points and activations, all combinations."""
    for bits in (4, 8):
        for group in (16, 32, 64, 128, PER_CHANNEL):
            for zero in (Zero.MIDPOINT, Zero.CODES, Zero.FLOATS, Zero.MINS):
                spec = QuantSpec(bits, group, zero=zero)
                yield Case(spec)
                yield Case(replace(spec, act=TOKEN))
                yield Case(_per_group(spec))


def _widths_and_grids() -> Iterator[Case]:
    """Codes of other widths (GGUF has 5 and 6 bits in groups of 32 and 16), other scale dtypes, codebooks."""
    for bits, group in ((2, 64), (3, 128), (5, 32), (6, 16)):
        for zero in (Zero.MIDPOINT, Zero.MINS):
            yield Case(QuantSpec(bits, group, zero=zero, scale_dtype=FP16))
            yield Case(_per_group(QuantSpec(bits, group, zero=zero, scale_dtype=FP16)))
    for dtype in (BF16, FP16):
        for zero in (Zero.MIDPOINT, Zero.FLOATS, Zero.MINS):
            yield Case(QuantSpec(4, 64, zero=zero, scale_dtype=dtype))
    for bits, group, grid in ((4, 64, Grid.NF4), (4, 64, Grid.FP4), (4, 32, Grid.E2M1), (8, 128, Grid.E4M3)):
        yield Case(QuantSpec(bits, group, grid, Zero.NONE))


SYM, ASYM, MINS = QuantSpec(4, 128), QuantSpec(4, 32, zero=Zero.CODES), QuantSpec(4, 32, zero=Zero.MINS)
# The schemes that the remaining cases vary around: the common checkpoint, llama.cpp's, and both activations.
MAIN = (SYM, MINS, replace(SYM, act=TOKEN), _per_group(SYM), _per_group(ASYM), QuantSpec(8, PER_CHANNEL, act=TOKEN))


def _shapes() -> Iterator[Case]:
    """Rows from none to 512, one output, odd outputs, K of one group, K with a part of a group, long rows."""
    for spec in MAIN:
        for m in (0, 1, 2, 8, 17, 64):
            yield Case(spec, m=m, n=40)
        for n, k in ((1, 256), (13, 384), (64, 128), (24, 200), (17, 72), (8, 2048)):
            yield Case(spec, m=3, n=n, k=k)
        yield Case(spec, m=1, n=13, k=200)
    for spec in (SYM, _per_group(SYM)):
        yield Case(spec, m=512, n=72)


def _inputs() -> Iterator[Case]:
    """dtypes of x, bias, negative and zero scales, NaN and infinity."""
    for spec in MAIN:
        for dtype in (BF16, FP16):
            yield Case(spec, x_dtype=dtype, bias=True)
        yield Case(spec, m=1, bias=True)
        yield Case(spec, scales="signed")
        yield Case(spec, scales="zeros")
        yield Case(spec, broken=True)


def _orders_and_experts() -> Iterator[Case]:
    """act-order, and mixtures of experts with idle experts at every place."""
    for group in (32, 128):
        for zero in (Zero.MIDPOINT, Zero.CODES):
            yield Case(QuantSpec(4, group, zero=zero, act_order=True))
    yield Case(QuantSpec(4, 32, act=TOKEN, act_order=True))
    yield Case(QuantSpec(4, 64, act_order=True), k=200)
    for spec in MAIN:
        yield Case(spec, m=9, counts=(4, 0, 3, 2))
    for counts in ((0, 0, 5), (5, 0, 0), (0, 0), (1, 1, 1, 1, 1, 1, 1, 1)):
        yield Case(SYM, m=sum(counts), counts=counts)
    yield Case(SYM, m=9, counts=(4, 0, 3, 2), bias=True, x_dtype=BF16)


CASES: tuple[Case, ...] = (*_schemes(), *_widths_and_grids(), *_shapes(), *_inputs(), *_orders_and_experts())
