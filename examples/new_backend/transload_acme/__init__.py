"""A whole vendor in one file: one kernel, one device.

The kernel keeps codes as signed bytes, the way int8 matrix units read them, and multiplies with plain torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from transload.hal import Device, Kernel, Packed, Problem, Serving
from transload.quant import Grid, QTensor, Zero


class Int8Kernel(Kernel):
    """Symmetric integer weights with 16- or 32-bit activations."""

    name = "acme-int8"

    def refuses(self, p: Problem, device: Device) -> str | None:
        """The limits of the (imaginary) instruction: say every one, as a sentence."""
        if p.spec.grid is not Grid.INT or p.spec.zero is not Zero.MIDPOINT:
            return f"only symmetric integer codes are multiplied, not {p.spec.grid.value} with {p.spec.zero.value}"
        if p.spec.act is not None:
            return "activations are not quantized here"
        if p.spec.act_order:
            return "there is no gather of x, which act-order needs"
        if p.experts:
            return "there is no grouped matmul"
        return None

    def pack(self, w: QTensor) -> Packed:
        """codes: int8 [N, K], signed; scales: as they are, [N, G]."""
        signed = (w.codes.short() - w.spec.midpoint).to(torch.int8)
        return Packed(self.name, w.spec, w.n, w.k, {"codes": signed, "scales": w.scales.clone()})

    def unpack(self, p: Packed) -> QTensor:
        """The exact inverse of `pack`."""
        codes = (p.tensors["codes"].short() + p.spec.midpoint).to(torch.uint8)
        return QTensor(p.spec, codes, p.tensors["scales"])

    def matmul(self, x: Tensor, w: Packed, bias: Tensor | None = None) -> Tensor:
        """x [M, K] times w.T plus bias [N]: [M, N] in x's dtype. A real vendor calls its library here."""
        codes, scales = w.tensors["codes"].float(), w.tensors["scales"].float()
        size = w.k if w.spec.group_size < 0 else w.spec.group_size
        weight = codes * scales.repeat_interleave(size, dim=1)[:, : w.k]
        y = x.float() @ weight.T
        return (y if bias is None else y + bias.float()).to(x.dtype)


class AcmeBackend:
    """The vendor: its kernels in order of preference, its devices, and what serves models on them."""

    name = "acme"
    kernels: Sequence[Kernel] = (Int8Kernel(),)
    serving = Serving()  # no engine yet: Transload's own runtime only

    def unavailable(self) -> str | None:
        """None, or what is missing and how to get it. Import the vendor's library here, not at the top."""
        return None

    def devices(self) -> Sequence[Device]:
        """The devices of this machine; memory in bytes."""
        return (Device("acme", 0, "Acme One (emulated)", "acme1", 1 << 30, 1 << 30),)

    def torch_device(self, device: Device) -> torch.device:
        """Where tensors of `device` live in torch; a vendor with a torch plug-in has its own type."""
        return torch.device("cpu")


backend = AcmeBackend()
