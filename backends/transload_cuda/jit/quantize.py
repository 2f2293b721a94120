"""Dynamic int8 quantization of activations in one launch: codes, scales and the block sums that zero points need.

scale = absmax / 127 and q = round half to even of x / scale, both divisions correctly rounded, so that codes equal
`reference.quantize_activation`'s. NaN or infinity makes the scale NaN; a group of zeros gets scale 0 and codes 0.

With SWIGLU, x is what a gated layer makes of rows [2 K]: silu of the first half times the second, not rounded between.

Both kernels write q: int8 [M, padded_k], 0 beyond K; sums: int32 [padded_k / BLOCK, M], of the codes in each block.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl

HALF_EVEN = tl.constexpr(12582912.0)  # 1.5 * 2**23: added and taken away, it rounds to the nearest even integer


@triton.jit
def scale_of(top, finite):
    """absmax / 127; NaN unless finite. A maximum may or may not see a NaN, so finiteness is known apart."""
    return tl.where(finite, tl.math.div_rn(top, tl.full(top.shape, 127.0, tl.float32)), float("nan"))


@triton.jit
def codes_of(x, scale):
    """int32 codes of x for a scale of the same shape; 0 where the scale is 0 or NaN."""
    usable = scale > 0
    exact = tl.where(usable, tl.math.div_rn(x, tl.where(usable, scale, 1.0)), 0.0)
    return tl.minimum(tl.maximum((exact + HALF_EVEN) - HALF_EVEN, -127.0), 127.0).to(tl.int32)


@triton.jit
def load_gated(x_row, source, real, k, SWIGLU: tl.constexpr):
    """float32 x at `source` of a row, 0 where not real; with SWIGLU silu(x) times the number K places on."""
    x = tl.load(x_row + source, mask=real, other=0.0).to(tl.float32)
    if SWIGLU:
        x = x / (1 + tl.exp(-x)) * tl.load(x_row + k + source, mask=real, other=0.0).to(tl.float32)
    return x


@triton.jit
def load_inputs(x_row, order_ptr, at, k, HAS_ORDER: tl.constexpr, SWIGLU: tl.constexpr):
    """`load_gated` at places `at` of a row, 0 beyond K; with an order, place i holds input order[i]."""
    source = at
    if HAS_ORDER:
        source = tl.load(order_ptr + at, mask=at < k, other=0)
    return load_gated(x_row, source, at < k, k, SWIGLU)


@triton.jit
def quantize_tokens(
    x_ptr,
    order_ptr,
    q_ptr,
    scales_ptr,
    sums_ptr,
    m,
    k,
    padded_k,
    x_stride,
    BLOCK: tl.constexpr,
    MANY: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    ONE_SUM: tl.constexpr,
    SWIGLU: tl.constexpr,
):
    """One scale a row: scales float32 [M]. With ONE_SUM, sums is int32 [M], of the whole row. Grid: (M,)."""
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + row * x_stride
    places = tl.arange(0, MANY)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    top = tl.zeros((MANY, BLOCK), tl.float32)
    finite = tl.full((MANY, BLOCK), 1, tl.int32)
    for first in range(0, padded_k, MANY * BLOCK):
        size = tl.abs(load_inputs(x_row, order_ptr, first + places, k, HAS_ORDER, SWIGLU))
        finite = tl.minimum(finite, (size < float("inf")).to(tl.int32))
        top = tl.maximum(top, size)
    scale = scale_of(tl.max(tl.max(top, 1), 0), tl.min(tl.min(finite, 1), 0) == 1)
    total = tl.zeros((MANY,), tl.int32)
    for first in range(0, padded_k, MANY * BLOCK):
        at = first + places
        x = load_inputs(x_row, order_ptr, at, k, HAS_ORDER, SWIGLU)
        q = codes_of(x, tl.zeros((MANY, BLOCK), tl.float32) + scale)
        tl.store(q_ptr + row * padded_k + at, q.to(tl.int8), mask=at < padded_k)
        sums = tl.sum(q, 1)
        if ONE_SUM:
            total += sums
        else:
            block = first // BLOCK + tl.arange(0, MANY)
            tl.store(sums_ptr + block.to(tl.int64) * m + row, sums, mask=block * BLOCK < padded_k)
    if ONE_SUM:
        tl.store(sums_ptr + row, tl.sum(total, 0))
    tl.store(scales_ptr + row, scale)


@triton.jit
def quantize_groups(
    x_ptr,
    q_ptr,
    scales_ptr,
    sums_ptr,
    m,
    k,
    padded_k,
    x_stride,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    MANY: tl.constexpr,
    SWIGLU: tl.constexpr,
):
    """A scale for every GROUP inputs of a row: scales float32 [padded_k / GROUP, M].

    A program takes MANY groups of BLOCKS (a power of two, GROUP or more in all) blocks. Grid: (M, groups / MANY).
    """
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * MANY + tl.arange(0, MANY)
    block = tl.arange(0, BLOCKS)[None, :]
    inside = (block * BLOCK < GROUP) & (group * GROUP < padded_k)[:, None]
    at = (group[:, None] * GROUP + block * BLOCK)[:, :, None] + tl.arange(0, BLOCK)[None, None, :]
    real = inside[:, :, None] & (at < k)
    x = load_gated(x_ptr + row * x_stride, at, real, k, SWIGLU)
    size = tl.abs(x)
    finite = tl.min(tl.min((size < float("inf")).to(tl.int32), 2), 1) == 1
    scale = scale_of(tl.max(tl.max(size, 2), 1), finite)
    q = codes_of(x, tl.zeros((MANY, BLOCKS, BLOCK), tl.float32) + scale[:, None, None])
    tl.store(q_ptr + row * padded_k + at, q.to(tl.int8), mask=inside[:, :, None] & (at < padded_k))
    which = (group[:, None] * GROUP) // BLOCK + block
    tl.store(sums_ptr + which.to(tl.int64) * m + row, tl.sum(q, 2), mask=inside)
    tl.store(scales_ptr + group.to(tl.int64) * m + row, scale, mask=group * GROUP < padded_k)
