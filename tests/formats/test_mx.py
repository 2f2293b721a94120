"""MXFP4 and NVFP4 in three vendors' layouts, and their exact int8 form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hostile import broken, survives
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_source import MemorySource, decoded, golden, only

import transload
from transload import bits
from transload.errors import TransloadError
from transload.formats.base import Format
from transload.formats.compressed_tensors import CompressedTensors
from transload.formats.mx import MX, GptOss, ModelOpt, powers_of_two
from transload.quant import Grid, QTensor, QuantSpec
from transload.rewrite import rewrite

MODULE = "model.layers.0.mlp.up_proj"
E2M1 = Grid.E2M1.values(4)


@pytest.mark.parametrize("name", ["ct_mxfp4", "ct_nvfp4"])
def test_golden_files_decode_exactly(name: str) -> None:
    source, tensors = golden(name)
    _, w = only(CompressedTensors(), source)
    assert w.spec.grid is Grid.E2M1
    found = w.dequantize()
    if name == "ct_mxfp4":
        assert torch.equal(found, tensors["dequant"])
    else:  # the library divides the scales in bfloat16, where they are read as float32
        assert torch.allclose(found, tensors["dequant"], rtol=2**-7, atol=0)


def test_scales_are_powers_of_two() -> None:
    assert powers_of_two(torch.tensor([0, 1, 127, 254], dtype=torch.uint8)).tolist() == [
        2.0**-127,
        2.0**-126,
        1,
        2.0**127,
    ]


def gpt_oss() -> tuple[MemorySource, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (2, 6, 64), dtype=torch.uint8, generator=g)
    scales = torch.randint(118, 130, (2, 6, 2), dtype=torch.uint8, generator=g)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    blocks = bits.pack(codes, 4).reshape(2, 6, 2, 16)
    tensors = {f"{name}_blocks": blocks, f"{name}_scales": scales, f"{name}_bias": torch.zeros(2, 6)}
    values = E2M1[codes.long()] * 2.0 ** (scales.float() - 127).repeat_interleave(32, -1)
    return MemorySource(tensors, {"quantization_config": {"quant_method": "mxfp4"}}), values


def test_gpt_oss_stacks_of_experts_read() -> None:
    source, values = gpt_oss()
    entry, w = only(GptOss(), source)
    assert entry.shape == (2, 6, 64)
    assert torch.equal(w.dequantize(), values)
    assert entry.name + "_bias" in GptOss().entries(source)


def modelopt() -> tuple[MemorySource, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (6, 64), dtype=torch.uint8, generator=g)
    scale = (torch.rand(6, 4, generator=g) * 400).to(torch.float8_e4m3fn)
    outer = torch.tensor(0.01)
    parts = {
        "weight": bits.pack(codes, 4),
        "weight_scale": scale,
        "weight_scale_2": outer,
        "input_scale": torch.tensor(1.0),
    }
    values = E2M1[codes.long()] * (scale.float() * outer).repeat_interleave(16, -1)
    config = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}
    return MemorySource({f"{MODULE}.{k}": t for k, t in parts.items()}, config), values


def test_modelopts_second_scale_multiplies() -> None:
    source, values = modelopt()
    assert torch.equal(only(ModelOpt(), source)[1].dequantize(), values)


@pytest.mark.parametrize("name", ["ct_mxfp4", "ct_nvfp4"])
def test_int8_holds_the_same_numbers(name: str) -> None:
    _, w = only(CompressedTensors(), golden(name)[0])
    wide = rewrite(w, QuantSpec(8, w.spec.group_size))
    assert torch.equal(wide.dequantize(), w.dequantize())


def changed(name: str, part: str, t: torch.Tensor) -> MemorySource:
    source, _ = golden(name)
    return MemorySource(source.tensors | {f"{MODULE}.{part}": t}, source.config)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (changed("ct_mxfp4", "weight_scale", torch.zeros(16, 3, dtype=torch.uint8)), "weight_scale.*for N=16, K=128"),
        (changed("ct_mxfp4", "weight_scale", torch.full((16, 4), 255, dtype=torch.uint8)), "up_proj: .*NaN"),
        (changed("ct_mxfp4", "weight_packed", torch.zeros(16, 60, dtype=torch.uint8)), "K=120 is not a multiple"),
        (changed("ct_nvfp4", "weight_global_scale", torch.zeros(1)), "up_proj: .*infinity"),
        (changed("ct_nvfp4", "weight_global_scale", torch.ones(2)), "weight_global_scale.*expected .1"),
    ],
)
def test_contradictions_are_named(source: MemorySource, message: str) -> None:
    with pytest.raises(TransloadError, match=message) as caught:
        decoded(CompressedTensors(), source)
    assert "memory" in str(caught.value)


@pytest.mark.parametrize("which", ["ct_mxfp4", "ct_nvfp4", "gpt-oss", "modelopt"])
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_broken_files_never_crash(which: str, data: st.DataObject) -> None:
    cases: dict[str, tuple[Format, MemorySource]] = {
        "gpt-oss": (GptOss(), gpt_oss()[0]),
        "modelopt": (ModelOpt(), modelopt()[0]),
    }
    fmt, source = cases[which] if which in cases else (CompressedTensors(), golden(which)[0])
    survives(fmt, data.draw(broken(source)))


def test_folders_on_disk_open(tmp_path: Path) -> None:
    stack = transload.open(gpt_oss()[0].save(tmp_path / "a"))["model.layers.0.mlp.experts.gate_up_proj"]
    assert isinstance(stack, QTensor)
    assert stack.spec == MX
    assert transload.open(modelopt()[0].save(tmp_path / "b")).format.name == "modelopt_fp4"
