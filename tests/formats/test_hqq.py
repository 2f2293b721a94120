"""HQQ's own layers, both axes and every width, against its files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hostile import broken, survives
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_source import GOLDEN, MemorySource, decoded, golden, only

import transload
from transload.errors import TransloadError
from transload.formats.hqq import Hqq
from transload.quant import Zero

FMT = Hqq()
MODULE = "model.layers.0.mlp.up_proj"
NAMES = sorted(p.stem for p in GOLDEN.glob("hqq_*.safetensors"))


@pytest.mark.parametrize(
    ("name", "bits", "group"),
    [
        ("hqq_4bit_axis1_g64", 4, 64),
        ("hqq_4bit_axis0_g16", 4, 1),  # every k has a scale of its own
        ("hqq_3bit_axis1_g32", 3, 32),
        ("hqq_2bit_axis1_g16", 2, 16),
        ("hqq_8bit_axis1_g64", 8, 32),  # K=96: groups of 64 straddle rows, runs of 32 do not
    ],
)
def test_golden_files_decode_exactly(name: str, bits: int, group: int) -> None:
    source, tensors = golden(name)
    entry, w = only(FMT, source)
    assert entry.shape == tuple(tensors["dequant"].shape)
    assert (w.spec.bits, w.spec.group_size, w.spec.zero) == (bits, group, Zero.FLOATS)
    assert torch.equal(w.dequantize(torch.float16).float(), tensors["dequant"])


def test_nothing_of_a_layer_is_left_as_a_float_tensor() -> None:
    assert FMT.entries(golden("hqq_4bit_axis1_g64")[0]).keys() == {MODULE}


def test_weights_viewed_as_floats_read_the_same() -> None:
    source, _ = golden("hqq_4bit_axis1_g64")
    packed = source.tensors[f"{MODULE}.W_q"]
    viewed = MemorySource(source.tensors | {f"{MODULE}.W_q": packed.view(torch.float16)}, source.config)
    assert only(FMT, viewed)[1].equal(only(FMT, source)[1])


def changed(part: str, t: torch.Tensor) -> MemorySource:
    source, _ = golden("hqq_4bit_axis1_g64")
    return MemorySource(source.tensors | {f"{MODULE}.{part}": t}, source.config)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (changed("W_q", torch.zeros(15, 64, dtype=torch.uint8)), "W_q.* has 960 bytes, expected 1024"),
        (changed("scale", torch.ones(31, 1).half()), "scale.*expected .32, 1."),
        (changed("zero", torch.full((32, 1), float("nan")).half()), "up_proj: .*NaN"),
        (changed("zero", torch.ones(32, 1)), "zero.* is F32, expected F16"),
        (changed("nbits", torch.tensor(1)), "nbits .1. and axis"),
        (changed("axis", torch.tensor(2)), "axis .2. are no HQQ layer"),
        (changed("group_size", torch.tensor(63)), "does not divide"),
        (changed("shape", torch.tensor([16, 128, 1])), "shape .16, 128, 1."),
        (changed("shape", torch.tensor([16, -128])), "no .N, K."),
        (changed("quant_scale", torch.tensor(1)), "quantized scales"),
        (changed("packing", torch.zeros(7, dtype=torch.uint8)), "packing"),
        (changed("shape", torch.zeros(10000)), "expected a few integers"),
    ],
)
def test_contradictions_are_named(source: MemorySource, message: str) -> None:
    with pytest.raises(TransloadError, match=message) as caught:
        decoded(FMT, source)
    assert "memory" in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_broken_files_never_crash(name: str, data: st.DataObject) -> None:
    survives(FMT, data.draw(broken(golden(name)[0])))


def test_a_folder_on_disk_opens(tmp_path: Path) -> None:
    source, _ = golden("hqq_3bit_axis1_g32")
    assert transload.open(source.save(tmp_path / "model"))[MODULE].equal(only(FMT, source)[1])
