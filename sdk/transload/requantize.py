"""Other numbers, on request: round-to-nearest under another scheme, with the error that it makes.

Rows are dequantized and rounded slab by slab, so a large weight costs its codes and a few megabytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from transload.errors import ConfigError
from transload.quant import PER_CHANNEL, ActSpec, QTensor, QuantSpec, Zero
from transload.reference import quantize_rtn

_SLAB = 1 << 22  # values in flight
_TEXT = re.compile(r"int([2-8])(?:-(?:g(\d{1,6})|(channel)))?((?:-(?:sym|asym|a8|fp16|bf16|fp32))*)")
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class Difference:
    """How far two weights are apart. max_error and rms_error are in the weight's own units, sqnr_db in decibels."""

    max_error: float
    rms_error: float
    sqnr_db: float  # 10 log10 of signal power over error power; infinite when they are equal

    def __str__(self) -> str:
        return f"max {self.max_error:.2e}, rms {self.rms_error:.2e}, SQNR {self.sqnr_db:.1f} dB"


def parse_spec(text: str) -> QuantSpec:
    """The scheme that a short text names; raises ConfigError for anything else.

    int<bits>[-g<size>|-channel][-asym][-a8][-fp16|-bf16|-fp32]: int4-g128 is 4 bits, groups of 128, symmetric, 16-bit
    activations, float16 scales. -asym has an integer zero point per group, -a8 quantizes activations to int8 per token.

    >>> str(parse_spec("int8-channel-a8"))
    'int8 channel sym float16 + int8 dynamic per token'
    """
    match = _TEXT.fullmatch(text.strip().lower())
    if not match:
        raise ConfigError(f"scheme '{text}': give int<bits>-g<group> or int<bits>-channel, for example int4-g128")
    bits, size, channel, flags = match.groups()
    words = flags.split("-")[1:]
    dtypes = [w for w in words if w in _DTYPES]
    if len(dtypes) > 1 or len(words) != len(set(words)) or {"sym", "asym"} <= set(words):
        raise ConfigError(f"scheme '{text}' says two things at once")
    group = PER_CHANNEL if channel else int(size) if size else 128
    return QuantSpec(
        int(bits),
        group,
        zero=Zero.CODES if "asym" in words else Zero.MIDPOINT,
        scale_dtype=_DTYPES[dtypes[0]] if dtypes else torch.float16,
        act=ActSpec() if "a8" in words else None,
    )


def requantize(w: QTensor | Tensor, spec: QuantSpec) -> tuple[QTensor, Difference]:
    """A weight [N, K] rounded to another scheme, and how far it moved. Groups follow position, also after act-order."""
    spec = replace(spec, act_order=False)
    parts, sums = [], _Sums()
    for rows in _float_rows(w):
        part = quantize_rtn(rows, spec)
        sums.add(rows, part.dequantize())
        parts.append(part)
    fields = ("codes", "scales", "zeros", "mins")
    joined = {f: torch.cat([getattr(p, f) for p in parts]) for f in fields if getattr(parts[0], f) is not None}
    return QTensor(spec, **joined), sums.difference()


def difference(a: QTensor | Tensor, b: QTensor | Tensor) -> Difference:
    """How far b is from a; both are [N, K] or both have one axis."""
    sums = _Sums()
    for left, right in zip(_float_rows(a), _float_rows(b), strict=True):
        sums.add(left, right)
    return sums.difference()


class _Sums:
    """Error and signal, added up slab by slab in float64."""

    def __init__(self) -> None:
        self.largest = self.error = self.signal = 0.0
        self.count = 0

    def add(self, want: Tensor, got: Tensor) -> None:
        apart = (got - want).double()
        self.count += want.numel()
        if want.numel():
            self.largest = max(self.largest, float(apart.abs().max()))
        self.error += float(apart.square().sum())
        self.signal += float(want.double().square().sum())

    def difference(self) -> Difference:
        if self.error == 0:
            return Difference(0.0, 0.0, math.inf)
        ratio = self.signal / self.error
        decibels = 10 * math.log10(ratio) if ratio > 0 else -math.inf
        return Difference(self.largest, math.sqrt(self.error / self.count), decibels)


def _float_rows(w: QTensor | Tensor) -> Iterator[Tensor]:
    """float32 slabs of rows."""
    n, k = (w.n, w.k) if isinstance(w, QTensor) else (w.shape[0], w[0].numel() if w.shape[0] else 1)
    step = max(1, _SLAB // max(k, 1))
    for start in range(0, n, step):
        stop = min(start + step, n)
        yield w.rows(start, stop).dequantize() if isinstance(w, QTensor) else w[start:stop].float()
