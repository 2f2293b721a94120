"""The kernel of last resort: dequantize with torch, multiply with cuBLAS. It takes every W*A16 scheme.

Codebooks (NF4, FP4, MXFP4, FP8) and groups of odd sizes run here. The codes stay packed in memory; a weight is unfolded
a slice at a time for every product, so it is slow where few rows share it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from transload import bits
from transload.errors import Unsupported
from transload.hal import Device, Kernel, Packed, Problem
from transload.quant import QTensor, QuantSpec, Zero
from transload.reference import rows_of_experts
from transload_cuda.device import on_device
from transload_cuda.layouts import SIDES, check_x, group_length

X_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SLICE = 1 << 26  # weights unfolded at a time: 256 MiB of float32


class DequantizeKernel(Kernel):
    """Weights as they came, codes at their own width; y is computed in x's dtype from float32-exact weights."""

    name: ClassVar[str] = "dequantize"

    def refuses(self, p: Problem, device: Device) -> str | None:
        """None for 16-bit activations."""
        if p.spec.act is not None:
            return f"16-bit activations only, not {p.spec.act}"
        if p.x_dtype not in X_DTYPES:
            return f"x must be float16, bfloat16 or float32, not {p.x_dtype}"
        return "there are no experts" if p.experts == 0 else None

    def pack(self, w: QTensor) -> Packed:
        """codes: uint8 [..., N, ceil(K * bits / 8)], LSB-first; scales, zeros, mins and g_idx untouched."""
        tensors = {"codes": bits.pack(w.codes, w.spec.bits)}
        for name in (*SIDES, "g_idx"):
            side: Tensor | None = getattr(w, name)
            if side is not None:
                tensors[name] = side.contiguous()
        return Packed(self.name, w.spec, w.n, w.k, tensors, w.experts)

    def unpack(self, p: Packed) -> QTensor:
        """The exact inverse of `pack`."""
        t = p.tensors
        codes = bits.unpack(t["codes"], p.spec.bits, p.k)
        return QTensor(p.spec, codes, t["scales"], t.get("zeros"), t.get("mins"), t.get("g_idx"))

    def place(self, p: Packed, device: torch.device) -> Packed:
        """`p` on a GPU. Raises BackendError when it does not fit."""
        with on_device(self.name, f"{p.nbytes} bytes of weight"):
            return super().place(p, device)

    def rows(self, p: Packed, index: Tensor) -> QTensor:
        """Output rows `index` (int64 [R]) of a packed linear."""
        if p.experts is not None:
            raise Unsupported(f"kernel '{self.name}' looks up rows of plain linears only, not of {p.experts} experts")
        at = index.to(p.tensors["codes"].device)
        taken = {name: t if name == "g_idx" else t[at] for name, t in p.tensors.items()}
        return self.unpack(replace(p, n=index.numel(), tensors=taken))

    def matmul(self, x: Tensor, w: Packed, bias: Tensor | None = None) -> Tensor:
        """x [M, K] times w.T plus bias [N]: [M, N] in x's dtype."""
        check_x(self.name, x, w, bias, None)
        with on_device(self.name, f"a slice of [N={w.n}, K={w.k}] as floats"):
            return _product(x, w.tensors, w.spec, bias)

    def grouped_matmul(self, x: Tensor, w: Packed, counts: Tensor, bias: Tensor | None = None) -> Tensor:
        """Rows sorted by expert, counts int64 [E] rows each, bias [E, N]: [M, N].

        The only kernel here that waits for the GPU: it reads the counts, and skips experts without rows.
        """
        check_x(self.name, x, w, bias, counts)
        rows = rows_of_experts(counts, len(x), w.experts)
        y, start = x.new_empty(len(x), w.n), 0
        with on_device(self.name, f"a slice of [N={w.n}, K={w.k}] as floats"):
            for e, count in enumerate(rows):
                if count:
                    expert = {name: t[e] for name, t in w.tensors.items()}
                    own = x[start : start + count]
                    y[start : start + count] = _product(own, expert, w.spec, None if bias is None else bias[e])
                start += count
        return y


def _product(x: Tensor, tensors: Mapping[str, Tensor], spec: QuantSpec, bias: Tensor | None) -> Tensor:
    n, k = tensors["codes"].shape[0], x.shape[1]
    step = max(1, SLICE // k)
    parts = []
    for start in range(0, n, step):
        part = {name: t if name == "g_idx" else t[start : start + step] for name, t in tensors.items()}
        parts.append(x @ dequantize(part, spec, k).to(x.dtype).T)
    y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return y if bias is None else y + bias.to(y.dtype)


def dequantize(tensors: Mapping[str, Tensor], spec: QuantSpec, k: int) -> Tensor:
    """float32 [N, K] of packed rows, without reading a value from the device."""
    codes = bits.unpack(tensors["codes"], spec.bits, k)
    at = codes.device
    group = tensors.get("g_idx")
    of_k = torch.arange(k, device=at) // group_length(k, spec) if group is None else group.long()
    values = spec.grid.values(spec.bits).to(at)[codes.long()] if spec.zero is Zero.NONE else codes.float()
    if spec.zero is Zero.MIDPOINT:
        values -= spec.midpoint
    elif "zeros" in tensors:
        values -= tensors["zeros"].float()[:, of_k]
    values *= tensors["scales"].float()[:, of_k]
    if "mins" in tensors:
        values += tensors["mins"].float()[:, of_k]
    return values
