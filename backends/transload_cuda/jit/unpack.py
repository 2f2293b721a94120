"""Two codes of a byte as operands of a tensor core, four bytes at a time.

A byte of a packed row holds a code of the row's first half in its low and one of the second half in its high nibble.
Triton works on every byte alone; PTX works on the four bytes of a register at once, in a quarter of the instructions,
and in the layout of the tensor core. Triton's interpreter runs no PTX, so every function here has a branch of plain
Triton that gives the same numbers. `ptx` is the text that the kernels get as a constant, "" where there is none.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl

# Four results of 16 bits are two registers, four of 8 bits are one. The compiler may give a result the register of the
# input: every program below has read its input for the last time before it writes its first result.
TO_16_BITS = tl.constexpr("=r,=r,=r,=r,r")
TO_8_BITS = tl.constexpr("=r,=r,r")

# prmt picks bytes by number: 0 to 3 from its first operand, 4 to 7 from the second. 0x4140 puts bytes 0 and 1 of the
# codes below the constant's byte each, 0x4342 bytes 2 and 3: as numbers of 16 bits, 2**p + code.
LIFT = """{{
.reg .b32 low, high;
and.b32 low, $4, 0x0f0f0f0f;
shr.u32 high, $4, 4;
and.b32 high, high, 0x0f0f0f0f;
prmt.b32 $0, low, {top}, 0x4140;
prmt.b32 $1, low, {top}, 0x4342;
prmt.b32 $2, high, {top}, 0x4140;
prmt.b32 $3, high, {top}, 0x4342;
{less}}}"""
LESS_FP16 = """.reg .b32 number;
mov.b32 number, {number};
sub.f16x2 $0, $0, number;
sub.f16x2 $1, $1, number;
sub.f16x2 $2, $2, number;
sub.f16x2 $3, $3, number;
"""
# Ampere has no bf16 subtraction: times one, plus a negative number, which is as exact and as fast.
LESS_BF16 = """.reg .b32 one, number;
mov.b32 one, 0x3f803f80;
mov.b32 number, {number};
fma.rn.bf16x2 $0, $0, one, number;
fma.rn.bf16x2 $1, $1, one, number;
fma.rn.bf16x2 $2, $2, one, number;
fma.rn.bf16x2 $3, $3, one, number;
"""

# A code in the top bits of a byte, its highest bit turned over, is the int8 number (code - midpoint) << (8 - bits).
RAISE = """{{
.reg .b32 low, high;
shl.b32 low, $2, {low};
shl.b32 high, $2, {high};
lop3.b32 $0, low, {mask}, 0x80808080, 0x6a;
lop3.b32 $1, high, {mask}, 0x80808080, 0x6a;
}}"""


def floats_ptx(half: bool, offset: int) -> str:
    """PTX from four bytes to their low and high codes less `offset` (2, 4, 8; 0: plus 2**p) in fp16 (half) or bf16."""
    top, one, less = (0x64, 0x6400, LESS_FP16) if half else (0x43, 0xC300, LESS_BF16)  # 2**10, and +-2**7
    number = f"{(one | offset) * 0x00010001:#010x}"
    return LIFT.format(top=f"{top * 0x01010101:#010x}", less=less.format(number=number) if offset else "")


def int8_ptx(bits: int) -> str:
    """PTX from four bytes to their low and high codes less the midpoint, times 2**(8 - bits), in int8."""
    mask = (0xFF << (8 - bits)) & 0xFF
    return RAISE.format(low=8 - bits, high=4 - bits, mask=f"{mask * 0x01010101:#010x}")


@triton.jit
def as_float(integer, dtype: tl.constexpr, NARROW: tl.constexpr):
    """2**p + integer in float16, float32 or, for integers up to 127, bfloat16: its bits set into the mantissa.

    p is the number of mantissa bits. An integer-to-float conversion would take eight times as long as this.
    """
    if dtype == tl.float16:
        return (integer.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True)
    elif dtype == tl.bfloat16 and NARROW:
        return (integer.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True)
    else:
        return (integer.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True)


@triton.jit
def less(lifted, OFFSET: tl.constexpr, dtype: tl.constexpr, NARROW: tl.constexpr):
    """What `as_float` gave less its 2**p and OFFSET, exactly, in dtype. OFFSET 0: unchanged; every group has a zero of
    its own to take away."""
    if OFFSET == 0:
        return lifted
    else:
        return (lifted - as_float(tl.full((1, 1), OFFSET, tl.uint8), dtype, NARROW)).to(dtype)


@triton.jit
def nibble_floats(packed, OFFSET: tl.constexpr, dtype: tl.constexpr, PTX: tl.constexpr, APART: tl.constexpr):
    """`less` of the low and of the high nibbles of uint8 bytes. APART: the PTX leaves the subtraction to Triton."""
    REST: tl.constexpr = OFFSET if APART or PTX == "" else 0
    if PTX == "":
        low, high = as_float(packed & 15, dtype, True), as_float(packed >> 4, dtype, True)
    elif dtype == tl.float16:
        low, high = tl.inline_asm_elementwise(PTX, TO_16_BITS, [packed], (tl.float16, tl.float16), True, 4)
    else:
        low, high = tl.inline_asm_elementwise(PTX, TO_16_BITS, [packed], (tl.bfloat16, tl.bfloat16), True, 4)
    return less(low, REST, dtype, True), less(high, REST, dtype, True)


@triton.jit
def nibble_int8(packed, BITS: tl.constexpr, PTX: tl.constexpr):
    """int8 (code - midpoint) << (8 - BITS) of the low and of the high nibbles of uint8 bytes."""
    if PTX != "":
        return tl.inline_asm_elementwise(PTX, TO_8_BITS, [packed], (tl.int8, tl.int8), True, 4)
    else:
        MASK: tl.constexpr = (255 << (8 - BITS)) & 255
        low = ((packed << (8 - BITS)) & MASK) ^ 128
        high = ((packed << (4 - BITS)) & MASK) ^ 128
        return low.to(tl.int8, bitcast=True), high.to(tl.int8, bitcast=True)
