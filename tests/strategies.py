"""Hypothesis strategies: quantized weights of every scheme, over small odd shapes."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from transload.quant import PER_CHANNEL, Grid, QTensor, QuantSpec, Zero

_CODEBOOKS = {Grid.NF4: 4, Grid.FP4: 4, Grid.E2M1: 4, Grid.E4M3: 8}


@st.composite
def specs(draw: st.DrawFn, codebooks: bool = True) -> QuantSpec:
    """Any scheme with 16-bit activations, without act-order."""
    group = draw(st.sampled_from((PER_CHANNEL, 1, 5, 8, 16, 32, 100)))
    dtype = draw(st.sampled_from((torch.float16, torch.bfloat16, torch.float32)))
    grid = draw(st.sampled_from(tuple(Grid))) if codebooks else Grid.INT
    if grid is not Grid.INT:
        return QuantSpec(_CODEBOOKS[grid], group, grid, Zero.NONE, dtype)
    zero = draw(st.sampled_from([z for z in Zero if z is not Zero.NONE]))
    return QuantSpec(draw(st.integers(2, 8)), group, zero=zero, scale_dtype=dtype)


@st.composite
def weights(draw: st.DrawFn, codebooks: bool = True, spec: QuantSpec | None = None) -> QTensor:
    """A weight [N, K] with random codes, scales of both signs and some zero scales."""
    spec = spec or draw(specs(codebooks))
    n, k = draw(st.integers(1, 9)), draw(st.integers(1, 70))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    groups, top = spec.groups(k), 1 << spec.bits
    codes = torch.randint(top, (n, k), generator=random, dtype=torch.uint8)
    if spec.grid is Grid.E4M3:
        codes[(codes & 0x7F) == 0x7F] = 0  # NaN is not a weight
    scales = torch.randn(n, groups, generator=random) * torch.randint(2, (n, groups), generator=random)
    zeros: torch.Tensor | None = None
    if spec.zero is Zero.CODES:
        zeros = torch.randint(top, (n, groups), generator=random, dtype=torch.uint8)
    elif spec.zero is Zero.FLOATS:
        zeros = (torch.rand(n, groups, generator=random) * top).to(spec.scale_dtype)
    mins = torch.randn(n, groups, generator=random).to(spec.scale_dtype) if spec.zero is Zero.MINS else None
    return QTensor(spec, codes, scales.to(spec.scale_dtype), zeros, mins)
