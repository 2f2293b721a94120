"""From the neutral value to the inputs of ONNX Runtime's MatMulNBits.

One node computes R = N (or 2 N) + (0 or G) rows of y[m, r] = sum_k x[m, k] * scales[r, b] * (codes[r, k] - zeros[r, b])
with b = k // block; without zeros the zero point is 2**(bits - 1). Three things do not fit that formula directly:

* Codes wider than 4 bits with 16-bit activations. The 8-bit node without int8 activations expands the whole weight on
  every call (20 to 60 times slower for one row, ONNX Runtime 1.31 on AVX512), the 4-bit node does not. An 8-bit code is
  16 * high + low, so the weight becomes two rows of 4-bit codes, N low ones and N high ones whose scales are 16 times
  larger; the zero point is split the same way and the two outputs are added.
* mins, and zero points that are floats. Codes are read around the midpoint, and what is missing is one constant c per
  row and group, to be multiplied with the sum of x over the group. G further rows compute these sums: every code is
  one above the zero point, and the scale is 1 inside the group and 0 outside. The node quantizes x for these rows as
  for all others, so that W4A8 keeps its meaning exactly. (With float zero points as an input the node would silently
  skip the quantization of x.)
* act-order. Columns are sorted by group; `columns` says which feature of x goes where.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from transload import bits
from transload.quant import PER_CHANNEL, ActSpec, QTensor, QuantSpec, Zero

BLOCKS = (16, 32, 64, 128, 256)  # what the CPU kernel accepts, ONNX Runtime 1.31


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """The constant inputs of one MatMulNBits node, and what is to be done around it.

    codes: uint8 [R, B, block * bits / 8]; scales: float32 [R, B]; zeros: uint8 [R, ceil(B * bits / 8)] or None.
    offsets: float32 [G, N], c of each group, or None. columns: int64 [K], the feature of x at each place; K = none.
    """

    n: int
    k: int  # length of the rows that the node sees
    bits: int
    block: int
    parts: int  # 2 when codes are split in low and high halves
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    offsets: Tensor | None
    columns: Tensor | None


def block_size(k: int, spec: QuantSpec) -> int | None:
    """The block that gives the scheme's own groups, or None when no block of MatMulNBits does.

    A block must lie inside one weight group, and with 8-bit activations be exactly their group, because the node
    quantizes x per block. Of those the largest that is not longer than needed: it has the fewest scales.
    """
    fitting = [b for b in BLOCKS if _nests(b, k, spec.group_size) and (spec.act is None or _equals(b, k, spec.act))]
    return next((b for b in fitting if b >= k), fitting[-1] if fitting else None)


def _nests(block: int, k: int, group_size: int) -> bool:
    return group_size == PER_CHANNEL or group_size >= k or group_size % block == 0


def _equals(block: int, k: int, act: ActSpec) -> bool:
    return act.group_size == block or (block >= k and (act.group_size == PER_CHANNEL or act.group_size >= k))


def lay_out(w: QTensor) -> Layout:
    """The node for a plain linear [N, K]. The scheme must have a block size."""
    block = block_size(w.k, w.spec)
    assert block is not None, "refuses() answers for schemes without a block size"
    codes, group, columns = _blocked(w, block)
    node_bits = 8 if w.spec.bits > 4 and w.spec.act else 4
    split = w.spec.bits > 4 and node_bits == 4
    scales = w.scales.float()[:, group]
    zeros = None if w.spec.zero is not Zero.CODES or w.zeros is None else w.zeros[:, group]
    if split:
        codes, scales, zeros = _halves(codes, scales, zeros, w.spec.midpoint)
    elif zeros is None:
        codes = codes + ((1 << (node_bits - 1)) - w.spec.midpoint)
    offsets = _offsets(w)
    if offsets is not None:
        codes, scales, zeros = _with_sum_rows(codes, scales, zeros, one_hot(group, len(offsets)).T.float(), node_bits)
    return Layout(
        n=w.n,
        k=w.k if columns is None else len(columns),
        bits=node_bits,
        block=block,
        parts=2 if split else 1,
        codes=bits.pack(codes, node_bits).reshape(*scales.shape, -1),
        scales=scales.contiguous(),
        zeros=None if zeros is None else bits.pack(zeros, node_bits),
        offsets=offsets,
        columns=columns,
    )


def _blocked(w: QTensor, block: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes uint8 [N, B * block], the group of every block int64 [B], and the columns of x (None: as they are)."""
    if w.g_idx is None:
        blocks = -(-w.k // block)
        return pad(w.codes, (0, blocks * block - w.k)), w.group_of_k()[::block][:blocks], None
    places, group = [], []
    for g, members in enumerate(torch.bincount(w.g_idx, minlength=w.spec.groups(w.k)).tolist()):
        count = -(-members // block)
        group += [g] * count
        places += [True] * members + [False] * (count * block - members)
    columns = torch.full((len(places),), w.k)
    columns[torch.tensor(places)] = torch.argsort(w.g_idx, stable=True)
    return pad(w.codes, (0, 1))[:, columns], torch.tensor(group), columns


def _halves(codes: Tensor, scales: Tensor, zeros: Tensor | None, midpoint: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of up to 8 bits as N rows of low halves followed by N rows of high halves, whose scale is 16 times."""
    if zeros is None:
        zeros = torch.full(scales.shape, midpoint, dtype=torch.uint8)
    low_high = [bits.unpack(t, 4, 2 * t.shape[1]) for t in (codes, zeros)]  # a byte is its low half, then its high half
    codes, zeros = (torch.cat([t[:, 0::2], t[:, 1::2]]) for t in low_high)
    return codes, torch.cat([scales, scales * 16]), zeros


def _offsets(w: QTensor) -> Tensor | None:
    """c[g, n], so that w = scale * (code - midpoint) + c: float32 [G, N]."""
    scales, midpoint = w.scales.double(), w.spec.midpoint
    if w.mins is not None:
        return (w.mins.double() + scales * midpoint).T.float().contiguous()
    if w.spec.zero is Zero.FLOATS and w.zeros is not None:
        return (scales * (midpoint - w.zeros.double())).T.float().contiguous()
    return None


def _with_sum_rows(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, member: Tensor, node_bits: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Appends one row per group that sums x over the group; member [G, B] is 1 where a block is in a group."""
    zero = 0 if zeros is not None else 1 << (node_bits - 1)
    ones = torch.full((len(member), codes.shape[1]), zero + 1, dtype=torch.uint8)
    if zeros is not None:
        zeros = torch.cat([zeros, torch.zeros(member.shape, dtype=torch.uint8)])
    return torch.cat([codes, ones]), torch.cat([scales, member]), zeros
