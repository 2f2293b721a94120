"""The same numbers under another scheme: what is exact, and the rewriting itself.

more bits         5-bit codes fit in 8 bits; a symmetric zero moves from 16 to 128 and the codes with it
wider scales      float16 and bfloat16 are float32 numbers
explicit zeros    a symmetric midpoint written out as a zero point per group
implicit zeros    code minus zero point fits symmetric codes of one bit more
smaller groups    a scale repeated; a row's one scale becomes one per group
E2M1 as int8      its values times two are whole numbers up to 12, the scale is halved
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from transload.errors import ConfigError
from transload.quant import PER_CHANNEL, Grid, QTensor, QuantSpec, Zero

WIDTHS = (2, 3, 4, 5, 6, 7, 8)


def exact_forms(spec: QuantSpec, group_size: int | None = None) -> Iterator[QuantSpec]:
    """Every scheme that holds all numbers of `spec`, itself first, then the nearest: bits, zeros, scales.

    Groups stay as they are, because smaller ones cost memory, unless group_size says that the target has only one.
    """
    if group_size is not None and _divides(group_size, spec):
        spec = replace(spec, group_size=group_size)
    starts = [spec]
    if spec.grid is Grid.E2M1:
        starts.append(replace(spec, bits=8, grid=Grid.INT, zero=Zero.MIDPOINT))
    if spec.zero is Zero.CODES and spec.bits < WIDTHS[-1]:
        starts.append(replace(spec, bits=spec.bits + 1, zero=Zero.MIDPOINT))
    seen = set()
    for start in starts:
        bits = [b for b in WIDTHS if b >= start.bits] if start.grid is Grid.INT else [start.bits]
        zeros = [start.zero] + ([Zero.CODES] if start.zero is Zero.MIDPOINT else [])
        scales = [start.scale_dtype] + ([torch.float32] if start.scale_dtype is not torch.float32 else [])
        for dtype, zero, b in product(scales, zeros, bits):
            form = replace(start, bits=b, zero=zero, scale_dtype=dtype)
            if form not in seen:
                seen.add(form)
                yield form


def rewrite(w: QTensor, spec: QuantSpec) -> QTensor:
    """The same numbers as `w` under `spec`. Raises ConfigError where that is not possible exactly."""
    if spec == w.spec:
        return w
    if w.spec.grid is Grid.E2M1 and spec.grid is Grid.INT:
        w = _e2m1_as_int8(w)
    if w.spec.grid is not spec.grid or w.spec.act_order != spec.act_order or spec.bits < w.spec.bits:
        raise ConfigError(f"{w.spec} cannot be rewritten as {spec} without changing numbers")
    w = _regrouped(w, spec.group_size)
    if w.spec.zero is Zero.CODES and spec.zero is Zero.MIDPOINT and spec.bits > w.spec.bits:
        w = _around_midpoint(w)
    codes, zeros = w.codes, w.zeros
    if w.spec.zero is Zero.MIDPOINT and spec.zero in (Zero.MIDPOINT, Zero.CODES):
        codes = codes + (spec.midpoint - w.spec.midpoint)
        if spec.zero is Zero.CODES:
            zeros = torch.full_like(w.scales, spec.midpoint, dtype=torch.uint8)
    elif w.spec.zero is not spec.zero:
        raise ConfigError(f"{w.spec} cannot be rewritten as {spec} without changing numbers")
    if zeros is not None and spec.zero is Zero.FLOATS:
        zeros = _widened(zeros, spec)
    mins = None if w.mins is None else _widened(w.mins, spec)
    return QTensor(spec, codes, _widened(w.scales, spec), zeros, mins, w.g_idx)


def _widened(t: Tensor, spec: QuantSpec) -> Tensor:
    if t.dtype is not spec.scale_dtype and spec.scale_dtype is not torch.float32:
        raise ConfigError(f"{t.dtype} scales cannot be rewritten as {spec.scale_dtype} without rounding")
    return t.to(spec.scale_dtype)


def _regrouped(w: QTensor, size: int) -> QTensor:
    """Smaller groups of K, each with the scale of the group that it was part of."""
    old = w.spec.group_size
    if size == old:
        return w
    whole = old == PER_CHANNEL
    if size == PER_CHANNEL or w.g_idx is not None or (not whole and (size > old or old % size)):
        raise ConfigError(f"groups of {old} cannot be rewritten as groups of {size} without changing numbers")
    source = torch.arange(-(-w.k // size)) * size // (w.k if whole else old)
    parts = {name: getattr(w, name) for name in ("scales", "zeros", "mins")}
    spec = replace(w.spec, group_size=size)
    return replace(w, spec=spec, **{name: t[..., source] for name, t in parts.items() if t is not None})


def _around_midpoint(w: QTensor) -> QTensor:
    """Zero points subtracted from the codes: 0..15 minus 0..15 fits the signed range of 5 bits."""
    assert w.zeros is not None
    spec = replace(w.spec, bits=w.spec.bits + 1, zero=Zero.MIDPOINT)
    shift = spec.midpoint - w.zeros  # in 1 .. midpoint, so that codes stay in their range without wrapping
    return QTensor(spec, w.codes + shift[..., w.group_of_k()], w.scales, g_idx=w.g_idx)


def _divides(size: int, spec: QuantSpec) -> bool:
    """True when groups of `spec` are whole numbers of groups of `size`, as far as the spec says."""
    if spec.act_order or spec.group_size == size:
        return False
    return spec.group_size == PER_CHANNEL or (spec.group_size > size and spec.group_size % size == 0)


def _e2m1_as_int8(w: QTensor) -> QTensor:
    """Codes 0..15 as twice their value plus 128; halving a float32 scale is exact."""
    doubled = (w.spec.grid.values(w.spec.bits) * 2 + 128).to(torch.uint8)
    spec = replace(w.spec, bits=8, grid=Grid.INT, zero=Zero.MIDPOINT)
    return QTensor(spec, doubled[w.codes.long()], w.scales / 2)
