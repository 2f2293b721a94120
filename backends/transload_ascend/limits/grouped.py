"""Limits of npu_grouped_matmul and of the fused gate-up matmul with SwiGLU: a stacked weight, rows sorted by expert."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from transload_ascend.limits import INNER, Limit
from transload_ascend.products import Product

OPERATOR = "npu_grouped_matmul"
SWIGLU_OPERATOR = "npu_grouped_matmul_swiglu_quant_v2"
W4A8_GROUP = 256

_DOC = "OPDOC npu_grouped_matmul"
_SWIGLU = "OPDOC npu_grouped_matmul_swiglu_quant_v2"
_HALVES = (torch.float16, torch.bfloat16)
_W8A8_SCALES = ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16))  # scale, output


@dataclass(frozen=True, slots=True)
class Call:
    """One call: x [M, K], weight [E, K, N], rows of x sorted by expert. n and k are the logical sizes.

    list_type: 0 when group_list holds cumulative sums, 1 when it holds counts. groups: scale rows per expert.
    """

    product: Product
    experts: int
    m: int
    k: int
    n: int
    x_dtype: torch.dtype
    weight_dtype: torch.dtype
    scale_dtype: torch.dtype | None
    scale_shape: tuple[int, ...] | None
    output_dtype: torch.dtype
    groups: int = 1
    x_dims: int = 2
    weight_dims: int = 3
    weight_k: int | None = None
    weight_contiguous: bool = True
    list_type: int = 0
    list_dtype: torch.dtype = torch.int64
    list_shape: tuple[int, ...] | None = None  # None: [E]
    offset_shape: tuple[int, ...] | None = None
    offset_dtype: torch.dtype | None = None
    token_dtype: torch.dtype | None = None
    token_shape: tuple[int, ...] | None = None
    bias_dtype: torch.dtype | None = None
    bias_shape: tuple[int, ...] | None = None

    @property
    def length(self) -> int:
        """Length of a group along K."""
        return self.k // max(self.groups, 1)


def _scales(c: Call) -> tuple[tuple[int, ...], ...]:
    per_group = (c.experts, c.groups, c.n)
    return (per_group,) if c.groups > 1 else ((c.experts, c.n),)


_ALL: tuple[Limit[Call], ...] = (
    Limit("product", "grouped matmuls with quantized weights run on Atlas A2 and A3 only", _DOC,
          lambda c: c.product.int4, ("product",)),
    Limit("dims", "x has two axes and the stacked weight three", _DOC,
          lambda c: (c.x_dims, c.weight_dims) == (2, 3), ("x_dims", "weight_dims")),
    Limit("k-match", "x and weight have the same K", _DOC, lambda c: c.weight_k in (None, c.k), ("k", "weight_k")),
    Limit("not-empty", "no axis is empty", _DOC, lambda c: min(c.m, c.k, c.n, c.experts) > 0,
          ("experts", "m", "k", "n")),
    Limit("experts", "at most 1024 experts", _DOC, lambda c: c.experts <= 1024, ("experts",)),
    Limit("inner-size", f"K and N are at most {INNER}", _DOC, lambda c: max(c.k, c.n) <= INNER, ("k", "n")),
    Limit("list-dtype", "the group list is int64", _DOC, lambda c: c.list_dtype == torch.int64, ("list_dtype",)),
    Limit("list-shape", "the group list has one entry per expert", _DOC,
          lambda c: c.list_shape in (None, (c.experts,)), ("list_shape", "experts")),
    Limit("list-type", "the group list holds cumulative sums (0), or counts (1) of at least two experts", _DOC,
          lambda c: c.list_type == 0 or (c.list_type == 1 and c.experts > 1), ("list_type", "experts")),
)  # fmt: skip

_INT4: tuple[Limit[Call], ...] = (
    Limit("weight-dtype", "the weight is int4 packed in int32", _DOC, lambda c: c.weight_dtype == torch.int32,
          ("weight_dtype",)),
    Limit("weight-contiguous", "the packed weight is a contiguous [E, K, N / 8]", "META npu_grouped_matmul",
          lambda c: c.weight_contiguous, ("weight_contiguous",)),
    Limit("int4-lanes", "N is a multiple of 8", "OPDOC npu_convert_weight_to_int4pack", lambda c: c.n % 8 == 0, ("n",)),
    Limit("group-divides", "K is a multiple of the number of groups", _DOC, lambda c: c.k % c.groups == 0,
          ("k", "groups")),
)  # fmt: skip

W4A16_LIMITS: tuple[Limit[Call], ...] = (
    *_ALL,
    *_INT4,
    Limit("x-dtype", "x is float16 or bfloat16", _DOC + ", table 2", lambda c: c.x_dtype in _HALVES, ("x_dtype",)),
    Limit("output-dtype", "the output has x's dtype", _DOC + ", table 2", lambda c: c.output_dtype == c.x_dtype,
          ("output_dtype", "x_dtype")),
    Limit("scale-dtype", "the scale has the dtype of x", _DOC + ", table 2", lambda c: c.scale_dtype == c.x_dtype,
          ("scale_dtype", "x_dtype")),
    Limit("scale-shape", "the scale is [E, N] per channel, [E, G, N] per group", _DOC,
          lambda c: c.scale_shape in _scales(c), ("scale_shape", "experts", "groups", "n")),
    Limit("offset", "the offset has the shape and dtype of the scale", _DOC,
          lambda c: (c.offset_shape, c.offset_dtype) == (c.scale_shape, c.scale_dtype),
          ("offset_shape", "offset_dtype")),
)  # fmt: skip

W4A8_LIMITS: tuple[Limit[Call], ...] = (
    *_ALL,
    *_INT4,
    Limit("x-dtype", "x is int8", "VA w4a8.py", lambda c: c.x_dtype == torch.int8, ("x_dtype",)),
    Limit("counts", "the group list holds counts: this form is the only one in use with a bias of 8 * sum(W)",
          "VA moe_mlp.py", lambda c: c.list_type == 1, ("list_type",)),
    Limit("output-dtype", "the output is float16 or bfloat16", "OPTEST test_npu_grouped_matmul.py",
          lambda c: c.output_dtype in _HALVES, ("output_dtype",)),
    Limit("scale-dtype", "the scale is int64: float32 bits, zero-extended", "VA w4a8.py _process_scale",
          lambda c: c.scale_dtype == torch.int64, ("scale_dtype",)),
    Limit("scale-shape", "the scale is [E, 1, N] per channel, [E, G, N] per group", "VA w4a8.py",
          lambda c: c.scale_shape == (c.experts, c.groups, c.n), ("scale_shape", "experts", "groups", "n")),
    Limit("group-256", "groups are 256 long, the only length that is in use and tested; or per channel",
          "OPTEST test_npu_grouped_matmul.py; VA023 w4a8.py", lambda c: c.groups == 1 or c.length == W4A8_GROUP,
          ("k", "groups")),
    Limit("token-scale", "the scale per token is float32 [M]", _DOC,
          lambda c: (c.token_dtype, c.token_shape) == (torch.float32, (c.m,)), ("token_dtype", "token_shape", "m")),
    Limit("bias", "the bias, 8 * sum(W) of each output, is there: float32 [E, N]; without it every number is wrong",
          "OPTEST test_npu_grouped_matmul.py; VA w4a8.py",
          lambda c: (c.bias_dtype, c.bias_shape) == (torch.float32, (c.experts, c.n)), ("bias_dtype", "bias_shape")),
)  # fmt: skip

INT8_SUMS_LIMITS: tuple[Limit[Call], ...] = (
    *_ALL,
    Limit("x-dtype", "x is int8", _DOC + ", table 2", lambda c: c.x_dtype == torch.int8, ("x_dtype",)),
    Limit("weight-dtype", "the weight is int8", _DOC + ", table 2", lambda c: c.weight_dtype == torch.int8,
          ("weight_dtype",)),
    Limit("output-dtype", "the sums are int32", _DOC + "; VA moe_mlp.py", lambda c: c.output_dtype == torch.int32,
          ("output_dtype",)),
)  # fmt: skip

W8A8_LIMITS: tuple[Limit[Call], ...] = (
    *(limit for limit in INT8_SUMS_LIMITS if limit.name != "output-dtype"),
    Limit("scale-dtype", "the scale is bfloat16 for bfloat16 output and float32 for float16 output", _DOC + ", table 2",
          lambda c: (c.scale_dtype, c.output_dtype) in _W8A8_SCALES,
          ("scale_dtype", "output_dtype")),
    Limit("scale-shape", "the scale is [E, N]", _DOC, lambda c: c.scale_shape == (c.experts, c.n),
          ("scale_shape", "experts", "n")),
    Limit("token-scale", "the scale per token is float32 [M]", _DOC,
          lambda c: (c.token_dtype, c.token_shape) == (torch.float32, (c.m,)), ("token_dtype", "token_shape", "m")),
    Limit("bias", "the bias is int32 [E, N] or absent", _DOC + ", table 2",
          lambda c: (c.bias_dtype, c.bias_shape) in ((None, None), (torch.int32, (c.experts, c.n))),
          ("bias_dtype", "bias_shape")),
)  # fmt: skip

SWIGLU_LIMITS: tuple[Limit[Call], ...] = (
    *(limit for limit in _ALL if limit.name != "list-type"),
    *_INT4,
    Limit("x-dtype", "x is int8", _SWIGLU, lambda c: c.x_dtype == torch.int8, ("x_dtype",)),
    Limit("list-type", "the group list holds cumulative sums (0) or counts (1)", _SWIGLU,
          lambda c: c.list_type in (0, 1),
          ("list_type",)),
    Limit("swiglu-n", "N, gate and up together, is at most 10240: expert widths up to 5120", _SWIGLU,
          lambda c: c.n <= 10240, ("n",)),
    Limit("swiglu-k", "K is below 20000", _SWIGLU, lambda c: c.k < 20000, ("k",)),
    Limit("scale-dtype", "the scale is int64: float32 bits, zero-extended", _SWIGLU,
          lambda c: c.scale_dtype == torch.int64, ("scale_dtype",)),
    Limit("scale-shape", "the scale is [E, N] per channel, [E, G, N] per group", _SWIGLU,
          lambda c: c.scale_shape in _scales(c), ("scale_shape", "experts", "groups", "n")),
    Limit("token-scale", "the scale per token is float32 [M]", _SWIGLU,
          lambda c: (c.token_dtype, c.token_shape) == (torch.float32, (c.m,)), ("token_dtype", "token_shape", "m")),
    Limit("bias", "weight_assist_matrix, 8 * sum(W) of each output, is there: float32 [E, N]", _SWIGLU,
          lambda c: (c.bias_dtype, c.bias_shape) == (torch.float32, (c.experts, c.n)), ("bias_dtype", "bias_shape")),
)  # fmt: skip
