"""The PTX that unpacks codes, proved without a GPU: an emulator runs it on every byte, and the machine code is counted.

Triton's interpreter takes the branch without PTX, so nothing else reads these lines before a GPU does.
"""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch

from transload.quant import ActSpec, QuantSpec, Zero

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed; its kernels use the PTX")

Words = np.ndarray[tuple[int], np.dtype[np.uint32]]


def run_ptx(text: str, inputs: list[Words], outputs: int) -> list[Words]:
    """What a block of inline PTX leaves in its first operands; the others are its inputs. Raises KeyError for an
    instruction that is not emulated here as the PTX ISA (9.0, sections 9.7.2 to 9.7.8) defines it."""
    registers: dict[str, Words] = {f"${outputs + i}": words for i, words in enumerate(inputs)}

    def value(name: str) -> Words:
        return registers[name] if name in registers else np.full_like(inputs[0], int(name, 0))

    for line in text.strip().strip("{}").split(";"):
        name, _, rest = line.strip().partition(" ")
        if name in ("", ".reg"):
            continue
        target, *operands = (part.strip() for part in rest.split(","))
        late = {f"${i}" for i in range(outputs, outputs + len(inputs))} & set(operands)
        assert not (late and "$0" in registers), f"{line.strip()}: the compiler may have put $0 where {late} was"
        registers[target] = INSTRUCTIONS[name](*map(value, operands))
    return [registers[f"${i}"] for i in range(outputs)]


def prmt(a: Words, b: Words, selector: Words) -> Words:
    """Four bytes, each chosen out of eight; the sign-replicating mode (selector bit 3) is not used."""
    pool = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.zeros_like(a)
    for i in range(4):
        chosen = selector >> np.uint32(4 * i) & np.uint32(15)
        assert (chosen < 8).all()
        byte = pool >> (chosen.astype(np.uint64) * np.uint64(8)) & np.uint64(255)
        out |= byte.astype(np.uint32) << np.uint32(8 * i)
    return out


def lop3(a: Words, b: Words, c: Words, table: Words) -> Words:
    """Bit i of the result is bit (a_i, b_i, c_i) of the table."""
    out = np.zeros_like(a)
    for case in range(8):
        if int(table[0]) >> case & 1:
            x, y, z = (v if case >> place & 1 else ~v for v, place in ((a, 2), (b, 1), (c, 0)))
            out |= x & y & z
    return out


def halves(words: Words, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(words.view(np.int16).copy()).view(dtype)


def words_of(t: torch.Tensor) -> Words:
    return t.contiguous().view(torch.int16).numpy().view(np.uint32)


def sub_f16x2(a: Words, b: Words) -> Words:
    return words_of(halves(a, torch.float16) - halves(b, torch.float16))


def fma_bf16x2(a: Words, b: Words, c: Words) -> Words:
    """Rounded once: float64 holds a product of two bfloat16 numbers and these sums exactly."""
    x, y, z = (halves(v, torch.bfloat16).double() for v in (a, b, c))
    return words_of((x * y + z).bfloat16())


INSTRUCTIONS = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "shr.u32": lambda a, b: a >> b,
    "shl.b32": lambda a, b: a << b,
    "prmt.b32": prmt,
    "lop3.b32": lop3,
    "sub.f16x2": sub_f16x2,
    "fma.rn.bf16x2": fma_bf16x2,
}


def every_byte(bits: int) -> tuple[np.ndarray[tuple[int, int], np.dtype[np.uint8]], Words]:
    """(bytes [count, 4], their words): every pair of codes in every place, among others that change with it."""
    at = np.arange(256)
    rows = [np.stack([(at * step + shift) % 256 for step, shift in places], 1) for places in (
        ((1, 0), (3, 5), (5, 7), (7, 11)), ((7, 1), (1, 0), (3, 2), (5, 3)), ((255, 255), (1, 0), (1, 0), (255, 255)),
        ((1, 0), (1, 0), (1, 0), (1, 0)),
    )]  # fmt: skip
    data = np.ascontiguousarray(np.concatenate(rows) & ((1 << bits) - 1) * 0x11).astype(np.uint8)
    return data, data.view(np.uint32)[:, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("zero", [Zero.MIDPOINT, Zero.CODES])
@pytest.mark.parametrize("apart", [False, True], ids=["whole", "apart"])
def test_nibbles_become_floats_exactly(dtype: torch.dtype, bits: int, zero: Zero, apart: bool) -> None:
    from transload_cuda.jit.launch import ptx

    data, words = every_byte(bits)
    found = run_ptx(ptx(QuantSpec(bits, 32, zero=zero), dtype, apart), [words], 4)
    lifted = apart or zero is Zero.CODES
    rest = {torch.float16: 2.0**10, torch.bfloat16: 2.0**7}[dtype] if lifted else -(2.0 ** (bits - 1))
    for pair, nibbles in ((found[:2], data & 15), (found[2:], data >> 4)):
        values = torch.stack([halves(register, dtype) for register in pair]).reshape(2, -1, 2)
        got = values.permute(1, 0, 2).reshape(-1, 4)
        assert torch.equal(got.double(), torch.from_numpy(nibbles.astype(np.float64)) + rest)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_nibbles_become_int8_exactly(bits: int) -> None:
    from transload_cuda.jit.launch import ptx

    data, words = every_byte(bits)
    low, high = run_ptx(ptx(QuantSpec(bits, 32, act=ActSpec()), torch.bfloat16, False), [words], 2)
    for register, nibbles in ((low, data & 15), (high, data >> 4)):
        wanted = (nibbles.astype(np.int64) - (1 << (bits - 1))) * (1 << (8 - bits))
        assert np.array_equal(register.view(np.int8).reshape(-1, 4), wanted)


def test_wide_codes_and_float32_have_no_ptx() -> None:
    from transload_cuda.jit.launch import ptx

    assert ptx(QuantSpec(4, 32), torch.float32, False) == ""
    assert ptx(QuantSpec(8, 32), torch.bfloat16, False) == ""
    assert ptx(QuantSpec(5, 32, act=ActSpec()), torch.float32, False) == ""
    assert ptx(QuantSpec(4, 32, act=ActSpec()), torch.float32, False) != ""
