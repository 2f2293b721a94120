"""Limits of npu_quant_matmul: int8 x int8 with scales per token (W8A8), and int8 x int4 per group of 256 (A8W4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from transload_ascend.limits import INNER, Limit
from transload_ascend.products import Product

OPERATOR = "npu_quant_matmul"
A8W4_GROUP = 256

_DOC = "OPDOC npu_quant_matmul"
_META = "META npu_quant_matmul"
_TEST = "OPTEST test_npu_quant_matmul.py"
_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Call:
    """One dynamic call: x int8 [M, K] with a scale per token, times a weight [K, N]. n and k are the logical sizes."""

    product: Product
    m: int
    k: int
    n: int
    scale_dtype: torch.dtype
    scale_shape: tuple[int, ...]
    token_shape: tuple[int, ...]
    output_dtype: torch.dtype
    x_dtype: torch.dtype = torch.int8
    weight_dtype: torch.dtype = torch.int8
    weight_k: int | None = None
    x_dims: int = 2
    weight_dims: int = 2
    weight_contiguous: bool = True
    token_dtype: torch.dtype = torch.float32
    offset_dtype: torch.dtype | None = None
    offset_shape: tuple[int, ...] | None = None
    bias_dtype: torch.dtype | None = None
    bias_shape: tuple[int, ...] | None = None


def _bias_dtype(c: Call) -> bool:
    if c.bias_dtype is torch.bfloat16:
        return c.output_dtype is torch.bfloat16
    if c.bias_dtype is torch.float16:
        return c.output_dtype is torch.float16
    return c.bias_dtype in (None, torch.int32, torch.float32)


_BOTH: tuple[Limit[Call], ...] = (
    Limit("x-dtype", "x is int8", _DOC, lambda c: c.x_dtype == torch.int8, ("x_dtype",)),
    Limit("2d", "x and weight have two axes; flatten the leading ones", _META,
          lambda c: (c.x_dims, c.weight_dims) == (2, 2), ("x_dims", "weight_dims")),
    Limit("k-match", "x and weight have the same K", _META, lambda c: c.weight_k in (None, c.k), ("k", "weight_k")),
    Limit("not-empty", "empty tensors are not supported", _DOC, lambda c: min(c.m, c.k, c.n) > 0, ("m", "k", "n")),
    Limit("inner-size", f"the last axes of x (K) and of the weight (N) are at most {INNER}; split wider layers", _DOC,
          lambda c: max(c.k, c.n) <= INNER, ("k", "n")),
    Limit("output-dtype", "the output is float16 or bfloat16", _DOC, lambda c: c.output_dtype in _HALVES,
          ("output_dtype",)),
    Limit("token-dtype", "the scale per token is float32", _DOC, lambda c: c.token_dtype == torch.float32,
          ("token_dtype",)),
)  # fmt: skip

W8A8_LIMITS: tuple[Limit[Call], ...] = (
    Limit("w8a8-product", "scales per token run on Atlas A2 and A3; on 310P as vllm-ascend runs W8A8_DYNAMIC there",
          _DOC + "; VA _310p", lambda c: c.product in (Product.A2, Product.A3, Product.P310), ("product",)),
    *_BOTH,
    Limit("weight-dtype", "the weight is int8", _DOC, lambda c: c.weight_dtype == torch.int8, ("weight_dtype",)),
    Limit("310p-output", "310P has no bfloat16 matmul", _DOC,
          lambda c: c.product is not Product.P310 or c.output_dtype is torch.float16, ("product", "output_dtype")),
    Limit("token-shape", "the scale per token is [M]", _META, lambda c: c.token_shape == (c.m,), ("token_shape", "m")),
    Limit("scale-shape", "the scale is [1] or [N]", _META, lambda c: c.scale_shape in ((1,), (c.n,)),
          ("scale_shape", "n")),
    Limit("scale-dtype", "the scale is float32, or bfloat16 for bfloat16 output", _DOC + ", table 2",
          lambda c: c.scale_dtype == torch.float32 or (c.scale_dtype == c.output_dtype == torch.bfloat16),
          ("scale_dtype", "output_dtype")),
    Limit("no-offset", "there is no offset beside a scale per token", _DOC + ", table 2",
          lambda c: c.offset_shape is None, ("offset_shape",)),
    Limit("bias-shape", "the bias is [N]", _META, lambda c: c.bias_shape in (None, (c.n,)), ("bias_shape", "n")),
    Limit("bias-dtype", "the bias is int32, float32 or the output's dtype", _META, _bias_dtype,
          ("bias_dtype", "output_dtype")),
)  # fmt: skip

A8W4_LIMITS: tuple[Limit[Call], ...] = (
    Limit("a8w4-product", "int8 x int4 runs on Atlas A2 and A3 only; on 310P choose W8A8", _TEST + " (Ascend910B)",
          lambda c: c.product.int4, ("product",)),
    *_BOTH,
    Limit("weight-dtype", "the weight is int4 packed in int32", _META, lambda c: c.weight_dtype == torch.int32,
          ("weight_dtype",)),
    Limit("weight-contiguous", "the weight is a contiguous [K, N / 8]", _TEST, lambda c: c.weight_contiguous,
          ("weight_contiguous",)),
    Limit("int4-lanes", "N is a multiple of 8", "OPDOC npu_convert_weight_to_int4pack", lambda c: c.n % 8 == 0, ("n",)),
    Limit("group-256", "K is a multiple of 256: the operator's only group size", _META,
          lambda c: c.k % A8W4_GROUP == 0, ("k",)),
    Limit("scale-dtype", "the scale is int64, as npu_trans_quant_param writes it", _META,
          lambda c: c.scale_dtype == torch.int64, ("scale_dtype",)),
    Limit("scale-shape", "the scale is [K / 256, N]", _META,
          lambda c: c.scale_shape == (c.k // A8W4_GROUP, c.n), ("scale_shape", "k", "n")),
    Limit("token-shape", "the scale per token is [M, 1]", _META, lambda c: c.token_shape == (c.m, 1),
          ("token_shape", "m")),
    Limit("offset", "the offset, 8 * sum(W) of each output, is there: float32 [N]; without it every number is wrong",
          _TEST + " a8w4_quant_golden", lambda c: (c.offset_dtype, c.offset_shape) == (torch.float32, (c.n,)),
          ("offset_dtype", "offset_shape", "n")),
    Limit("bias", "the bias is int32 [N] or absent; add a float bias to the output", _META,
          lambda c: (c.bias_dtype, c.bias_shape) in ((None, None), (torch.int32, (c.n,))),
          ("bias_dtype", "bias_shape")),
)  # fmt: skip
