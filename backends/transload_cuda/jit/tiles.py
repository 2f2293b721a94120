"""Parts that the Triton matmuls share: which tile a program computes, and how its sums leave it.

All products are y.T[N, M] = w[N, K] @ x.T[K, M]: the weight is the first operand, because tensor cores take that one
from registers, where it has just been unpacked, and because a few rows of x then fill a tile of 16 columns.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl

# Zero kinds, as layouts.zero_kind gives them.
MIDPOINT = tl.constexpr(0)
CODES = tl.constexpr(1)
FLOATS = tl.constexpr(2)
MINS = tl.constexpr(3)


@triton.jit
def place_of_program(tiles_m, tiles_n, BAND: tl.constexpr):
    """(tile of rows, tile of outputs): BAND tiles of rows go through the outputs together, so that both stay in L2."""
    pid = tl.program_id(0)
    band = pid // (BAND * tiles_n)
    first = band * BAND
    height = tl.minimum(tiles_m - first, BAND)
    within = pid % (BAND * tiles_n)
    return first + within % height, within // height


@triton.jit
def rows_of_tile(tile, counts_ptr, m, experts, BLOCK_M: tl.constexpr, EXPERTS: tl.constexpr):
    """(expert, first row, end of the expert's rows) of a tile of at most BLOCK_M rows of one expert.

    EXPERTS is 0 for a plain linear, else experts rounded up to a power of two. Tiles beyond the last expert's get no
    rows: first >= end. The counts stay on the device: every program adds them up itself, so no launch waits for them.
    """
    if EXPERTS == 0:
        expert = tl.zeros((), tl.int32)
        start = tile * BLOCK_M
        end = m
    else:
        e = tl.arange(0, EXPERTS)
        counts = tl.maximum(tl.load(counts_ptr + e, mask=e < experts, other=0).to(tl.int32), 0)
        tiles = (counts + BLOCK_M - 1) // BLOCK_M
        expert = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
        before = e < expert
        row = tl.sum(tl.where(before, counts, 0), 0)
        start = row + (tile - tl.sum(tl.where(before, tiles, 0), 0)) * BLOCK_M
        end = tl.minimum(row + tl.sum(tl.where(e == expert, counts, 0), 0), m)
    return expert, start, end


@triton.jit
def store_tile(acc, y_ptr, bias_ptr, expert, rows, end, outputs, m, n, split, HAS_BIAS: tl.constexpr):
    """Writes acc [BLOCK_N, BLOCK_M] to y[split, rows, outputs]; the first split adds the bias [E, N]."""
    inside = outputs < n
    if HAS_BIAS:
        bias = tl.load(bias_ptr + expert * n + outputs, mask=inside, other=0.0).to(tl.float32)
        acc += tl.where(split == 0, bias, 0.0)[:, None]
    at = (split.to(tl.int64) * m + rows) * n
    tl.store(
        y_ptr + at[None, :] + outputs[:, None],
        acc.to(y_ptr.dtype.element_ty),
        mask=(rows < end)[None, :] & inside[:, None],
    )


@triton.jit
def sum_splits(partial_ptr, y_ptr, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """y[i] = the sum of partial[s, i] in the order of s: the same bits every time."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros((BLOCK,), tl.float32)
    for s in tl.static_range(SPLITS):
        total += tl.load(partial_ptr + s * size + at, mask=inside, other=0.0)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=inside)
