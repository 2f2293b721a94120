"""One typed function per torch_npu operator, each checking the operator's documented limits before the call.

torch_npu and CANN check a part of these limits, late and in their own words; some break in silence. Every function
here raises Unsupported with the limit, what was found and the limit's source, or BackendError with the vendor's text.
Sizes are logical: n and k count weights, not int32 words. Nothing is imported from torch_npu before the first call.
"""

from __future__ import annotations

from types import ModuleType, TracebackType

import torch
from torch import Tensor

from transload.errors import BackendError
from transload_ascend.limits import check, tensors, weight_quant
from transload_ascend.limits import quant_matmul as qm
from transload_ascend.products import product_here

PLAIN, FRACTAL_NZ = 2, 29  # storage formats
LANES = 8


class vendor:
    """Runs a block of torch_npu calls and turns its RuntimeErrors into BackendError, text kept."""

    def __init__(self, operator: str) -> None:
        self.operator = operator

    def __enter__(self) -> ModuleType:
        import torch_npu

        return torch_npu  # type: ignore[no-any-return]

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(e, RuntimeError):
            raise BackendError(f"{self.operator}: {e}") from e


def is_nz(weight: Tensor) -> bool:
    """True when a tensor on the device is stored as FRACTAL_NZ."""
    with vendor("get_npu_format") as npu:
        return int(npu.get_npu_format(weight)) == FRACTAL_NZ


def weight_quant_matmul(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    *,
    offset: Tensor | None = None,
    bias: Tensor | None = None,
    group_size: int = 0,
    inner_precise: int = 0,
) -> Tensor:
    """y = x @ ((weight + offset) * scale) + bias with 4-bit weights: [M, N] in x's dtype.

    x: float16 or bfloat16 [M, K]. weight: int32 [K, N / 8], or the transposed view [K / 8, N] of [N, K / 8].
    scale, offset: x's dtype, [1, N] per channel (group_size 0), [ceil(K / group_size), N] per group.
    bias: [N], float16 for float16 x, float32 for bfloat16 x.

    The offset is added. msModelSlim and everybody else store a zero that is subtracted, so its sign is turned before.
    """
    transposed = not weight.is_contiguous()
    rows, columns = weight.shape
    call = weight_quant.Call(
        product=product_here(),
        x_dtype=x.dtype,
        x_dims=x.dim(),
        m=x.shape[0],
        k=x.shape[-1],
        n=columns if transposed else columns * LANES,
        weight_k=rows * LANES if transposed else rows,
        weight_dtype=weight.dtype,
        transposed=transposed,
        x_transposed=not x.is_contiguous(),
        nz=is_nz(weight),
        group_size=group_size,
        scale_dtype=scale.dtype,
        scale_shape=tuple(scale.shape),
        offset_dtype=None if offset is None else offset.dtype,
        offset_shape=None if offset is None else tuple(offset.shape),
        bias_dtype=None if bias is None else bias.dtype,
        bias_shape=None if bias is None else tuple(bias.shape),
        bias_contiguous=bias is None or bias.is_contiguous(),
        inner_precise=inner_precise,
    )
    check(weight_quant.OPERATOR, weight_quant.LIMITS, call)
    with vendor(weight_quant.OPERATOR) as npu:
        y: Tensor = npu.npu_weight_quant_batchmatmul(
            x,
            weight,
            scale,
            antiquant_offset=offset,
            bias=bias,
            antiquant_group_size=group_size,
            inner_precise=inner_precise,
        )
    return y


def quant_matmul(
    x: Tensor, weight: Tensor, scale: Tensor, token_scale: Tensor, output_dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    """y = (x @ weight) * scale * token_scale + bias, int8 times int8: [M, N] in output_dtype.

    x: int8 [M, K]. weight: int8 [K, N]. scale: float32 [N]. token_scale: float32 [M]. An int32 bias is added to the
    sums before they are scaled, a float one after.
    """
    call = _quant_call(x, weight, weight.shape[-1], scale, token_scale, output_dtype, bias=bias)
    check(qm.OPERATOR, qm.W8A8_LIMITS, call)
    with vendor(qm.OPERATOR) as npu:
        y: Tensor = npu.npu_quant_matmul(
            x, weight, scale, pertoken_scale=token_scale, bias=bias, output_dtype=output_dtype
        )
    return y


def quant_matmul_a8w4(
    x: Tensor, weight: Tensor, scale: Tensor, scale_bias: Tensor, token_scale: Tensor, output_dtype: torch.dtype
) -> Tensor:
    """y = (sum over groups of 256 of (x @ weight) * scale) * token_scale, int8 times int4: [M, N] in output_dtype.

    x: int8 [M, K]. weight: int32 [K, N / 8]. scale: int64 [K / 256, N] as `layouts.fp19_scale` writes it.
    scale_bias: float32 [N], 8 * sum(W), see `layouts.scale_bias`. token_scale: float32 [M, 1].
    Sums over groups are kept in float16 on the device (OPTEST test_npu_quant_matmul.py, a8w4_quant_golden).
    """
    n = weight.shape[-1] * LANES
    call = _quant_call(x, weight, n, scale, token_scale, output_dtype, offset=scale_bias)
    check(qm.OPERATOR, qm.A8W4_LIMITS, call)
    with vendor(qm.OPERATOR) as npu:
        y: Tensor = npu.npu_quant_matmul(
            x,
            weight,
            scale,
            offset=scale_bias,
            pertoken_scale=token_scale,
            output_dtype=output_dtype,
            group_sizes=[0, 0, qm.A8W4_GROUP],
        )
    return y


def dynamic_quant(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row as int8 with its own scale: float16 or bfloat16 [..., K] -> (int8 [..., K], float32 [...]).

    scale = absmax / 127. A row of zeros has scale 0, and whatever its codes are, the product with the scale is 0.
    """
    check("npu_dynamic_quant", tensors.DYNAMIC_QUANT, tensors.Call(product_here(), x.dtype, tuple(x.shape)))
    with vendor("npu_dynamic_quant") as npu:
        q, scale = npu.npu_dynamic_quant(x)
    return q, scale


def convert_weight_to_int4pack(values: Tensor) -> Tensor:
    """Packs the last axis on the device: int32 [R, C], -8 .. 7 -> int32 [R, C / 8]; `layouts.int4pack` of codes - 8."""
    low, high = (int(values.min()), int(values.max())) if values.numel() else (0, 0)
    call = tensors.Call(product_here(), values.dtype, tuple(values.shape), values.is_contiguous(), low, high)
    check("npu_convert_weight_to_int4pack", tensors.INT4PACK, call)
    with vendor("npu_convert_weight_to_int4pack") as npu:
        packed: Tensor = npu.npu_convert_weight_to_int4pack(values)
    return packed


def trans_quant_param(scale: Tensor) -> Tensor:
    """Scales as 19-bit floats in int64: float32 [n] -> int64 [n]; `layouts.fp19_scale` on the device."""
    call = tensors.Call(product_here(), scale.dtype, tuple(scale.shape), scale.is_contiguous())
    check("npu_trans_quant_param", tensors.TRANS_QUANT_PARAM, call)
    with vendor("npu_trans_quant_param") as npu:
        words: Tensor = npu.npu_trans_quant_param(scale)
    return words


def to_nz_int4(weight: Tensor) -> Tensor:
    """A packed weight stored as FRACTAL_NZ: int32 [..., R, W] -> the same shape, bytes in the order of `layouts.to_nz`.

    The bytes are cast, not the words: blocks are 32 bytes wide, and only int8 has that width in every CANN release.
    """
    data = weight.view(torch.int8)
    call = tensors.Call(product_here(), data.dtype, tuple(data.shape), data.is_contiguous())
    check("npu_format_cast", tensors.FORMAT_CAST, call)
    with vendor("npu_format_cast") as npu:
        npu.npu.config.allow_internal_format = True  # off by default: the cast would then do nothing
        cast: Tensor = npu.npu_format_cast(data, FRACTAL_NZ)
    return cast.view(torch.int32)


def from_nz_int4(weight: Tensor) -> Tensor:
    """The inverse of `to_nz_int4`: an int32 weight stored as FRACTAL_NZ, in plain order again."""
    with vendor("npu_format_cast") as npu:
        cast: Tensor = npu.npu_format_cast(weight.view(torch.int8), PLAIN)
    return cast.view(torch.int32)


def _quant_call(
    x: Tensor,
    weight: Tensor,
    n: int,
    scale: Tensor,
    token_scale: Tensor,
    output_dtype: torch.dtype,
    offset: Tensor | None = None,
    bias: Tensor | None = None,
) -> qm.Call:
    return qm.Call(
        product=product_here(),
        m=x.shape[0],
        k=x.shape[-1],
        n=n,
        x_dtype=x.dtype,
        x_dims=x.dim(),
        weight_dtype=weight.dtype,
        weight_dims=weight.dim(),
        weight_k=weight.shape[-2],
        weight_contiguous=weight.is_contiguous(),
        scale_dtype=scale.dtype,
        scale_shape=tuple(scale.shape),
        token_dtype=token_scale.dtype,
        token_shape=tuple(token_scale.shape),
        output_dtype=output_dtype,
        offset_dtype=None if offset is None else offset.dtype,
        offset_shape=None if offset is None else tuple(offset.shape),
        bias_dtype=None if bias is None else bias.dtype,
        bias_shape=None if bias is None else tuple(bias.shape),
    )
