"""Limits of npu_weight_quant_batchmatmul, the dense W4A16 matmul: y = x @ ((weight + offset) * scale) + bias."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from transload_ascend.limits import INNER, Limit
from transload_ascend.products import Product

OPERATOR = "npu_weight_quant_batchmatmul"

_DOC = "OPDOC npu_weight_quant_batchmatmul"
_BIAS = {torch.float16: torch.float16, torch.bfloat16: torch.float32}
_NZ_GROUPS = (64, 128)


@dataclass(frozen=True, slots=True)
class Call:
    """One call with int4 weights in int32. n and k are the logical sizes; group_size 0 means per channel.

    transposed: the weight is a [K / 8, N] view of a contiguous [N, K / 8]. nz: it is stored as FRACTAL_NZ.
    """

    product: Product
    x_dtype: torch.dtype
    m: int
    k: int
    n: int
    group_size: int
    scale_dtype: torch.dtype
    scale_shape: tuple[int, ...]
    x_dims: int = 2
    weight_k: int | None = None  # K of the weight; None: the same
    weight_dtype: torch.dtype = torch.int32
    transposed: bool = False
    x_transposed: bool = False
    nz: bool = False
    offset_dtype: torch.dtype | None = None
    offset_shape: tuple[int, ...] | None = None
    bias_dtype: torch.dtype | None = None
    bias_shape: tuple[int, ...] | None = None
    bias_contiguous: bool = True
    inner_precise: int = 0

    @property
    def packed_axis(self) -> int:
        """Length of the axis that is packed by eight."""
        return self.k if self.transposed else self.n

    @property
    def groups(self) -> int:
        """Rows of the scale."""
        return -(-self.k // self.group_size) if self.group_size > 0 else 1

    @property
    def nz_groups(self) -> bool:
        """A weight per group, stored as FRACTAL_NZ."""
        return self.nz and self.group_size > 0


def _scale_shape(c: Call) -> bool:
    if c.group_size == 0:
        return c.scale_shape in ((c.n,), (1, c.n))
    return c.scale_shape == (c.groups, c.n)


LIMITS: tuple[Limit[Call], ...] = (
    Limit("int4-product", "int4 weights run on Atlas A2 and A3 only; on 310P choose W8A8, on 950 the MX formats",
          _DOC, lambda c: c.product.int4, ("product",)),
    Limit("x-dtype", "x is float16 or bfloat16", _DOC, lambda c: c.x_dtype in _BIAS, ("x_dtype",)),
    Limit("x-2d", "x has two axes; flatten the leading ones (a 3-D x fails on the device)",
          _DOC + "; issue 3210", lambda c: c.x_dims == 2, ("x_dims",)),
    Limit("weight-dtype", "4-bit weights are int4 packed in int32", _DOC,
          lambda c: c.weight_dtype == torch.int32, ("weight_dtype",)),
    Limit("k-match", "x and weight have the same K", "OPSRC WeightQuantBatchMatmulV2KernelNpuOpApi.cpp",
          lambda c: c.weight_k in (None, c.k), ("k", "weight_k")),
    Limit("not-empty", "empty tensors are not supported", _DOC, lambda c: min(c.m, c.k, c.n) > 0, ("m", "k", "n")),
    Limit("inner-size", f"K and N are at most {INNER}", _DOC, lambda c: max(c.k, c.n) <= INNER, ("k", "n")),
    Limit("rows", f"M is at most 2147483647, and {INNER} with a transposed x", _DOC,
          lambda c: c.m <= (INNER if c.x_transposed else 2**31 - 1), ("m", "x_transposed")),
    Limit("int4-lanes", "the packed axis (N, or K of a transposed weight) is a multiple of 8",
          "OPDOC npu_convert_weight_to_int4pack", lambda c: c.packed_axis % 8 == 0, ("n", "k", "transposed")),
    Limit("transposed-shape", "a transposed weight needs N > 1 and K > 8, else its view reads as not transposed",
          _DOC + ", constraints; META npu_weight_quant_batchmatmul",
          lambda c: not c.transposed or (c.n > 1 and c.k > 8),
          ("n", "k")),
    Limit("group-multiple", "the group size is 0 (per channel) or a multiple of 32 from 32 on", _DOC,
          lambda c: c.group_size == 0 or (c.group_size >= 32 and c.group_size % 32 == 0), ("group_size",)),
    Limit("group-below-k", "the group size is at most K - 1; one group is per channel", _DOC,
          lambda c: c.group_size < c.k, ("group_size", "k")),
    Limit("scale-dtype", "the scale has the dtype of x", _DOC, lambda c: c.scale_dtype == c.x_dtype,
          ("scale_dtype", "x_dtype")),
    Limit("scale-shape", "the scale is [N] or [1, N] per channel, [ceil(K / group size), N] per group",
          _DOC, _scale_shape,
          ("scale_shape", "n", "k", "group_size")),
    Limit("offset-shape", "the offset has the shape of the scale", _DOC,
          lambda c: c.offset_shape in (None, c.scale_shape), ("offset_shape", "scale_shape")),
    Limit("offset-dtype", "the offset has the dtype of the scale", _DOC,
          lambda c: c.offset_dtype in (None, c.scale_dtype), ("offset_dtype", "scale_dtype")),
    Limit("bias-dtype", "the bias is float16 for float16 x and float32 for bfloat16 x", _DOC,
          lambda c: c.bias_dtype in (None, _BIAS.get(c.x_dtype)), ("bias_dtype", "x_dtype")),
    Limit("bias-shape", "the bias is [N] or [1, N]", _DOC,
          lambda c: c.bias_shape in (None, (c.n,), (1, c.n)), ("bias_shape", "n")),
    Limit("bias-contiguous", "the bias is contiguous", _DOC, lambda c: c.bias_contiguous, ("bias_contiguous",)),
    Limit("inner-precise", "inner_precise is 0, or 1 for M <= 16 with FRACTAL_NZ weights per group", _DOC,
          lambda c: c.inner_precise == 0 or (c.inner_precise == 1 and c.nz_groups and c.m <= 16),
          ("inner_precise", "nz", "group_size", "m")),
    Limit("nz-channel-transposed", "a FRACTAL_NZ weight per channel is transposed", _DOC,
          lambda c: not c.nz or c.group_size > 0 or c.transposed, ("nz", "transposed")),
    Limit("nz-group-straight", "a FRACTAL_NZ weight per group is not transposed", _DOC,
          lambda c: not c.nz_groups or not c.transposed, ("nz", "transposed")),
    Limit("nz-group-size", "a FRACTAL_NZ weight takes groups of 64 or 128 (others fail with EZ1001 on the device)",
          _DOC + "; issues 5603 8770 10834 3588", lambda c: not c.nz_groups or c.group_size in _NZ_GROUPS,
          ("group_size",)),
    Limit("nz-group-k", "K of a FRACTAL_NZ weight per group is a multiple of the group size", _DOC,
          lambda c: not c.nz_groups or c.k % c.group_size == 0, ("k", "group_size")),
    Limit("nz-group-n", "N of a FRACTAL_NZ weight per group is a multiple of 64", _DOC,
          lambda c: not c.nz_groups or c.n % 64 == 0, ("n",)),
)  # fmt: skip
