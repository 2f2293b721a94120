"""Static activation scales and schemes of the cache: carried where the target has a place for them, named where not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import transload
from transload.errors import CannotHold
from transload.formats import find_format
from transload.quant import PER_CHANNEL, ActSpec, QuantSpec
from transload.reference import quantize_rtn

NAMES = ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj")
STATIC = QuantSpec(8, PER_CHANNEL, scale_dtype=torch.bfloat16, act=ActSpec(static=True))
CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}


def checkpoint(folder: Path, extra: dict[str, torch.Tensor] | None = None, **settings: Any) -> Path:
    """Two linears of W8A8 with static scales, as compressed-tensors."""
    torch.manual_seed(0)
    format = find_format("compressed-tensors")
    tensors = {"model.norm.weight": torch.ones(64)} | (extra or {})
    for name in NAMES:
        tensors |= format.encode(name, quantize_rtn(torch.randn(64, 64), STATIC))
        tensors[f"{name}.input_scale"] = torch.rand(1)
    config: dict[str, Any] = format.finish(dict.fromkeys(NAMES, STATIC), {})["config.json"]  # type: ignore[assignment]
    config["quantization_config"] |= settings
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return folder


@pytest.mark.parametrize("target", ["compressed-tensors", "transload"])
def test_static_scales_go_with_their_weights(target: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "a")
    report = transload.port(source, tmp_path / "b", to=target)
    assert report.exact
    before, after = (load_file(p / "model.safetensors") for p in (source, tmp_path / "b"))
    ported = transload.open(tmp_path / "b")
    for name in NAMES:
        assert torch.equal(before[f"{name}.input_scale"], after[f"{name}.input_scale"])
        assert ported.entries[name].spec == STATIC
    transload.port(tmp_path / "b", tmp_path / "c", to="compressed-tensors")
    again = load_file(tmp_path / "c" / "model.safetensors")
    assert before.keys() == again.keys()
    assert all(torch.equal(t, again[name]) for name, t in before.items())


@pytest.mark.parametrize(
    ("target", "activations"), [("compressed-tensors", "int8"), ("gptq", "16bit"), ("fp32", "keep")]
)
def test_static_scales_are_named_when_they_are_left_out(target: str, activations: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "a")
    report = transload.port(source, tmp_path / "b", to=target, activations=activations)
    assert any("2 static activation scales are left out" in note and NAMES[0] in note for note in report.notes)
    assert not [name for name in load_file(tmp_path / "b" / "model.safetensors") if name.endswith("input_scale")]


def test_a_cache_scheme_is_kept_by_its_own_format_and_named_elsewhere(tmp_path: Path) -> None:
    scales = {f"model.layers.0.self_attn.{x}_scale": torch.rand(1) for x in "kv"}
    source = checkpoint(tmp_path / "a", scales, kv_cache_scheme=CACHE)
    transload.port(source, tmp_path / "b", to="compressed-tensors")
    kept = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    assert kept["kv_cache_scheme"] == CACHE
    assert scales.keys() <= load_file(tmp_path / "b" / "model.safetensors").keys()
    report = transload.port(source, tmp_path / "c", to="gptq", activations="16bit")
    assert any("cache of keys and values is quantized (8-bit float, 2 scales)" in note for note in report.notes)
    assert "kv_cache_scheme" not in (tmp_path / "c" / "config.json").read_text()


def test_static_scales_of_another_form_are_a_refusal(tmp_path: Path) -> None:
    """msModelSlim folds its scales into others; compressed-tensors' readers would miss theirs."""
    torch.manual_seed(0)
    name = NAMES[0]
    tensors = {
        f"{name}.weight": torch.randint(-128, 127, (64, 64), dtype=torch.int8),
        f"{name}.input_scale": torch.rand(1) + 0.1,
        f"{name}.input_offset": torch.zeros(1),
        f"{name}.quant_bias": torch.zeros(64, dtype=torch.int32),
        f"{name}.deq_scale": torch.rand(64),
    }
    types = dict.fromkeys(tensors, "W8A8")
    source = tmp_path / "a"
    source.mkdir()
    save_file(tensors, source / "model.safetensors")
    (source / "quant_model_description.json").write_text(json.dumps(types | {"model_quant_type": "W8A8"}))
    (source / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CannotHold, match="another form in 'msmodelslim': give activations 'int8' or '16bit'"):
        transload.port(source, tmp_path / "b", to="compressed-tensors")
    report = transload.port(source, tmp_path / "b", to="compressed-tensors", activations="int8")
    assert any("4 tensors (deq_scale, input_offset, input_scale, quant_bias)" in note for note in report.notes)


def test_fp8_activations_are_named(tmp_path: Path) -> None:
    name = NAMES[0]
    tensors = {f"{name}.weight": torch.randn(64, 64).to(torch.float8_e4m3fn), f"{name}.weight_scale": torch.rand(1)}
    save_file(tensors | {f"{name}.input_scale": torch.rand(1)}, tmp_path / "model.safetensors")
    declared = {"quant_method": "fp8", "activation_scheme": "static"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": declared}))
    notes = transload.open(tmp_path).notes()
    assert any("FP8 activations" in note for note in notes)
    assert any("1 tensor (input_scale)" in note for note in notes)
