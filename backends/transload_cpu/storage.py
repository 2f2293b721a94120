"""How this backend keeps a weight: codes at their own width, everything else as it came.

The bytes are those of the neutral value, so packing is exact for every scheme; what ONNX Runtime wants is derived
from them when a session is built (`onnx_layout`) and belongs to that session.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from transload import bits
from transload.hal import Packed
from transload.quant import QTensor

_SIDES = ("scales", "zeros", "mins", "g_idx")


def pack_tight(kernel: str, w: QTensor) -> Packed:
    """codes: uint8 [..., N, ceil(K * bits / 8)], LSB-first; scales, zeros, mins and g_idx untouched."""
    tensors = {"codes": bits.pack(w.codes, w.spec.bits)}
    for name in _SIDES:
        side: Tensor | None = getattr(w, name)
        if side is not None:
            tensors[name] = side.contiguous()
    return Packed(kernel, w.spec, w.n, w.k, tensors, w.experts)


def unpack_tight(p: Packed) -> QTensor:
    """The exact inverse of `pack_tight`."""
    return _unpacked(p, p.tensors)


def take_rows(p: Packed, which: slice | Tensor, expert: int | None = None) -> QTensor:
    """Output rows `which` (of one expert) as a plain linear; only these rows are unpacked."""
    whole = p.tensors if expert is None else {n: t if n == "g_idx" else t[expert] for n, t in p.tensors.items()}
    return _unpacked(p, {name: t if name == "g_idx" else t[which] for name, t in whole.items()})


def _unpacked(p: Packed, tensors: Mapping[str, Tensor]) -> QTensor:
    codes = bits.unpack(tensors["codes"], p.spec.bits, p.k)
    return QTensor(p.spec, codes, tensors["scales"], tensors.get("zeros"), tensors.get("mins"), tensors.get("g_idx"))
