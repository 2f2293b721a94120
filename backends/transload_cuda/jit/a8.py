"""W4A8 and W8A8 in Triton: int8 activations times int8 weights, exact int32 sums in each segment, then the scales.

A segment is the smaller of weight group and activation group. Weights are codes less an offset that makes them signed;
where the zero point differs from it, the block's sum of activations corrects the difference.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl

from transload_cuda.jit.tiles import MIDPOINT, MINS, place_of_program, rows_of_tile, store_tile


@triton.jit
def signed(codes, OFFSET: tl.constexpr):
    """codes - OFFSET as int8."""
    if OFFSET == 128:
        return (codes ^ 128).to(tl.int8, bitcast=True)  # the top bit turned over is the number less 128
    else:
        return codes.to(tl.int8) - OFFSET


@triton.jit
def zero_term(scale, sides_ptr, side, sums, ZERO: tl.constexpr, OFFSET: tl.constexpr):
    """What a block adds for its zeros or mins: [BLOCK_N, BLOCK_M], for row sums [BLOCK_M] of the activations."""
    other = tl.load(sides_ptr + side).to(tl.float32)
    factor = other + OFFSET * scale if ZERO == MINS else (OFFSET - other) * scale
    return factor[:, None] * sums.to(tl.float32)[None, :]


@triton.jit
def add_block(
    acc,
    codes,
    x_rows,
    rows,
    scales_ptr,
    sides_ptr,
    x_scales_ptr,
    sums_ptr,
    k_first,
    m,
    n,
    outputs,
    GROUP: tl.constexpr,
    ACT_GROUP: tl.constexpr,
    WHOLE: tl.constexpr,
    ZERO: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc plus one block of inputs, all of one segment: float32, or int32 where WHOLE leaves scaling to the end."""
    x = tl.load(x_rows[None, :] + (k_first + tl.arange(0, BLOCK_K))[:, None])
    w = signed(codes, OFFSET)
    if WHOLE:
        acc = tl.dot(w, x, acc, out_dtype=tl.int32)
    else:
        side = outputs if GROUP == 0 else (k_first // GROUP) * n + outputs
        scale = tl.load(scales_ptr + side).to(tl.float32)
        part = tl.dot(w, x, out_dtype=tl.int32).to(tl.float32) * scale[:, None]
        if ZERO != MIDPOINT:
            sums = tl.load(sums_ptr + (k_first // BLOCK_K) * m + rows)
            part += zero_term(scale, sides_ptr, side, sums, ZERO, OFFSET)
        if ACT_GROUP != 0:
            part *= tl.load(x_scales_ptr + (k_first // ACT_GROUP) * m + rows)[None, :]
        acc += part
    return acc


@triton.jit
def matmul_a8(
    x_ptr,
    x_scales_ptr,
    sums_ptr,
    codes_ptr,
    scales_ptr,
    sides_ptr,
    bias_ptr,
    counts_ptr,
    y_ptr,
    m,
    n,
    width,
    groups,
    experts,
    tiles_m,
    tiles_n,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
    ACT_GROUP: tl.constexpr,
    WHOLE: tl.constexpr,
    ZERO: tl.constexpr,
    OFFSET: tl.constexpr,
    EXPERTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    BAND: tl.constexpr,
):
    """y[split, M, N] of int8 x [M, LANES * width] with scales and sums as quantize.py makes them.

    WHOLE: one weight scale and one activation scale a row, and one sum of the whole row.
    Grid: (tiles_m * tiles_n, SPLITS); split s sums its own part of K.
    """
    tile, column = place_of_program(tiles_m, tiles_n, BAND)
    split = tl.program_id(1)
    expert, start, end = rows_of_tile(tile, counts_ptr, m, experts, BLOCK_M, EXPERTS)
    if start >= end:
        return
    rows = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
    outputs = column * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows and outputs beyond the edge repeat a valid one and are not stored.
    valid = tl.where(rows < end, rows, start)
    near = tl.where(outputs < n, outputs, 0)
    expert64 = expert.to(tl.int64)
    x_rows = x_ptr + valid * (LANES * width)
    codes_row = codes_ptr + (expert64 * n + near) * width
    scales_ptr += expert64 * groups * n
    sides_ptr += expert64 * groups * n

    blocks = width // BLOCK_K
    each = (blocks + SPLITS - 1) // SPLITS
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32 if WHOLE else tl.float32)
    for block in range(split * each, tl.minimum(split * each + each, blocks)):
        first = block * BLOCK_K
        packed = tl.load(codes_row[:, None] + (first + tl.arange(0, BLOCK_K))[None, :])
        if LANES == 2:
            acc = add_block(
                acc, packed & 15, x_rows, valid, scales_ptr, sides_ptr, x_scales_ptr, sums_ptr, first, m, n, near,
                GROUP, ACT_GROUP, WHOLE, ZERO, OFFSET, BLOCK_K,
            )  # fmt: skip
            acc = add_block(
                acc, packed >> 4, x_rows, valid, scales_ptr, sides_ptr, x_scales_ptr, sums_ptr, first + width, m, n,
                near, GROUP, ACT_GROUP, WHOLE, ZERO, OFFSET, BLOCK_K,
            )  # fmt: skip
        else:
            acc = add_block(
                acc, packed, x_rows, valid, scales_ptr, sides_ptr, x_scales_ptr, sums_ptr, first, m, n, near,
                GROUP, ACT_GROUP, WHOLE, ZERO, OFFSET, BLOCK_K,
            )  # fmt: skip
    y = acc.to(tl.float32)
    if WHOLE:
        scale = tl.load(scales_ptr + near).to(tl.float32)
        y = y * scale[:, None]
        if ZERO != MIDPOINT:
            term = zero_term(scale, sides_ptr, near, tl.load(sums_ptr + valid), ZERO, OFFSET)
            y += tl.where(split == 0, term, 0.0)
    if ACT_GROUP == 0:
        y = y * tl.load(x_scales_ptr + valid)[None, :]
    store_tile(y, y_ptr, bias_ptr, expert64, rows, end, outputs, m, n, split, HAS_BIAS)
