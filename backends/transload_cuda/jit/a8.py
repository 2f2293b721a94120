"""W4A8 and W8A8 in Triton: int8 activations times int8 weights, exact int32 sums in each segment, then the scales.

A segment is the smaller of weight group and activation group. Weights are codes less an offset that makes them signed;
where the zero point differs from it, the block's sum of activations corrects the difference.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl

from transload_cuda.jit.tiles import MIDPOINT, MINS, place_of_program, rows_of_tile, store_tile
from transload_cuda.jit.unpack import nibble_int8


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
    DOWN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc plus one block of inputs, all of one segment: float32, or int32 where WHOLE leaves scaling to the end.

    codes: int8, less OFFSET and divided by DOWN, a power of two: the sums become floats with the same bits rounded.
    """
    x = tl.load(x_rows[None, :] + (k_first + tl.arange(0, BLOCK_K))[:, None])
    if WHOLE:
        acc = tl.dot(codes, x, acc, out_dtype=tl.int32)
    else:
        side = outputs if GROUP == 0 else (k_first // GROUP) * n + outputs
        scale = tl.load(scales_ptr + side).to(tl.float32)
        part = tl.dot(codes, x, out_dtype=tl.int32).to(tl.float32) * (scale * DOWN)[:, None]
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
    BITS: tl.constexpr,
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
    PTX: tl.constexpr,
):
    """y[split, M, N] of int8 x [M, LANES * width] with scales and sums as quantize.py makes them.

    WHOLE: one weight scale and one activation scale a row, and one sum of the whole row. PTX: unpack.int8_ptx or "".
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

    DOWN: tl.constexpr = 1.0 / (1 << (8 - BITS)) if LANES == 2 else 1.0
    blocks = width // BLOCK_K
    each = (blocks + SPLITS - 1) // SPLITS
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32 if WHOLE else tl.float32)
    for block in range(split * each, tl.minimum(split * each + each, blocks)):
        first = block * BLOCK_K
        packed = tl.load(codes_row[:, None] + (first + tl.arange(0, BLOCK_K))[None, :])
        if LANES == 2:
            low, high = nibble_int8(packed, BITS, PTX)
            acc = add_block(
                acc, low, x_rows, valid, scales_ptr, sides_ptr, x_scales_ptr, sums_ptr, first, m, n, near,
                GROUP, ACT_GROUP, WHOLE, ZERO, OFFSET, DOWN, BLOCK_K,
            )  # fmt: skip
            acc = add_block(
                acc, high, x_rows, valid, scales_ptr, sides_ptr, x_scales_ptr, sums_ptr, first + width, m, n,
                near, GROUP, ACT_GROUP, WHOLE, ZERO, OFFSET, DOWN, BLOCK_K,
            )  # fmt: skip
        else:
            # The top bit turned over is the number less 128. Narrower codes are less than 128: no bit is lost.
            codes = (packed ^ 128).to(tl.int8, bitcast=True) if OFFSET == 128 else packed.to(tl.int8) - OFFSET
            acc = add_block(
                acc, codes, x_rows, valid, scales_ptr, sides_ptr, x_scales_ptr, sums_ptr, first, m, n, near,
                GROUP, ACT_GROUP, WHOLE, ZERO, OFFSET, DOWN, BLOCK_K,
            )  # fmt: skip
    y = acc.to(tl.float32)
    if WHOLE:
        scale = tl.load(scales_ptr + near).to(tl.float32)
        y = y * (scale * DOWN)[:, None]
        if ZERO != MIDPOINT:
            term = zero_term(scale, sides_ptr, near, tl.load(sums_ptr + valid), ZERO, OFFSET)
            y += tl.where(split == 0, term, 0.0)
    if ACT_GROUP == 0:
        y = y * tl.load(x_scales_ptr + valid)[None, :]
    store_tile(y, y_ptr, bias_ptr, expert64, rows, end, outputs, m, n, split, HAS_BIAS)
