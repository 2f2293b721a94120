"""The Triton kernels' weight layout: pure functions, exact in both directions, usable on any machine.

Codes of up to 4 bits share a byte in two halves of the row: byte j holds code j in its low and code j + width in its
high nibble, so that one load feeds two products without any shuffling between lanes, whatever the tile. For K = 8:

    codes   0 1 2 3 4 5 6 7          width 4
    bytes   0x40 0x51 0x62 0x73

Wider codes have a byte of their own. Both halves are padded to whole groups; the padding's scales are 0. Scales, zeros
and mins lie group by group, [G, N], because a tile reads them for many outputs and one group at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import lcm

import torch
from torch import Tensor

from transload import bits
from transload.errors import ConfigError, Unsupported
from transload.hal import Packed
from transload.quant import PER_CHANNEL, Grid, QTensor, QuantSpec, Zero

ROW_ALIGN = 128  # bytes that a row is padded to where no group asks for another unit
SIDES = ("scales", "zeros", "mins")


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of a packed weight. group and act_group are 0 where the whole row shares one scale."""

    lanes: int  # codes in a byte
    width: int  # bytes in a row
    group: int  # weight group
    act_group: int  # activation group
    groups: int  # rows of scales, padding included

    @property
    def padded_k(self) -> int:
        """Codes in a row, padding included."""
        return self.lanes * self.width

    @property
    def segment(self) -> int:
        """Codes that share both scales: the smaller of the groups, 0 for the whole row."""
        return min(self.group, self.act_group) or max(self.group, self.act_group)


def geometry(k: int, spec: QuantSpec) -> Geometry:
    """How a weight of K inputs is laid out; a group that covers the whole row counts as none."""
    act = spec.act.group_size if spec.act else PER_CHANNEL
    group = 0 if spec.groups(k) <= 1 else spec.group_size
    act_group = act if 0 < act < k else 0
    unit = lcm(group or 1, act_group or 1) if group or act_group else ROW_ALIGN
    lanes = 2 if spec.bits <= 4 else 1
    width = -(-k // (lanes * unit)) * unit
    return Geometry(lanes, width, group, act_group, lanes * width // group if group else 1)


def refuses_weight(p_n: int, p_k: int, spec: QuantSpec, step: int) -> str | None:
    """Why a weight cannot be laid out for dots over `step` inputs at a time; None when it can."""
    if spec.grid is not Grid.INT:
        return f"it takes integer codes, not {spec.grid.value}"
    if p_n < 1 or p_k < 1:
        return f"[N={p_n}, K={p_k}] is empty"
    g = geometry(p_k, spec)
    for name, size in (("weight", g.group), ("activation", g.act_group)):
        if size % step:
            return f"{name} groups of {size} are not a multiple of {step}, what one tensor-core step sums"
    if g.group and g.act_group and max(g.group, g.act_group) % min(g.group, g.act_group):
        return f"activation groups of {g.act_group} and weight groups of {g.group} do not nest"
    return None


def pack(kernel: str, w: QTensor) -> Packed:
    """`codes` uint8 [..., N, width]; `scales`, `zeros` and `mins` [..., G, N] in their own dtype; `order` int32 [K].

    order says which input stands at each place, for act-order weights only. Raises Unsupported where the groups of
    such a weight have unequal sizes.
    """
    g = geometry(w.k, w.spec)
    order = _order(kernel, w)
    codes = w.codes if order is None else w.codes[..., order.long()]
    tensors = {"codes": _pack_codes(codes, g)}
    for name in SIDES:
        side: Tensor | None = getattr(w, name)
        if side is not None:
            padded = torch.nn.functional.pad(side, (0, g.groups - side.shape[-1]))
            tensors[name] = padded.transpose(-1, -2).contiguous()
    if order is not None:
        tensors["order"] = order
    return Packed(kernel, w.spec, w.n, w.k, tensors, w.experts)


def unpack(p: Packed) -> QTensor:
    """The exact inverse of `pack`, on the device that holds the packed weight."""
    g = geometry(p.k, p.spec)
    t = p.tensors
    codes, g_idx = _unpack_codes(t["codes"], g, p.k), None
    sides = {name: _unpack_side(t[name], p) for name in SIDES if name in t}
    if "order" in t:
        place = torch.argsort(t["order"].long())
        codes, g_idx = codes[..., place].contiguous(), (place // group_length(p.k, p.spec)).int()
    return QTensor(p.spec, codes, sides["scales"], sides.get("zeros"), sides.get("mins"), g_idx)


def rows(p: Packed, index: Tensor) -> QTensor:
    """Output rows `index` (int64 [R]) of a plain linear, as `unpack` would give them; only these are unpacked."""
    if p.experts is not None:
        raise Unsupported(f"kernel '{p.kernel}' looks up rows of plain linears only, not of {p.experts} experts")
    at = index.to(p.tensors["codes"].device)
    taken = {"codes": p.tensors["codes"][at]}
    taken |= {name: p.tensors[name][:, at] for name in SIDES if name in p.tensors}
    taken |= {"order": p.tensors["order"]} if "order" in p.tensors else {}
    return unpack(replace(p, n=index.numel(), tensors=taken))


def group_length(k: int, spec: QuantSpec) -> int:
    """Inputs in a group: K for per channel."""
    return k if spec.group_size == PER_CHANNEL else spec.group_size


def check_x(kernel: str, x: Tensor, w: Packed, bias: Tensor | None, counts: Tensor | None) -> None:
    """Raises ConfigError when operands do not fit the weight. Reads shapes only, never a value from the device."""
    if x.dim() != 2 or x.shape[1] != w.k:
        raise ConfigError(f"kernel '{kernel}': x is {tuple(x.shape)}, expected [M, {w.k}]")
    if (counts is None) != (w.experts is None) or (counts is not None and tuple(counts.shape) != (w.experts,)):
        found = None if counts is None else tuple(counts.shape)
        raise ConfigError(f"kernel '{kernel}': counts {found} for a weight of {w.experts} experts")
    expected = (w.n,) if w.experts is None else (w.experts, w.n)
    if bias is not None and tuple(bias.shape) != expected:
        raise ConfigError(f"kernel '{kernel}': bias has shape {tuple(bias.shape)}, expected {expected}")
    at = {t.device for t in (x, bias, counts, *w.tensors.values()) if t is not None}
    if len(at) > 1:
        raise ConfigError(f"kernel '{kernel}': operands are on {sorted(map(str, at))}; move them to one device")


def check_placed(w: Packed, tensor: str) -> None:
    """Raises ConfigError for a weight that lacks what `place` makes on a GPU."""
    if tensor not in w.tensors:
        raise ConfigError(f"kernel '{w.kernel}': the weight is as packed on the host; place it on a GPU first")


def _pack_codes(codes: Tensor, g: Geometry) -> Tensor:
    padded = torch.nn.functional.pad(codes, (0, g.padded_k - codes.shape[-1]))
    if g.lanes == 1:
        return padded.contiguous()
    pairs = torch.stack((padded[..., : g.width], padded[..., g.width :]), dim=-1)
    return bits.pack(pairs.flatten(-2), 4)


def _unpack_codes(packed: Tensor, g: Geometry, k: int) -> Tensor:
    if g.lanes == 1:
        return packed[..., :k].contiguous()
    pairs = bits.unpack(packed, 4, g.padded_k).reshape(*packed.shape[:-1], g.width, 2)
    return torch.cat((pairs[..., 0], pairs[..., 1]), dim=-1)[..., :k].contiguous()


def _unpack_side(side: Tensor, p: Packed) -> Tensor:
    return side.transpose(-1, -2)[..., : p.spec.groups(p.k)].contiguous()


def _order(kernel: str, w: QTensor) -> Tensor | None:
    """Inputs sorted by group, int32 [K]."""
    if w.g_idx is None:
        return None
    usual = torch.arange(w.k, device=w.g_idx.device) // group_length(w.k, w.spec)
    order = torch.argsort(w.g_idx, stable=True)
    if not torch.equal(w.g_idx[order].long(), usual):
        raise Unsupported(f"kernel '{kernel}' cannot pack act-order groups of unequal sizes")
    return order.int()


def zero_kind(spec: QuantSpec) -> int:
    """The zero as the kernels' constant: 0 midpoint, 1 integers, 2 floats, 3 mins."""
    return (Zero.MIDPOINT, Zero.CODES, Zero.FLOATS, Zero.MINS).index(spec.zero)
