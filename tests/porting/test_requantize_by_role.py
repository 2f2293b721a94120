"""Schemes by role and by name, "auto", and settings that a file has once: all before a byte is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from memory_source import random_weight
from safetensors.torch import load_file
from test_port import LAYER, MemorySource, model, spec

import transload
from transload.errors import CannotHold, ConfigError
from transload.porting.schemes import Requantize, parse_schemes
from transload.quant import ActSpec, Grid, QTensor, QuantSpec, Zero

DYNAMIC = ActSpec()
GPTQ = spec(4, 32)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERT = ("gate_proj", "up_proj", "down_proj")


def moe(folder: Path, made: QuantSpec = GPTQ, format: str = "gptq") -> Path:
    """One layer of a mixture of experts: attention, two routed experts, a shared one; the head quantized too."""
    names = [f"self_attn.{n}" for n in ATTENTION] + [f"mlp.shared_experts.{n}" for n in EXPERT]
    names += [f"mlp.experts.{e}.{n}" for e in range(2) for n in EXPERT]
    weights = {LAYER + name: random_weight(made, 64, 64, i) for i, name in enumerate(names)}
    weights["lm_head"] = random_weight(made, 64, 64, 99)
    return model(folder, weights, format, architectures=["Qwen3MoeForCausalLM"], num_hidden_layers=1)


def dense(folder: Path, made: QuantSpec = GPTQ, format: str = "gptq") -> Path:
    names = [f"self_attn.{n}" for n in ATTENTION] + [f"mlp.{n}" for n in EXPERT]
    path = model(folder, {LAYER + n: random_weight(made, 128, 128, i) for i, n in enumerate(names)}, format)
    tensors = {n: t for n, t in load_file(path / "model.safetensors").items() if not n.endswith("proj.bias")}
    return MemorySource(tensors, json.loads((path / "config.json").read_text())).save(path)


def kinds(folder: Path) -> dict[str, str]:
    """Scheme in words by the end of the module's name."""
    found = transload.open(folder)
    return {n.removeprefix(LAYER): str(s) for n, s in found.modules().items() if s is not None}


@pytest.mark.parametrize("release", ["vllm-ascend==0.23", "vllm-ascend==main"])
def test_auto_makes_of_a_gptq_mixture_of_experts_what_vllm_ascend_loads(release: str, tmp_path: Path) -> None:
    report = transload.port(moe(tmp_path / "a"), tmp_path / "b", release, requantize="auto")
    found = kinds(tmp_path / "b")
    assert report.target_format == "msmodelslim"
    for name, scheme in found.items():
        wide = "int4" if ".experts." in name else "int8"
        assert scheme == f"{wide} channel sym fp32 + int8 dynamic per token", name
    assert len(found) == 13  # the head and the router are float
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    types = json.loads((tmp_path / "b" / "quant_model_description.json").read_text())
    expert, shared = LAYER + "mlp.experts.0.", LAYER + "mlp.shared_experts."
    assert types[f"{expert}down_proj.weight"] == "W4A8_DYNAMIC"
    assert types[f"{shared}down_proj.weight"] == types[f"{LAYER}self_attn.q_proj.weight"] == "W8A8_DYNAMIC"
    assert types["lm_head.weight"] == types[f"{LAYER}mlp.gate.weight"] == "FLOAT"
    assert types["group_size"] == 0
    assert tensors[f"{expert}gate_proj.scale_bias"].shape == (64, 1)
    assert tensors[f"{expert}down_proj.scale_bias"].shape == (64, 16)
    assert f"{shared}down_proj.scale_bias" not in tensors
    w = transload.open(tmp_path / "b")[f"{expert}down_proj"]
    assert isinstance(w, QTensor)
    parts = 8 * w.dequantize().double().reshape(64, 16, 4).sum(-1)
    assert torch.allclose(tensors[f"{expert}down_proj.scale_bias"].double(), parts, atol=1e-4)
    assert {(e.experts, e.requested, e.executed) for e in report.executed} == {
        (True, "W4A8", "W4A8"),
        (False, "W8A8", "W8A8"),
    }


def test_auto_refuses_a_dense_model_where_no_four_bit_linear_runs_and_names_the_choices(tmp_path: Path) -> None:
    source = dense(tmp_path / "a")
    with pytest.raises(CannotHold, match="auto keeps the width of codes") as e:
        transload.port(source, tmp_path / "b", "vllm-ascend==main", requantize="auto")
    message = str(e.value)
    assert "--requantize int8-channel-a8" in message
    assert "vllm==0.32" in message
    assert "compressed-tensors" in message
    assert not (tmp_path / "b").exists()


def test_the_dense_class_of_023_takes_four_bits_exactly_and_the_report_says_that_it_runs_w4a16(tmp_path: Path) -> None:
    report = transload.port(dense(tmp_path / "a", spec(4, 64)), tmp_path / "b", "vllm-ascend==0.23")
    assert report.exact
    assert {(e.requested, e.written, e.executed) for e in report.executed} == {("W4A16", "W4A8", "W4A16")}
    assert any("W4A8_DYNAMIC are multiplied with 16-bit activations" in note for note in report.notes)


def test_schemes_by_role_are_followed_and_the_rest_keeps_its_numbers(tmp_path: Path) -> None:
    source = moe(tmp_path / "a", spec(4, 16), "transload")
    asked = {
        "shared_experts": "int8-g32",
        "re:.*[qkv]_proj": "int4-channel",
        "o_proj": "int4-g32",
        "experts": "int4-g32-asym",
    }
    with pytest.raises(CannotHold, match=r"cannot take 3 of 14 .*K=64 is not a multiple of 256 .*self_attn\.k_proj"):
        transload.port(source, tmp_path / "b", "vllm", requantize=asked | {"re:.*[qkv]_proj": "int4-g256"})
    report = transload.port(source, tmp_path / "b", "vllm", requantize=asked | {"lm_head": "float"})
    found = {n: s.partition(" fp16")[0] for n, s in kinds(tmp_path / "b").items()}
    assert found["mlp.shared_experts.up_proj"] == "int8 g32 sym"
    assert found["mlp.experts.1.up_proj"] == "int4 g32 asym"
    assert found["self_attn.o_proj"] == "int4 g32 sym"
    assert found["self_attn.q_proj"] == "int4 channel sym"
    assert "lm_head" not in found
    assert {m.action for m in report.modules} == {"requantize", "dequantize"}


def test_a_text_and_a_mapping_say_the_same() -> None:
    text = parse_schemes("attention=int8-channel-a8, experts=int4-g128,lm_head=float")
    mapping: Requantize = {"attention": "int8-channel-a8", "experts": "int4-g128", "lm_head": "float"}
    assert (
        text
        == parse_schemes(mapping)
        == parse_schemes(["attention=int8-channel-a8", "experts=int4-g128,lm_head=float"])
    )
    assert parse_schemes(["re:a{1,2}=int4-g128", "int8-g32"]) is not None


@pytest.mark.parametrize(
    ("requantize", "says"),
    [
        ("atention=int8-g32", "pattern 'atention' matches no quantized module; there are attention, experts"),
        ("attention=int8-g32,q_proj=int4-g32", "'q_proj' matches only modules that earlier patterns took"),
        ("int8-g32,attention=int4-g32", "takes every module; put it after the patterns"),
        ("experts=auto", "auto stands alone"),
        ("re:(=int4-g32", "missing|unterminated"),
        ("experts=four", "for example int4-g128"),
        ([], "no scheme given"),
    ],
)
def test_patterns_are_checked(requantize: Requantize, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        transload.port(moe(tmp_path / "a"), tmp_path / "b", "vllm", requantize=requantize)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("to", ["awq", "msmodelslim"])
def test_a_second_group_size_is_refused_by_name_before_anything_is_written(to: str, tmp_path: Path) -> None:
    weights = {f"{LAYER}mlp.{n}": random_weight(spec(4, 32), 64, 64, i) for i, n in enumerate(EXPERT)}
    weights[LAYER + "self_attn.o_proj"] = random_weight(spec(4, 16), 64, 64)
    source = model(tmp_path / "a", weights)
    with pytest.raises(CannotHold, match="one group size per file, here 32, and this module has 16") as e:
        transload.port(source, tmp_path / "b", to)
    assert "self_attn.o_proj" in str(e.value)
    assert "cannot take 1 of 4" in str(e.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
    report = transload.port(source, tmp_path / "b", to, requantize="int4-g32")
    assert {m.name: m.action for m in report.modules if m.action != "repack"} == {
        LAYER + "self_attn.o_proj": "requantize"
    }


def test_the_group_size_that_was_asked_for_wins(tmp_path: Path) -> None:
    weights = {f"{LAYER}mlp.{n}": random_weight(spec(4, 32), 64, 64, i) for i, n in enumerate(EXPERT)}
    weights[LAYER + "self_attn.o_proj"] = random_weight(spec(8, 16), 64, 64)
    with pytest.raises(CannotHold, match="here 64, and this module has 32"):
        transload.port(model(tmp_path / "a", weights), tmp_path / "b", "awq", requantize={"o_proj": "int4-g64"})
    report = transload.port(tmp_path / "a", tmp_path / "b", "awq", requantize="int4-g64")
    assert {m.target for m in report.modules} == {"int4 g64 asym fp16"}


def test_float_linears_are_rounded_only_when_everything_is_asked_for(tmp_path: Path) -> None:
    names = [f"{LAYER}self_attn.{n}" for n in ATTENTION]
    extra = {f"{n}.weight": torch.randn(64, 64, dtype=torch.bfloat16) for n in names}
    extra["model.layers.1.mlp.up_proj.weight"] = torch.randn(64, 64)  # multi-token prediction lies behind layer 0
    weights = {LAYER + "mlp.up_proj": random_weight(GPTQ, 64, 64)}
    source = model(tmp_path / "a", weights, num_hidden_layers=1)
    tensors = load_file(source / "model.safetensors") | extra
    MemorySource(tensors, json.loads((source / "config.json").read_text())).save(source)
    kept = transload.port(source, tmp_path / "b", "msmodelslim", requantize="int8-channel-a8")
    assert [m.name for m in kept.modules] == [LAYER + "mlp.up_proj"]
    all_of_it = transload.port(source, tmp_path / "c", "msmodelslim", requantize="int8-channel-a8", requantize_all=True)
    assert {m.name for m in all_of_it.modules} == {*names, LAYER + "mlp.up_proj"}
    assert transload.open(tmp_path / "c").entry("model.layers.1.mlp.up_proj.weight").dtype == "F32"


FULL = [
    ("msmodelslim", spec(4, 32)),  # its scales are float32
    ("bitsandbytes", QuantSpec(4, 64, Grid.NF4, Zero.NONE, torch.float16)),  # its absmax is float32
    ("msmodelslim", QuantSpec(8, -1, scale_dtype=torch.bfloat16, act=DYNAMIC)),
    ("compressed-tensors", spec(4, 32, Zero.CODES, torch.float32)),
]


@pytest.mark.parametrize(("to", "made"), FULL, ids=str)
def test_wider_scales_are_taken_where_they_make_a_port_exact(to: str, made: QuantSpec, tmp_path: Path) -> None:
    source = model(tmp_path / "a", {LAYER + "mlp.up_proj": random_weight(made, 64, 64)})
    assert transload.port(source, tmp_path / "b", to).exact
