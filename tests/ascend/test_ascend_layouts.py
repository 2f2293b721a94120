"""The layouts, on any machine: against worked values, against each other, and against msModelSlim's own files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from transload.quant import PER_CHANNEL, ActSpec, QTensor, QuantSpec, fuse_rows, stack_experts
from transload_ascend import layouts
from transload_ascend.experts import GroupedW4A8
from transload_ascend.w4a16 import W4A16

EXAMPLES = settings(max_examples=50, deadline=None)  # a busy machine is not a failure
GOLDEN = Path(__file__).parents[1] / "golden"


def _codes(*shape: int) -> Tensor:
    return torch.randint(16, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_int4pack_puts_element_i_of_eight_in_bits_4i() -> None:
    codes = torch.tensor([[8, 9, 10, 11, 12, 13, 14, 15], [0, 1, 2, 3, 4, 5, 6, 7]], dtype=torch.uint8)
    assert [hex(v & 0xFFFFFFFF) for v in layouts.int4pack(codes)[:, 0].tolist()] == ["0x76543210", "0xfedcba98"]


@EXAMPLES
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 20))
def test_packing_along_n_and_k_round_trips(experts: int, words: int, k: int) -> None:
    codes = _codes(experts, 8 * words, k)
    packed = layouts.pack_along_n(codes)
    assert packed.shape == (experts, k, words)
    assert torch.equal(layouts.unpack_along_n(packed), codes)
    along_k = codes.transpose(1, 2).contiguous()
    assert torch.equal(layouts.int4unpack(layouts.int4pack(along_k)), along_k)


@EXAMPLES
@given(st.sampled_from([torch.int8, torch.int32]), st.integers(1, 40), st.integers(1, 80))
def test_nz_keeps_every_element_at_the_documented_place(dtype: torch.dtype, rows: int, columns: int) -> None:
    matrix = torch.arange(rows * columns).reshape(rows, columns).to(dtype)
    blocks = layouts.to_nz(matrix)
    c0 = 32 // matrix.element_size()
    assert blocks.shape == (-(-columns // c0), -(-rows // 16), 16, c0)
    r, c = rows - 1, columns - 1
    assert blocks[c // c0, r // 16, r % 16, c % c0] == matrix[r, c]
    assert torch.equal(layouts.from_nz(blocks, rows, columns), matrix)


def test_nz_of_packed_bytes_and_of_packed_words_are_the_same_bytes() -> None:
    words = layouts.pack_along_n(_codes(192, 48))
    as_bytes = layouts.to_nz(words.view(torch.int8))
    assert torch.equal(as_bytes.view(torch.int32).flatten(), layouts.to_nz(words).flatten())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_scales_survive_the_19_bit_float(dtype: torch.dtype) -> None:
    scales = torch.arange(1, 0x7C00 if dtype == torch.float16 else 0x7F80, dtype=torch.int16).view(dtype)
    words = layouts.fp19_scale(scales)
    assert torch.equal(layouts.scale_from_bits(words).to(dtype), scales)
    assert bool(((words >> 46) == 1).all())


def test_scale_words_are_worked_values() -> None:
    one_third = torch.tensor([1.0, 1 / 3])  # 0x3f800000, 0x3eaaaaab
    assert [hex(v) for v in layouts.scale_bits(one_third).tolist()] == ["0x3f800000", "0x3eaaaaab"]
    assert [hex(v) for v in layouts.fp19_scale(one_third).tolist()] == ["0x40003f800000", "0x40003eaaa000"]


@EXAMPLES
@given(st.sampled_from([32, 96, PER_CHANNEL]), st.integers(1, 200))
def test_scale_bias_is_eight_times_the_dequantized_row_sums(group: int, k: int) -> None:
    spec = QuantSpec(4, group, act=ActSpec())
    scales = torch.rand(2, 8, spec.groups(k), generator=torch.Generator().manual_seed(k))
    w = QTensor(spec, _codes(2, 8, k), scales)
    expected = 8 * w.dequantize(torch.float64).sum(-1)
    assert torch.allclose(layouts.scale_bias(w).double(), expected, rtol=1e-6, atol=1e-6)


def _msmodelslim(tensors: dict[str, Tensor], name: str, spec: QuantSpec) -> QTensor:
    """One linear of a file, unpacked here by its documented rule: byte (i, k) holds rows 2i (low nibble) and 2i + 1."""
    packed = tensors[f"{name}.weight"].view(torch.uint8)
    codes = torch.empty(2 * packed.shape[0], packed.shape[1], dtype=torch.uint8)
    codes[0::2], codes[1::2] = (packed & 15) ^ 8, (packed >> 4) ^ 8
    return QTensor(spec, codes, tensors[f"{name}.weight_scale"])


def test_w4a16_of_msmodelslim_packs_to_what_vllm_ascend_makes_of_it() -> None:
    tensors = load_file(GOLDEN / "msmodelslim_v0_w4a16_g64" / "quant_model_weights.safetensors")
    name = "model.layers.0.self_attn.k_proj"
    packed = W4A16().pack(_msmodelslim(tensors, name, QuantSpec(4, 64))).tensors
    loaded = tensors[f"{name}.weight"].transpose(0, 1).contiguous().view(torch.int32)
    assert torch.equal(packed["weight"], loaded)
    assert torch.equal(packed["scale"], tensors[f"{name}.weight_scale"].transpose(0, 1))


def test_w4a8_experts_of_msmodelslim_pack_to_what_vllm_ascend_makes_of_them() -> None:
    tensors = load_file(GOLDEN / "msmodelslim_w4a8" / "quant_model_weights.safetensors")
    spec = QuantSpec(4, PER_CHANNEL, act=ActSpec())
    at = "model.layers.0.mlp.experts.0."
    gate, up, down = (_msmodelslim(tensors, f"{at}{m}_proj", spec) for m in ("gate", "up", "down"))
    for parts, names in (((gate, up), ("gate_proj", "up_proj")), ((down,), ("down_proj",))):
        packed = GroupedW4A8().pack(stack_experts([fuse_rows(parts)])).tensors
        weight = torch.cat([tensors[f"{at}{n}.weight"] for n in names]).unsqueeze(0)
        scale = torch.cat([tensors[f"{at}{n}.weight_scale"] for n in names]).unsqueeze(0)
        bias = torch.cat([tensors[f"{at}{n}.scale_bias"] for n in names]).unsqueeze(0)
        assert torch.equal(packed["weight"], weight.transpose(1, 2).contiguous().view(torch.int32))
        assert torch.equal(packed["scale"], scale.transpose(1, 2).contiguous().view(torch.int32).long())
        assert torch.equal(packed["scale_bias"], bias.transpose(1, 2).sum(1))
