"""The native kernels' packed weight: one block of bytes, drawn in native/layout.h, that can be saved and mapped."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from transload.errors import ConfigError, FormatError, Unsupported
from transload.hal import Packed
from transload.quant import PER_CHANNEL, Grid, QTensor, QuantSpec, Zero
from transload_cpu.native_library import DTYPES, Geometry, check, load

_ROOMS = (4, 5, 6, 8)  # bits that a code may take; others take the next larger room
_ZEROS = {Zero.MIDPOINT: 0, Zero.CODES: 1, Zero.FLOATS: 2, Zero.MINS: 3}


def refuses_weight(n: int, k: int, spec: QuantSpec) -> str | None:
    """None when a weight of this scheme can be packed; otherwise the reason."""
    if spec.grid is not Grid.INT:
        return f"it takes integer codes, not {spec.grid.value}"
    if n < 1 or k < 1:
        return f"[N={n}, K={k}] is empty"
    if spec.group_size != PER_CHANNEL and spec.group_size % 8 and spec.group_size < k:
        return f"group_size {spec.group_size} is not a multiple of 8"
    return None


def pack(kernel: str, w: QTensor) -> Packed:
    """The weight in one block of bytes, scales in their own dtype. Raises Unsupported for uneven act-order groups."""
    reason = refuses_weight(w.n, w.k, w.spec)
    if reason:
        raise Unsupported(f"kernel '{kernel}' cannot pack {w.spec}: {reason}")
    geometry = _geometry(w.spec, w.n, w.k, w.experts)
    packed = torch.empty(_bytes(geometry), dtype=torch.uint8)
    order = _order(kernel, w)
    codes = w.codes if order is None else w.codes[..., order.to(w.codes.device)]
    sides = (codes, w.scales, w.zeros if w.mins is None else w.mins, order)
    sources = [None if t is None else t.cpu().contiguous() for t in sides]
    pointers = [None if t is None else t.data_ptr() for t in sources]
    check(load().tl_pack(geometry, *pointers, packed.data_ptr(), len(packed), torch.get_num_threads()), "pack")
    return Packed(kernel, w.spec, w.n, w.k, {"packed": packed}, w.experts)


def unpack(p: Packed) -> QTensor:
    """The exact inverse of `pack`."""
    parts = _Parts((p.n,) if p.experts is None else (p.experts, p.n), p)
    packed = p.tensors["packed"]
    check(load().tl_unpack(packed.data_ptr(), packed.numel(), *parts.pointers(), torch.get_num_threads()), "unpack")
    return parts.weight(p)


def verify(p: Packed) -> None:
    """Raises FormatError when a block from a file is not one that `pack` makes for p's scheme and sizes.

    Kernels take sizes and places from the block itself, so a foreign one must not be believed.
    """
    where, packed = f"kernel '{p.kernel}' [N={p.n}, K={p.k}]", p.tensors.get("packed")
    if packed is None or len(p.tensors) > 1 or packed.dtype != torch.uint8 or packed.dim() != 1:
        raise FormatError(f"{where}: a packed weight is one row of bytes")
    found, expected = Geometry(), _geometry(p.spec, p.n, p.k, p.experts)
    if load().tl_describe(packed.data_ptr(), packed.numel(), found):
        raise FormatError(f"{where}: the packed weight is truncated, damaged, or of another version")
    if bytes(found) != bytes(expected) or packed.numel() != _bytes(expected):
        raise FormatError(f"{where}: the packed weight is another one, not {p.spec}")
    if p.spec.act_order:
        section = packed[-(-(-4 * p.k // 64) * 64) :]  # the last one, in whole lines of 64 bytes
        if not torch.equal(section[: 4 * p.k].view(torch.int32).sort().values, torch.arange(p.k, dtype=torch.int32)):
            raise FormatError(f"{where}: the packed weight's order of inputs is none")


def rows(p: Packed, index: Tensor) -> QTensor:
    """Output rows `index` (int64 [R]) of a plain linear, as `unpack` would give them."""
    if p.experts is not None:
        raise Unsupported(f"kernel '{p.kernel}' looks up rows of plain linears only, not of {p.experts} experts")
    index = index.to("cpu", torch.int64).contiguous()
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < p.n:
        raise ConfigError(f"kernel '{p.kernel}': rows {int(index.min())}..{int(index.max())} of a weight with {p.n}")
    parts = _Parts((index.numel(),), p)
    packed = p.tensors["packed"]
    status = load().tl_rows(packed.data_ptr(), packed.numel(), index.data_ptr(), index.numel(), *parts.pointers())
    check(status, "rows")
    return parts.weight(p)


def dequantize(p: Packed, dtype: torch.dtype, first: int = 0, count: int | None = None) -> Tensor:
    """Outputs first .. first + count - 1 (default: all) as floats [count, K], or [E, N, K] of a whole stacked weight.

    The float32 value of `QTensor.dequantize`, rounded once to `dtype`: float32, bfloat16 or float16. Outputs of stacked
    experts are counted one expert after the other. Raises ConfigError for another dtype or outputs that are not there.
    """
    outputs = p.n * (p.experts or 1)
    count = outputs - first if count is None else count
    if dtype not in DTYPES or first < 0 or count < 0 or first + count > outputs:
        raise ConfigError(f"kernel '{p.kernel}': outputs {first}..{first + count} of {outputs} as {dtype}")
    packed, out = p.tensors["packed"], torch.empty(count, p.k, dtype=dtype)
    threads = torch.get_num_threads()
    status = load().tl_dequantize(
        packed.data_ptr(), packed.numel(), first, count, DTYPES[dtype], out.data_ptr(), threads
    )
    check(status, "dequantize")
    return out if p.experts is None or count < outputs else out.view(p.experts, p.n, p.k)


class _Parts:
    """Empty tensors that the library fills: codes, scales, zeros or mins, and the order of the inputs."""

    def __init__(self, lead: tuple[int, ...], p: Packed) -> None:
        spec = p.spec
        groups = (*lead, spec.groups(p.k))
        zero_dtype = {Zero.CODES: torch.uint8, Zero.FLOATS: spec.scale_dtype, Zero.MINS: spec.scale_dtype}
        self.codes = torch.empty(*lead, p.k, dtype=torch.uint8)
        self.scales = torch.empty(groups, dtype=spec.scale_dtype)
        self.zeros = torch.empty(groups, dtype=zero_dtype[spec.zero]) if spec.zero in zero_dtype else None
        self.order = torch.empty(p.k, dtype=torch.int32) if spec.act_order else None

    def pointers(self) -> tuple[int | None, ...]:
        """Addresses in the order in which the library takes them."""
        parts = (self.codes, self.scales, self.zeros, self.order)
        return tuple(None if t is None else t.data_ptr() for t in parts)

    def weight(self, p: Packed) -> QTensor:
        """The filled tensors as a weight, inputs back in their original order."""
        codes, g_idx = self.codes, None
        if self.order is not None:
            place = torch.argsort(self.order.long())
            size = p.k if p.spec.group_size == PER_CHANNEL else p.spec.group_size
            codes, g_idx = codes[..., place].contiguous(), (place // size).int()
        mins = self.zeros if p.spec.zero is Zero.MINS else None
        return QTensor(p.spec, codes, self.scales, self.zeros if mins is None else None, mins, g_idx)


def _geometry(spec: QuantSpec, n: int, k: int, experts: int | None) -> Geometry:
    return Geometry(
        n=n,
        k=k,
        group_size=spec.group_size,
        experts=1 if experts is None else experts,
        bits=next(room for room in _ROOMS if room >= spec.bits),
        zero=_ZEROS[spec.zero],
        midpoint=spec.midpoint if spec.zero is Zero.MIDPOINT else 0,
        scale_dtype=DTYPES[spec.scale_dtype],
        act_order=int(spec.act_order),
    )


def _bytes(geometry: Geometry) -> int:
    size = ctypes.c_int64()
    check(load().tl_packed_bytes(geometry, size), "pack")
    return size.value


def _order(kernel: str, w: QTensor) -> Tensor | None:
    """Inputs sorted by group, int32 [K]: place i of the packed weight holds input order[i]."""
    if w.g_idx is None:
        return None
    usual = torch.arange(w.k) // (w.k if w.spec.group_size == PER_CHANNEL else w.spec.group_size)
    order = torch.argsort(w.g_idx.cpu(), stable=True)
    if not torch.equal(w.g_idx.cpu()[order].long(), usual):
        raise Unsupported(f"kernel '{kernel}' cannot pack act-order groups of unequal sizes")
    return order.int()
