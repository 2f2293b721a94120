"""Dense W8A8: 8-bit weights per channel, activations quantized to int8 per token, by npu_quant_matmul.

The choice for layers that stay in eight bits beside 4-bit experts, and the only quantized one on 310P.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transload.hal import Device, Kernel, Packed, Problem
from transload.quant import QTensor
from transload_ascend import layouts, ops
from transload_ascend.limits import objection, quant_matmul
from transload_ascend.products import product_of
from transload_ascend.w4a8 import int8_objection


class W8A8(Kernel):
    """Symmetric 8-bit integers per channel. Weights: int8 [K, N], scales float32 [N]."""

    name = "ascend-w8a8"

    def refuses(self, p: Problem, device: Device) -> str | None:
        """None for symmetric 8-bit integers per channel with int8 activations per token."""
        if p.experts is not None:
            return "dense layers only"
        if p.spec.groups(p.k) > 1:
            return f"one scale per channel only, not groups of {p.spec.group_size}"
        return int8_objection(p, 8) or objection(quant_matmul.OPERATOR, quant_matmul.W8A8_LIMITS, _call(p, device))

    def pack(self, w: QTensor) -> Packed:
        """`weight` int8 [K, N], `scale` float32 [N]."""
        packed = {"weight": layouts.signed8(w.codes).T.contiguous(), "scale": w.scales[:, 0].float()}
        return Packed(self.name, w.spec, w.n, w.k, packed)

    def unpack(self, p: Packed) -> QTensor:
        """The exact inverse of `pack`."""
        codes = layouts.unsigned8(p.tensors["weight"].T.contiguous())
        return QTensor(p.spec, codes, p.tensors["scale"].to(p.spec.scale_dtype).unsqueeze(-1))

    def matmul(self, x: Tensor, w: Packed, bias: Tensor | None = None) -> Tensor:
        """x float16 or bfloat16 [M, K]."""
        if x.shape[0] == 0:
            return x.new_empty(0, w.n)
        q, scale = ops.dynamic_quant(x)
        float_bias = None if bias is None else bias.float()
        return ops.quant_matmul(q, w.tensors["weight"], w.tensors["scale"], scale, x.dtype, float_bias)


def _call(p: Problem, device: Device) -> quant_matmul.Call:
    m = p.m or 1
    return quant_matmul.Call(
        product=product_of(device.arch),
        m=m,
        k=p.k,
        n=p.n,
        scale_dtype=torch.float32,
        scale_shape=(p.n,),
        token_shape=(m,),
        output_dtype=p.x_dtype,
    )
