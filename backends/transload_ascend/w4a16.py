"""Dense W4A16: 4-bit weights, float16 or bfloat16 activations, by npu_weight_quant_batchmatmul."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from transload.errors import Unsupported
from transload.hal import Device, Kernel, Packed, Problem
from transload.quant import Grid, QTensor, Zero
from transload_ascend import layouts, ops
from transload_ascend.casts import cast
from transload_ascend.limits import objection, tensors, weight_quant
from transload_ascend.products import product_of


class W4A16(Kernel):
    """Weights in plain (ND) order.

    Per group: int32 [K, N / 8], packed along N, as msModelSlim packs its W4A16 groups. Per channel: int32 [N, K / 8],
    packed along K and handed over as a transposed view, the form that the operator's page recommends.
    """

    name = "ascend-w4a16"

    def refuses(self, p: Problem, device: Device) -> str | None:
        """None for symmetric or asymmetric 4-bit integers within the operator's limits."""
        return _spec_objection(p) or objection(weight_quant.OPERATOR, weight_quant.LIMITS, self._call(p, device))

    def _call(self, p: Problem, device: Device) -> weight_quant.Call:
        group_size = 0 if p.spec.groups(p.k) == 1 else p.spec.group_size
        shape = (p.spec.groups(p.k), p.n)
        return weight_quant.Call(
            product=product_of(device.arch),
            x_dtype=p.x_dtype,
            m=p.m or 1,
            k=p.k,
            n=p.n,
            group_size=group_size,
            scale_dtype=p.x_dtype,  # cast before the call, see matmul
            scale_shape=shape,
            transposed=group_size == 0,
        )

    def pack(self, w: QTensor) -> Packed:
        """`weight`, `scale` [G, N], `offset` [G, N] for asymmetric codes, `order` [K] for act-order."""
        order = None if w.g_idx is None else _order(w)
        codes = w.codes if order is None else w.codes[:, order]
        per_channel = w.spec.groups(w.k) == 1
        packed = {
            "weight": layouts.int4pack(codes.contiguous()) if per_channel else layouts.pack_along_n(codes),
            "scale": w.scales.T.contiguous(),
        }
        if w.zeros is not None:
            packed["offset"] = (layouts.NEGATIVE - w.zeros.T.to(w.spec.scale_dtype)).contiguous()
        if order is not None:
            packed["order"] = order
        return Packed(self.name, w.spec, w.n, w.k, packed)

    def unpack(self, p: Packed) -> QTensor:
        """The exact inverse of `pack`."""
        t = p.tensors
        weight = self._stored(p)
        codes = layouts.int4unpack(weight) if p.spec.groups(p.k) == 1 else layouts.unpack_along_n(weight)
        zeros = (layouts.NEGATIVE - t["offset"]).to(torch.uint8).T.contiguous() if "offset" in t else None
        g_idx = None
        if "order" in t:
            positions = torch.argsort(t["order"])
            codes = codes[:, positions].contiguous()
            g_idx = (positions // layouts.group_length(p.spec, p.k)).to(torch.int32)
        return QTensor(p.spec, codes, t["scale"].T.contiguous(), zeros, None, g_idx)

    def matmul(self, x: Tensor, w: Packed, bias: Tensor | None = None) -> Tensor:
        """x float16 or bfloat16 [M, K]. Scales are cast to x's dtype, the only one that the operator takes."""
        if x.shape[0] == 0:
            return x.new_empty(0, w.n)
        t = w.tensors
        rows = x.index_select(1, t["order"]) if "order" in t else x.contiguous()
        weight = self._weight(w)
        per_channel = w.spec.groups(w.k) == 1
        return ops.weight_quant_matmul(
            rows,
            weight.T if per_channel else weight,
            cast(t["scale"], x.dtype),
            offset=cast(t["offset"], x.dtype) if "offset" in t else None,
            bias=None
            if bias is None
            else bias.to(torch.float32 if x.dtype == torch.bfloat16 else x.dtype).contiguous(),
            group_size=0 if per_channel else w.spec.group_size,
        )

    def _weight(self, p: Packed) -> Tensor:
        """The weight as `matmul` reads it."""
        return p.tensors["weight"]

    def _stored(self, p: Packed) -> Tensor:
        """The weight as `pack` made it."""
        return p.tensors["weight"]


class W4A16NZ(W4A16):
    """Weights in FRACTAL_NZ order once they are on the device; `pack` makes the same tensors as W4A16.

    It comes after W4A16 in the order of preference: the operator's page allows int4 in FRACTAL_NZ in graph mode only,
    while vllm-ascend 0.23 uses it in single calls. Measure it on the device before choosing it.
    """

    name = "ascend-w4a16-nz"

    def refuses(self, p: Problem, device: Device) -> str | None:
        """None when W4A16 takes the problem and its packed weight divides into whole blocks."""
        reason = _spec_objection(p)
        if reason is not None:
            return reason
        call = replace(self._call(p, device), nz=True)
        rows, columns = (p.n, p.k // 2) if call.transposed else (p.k, p.n // 2)
        cast = tensors.Call(call.product, torch.int8, (rows, columns))
        return objection(weight_quant.OPERATOR, weight_quant.LIMITS, call) or objection(
            "npu_format_cast", tensors.FORMAT_CAST, cast
        )

    def place(self, p: Packed, device: torch.device) -> Packed:
        """Moves the weight and casts it: `weight` becomes `weight_nz`."""
        moved = dict(super().place(p, device).tensors)
        moved["weight_nz"] = ops.to_nz_int4(moved.pop("weight"))
        return replace(p, tensors=moved)

    def _weight(self, p: Packed) -> Tensor:
        return p.tensors["weight_nz"] if "weight_nz" in p.tensors else p.tensors["weight"]

    def _stored(self, p: Packed) -> Tensor:
        return ops.from_nz_int4(p.tensors["weight_nz"]) if "weight_nz" in p.tensors else p.tensors["weight"]


def _spec_objection(p: Problem) -> str | None:
    spec = p.spec
    if p.experts is not None:
        return "dense layers only"
    if spec.act is not None:
        return f"16-bit activations only, not {spec.act}"
    if spec.bits != 4 or spec.grid is not Grid.INT:
        return f"4-bit integers only, not {spec.bits}-bit {spec.grid.value}"
    if spec.zero not in (Zero.MIDPOINT, Zero.CODES):
        return f"zero points are whole codes in the operator's 16-bit offset, not {spec.zero.value}"
    if p.x_dtype == torch.float16 and spec.scale_dtype != torch.float16:
        name = str(spec.scale_dtype).removeprefix("torch.")
        return (
            f"the operator takes scales in x's dtype, and {name} scales may not fit float16; use bfloat16 activations"
        )
    return None


def _order(w: QTensor) -> Tensor:
    """The order of K that puts the groups of an act-order weight one after the other: int64 [K].

    Raises Unsupported when the groups are not of equal sizes (the last may be shorter).
    """
    assert w.g_idx is not None
    sizes = torch.bincount(w.g_idx, minlength=w.spec.groups(w.k))
    plain = torch.bincount(torch.arange(w.k) // layouts.group_length(w.spec, w.k))
    if not torch.equal(sizes, plain):
        raise Unsupported("act-order with groups of unequal sizes")
    return torch.argsort(w.g_idx, stable=True)
