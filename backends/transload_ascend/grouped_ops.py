"""The grouped operators, for mixtures of experts: one stacked weight [E, K, N], rows of x sorted by expert.

Every function takes `counts`, int64 [E], the rows of each expert, and turns it into the form its operator wants.
Limits are checked before the call as in `ops`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transload_ascend.limits import check, grouped, tensors
from transload_ascend.ops import LANES, vendor
from transload_ascend.products import product_here

_CUMULATIVE, _COUNTS = 0, 1
_ONE_OUTPUT, _BY_ROWS = 3, 0  # split_item and group_type: a single output, groups along M


def grouped_w4a16(
    x: Tensor, weight: Tensor, scale: Tensor, offset: Tensor, counts: Tensor, output_dtype: torch.dtype | None = None
) -> Tensor:
    """y = x @ ((weight + offset) * scale) expert by expert: [M, N] in x's dtype.

    x: float16 or bfloat16 [M, K]. weight: int32 [E, K, N / 8]. scale, offset: x's dtype, [E, N] per channel,
    [E, G, N] per group. The offset is added, as in `ops.weight_quant_matmul`; zeros for symmetric weights.
    """
    call = _call(x, weight, LANES, scale, output_dtype or x.dtype, _CUMULATIVE, counts, offset=offset)
    check(grouped.OPERATOR, grouped.W4A16_LIMITS, call)
    with vendor(grouped.OPERATOR) as npu:
        y: Tensor = npu.npu_grouped_matmul(
            [x],
            [weight],
            antiquant_scale=[scale],
            antiquant_offset=[offset],
            group_list=counts.cumsum(0),
            group_list_type=_CUMULATIVE,
            split_item=_ONE_OUTPUT,
            group_type=_BY_ROWS,
            output_dtype=call.output_dtype,
        )[0]
    return y


def grouped_w4a8(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    scale_bias: Tensor,
    token_scale: Tensor,
    counts: Tensor,
    output_dtype: torch.dtype,
) -> Tensor:
    """y = (x @ weight) * scale * token_scale expert by expert, int8 times int4: [M, N] in output_dtype.

    x: int8 [M, K]; the operator may overwrite it (OPTEST test_npu_grouped_matmul.py). weight: int32 [E, K, N / 8].
    scale: int64 [E, 1, N], or [E, K / 256, N], as `layouts.scale_bits` writes it. scale_bias: float32 [E, N],
    8 * sum(W), see `layouts.scale_bias`. token_scale: float32 [M].
    """
    call = _call(x, weight, LANES, scale, output_dtype, _COUNTS, counts, token_scale, scale_bias)
    check(grouped.OPERATOR, grouped.W4A8_LIMITS, call)
    with vendor(grouped.OPERATOR) as npu:
        y: Tensor = npu.npu_grouped_matmul(
            [x],
            [weight],
            bias=[scale_bias],
            scale=[scale],
            per_token_scale=[token_scale],
            group_list=counts,
            group_list_type=_COUNTS,
            split_item=_ONE_OUTPUT,
            group_type=_BY_ROWS,
            output_dtype=output_dtype,
        )[0]
    return y


def grouped_w8a8(
    x: Tensor, weight: Tensor, scale: Tensor, token_scale: Tensor, counts: Tensor, output_dtype: torch.dtype
) -> Tensor:
    """y = (x @ weight) * scale * token_scale expert by expert, int8 times int8: [M, N] in output_dtype.

    x: int8 [M, K]. weight: int8 [E, K, N]. scale: [E, N], bfloat16 for bfloat16 output, float32 for float16 output.
    token_scale: float32 [M].
    """
    call = _call(x, weight, 1, scale, output_dtype, _CUMULATIVE, counts, token_scale)
    check(grouped.OPERATOR, grouped.W8A8_LIMITS, call)
    with vendor(grouped.OPERATOR) as npu:
        y: Tensor = npu.npu_grouped_matmul(
            [x],
            [weight],
            scale=[scale],
            per_token_scale=[token_scale],
            group_list=counts.cumsum(0),
            group_list_type=_CUMULATIVE,
            split_item=_ONE_OUTPUT,
            group_type=_BY_ROWS,
            output_dtype=output_dtype,
        )[0]
    return y


def grouped_int8_sums(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """The exact sums x @ weight expert by expert: int8 [M, K], int8 [E, K, N] -> int32 [M, N]."""
    call = _call(x, weight, 1, None, torch.int32, _CUMULATIVE, counts)
    check(grouped.OPERATOR, grouped.INT8_SUMS_LIMITS, call)
    with vendor(grouped.OPERATOR) as npu:
        sums: Tensor = npu.npu_grouped_matmul(
            [x],
            [weight],
            group_list=counts.cumsum(0),
            group_list_type=_CUMULATIVE,
            split_item=_ONE_OUTPUT,
            group_type=_BY_ROWS,
            output_dtype=torch.int32,
        )[0]
    return sums


def grouped_w4a8_swiglu(
    x: Tensor, weight: Tensor, scale: Tensor, scale_bias: Tensor, token_scale: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """Gate and up matmuls, silu(gate) * up, and quantization in one step: (int8 [M, N / 2], float32 scales [M]).

    Arguments as in `grouped_w4a8`, but scale is [E, N] per channel. The gate's columns come before the up's.
    """
    call = _call(x, weight, LANES, scale, torch.float16, _CUMULATIVE, counts, token_scale, scale_bias)
    check(grouped.SWIGLU_OPERATOR, grouped.SWIGLU_LIMITS, call)
    with vendor(grouped.SWIGLU_OPERATOR) as npu:
        q, scales = npu.npu_grouped_matmul_swiglu_quant_v2(
            x,
            [weight],
            [scale],
            token_scale,
            counts.cumsum(0),
            weight_assist_matrix=[scale_bias],
            dequant_mode=0 if call.groups == 1 else 1,
            group_list_type=_CUMULATIVE,
        )
    return q, scales


def dequant_swiglu_quant(sums: Tensor, scale: Tensor, token_scale: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """int32 sums to silu(gate) * up in int8: [T, 2H] -> (int8 [T, H], float32 scales [T]).

    scale: float32 [E, 2H]. token_scale: float32 [T, 1]. The gate is the left half (activate_left) and the result is
    quantized per row (quant_mode 1): neither is the operator's default. Rows beyond sum(counts) are garbage.
    """
    call = tensors.SwigluCall(
        product=product_here(),
        x_dtype=sums.dtype,
        x_shape=tuple(sums.shape),
        groups=counts.shape[0],
        scale_dtype=scale.dtype,
        scale_shape=tuple(scale.shape),
        token_dtype=token_scale.dtype,
        token_shape=tuple(token_scale.shape),
        list_dtype=counts.dtype,
    )
    check("npu_dequant_swiglu_quant", tensors.DEQUANT_SWIGLU, call)
    with vendor("npu_dequant_swiglu_quant") as npu:
        q, scales = npu.npu_dequant_swiglu_quant(
            sums,
            weight_scale=scale,
            activation_scale=token_scale,
            group_index=counts,
            activate_left=True,
            quant_mode=1,
        )
    return q, scales


def _call(
    x: Tensor,
    weight: Tensor,
    lanes: int,
    scale: Tensor | None,
    output_dtype: torch.dtype,
    list_type: int,
    counts: Tensor,
    token_scale: Tensor | None = None,
    bias: Tensor | None = None,
    offset: Tensor | None = None,
) -> grouped.Call:
    return grouped.Call(
        product=product_here(),
        experts=weight.shape[0],
        m=x.shape[0],
        k=x.shape[-1],
        n=weight.shape[-1] * lanes,
        x_dtype=x.dtype,
        x_dims=x.dim(),
        weight_dtype=weight.dtype,
        weight_dims=weight.dim(),
        weight_k=weight.shape[-2],
        weight_contiguous=weight.is_contiguous(),
        scale_dtype=None if scale is None else scale.dtype,
        scale_shape=None if scale is None else tuple(scale.shape),
        groups=scale.shape[1] if scale is not None and scale.dim() == 3 else 1,
        output_dtype=output_dtype,
        list_type=list_type,
        list_dtype=counts.dtype,
        list_shape=tuple(counts.shape),
        offset_dtype=None if offset is None else offset.dtype,
        offset_shape=None if offset is None else tuple(offset.shape),
        token_dtype=None if token_scale is None else token_scale.dtype,
        token_shape=None if token_scale is None else tuple(token_scale.shape),
        bias_dtype=None if bias is None else bias.dtype,
        bias_shape=None if bias is None else tuple(bias.shape),
    )
