"""Blocks that are written: the gguf package reads the same numbers, and its own blocks come back byte for byte."""

from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from memory_source import random_weight

from transload.formats.gguf import Gguf
from transload.formats.gguf_blocks import decode_blocks
from transload.formats.gguf_encode import TYPES, encode_blocks
from transload.quant import ActSpec, Grid, QuantSpec, Zero

F16 = torch.float16


@pytest.mark.parametrize(("spec", "kind"), TYPES.items(), ids=TYPES.values())
@given(n=st.integers(1, 5), blocks=st.integers(1, 4), seed=st.integers(0, 9))
def test_the_owner_reads_the_same_numbers(spec: QuantSpec, kind: str, n: int, blocks: int, seed: int) -> None:
    w = random_weight(spec, n, 32 * blocks, seed)
    w.scales[0] *= -1  # ggml's own scales are negative as often as not
    raw = encode_blocks(w)
    theirs = gguf.dequantize(raw.numpy(), gguf.GGMLQuantizationType[kind])
    assert torch.equal(torch.from_numpy(theirs), w.dequantize())
    assert decode_blocks(kind, raw, w.k).equal(w)


@pytest.mark.parametrize("kind", TYPES.values())
def test_the_owners_blocks_come_back_byte_for_byte(kind: str) -> None:
    values = np.random.default_rng(0).standard_normal((7, 96), dtype=np.float32)
    raw = torch.from_numpy(gguf.quantize(values, gguf.GGMLQuantizationType[kind]))
    assert torch.equal(encode_blocks(decode_blocks(kind, raw, 96)), raw)


SYMMETRIC = QuantSpec(4, 32, scale_dtype=F16)
REFUSED = [
    (replace(SYMMETRIC, bits=6), (8, 64), "codes of 4, 5 or 8 bits, not 6"),
    (replace(SYMMETRIC, bits=8, zero=Zero.MINS), (8, 64), "codes of 4 or 5 bits, not 8"),
    (replace(SYMMETRIC, zero=Zero.CODES), (8, 64), "zero points as midpoint or mins, not codes"),
    (replace(SYMMETRIC, scale_dtype=torch.bfloat16), (8, 64), "float16 scales, not bfloat16"),
    (replace(SYMMETRIC, group_size=16), (8, 64), "groups of 32, not 16"),
    (replace(SYMMETRIC, act_order=True), (8, 64), "no g_idx"),
    (replace(SYMMETRIC, act=ActSpec()), (8, 64), "weight-only"),
    (QuantSpec(4, 32, Grid.NF4, Zero.NONE), (8, 64), "integer codes, not nf4"),
    (SYMMETRIC, (8, 80), "K=80 is not a multiple of 32"),
    (SYMMETRIC, (2, 8, 64), "one linear"),
]


@pytest.mark.parametrize(("spec", "shape", "says"), REFUSED, ids=lambda v: str(v)[:30])
def test_what_a_block_cannot_hold_is_refused(spec: QuantSpec, shape: tuple[int, ...], says: str) -> None:
    assert says in str(Gguf().cannot_hold(spec, shape))
