"""AutoRound's three packings against its own files, and per-layer schemes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hostile import broken, survives
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_source import MemorySource, decoded, golden, only, random_weight, written

import transload
from transload.errors import TransloadError
from transload.formats.autoround import AutoRound
from transload.formats.awq import Awq
from transload.formats.base import Json
from transload.formats.gptq import Gptq, GptqV2
from transload.quant import QTensor, QuantSpec, Zero

FMT = AutoRound()
MODULE = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize("name", ["autoround_v1", "autoround_v2", "autoround_v1_3bit"])
def test_golden_files_decode_exactly(name: str) -> None:
    source, tensors = golden(name)
    _, w = only(FMT, source)
    assert w.spec.bits == (3 if "3bit" in name else 4)
    assert torch.equal(w.dequantize(), tensors["dequant"])


def renamed(source: MemorySource, packing: str, **config: object) -> MemorySource:
    """Another format's tensors under AutoRound's configuration; there is no g_idx."""
    tensors = {k: t for k, t in source.tensors.items() if not k.endswith("g_idx")}
    quantization: Json = {
        "quant_method": "auto-round",
        "packing_format": packing,
        "bits": 4,
        "group_size": 32,
        "sym": False,
    }
    return MemorySource(tensors, {"quantization_config": {**quantization, **config}})


def weight(b: int = 4, group: int = 32, zero: Zero = Zero.CODES) -> QTensor:
    return random_weight(QuantSpec(b, group, zero=zero, scale_dtype=torch.float16), 8, 64, b)


@pytest.mark.parametrize(
    ("fmt", "packing"),
    [
        (Gptq(), "auto_round:auto_gptq"),
        (GptqV2(), "auto_round"),
        (GptqV2(), "auto_round:gptqmodel"),
        (Awq(), "auto_round:auto_awq"),
    ],
)
def test_every_packing_is_one_of_three_layouts(fmt: Gptq | Awq, packing: str) -> None:
    w = weight()
    assert only(FMT, renamed(written(fmt, {MODULE: w}), packing))[1].equal(w)


def test_extra_config_changes_single_layers() -> None:
    weights = {
        "model.layers.0.mlp.up_proj": weight(),
        "model.layers.0.mlp.down_proj": weight(8, 64),
        "model.layers.1.mlp.down_proj": weight(8, 64),
        "model.layers.1.self_attn.q_proj": weight(4, 32, Zero.MIDPOINT),
        "lm_head": weight(2, -1),
    }
    extra = {
        r"layers\.\d\.mlp\.down": {"bits": 8, "group_size": 64},
        "q_proj": {"sym": True, "bits": None},
        "lm_head": {"bits": 2, "group_size": -1},
    }
    found = decoded(FMT, renamed(written(GptqV2(), weights), "auto_round", extra_config=extra))
    assert all(found[m].equal(w) for m, w in weights.items())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"packing_format": "auto_round:fp8_static"}, "is not read"),
        ({"data_type": "mx_fp"}, "'mx_fp' is not read"),
        ({"act_bits": 8}, "8-bit activations"),
        ({"extra_config": {"(": {}}}, "extra_config"),
        ({"extra_config": {MODULE: 3}}, "extra_config of .*up_proj"),
        ({"bits": 8}, "qzeros|qweight|scales"),
        ({"packing_format": 7}, "packing_format is '7', expected a string"),
    ],
)
def test_contradictions_are_named(config: Json, message: str) -> None:
    source = renamed(written(Gptq(), {MODULE: weight()}), "auto_round:auto_gptq", **config)
    with pytest.raises(TransloadError, match=message) as caught:
        decoded(FMT, source)
    assert "memory" in str(caught.value)


@pytest.mark.parametrize("name", ["autoround_v1", "autoround_v1_3bit"])
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_broken_files_never_crash(name: str, data: st.DataObject) -> None:
    survives(FMT, data.draw(broken(golden(name)[0])))


def test_a_folder_on_disk_opens(tmp_path: Path) -> None:
    w = weight()
    folder = renamed(written(Awq(), {MODULE: w}), "auto_round:auto_awq").save(tmp_path / "model")
    assert transload.open(folder)[MODULE].equal(w)
