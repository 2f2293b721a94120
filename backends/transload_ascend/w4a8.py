"""Dense W4A8: 4-bit weights, activations quantized to int8 per token, by the int8 x int4 form of npu_quant_matmul."""

from __future__ import annotations

import torch
from torch import Tensor

from transload.hal import Device, Kernel, Packed, Problem
from transload.quant import Grid, QTensor, Zero
from transload_ascend import layouts, ops
from transload_ascend.limits import objection, quant_matmul
from transload_ascend.products import product_of


class W4A8(Kernel):
    """Groups of 256, symmetric, float16 or bfloat16 scales (they fit the operator's 19-bit floats exactly).

    Weights: int32 [K, N / 8] packed along N. The operator adds up the groups in float16.
    """

    name = "ascend-w4a8"

    def refuses(self, p: Problem, device: Device) -> str | None:
        """None for symmetric 4-bit integers in groups of 256 with int8 activations per token."""
        if p.experts is not None:
            return "dense layers only"
        return (
            int8_objection(p, 4)
            or _group_objection(p)
            or objection(quant_matmul.OPERATOR, quant_matmul.A8W4_LIMITS, _call(p, device))
        )

    def pack(self, w: QTensor) -> Packed:
        """`weight` int32 [K, N / 8], `scale` int64 [G, N] of 19-bit floats, `scale_bias` float32 [N]."""
        packed = {
            "weight": layouts.pack_along_n(w.codes),
            "scale": layouts.fp19_scale(w.scales.T),
            "scale_bias": layouts.scale_bias(w),
        }
        return Packed(self.name, w.spec, w.n, w.k, packed)

    def unpack(self, p: Packed) -> QTensor:
        """The exact inverse of `pack`."""
        scales = layouts.scale_from_bits(p.tensors["scale"]).to(p.spec.scale_dtype).T.contiguous()
        return QTensor(p.spec, layouts.unpack_along_n(p.tensors["weight"]), scales)

    def matmul(self, x: Tensor, w: Packed, bias: Tensor | None = None) -> Tensor:
        """x float16 or bfloat16 [M, K]. The bias is added to the output: the operator's own is int32."""
        if x.shape[0] == 0:
            return x.new_empty(0, w.n)
        t = w.tensors
        q, scale = ops.dynamic_quant(x)
        y = ops.quant_matmul_a8w4(q, t["weight"], t["scale"], t["scale_bias"], scale.unsqueeze(-1), x.dtype)
        return y if bias is None else y + bias.to(x.dtype)


def int8_objection(p: Problem, bits: int) -> str | None:
    """Why a spec is not symmetric integers of `bits` bits with dynamic int8 activations per token, or None."""
    spec = p.spec
    if spec.act is None or spec.act.static or spec.act.group_size > 0:
        return f"dynamic int8 activations per token only, not {spec.act or '16-bit activations'}"
    if spec.bits != bits or spec.grid is not Grid.INT:
        return f"{bits}-bit integers only, not {spec.bits}-bit {spec.grid.value}"
    if spec.zero is not Zero.MIDPOINT:
        return f"symmetric weights only, not zero {spec.zero.value}"
    if spec.act_order:
        return "no act-order; W4A16 takes it"
    if p.x_dtype not in (torch.float16, torch.bfloat16):
        return f"x is float16 or bfloat16, not {str(p.x_dtype).removeprefix('torch.')}"
    return None


def _group_objection(p: Problem) -> str | None:
    length = layouts.group_length(p.spec, p.k)
    if length != quant_matmul.A8W4_GROUP:
        return f"groups of {quant_matmul.A8W4_GROUP} only, not {length}: the operator has no other size; W4A16 has"
    if p.spec.scale_dtype == torch.float32:
        return (
            "the operator keeps scales as 19-bit floats: float16 and bfloat16 scales fit exactly, float32 ones do not"
        )
    return None


def _call(p: Problem, device: Device) -> quant_matmul.Call:
    m = p.m or 1
    return quant_matmul.Call(
        product=product_of(device.arch),
        m=m,
        k=p.k,
        n=p.n,
        weight_dtype=torch.int32,
        scale_dtype=torch.int64,
        scale_shape=(p.spec.groups(p.k), p.n),
        token_shape=(m, 1),
        output_dtype=p.x_dtype,
        offset_dtype=torch.float32,
        offset_shape=(p.n,),
    )
