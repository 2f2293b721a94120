"""Bit packing: a stream of codes, LSB first, against an independent definition with Python integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transload import bits

WORDS = {torch.uint8: 8, torch.int8: 8, torch.int16: 16, torch.int32: 32, torch.int64: 64}

widths = st.integers(2, 8)
words = st.sampled_from(tuple(WORDS))


@st.composite
def rows(draw: st.DrawFn, bits: int) -> list[int]:
    return draw(st.lists(st.integers(0, (1 << bits) - 1), max_size=70))


def stream(codes: list[int], bits: int, word_bits: int) -> list[int]:
    """The words of one row as signed integers: one big number, cut."""
    number = sum(code << (bits * i) for i, code in enumerate(codes))
    count = -(-len(codes) * bits // word_bits)
    cut = [(number >> (word_bits * i)) & ((1 << word_bits) - 1) for i in range(count)]
    return [w - (1 << word_bits) if w >> (word_bits - 1) else w for w in cut]


@given(st.data(), widths, words)
def test_words_are_the_little_endian_stream_of_codes(data: st.DataObject, width: int, word: torch.dtype) -> None:
    codes = data.draw(rows(width))
    packed = bits.pack(torch.tensor(codes, dtype=torch.uint8), width, word)
    assert packed.dtype == word
    expected = torch.tensor(stream(codes, width, WORDS[word]), dtype=torch.int64)
    assert packed.tolist() == (expected % 256 if word == torch.uint8 else expected).tolist()


@given(st.data(), widths, words)
def test_unpack_is_the_inverse_of_pack(data: st.DataObject, width: int, word: torch.dtype) -> None:
    codes = torch.tensor(data.draw(rows(width)), dtype=torch.uint8)
    packed = bits.pack(codes, width, word)
    assert packed.shape == (bits.packed_len(len(codes), width, word),)
    assert torch.equal(bits.unpack(packed, width, len(codes)), codes)


@given(st.data(), widths, st.integers(1, 4), st.integers(0, 5), st.integers(0, 40))
def test_rows_are_packed_one_by_one(data: st.DataObject, width: int, experts: int, n: int, k: int) -> None:
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    codes = torch.randint(1 << width, (experts, n, k), generator=random, dtype=torch.uint8)
    packed = bits.pack(codes, width)
    assert packed.shape == (experts, n, bits.packed_len(k, width))
    for e in range(experts):
        for row in range(n):
            assert torch.equal(packed[e, row], bits.pack(codes[e, row], width))
    assert torch.equal(bits.unpack(packed, width, k), codes)


@given(widths, words)
def test_transposed_and_sliced_codes_pack_like_their_copies(width: int, word: torch.dtype) -> None:
    codes = torch.randint(1 << width, (13, 11), generator=torch.Generator().manual_seed(width), dtype=torch.uint8)
    for view in (codes.T, codes[::2, 1:-1], codes.T[3:, ::3]):
        assert torch.equal(bits.pack(view, width, word), bits.pack(view.contiguous(), width, word))
    packed = bits.pack(codes, width, word)
    wide = torch.stack([packed, packed], dim=-1)[..., 0]
    assert torch.equal(bits.unpack(wide, width, 11), codes)


def test_the_example_of_the_module_holds() -> None:
    codes = torch.tensor([5, 5, 7, 7, 10, 10, 7, 3], dtype=torch.uint8)
    assert bits.pack(codes, 4).tolist() == [0x55, 0x77, 0xAA, 0x37]
    assert bits.pack(codes, 4, torch.int32).tolist() == [0x37AA7755]


def test_packing_leaves_its_input_alone() -> None:
    codes = torch.full((2, 8), 3, dtype=torch.uint8)
    for width in range(2, 9):
        bits.pack(codes, width)
    assert bool((codes == 3).all())


@pytest.mark.parametrize("width", range(2, 9))
def test_too_few_bytes_are_an_error(width: int) -> None:
    with pytest.raises(ValueError, match="hold fewer than"):
        bits.unpack(torch.zeros(width, dtype=torch.uint8), width, 9)


def test_lengths() -> None:
    assert [bits.packed_len(9, width) for width in range(2, 9)] == [3, 4, 5, 6, 7, 8, 9]
    assert bits.packed_len(9, 4, torch.int32) == 2
    assert bits.packed_len(0, 4) == 0


@given(st.sampled_from([2, 4]), st.integers(0, 9))
def test_lanes_laid_over_each_other_come_apart_again(width: int, length: int) -> None:
    random = torch.Generator().manual_seed(length)
    lanes = torch.randint(1 << width, (8 // width, 3, length), generator=random, dtype=torch.uint8)
    joined = bits.join(tuple(lanes), width)
    assert torch.equal(joined, bits.pack(lanes.movedim(0, -1), width).squeeze(-1))
    assert torch.equal(torch.stack(bits.split(joined, width)), lanes)
