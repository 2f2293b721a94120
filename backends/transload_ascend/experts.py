"""Mixtures of experts: W4A8, W4A16 and W8A8 with npu_grouped_matmul over one stacked weight."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from transload.errors import Unsupported
from transload.hal import Device, Kernel, Packed, Problem
from transload.quant import Grid, QTensor, Zero
from transload_ascend import grouped_ops, layouts, ops
from transload_ascend.casts import cast
from transload_ascend.limits import Limit, grouped, objection
from transload_ascend.products import Product, product_of
from transload_ascend.w4a8 import int8_objection


class Grouped(Kernel):
    """What the three have in common: stacked weights only, and a bias that is added to the output."""

    limits: ClassVar[tuple[Limit[grouped.Call], ...]]

    def refuses(self, p: Problem, device: Device) -> str | None:
        """None for stacked experts of the kernel's scheme within the operator's limits."""
        if p.experts is None:
            return "stacked experts only"
        return self._spec_objection(p) or objection(grouped.OPERATOR, self.limits, self._call(p, device))

    @abstractmethod
    def _spec_objection(self, p: Problem) -> str | None: ...

    @abstractmethod
    def _call(self, p: Problem, device: Device) -> grouped.Call: ...

    @abstractmethod
    def _rows(self, x: Tensor, w: Packed, counts: Tensor) -> Tensor:
        """The product without a bias; x is not empty."""

    def matmul(self, x: Tensor, w: Packed, bias: Tensor | None = None) -> Tensor:
        """Refused: `refuses` says "stacked experts only"."""
        raise Unsupported(f"kernel '{self.name}' multiplies stacked experts; use grouped_matmul")

    def grouped_matmul(self, x: Tensor, w: Packed, counts: Tensor, bias: Tensor | None = None) -> Tensor:
        """x float16 or bfloat16 [M, K], rows sorted by expert; counts int64 [E]; bias [E, N]: [M, N] in x's dtype."""
        if x.shape[0] == 0:
            return x.new_empty(0, w.n)
        y = self._rows(x.contiguous(), w, counts)
        if bias is None:
            return y
        return y + bias.to(x.dtype)[_expert_of_rows(counts, x)]


class GroupedW4A8(Grouped):
    """int8 x int4: one scale per channel, or groups of 256 with float16 scales.

    Weights: int32 [E, K, N / 8]; scales: int64 [E, G, N] of float32 bits; 8 * sum(W): float32 [E, N].
    """

    name = "ascend-grouped-w4a8"
    limits = grouped.W4A8_LIMITS

    def _spec_objection(self, p: Problem) -> str | None:
        if p.spec.groups(p.k) > 1 and p.spec.scale_dtype != torch.float16:
            return (
                "scales per group are float16 values in the operator (vllm-ascend 0.23 rounds them); W4A16 takes others"
            )
        return int8_objection(p, 4)

    def _call(self, p: Problem, device: Device) -> grouped.Call:
        m, experts, groups = p.m or 1, p.experts or 0, p.spec.groups(p.k)
        return grouped.Call(
            product=product_of(device.arch),
            experts=experts,
            m=m,
            k=p.k,
            n=p.n,
            x_dtype=torch.int8,
            weight_dtype=torch.int32,
            scale_dtype=torch.int64,
            scale_shape=(experts, groups, p.n),
            groups=groups,
            output_dtype=p.x_dtype,
            list_type=1,
            token_dtype=torch.float32,
            token_shape=(m,),
            bias_dtype=torch.float32,
            bias_shape=(experts, p.n),
        )

    def pack(self, w: QTensor) -> Packed:
        """`weight`, `scale`, `scale_bias` as in the class's docstring."""
        packed = {
            "weight": layouts.pack_along_n(w.codes),
            "scale": layouts.scale_bits(w.scales.transpose(1, 2)),
            "scale_bias": layouts.scale_bias(w),
        }
        return Packed(self.name, w.spec, w.n, w.k, packed, w.experts)

    def unpack(self, p: Packed) -> QTensor:
        """The exact inverse of `pack`."""
        scales = layouts.scale_from_bits(p.tensors["scale"]).to(p.spec.scale_dtype).transpose(1, 2).contiguous()
        return QTensor(p.spec, layouts.unpack_along_n(p.tensors["weight"]), scales)

    def _rows(self, x: Tensor, w: Packed, counts: Tensor) -> Tensor:
        q, scale = ops.dynamic_quant(x)
        t = w.tensors
        return grouped_ops.grouped_w4a8(q, t["weight"], t["scale"], t["scale_bias"], scale, counts, x.dtype)

    def swiglu_experts(self, x: Tensor, gate_up: Packed, down: Packed, counts: Tensor) -> Tensor | None:
        """Two matmuls with SwiGLU and quantization between them, for expert widths up to 5120; else None.

        The values between the two are quantized from float32, without a rounding to x's dtype before.
        """
        if x.shape[0] == 0 or gate_up.kernel != self.name or down.kernel != self.name or swiglu_objection(gate_up):
            return None
        q, scale = ops.dynamic_quant(x.contiguous())
        t = gate_up.tensors
        weight_scale = t["scale"].squeeze(1) if t["scale"].shape[1] == 1 else t["scale"]
        q, scale = grouped_ops.grouped_w4a8_swiglu(q, t["weight"], weight_scale, t["scale_bias"], scale, counts)
        t = down.tensors
        return grouped_ops.grouped_w4a8(q, t["weight"], t["scale"], t["scale_bias"], scale, counts, x.dtype)


def swiglu_objection(gate_up: Packed) -> str | None:
    """Why the fused operator does not take a gate and up weight, or None."""
    groups = gate_up.spec.groups(gate_up.k)
    experts = gate_up.experts or 0
    call = grouped.Call(
        product=Product.A2,  # a weight of this kernel is on a product that takes it
        experts=experts,
        m=1,
        k=gate_up.k,
        n=gate_up.n,
        x_dtype=torch.int8,
        weight_dtype=torch.int32,
        scale_dtype=torch.int64,
        scale_shape=(experts, gate_up.n) if groups == 1 else (experts, groups, gate_up.n),
        groups=groups,
        output_dtype=torch.int8,
        token_dtype=torch.float32,
        token_shape=(1,),
        bias_dtype=torch.float32,
        bias_shape=(experts, gate_up.n),
    )
    return objection(grouped.SWIGLU_OPERATOR, grouped.SWIGLU_LIMITS, call)


class GroupedW4A16(Grouped):
    """4-bit weights, 16-bit activations. Weights: int32 [E, K, N / 8]; scales and offsets [E, N] or [E, G, N]."""

    name = "ascend-grouped-w4a16"
    limits = grouped.W4A16_LIMITS

    def _spec_objection(self, p: Problem) -> str | None:
        spec = p.spec
        if spec.act is not None:
            return f"16-bit activations only, not {spec.act}"
        if spec.bits != 4 or spec.grid is not Grid.INT:
            return f"4-bit integers only, not {spec.bits}-bit {spec.grid.value}"
        if spec.zero not in (Zero.MIDPOINT, Zero.CODES):
            return f"zero points are whole codes in the operator's 16-bit offset, not {spec.zero.value}"
        if spec.act_order:
            return "no act-order"
        if p.x_dtype == torch.float16 and spec.scale_dtype != torch.float16:
            return "the operator takes scales in x's dtype; float16 x needs float16 scales; use bfloat16 activations"
        if p.k % layouts.group_length(spec, p.k):
            return f"groups of equal length only: K={p.k} is no multiple of {spec.group_size}"
        return None

    def _call(self, p: Problem, device: Device) -> grouped.Call:
        experts, groups = p.experts or 0, p.spec.groups(p.k)
        shape = (experts, p.n) if groups == 1 else (experts, groups, p.n)
        return grouped.Call(
            product=product_of(device.arch),
            experts=experts,
            m=p.m or 1,
            k=p.k,
            n=p.n,
            x_dtype=p.x_dtype,
            weight_dtype=torch.int32,
            scale_dtype=p.x_dtype,
            scale_shape=shape,
            groups=groups,
            output_dtype=p.x_dtype,
            offset_dtype=p.x_dtype,
            offset_shape=shape,
        )

    def pack(self, w: QTensor) -> Packed:
        """`weight`, `scale`, `offset`; a symmetric weight has an offset of zeros, as vllm-ascend makes one."""
        scale = w.scales.transpose(1, 2).contiguous()
        zeros = w.zero_points(w.spec.scale_dtype)
        assert zeros is not None
        offset = (layouts.NEGATIVE - zeros).transpose(1, 2).contiguous()
        if w.spec.groups(w.k) == 1:
            scale, offset = scale.squeeze(1), offset.squeeze(1)
        packed = {"weight": layouts.pack_along_n(w.codes), "scale": scale, "offset": offset}
        return Packed(self.name, w.spec, w.n, w.k, packed, w.experts)

    def unpack(self, p: Packed) -> QTensor:
        """The exact inverse of `pack`."""
        shape = (-1, p.spec.groups(p.k), p.n)
        scale, offset = (p.tensors[name].reshape(shape).transpose(1, 2).contiguous() for name in ("scale", "offset"))
        zeros = (layouts.NEGATIVE - offset).to(torch.uint8) if p.spec.zero is Zero.CODES else None
        return QTensor(p.spec, layouts.unpack_along_n(p.tensors["weight"]), scale, zeros)

    def _rows(self, x: Tensor, w: Packed, counts: Tensor) -> Tensor:
        t = w.tensors
        return grouped_ops.grouped_w4a16(x, t["weight"], cast(t["scale"], x.dtype), cast(t["offset"], x.dtype), counts)


class GroupedW8A8(Grouped):
    """int8 x int8, one scale per channel. Weights: int8 [E, K, N]; scales: float32 [E, N]."""

    name = "ascend-grouped-w8a8"
    limits = grouped.W8A8_LIMITS

    def _spec_objection(self, p: Problem) -> str | None:
        if p.spec.groups(p.k) > 1:
            return f"one scale per channel only, not groups of {p.spec.group_size}"
        return int8_objection(p, 8)

    def _call(self, p: Problem, device: Device) -> grouped.Call:
        m, experts = p.m or 1, p.experts or 0
        return grouped.Call(
            product=product_of(device.arch),
            experts=experts,
            m=m,
            k=p.k,
            n=p.n,
            x_dtype=torch.int8,
            weight_dtype=torch.int8,
            scale_dtype=_scale_dtype(p.x_dtype),
            scale_shape=(experts, p.n),
            output_dtype=p.x_dtype,
            token_dtype=torch.float32,
            token_shape=(m,),
        )

    def pack(self, w: QTensor) -> Packed:
        """`weight` int8 [E, K, N], `scale` float32 [E, N]."""
        weight = layouts.signed8(w.codes).transpose(1, 2).contiguous()
        packed = {"weight": weight, "scale": w.scales[..., 0].float()}
        return Packed(self.name, w.spec, w.n, w.k, packed, w.experts)

    def unpack(self, p: Packed) -> QTensor:
        """The exact inverse of `pack`."""
        codes = layouts.unsigned8(p.tensors["weight"].transpose(1, 2).contiguous())
        return QTensor(p.spec, codes, p.tensors["scale"].to(p.spec.scale_dtype).unsqueeze(-1))

    def _rows(self, x: Tensor, w: Packed, counts: Tensor) -> Tensor:
        q, token_scale = ops.dynamic_quant(x)
        weight, scale = w.tensors["weight"], w.tensors["scale"]
        if x.dtype == torch.bfloat16 and w.spec.scale_dtype != torch.bfloat16:
            # The operator takes bfloat16 scales only beside bfloat16 output; these would be rounded.
            sums = grouped_ops.grouped_int8_sums(q, weight, counts)
            return (sums * scale[_expert_of_rows(counts, x)] * token_scale.unsqueeze(-1)).to(x.dtype)
        return grouped_ops.grouped_w8a8(q, weight, cast(scale, _scale_dtype(x.dtype)), token_scale, counts, x.dtype)


def _scale_dtype(output: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if output == torch.bfloat16 else torch.float32


def _expert_of_rows(counts: Tensor, x: Tensor) -> Tensor:
    """The expert of every row of x: int64 [M]."""
    experts = torch.arange(counts.shape[0], device=x.device)
    return torch.repeat_interleave(experts, counts, output_size=x.shape[0])
