"""W4A16 and W8A16 in Triton: exact integer weights times 16-bit (or float32) activations, scaled group by group.

The scales stay out of the product: a tensor core multiplies codes less their integer zero point, which bfloat16 and
float16 hold exactly, and the float32 sum of a group is scaled. A float zero point or min is added as its product with
the sum of the group's activations.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl

from transload_cuda.jit.tiles import CODES, FLOATS, MINS, place_of_program, rows_of_tile, store_tile
from transload_cuda.jit.unpack import as_float, less, nibble_floats


@triton.jit
def add_block(
    acc,
    codes,
    x_rows,
    scales_ptr,
    sides_ptr,
    k_first,
    k,
    n,
    outputs,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    OFFSET: tl.constexpr,
    DEFER: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NARROW: tl.constexpr,
):
    """acc plus codes [BLOCK_N, BLOCK_K] times x.T [BLOCK_K, BLOCK_M], inputs k_first and following of one group.

    codes: as `less` gives them. With DEFER, one scale covers the row and the caller applies it at the end.
    """
    at = k_first + tl.arange(0, BLOCK_K)
    if EVEN_K:
        x = tl.load(x_rows[None, :] + at[:, None])
    else:
        x = tl.load(x_rows[None, :] + at[:, None], mask=(at < k)[:, None], other=0.0)
    side = outputs if GROUP == 0 else (k_first // GROUP) * n + outputs
    if ZERO == CODES:
        codes = (codes - as_float(tl.load(sides_ptr + side)[:, None], x.dtype, NARROW)).to(x.dtype)
    if DEFER:
        acc = tl.dot(codes, x, acc)
    else:
        scale = tl.load(scales_ptr + side).to(tl.float32)
        acc += tl.dot(codes, x) * scale[:, None]
        if ZERO == FLOATS:
            zero = tl.load(sides_ptr + side).to(tl.float32)
            acc += ((OFFSET - zero) * scale)[:, None] * tl.sum(x.to(tl.float32), 0)[None, :]
        if ZERO == MINS:
            low = tl.load(sides_ptr + side).to(tl.float32)
            acc += (low + OFFSET * scale)[:, None] * tl.sum(x.to(tl.float32), 0)[None, :]
    return acc


@triton.jit
def matmul_a16(
    x_ptr,
    codes_ptr,
    scales_ptr,
    sides_ptr,
    bias_ptr,
    counts_ptr,
    y_ptr,
    m,
    n,
    k,
    width,
    groups,
    experts,
    tiles_m,
    tiles_n,
    x_stride,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    OFFSET: tl.constexpr,
    EXPERTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    BAND: tl.constexpr,
    PTX: tl.constexpr,
    APART: tl.constexpr,
):
    """y[split, M, N] of x [M, K] (rows x_stride apart) and a weight in the layout of layouts.py.

    sides are zeros or mins; PTX and APART are those of `nibble_floats`.
    Grid: (tiles_m * tiles_n, SPLITS); split s sums its own part of K.
    """
    TAKEN: tl.constexpr = 0 if ZERO == CODES else OFFSET
    DEFER: tl.constexpr = GROUP == 0 and ZERO <= CODES
    tile, column = place_of_program(tiles_m, tiles_n, BAND)
    split = tl.program_id(1)
    expert, start, end = rows_of_tile(tile, counts_ptr, m, experts, BLOCK_M, EXPERTS)
    if start >= end:
        return
    rows = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
    outputs = column * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows and outputs beyond the edge repeat a valid one and are not stored.
    x_rows = x_ptr + tl.where(rows < end, rows, start) * x_stride
    near = tl.where(outputs < n, outputs, 0)
    expert64 = expert.to(tl.int64)
    codes_row = codes_ptr + (expert64 * n + near) * width
    scales_ptr += expert64 * groups * n
    sides_ptr += expert64 * groups * n

    blocks = width // BLOCK_K
    each = (blocks + SPLITS - 1) // SPLITS
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in range(split * each, tl.minimum(split * each + each, blocks)):
        first = block * BLOCK_K
        packed = tl.load(codes_row[:, None] + (first + tl.arange(0, BLOCK_K))[None, :])
        if LANES == 2:
            low, high = nibble_floats(packed, TAKEN, x_ptr.dtype.element_ty, PTX, APART)
            acc = add_block(
                acc, low, x_rows, scales_ptr, sides_ptr, first, k, n, near,
                GROUP, ZERO, OFFSET, DEFER, EVEN_K, BLOCK_K, LANES == 2,
            )  # fmt: skip
            acc = add_block(
                acc, high, x_rows, scales_ptr, sides_ptr, first + width, k, n, near,
                GROUP, ZERO, OFFSET, DEFER, EVEN_K, BLOCK_K, LANES == 2,
            )  # fmt: skip
        else:
            codes = less(as_float(packed, x_ptr.dtype.element_ty, False), TAKEN, x_ptr.dtype.element_ty, False)
            acc = add_block(
                acc, codes, x_rows, scales_ptr, sides_ptr, first, k, n, near,
                GROUP, ZERO, OFFSET, DEFER, EVEN_K, BLOCK_K, LANES == 2,
            )  # fmt: skip
    if DEFER:
        acc = acc * tl.load(scales_ptr + near).to(tl.float32)[:, None]
    store_tile(acc, y_ptr, bias_ptr, expert64, rows, end, outputs, m, n, split, HAS_BIAS)
