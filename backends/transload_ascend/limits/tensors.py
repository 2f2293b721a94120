"""Limits of the operators that prepare tensors: dynamic quantization, int4 packing, scale words, FRACTAL_NZ, SwiGLU."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from transload_ascend.limits import Limit
from transload_ascend.products import Product

_HALVES = (torch.float16, torch.bfloat16)
_THREE = (Product.A2, Product.A3, Product.P310)


@dataclass(frozen=True, slots=True)
class Call:
    """One call on one tensor."""

    product: Product
    dtype: torch.dtype
    shape: tuple[int, ...]
    contiguous: bool = True
    low: int = 0  # smallest and largest value, where the limit looks at them
    high: int = 0


DYNAMIC_QUANT: tuple[Limit[Call], ...] = (
    Limit("product", "runs on Atlas A2 and A3; on 310P as vllm-ascend uses it there",
          "OPDOC npu_dynamic_quant; VA _310p", lambda c: c.product in _THREE, ("product",)),
    Limit("x-dtype", "x is float16 or bfloat16", "OPDOC npu_dynamic_quant", lambda c: c.dtype in _HALVES, ("dtype",)),
    Limit("dims", "x has at least two axes", "OPDOC npu_dynamic_quant", lambda c: len(c.shape) >= 2, ("shape",)),
)  # fmt: skip

INT4PACK: tuple[Limit[Call], ...] = (
    Limit("product", "runs on Atlas A2 and A3 only", "OPDOC npu_convert_weight_to_int4pack", lambda c: c.product.int4,
          ("product",)),
    Limit("dtype", "the weight is int32, one value an element", "OPDOC npu_convert_weight_to_int4pack",
          lambda c: c.dtype == torch.int32, ("dtype",)),
    Limit("2d", "the weight has two axes", "OPDOC npu_convert_weight_to_int4pack", lambda c: len(c.shape) == 2,
          ("shape",)),
    Limit("not-empty", "no axis is empty", "OPSRC ConvertWeightToINT4PackKernelNpuOpApi.cpp",
          lambda c: min(c.shape) > 0,
          ("shape",)),
    Limit("lanes", "the last axis is a multiple of 8", "OPDOC npu_convert_weight_to_int4pack",
          lambda c: c.shape[-1] % 8 == 0, ("shape",)),
    Limit("contiguous", "the weight is contiguous", "OPDOC npu_convert_weight_to_int4pack", lambda c: c.contiguous,
          ("contiguous",)),
    Limit("range", "values are -8 .. 7; the operator cuts off the upper bits of others in silence",
          "OPSRC ConvertWeightToINT4PackKernelNpuOpApi.cpp", lambda c: c.low >= -8 and c.high <= 7, ("low", "high")),
)  # fmt: skip

TRANS_QUANT_PARAM: tuple[Limit[Call], ...] = (
    Limit("product", "runs on Atlas A2, A3 and 310P", "OPDOC npu_trans_quant_param",
          lambda c: c.product in _THREE, ("product",)),
    Limit("dtype", "the scale is float32", "OPDOC npu_trans_quant_param", lambda c: c.dtype == torch.float32,
          ("dtype",)),
    Limit("shape", "the scale is [n] or [1, n]; flatten others", "META npu_trans_quant_param",
          lambda c: len(c.shape) == 1 or (len(c.shape) == 2 and c.shape[0] == 1), ("shape",)),
    Limit("not-empty", "the scale is not empty", "OPDOC npu_trans_quant_param", lambda c: 0 not in c.shape, ("shape",)),
    Limit("contiguous", "the scale is contiguous", "OPDOC npu_trans_quant_param", lambda c: c.contiguous,
          ("contiguous",)),
)  # fmt: skip

# FRACTAL_NZ of packed weights only: the bytes are cast and then read as int32, so neither axis may be padded.
FORMAT_CAST: tuple[Limit[Call], ...] = (
    Limit("product", "4-bit weights exist on Atlas A2 and A3 only", "OPDOC npu_format_cast", lambda c: c.product.int4,
          ("product",)),
    Limit("dtype", "the packed bytes are int8: an int32 cast has blocks of other widths",
          "VA w4a8.py; PTA FormatHelper.cpp",
          lambda c: c.dtype == torch.int8, ("dtype",)),
    Limit("dims", "the weight has two axes, or three with experts", "PTA FormatHelper.cpp",
          lambda c: len(c.shape) in (2, 3), ("shape",)),
    Limit("rows", "rows are a multiple of 16, the height of a block", "OPDOC npu_format_cast",
          lambda c: c.shape[-2] % 16 == 0, ("shape",)),
    Limit("columns", "a row is a multiple of 32 bytes, the width of a block: 64 int4 values", "OPDOC npu_format_cast",
          lambda c: c.shape[-1] % 32 == 0, ("shape",)),
    Limit("contiguous", "the bytes are contiguous", "VA utils.py", lambda c: c.contiguous, ("contiguous",)),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class SwigluCall:
    """One call of npu_dequant_swiglu_quant on x [T, 2H] with groups of rows."""

    product: Product
    x_dtype: torch.dtype
    x_shape: tuple[int, ...]
    groups: int
    scale_dtype: torch.dtype
    scale_shape: tuple[int, ...]
    token_dtype: torch.dtype
    token_shape: tuple[int, ...]
    list_dtype: torch.dtype = torch.int64

    @property
    def half(self) -> int:
        """H, the width of gate and of up."""
        return self.x_shape[-1] // 2


_SWIGLU = "OPDOC npu_dequant_swiglu_quant"

DEQUANT_SWIGLU: tuple[Limit[SwigluCall], ...] = (
    Limit("product", "runs on Atlas A2 and A3 only", _SWIGLU, lambda c: c.product.int4, ("product",)),
    Limit("x-dtype", "x is int32, the sums of an int8 matmul", _SWIGLU, lambda c: c.x_dtype == torch.int32,
          ("x_dtype",)),
    Limit("x-shape", "x is [T, 2 * H]", _SWIGLU, lambda c: len(c.x_shape) == 2 and c.x_shape[1] % 2 == 0, ("x_shape",)),
    Limit("width", "H is at most 10496 and a multiple of 64", _SWIGLU, lambda c: c.half <= 10496 and c.half % 64 == 0,
          ("half",)),
    Limit("scale", "the weight scale is float32 [groups, 2 * H]", _SWIGLU,
          lambda c: (c.scale_dtype, c.scale_shape) == (torch.float32, (c.groups, c.x_shape[-1])),
          ("scale_dtype", "scale_shape", "groups")),
    Limit("token-scale", "the scale per token is float32 [T, 1]", _SWIGLU,
          lambda c: (c.token_dtype, c.token_shape) == (torch.float32, (c.x_shape[0], 1)),
          ("token_dtype", "token_shape")),
    Limit("list-dtype", "the counts are int64", _SWIGLU, lambda c: c.list_dtype == torch.int64, ("list_dtype",)),
)  # fmt: skip
