"""The Triton products as a torch operator, so that torch.compile keeps its graph whole around them.

In eager mode the kernels call `launch.multiply` directly: an operator call costs more than a small launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transload.hal import Packed
from transload.quant import ActSpec, QuantSpec, Zero
from transload_cuda.jit import launch


@torch.library.custom_op("transload_cuda::matmul", mutates_args=())
def matmul_op(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    mins: Tensor | None,
    order: Tensor | None,
    bias: Tensor | None,
    counts: Tensor | None,
    n: int,
    bits: int,
    group_size: int,
    zero: str,
    act_group: int,
) -> Tensor:
    """`launch.multiply` with its weight spread out. act_group: ActSpec.group_size, or 0 for 16-bit activations."""
    act = ActSpec(group_size=act_group) if act_group else None
    spec = QuantSpec(bits, group_size, zero=Zero(zero), scale_dtype=scales.dtype, act=act, act_order=order is not None)
    named = {"codes": codes, "scales": scales, "zeros": zeros, "mins": mins, "order": order}
    tensors = {name: t for name, t in named.items() if t is not None}
    return launch.multiply(x, tensors, spec, n, bias, counts)


@matmul_op.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    mins: Tensor | None,
    order: Tensor | None,
    bias: Tensor | None,
    counts: Tensor | None,
    n: int,
    bits: int,
    group_size: int,
    zero: str,
    act_group: int,
) -> Tensor:
    return x.new_empty(x.shape[0], n)


def traced_multiply(x: Tensor, w: Packed, bias: Tensor | None, counts: Tensor | None) -> Tensor:
    """The product of a packed weight as one node of the graph."""
    spec, t = w.spec, w.tensors
    act = spec.act.group_size if spec.act else 0
    y: Tensor = matmul_op(
        x, t["codes"], t["scales"], t.get("zeros"), t.get("mins"), t.get("order"), bias, counts,
        w.n, spec.bits, spec.group_size, spec.zero.value, act,
    )  # fmt: skip
    return y
