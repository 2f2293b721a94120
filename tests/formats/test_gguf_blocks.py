"""Block decoding against the gguf package, bit for bit, on random bytes."""

import gguf
import numpy as np
import pytest
import torch

from transload.errors import FormatError
from transload.formats.gguf_blocks import BLOCKS, decode_blocks
from transload.quant import Zero


def random_blocks(ggml_type: str, n: int, k: int, seed: int = 0) -> torch.Tensor:
    """Random bytes with sane half-precision scales, so that nothing overflows to infinity."""
    block = BLOCKS[ggml_type]
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (n, k // block.elems, block.nbytes), dtype=np.uint8)
    for start in HALVES[ggml_type]:
        scales = rng.normal(0, 0.01, raw.shape[:2]).astype(np.float16)
        raw[..., start : start + 2] = scales[..., None].view(np.uint8)
    if ggml_type == "MXFP4":
        raw[..., 0] = rng.integers(0, 250, raw.shape[:2])
    return torch.from_numpy(raw.reshape(n, -1))


HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "MXFP4": (),
}  # fmt: skip


@pytest.mark.parametrize("ggml_type", BLOCKS)
def test_decoded_numbers_equal_the_gguf_package(ggml_type):
    raw = random_blocks(ggml_type, 5, 1024)
    want = gguf.dequantize(raw.numpy(), gguf.GGMLQuantizationType[ggml_type])
    got = decode_blocks(ggml_type, raw, 1024).dequantize()
    assert torch.equal(got, torch.from_numpy(want))


@pytest.mark.parametrize("ggml_type", BLOCKS)
def test_block_sizes_are_ggmls(ggml_type):
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[ggml_type]] == (
        BLOCKS[ggml_type].elems,
        BLOCKS[ggml_type].nbytes,
    )


def test_experts_keep_their_axis_and_flat_bytes_become_rows():
    raw = random_blocks("Q4_0", 6, 64)
    stacked = decode_blocks("Q4_0", raw.reshape(2, 3, -1), 64)
    assert stacked.codes.shape == (2, 3, 64)
    assert torch.equal(decode_blocks("Q4_0", raw.flatten(), 64).codes, stacked.codes.flatten(0, 1))


def test_codes_keep_the_blocks_own_width():
    assert (BLOCKS["Q5_0"].spec.bits, BLOCKS["Q5_0"].spec.midpoint) == (5, 16)
    assert (BLOCKS["Q6_K"].spec.bits, BLOCKS["Q6_K"].spec.group_size) == (6, 16)
    assert BLOCKS["Q4_K"].spec.zero is Zero.MINS
    assert int(decode_blocks("Q5_0", random_blocks("Q5_0", 8, 256), 256).codes.max()) == 31


@pytest.mark.parametrize(
    ("ggml_type", "raw", "k", "says"),
    [
        ("IQ4_XS", torch.zeros(136, dtype=torch.uint8), 256, "IQ4_XS cannot be decoded"),
        ("Q4_0", torch.zeros(18, dtype=torch.uint8), 48, "not whole Q4_0 blocks of 32"),
        ("Q4_K", torch.zeros(143, dtype=torch.uint8), 256, "143 bytes are not whole rows of 144"),
        ("MXFP4", torch.full((17,), 255, dtype=torch.uint8), 32, "NaN"),
    ],
)
def test_bad_blocks_are_named(ggml_type, raw, k, says):
    with pytest.raises(FormatError, match=says):
        decode_blocks(ggml_type, raw, k)
