"""FP8: blocks, channels and tensors, against the definition w = fp8 * scale."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hostile import broken, survives
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_source import MemorySource, decoded, only

import transload
from transload.errors import TransloadError
from transload.formats.base import Json
from transload.formats.fp8 import Fp8

FMT = Fp8()
MODULE = "model.layers.0.mlp.up_proj"


def fp8(n: int, k: int) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(n * k)).to(torch.float8_e4m3fn)


def source(weight: torch.Tensor, scale: torch.Tensor, part: str = "weight_scale_inv", **config: object) -> MemorySource:
    quantization: Json = {"quant_method": "fp8", "activation_scheme": "dynamic", **config}
    tensors = {f"{MODULE}.weight": weight, f"{MODULE}.{part}": scale, "model.norm.weight": torch.ones(4)}
    return MemorySource(tensors, {"quantization_config": quantization})


@given(n=st.integers(1, 300), k=st.integers(1, 300), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=25, deadline=None)
def test_blocks_multiply_whatever_the_shape(n: int, k: int, dtype: torch.dtype) -> None:
    weight, rows, columns = fp8(n, k), -(-n // 128), -(-k // 64)
    scale = (torch.rand(rows, columns) + 0.1).to(dtype)
    entry, w = only(FMT, source(weight, scale, weight_block_size=[128, 64]))
    assert entry.shape == (n, k)
    full = scale.float().repeat_interleave(128, 0)[:n].repeat_interleave(64, 1)[:, :k]
    assert torch.equal(w.dequantize(), weight.float() * full)


@pytest.mark.parametrize("shape", [(), (1,), (6,), (6, 1)], ids=str)
def test_scales_of_a_tensor_or_of_channels_multiply(shape: tuple[int, ...]) -> None:
    weight, scale = fp8(6, 40), torch.rand(shape) + 0.1
    _, w = only(FMT, source(weight, scale, "weight_scale"))
    assert w.spec.group_size == -1
    assert torch.equal(w.dequantize(), weight.float() * scale.reshape(-1, 1))


def test_power_of_two_scales_read_as_float32() -> None:
    weight, scale = fp8(128, 128), torch.tensor([[2.0**-9]]).to(torch.float8_e8m0fnu)
    _, w = only(FMT, source(weight, scale, weight_block_size=[128, 128]))
    assert torch.equal(w.dequantize(), weight.float() * 2.0**-9)


NAN = torch.full((6, 40), float("nan")).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            source(fp8(6, 40), torch.ones(2, 1), weight_block_size=[128, 128]),
            "weight_scale_inv.*expected .1, 1. for N=6",
        ),
        (source(fp8(6, 40), torch.ones(2, 2)), "no weight_block_size"),
        (source(fp8(6, 40), torch.ones(1, 1), weight_block_size=[0, 128]), "weight_block_size is"),
        (source(fp8(6, 40), torch.full((6,), float("inf")), "weight_scale"), "up_proj: .*infinity"),
        (source(NAN, torch.ones(1)), "up_proj: weight contains NaN"),
        (source(fp8(6, 40), torch.ones(1), "other"), "neither weight_scale_inv nor weight_scale"),
    ],
)
def test_contradictions_are_named(bad: MemorySource, message: str) -> None:
    with pytest.raises(TransloadError, match=message) as caught:
        decoded(FMT, bad)
    assert "memory" in str(caught.value)


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_broken_files_never_crash(data: st.DataObject) -> None:
    survives(FMT, data.draw(broken(source(fp8(130, 70), torch.ones(2, 2), weight_block_size=[128, 64]))))


def test_a_folder_on_disk_opens(tmp_path: Path) -> None:
    made = source(fp8(6, 40), torch.ones(1, 1), weight_block_size=[128, 128])
    checkpoint = transload.open(made.save(tmp_path / "model"))
    assert checkpoint.format.name == "fp8"
    assert checkpoint[MODULE].equal(only(FMT, made)[1])
