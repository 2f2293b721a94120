"""Engines as targets: their limits count, and fused layers share a scheme."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from memory_source import random_weight
from test_port import LAYER, model, module, spec

import transload
from transload.errors import CannotHold
from transload.porting.target import find_target
from transload.quant import QuantSpec, Zero

ATTENTION = ("q_proj", "k_proj", "v_proj")


def attention(*specs: QuantSpec) -> dict[str, transload.QTensor]:
    return {
        f"{LAYER}self_attn.{name}": random_weight(made, 32, 64) for name, made in zip(ATTENTION, specs, strict=True)
    }


def test_an_engine_chooses_the_format_that_it_loads() -> None:
    assert find_target("vllm").format.name == "compressed-tensors"
    assert find_target("vllm-ascend==0.23").format.name == "msmodelslim"
    assert find_target("awq").engine is None


def test_what_an_engine_does_not_run_is_refused(tmp_path: Path) -> None:
    source = model(tmp_path / "a", module("mlp.up_proj", spec(8, 16)))
    transload.port(source, tmp_path / "b", "compressed-tensors")
    with pytest.raises(CannotHold, match=r"vllm 0\.32 \(CUDA\) runs group size .*, not 16"):
        transload.port(source, tmp_path / "c", "vllm")


def test_members_of_a_fused_layer_are_brought_to_one_exact_scheme(tmp_path: Path) -> None:
    weights = attention(spec(5, 32), spec(4, 32), spec(8, 32))
    source = model(tmp_path / "a", weights)
    report = transload.port(source, tmp_path / "b", "vllm")
    assert report.exact
    assert {m.target for m in report.modules} == {"int8 g32 sym fp16"}
    apart = transload.port(source, tmp_path / "c", "compressed-tensors")
    assert {m.target for m in apart.modules} == {"int8 g32 sym fp16", "int4 g32 sym fp16"}


def test_members_without_a_common_scheme_are_refused_or_requantized_together(tmp_path: Path) -> None:
    weights = attention(spec(4, 32), spec(4, 32), spec(4, 64))
    source = model(tmp_path / "a", weights)
    with pytest.raises(CannotHold, match=r"qkv_proj is one fused layer in the engine, and its members differ"):
        transload.port(source, tmp_path / "b", "vllm")
    report = transload.port(source, tmp_path / "b", "vllm", requantize="int4-g32")
    assert {(m.action, m.target) for m in report.modules} == {("requantize", "int4 g32 sym fp16")}


def test_the_report_says_how_to_start_engines(tmp_path: Path) -> None:
    source = model(tmp_path / "a", module("mlp.up_proj", spec(4, 32, dtype=torch.bfloat16)))
    report = transload.port(source, tmp_path / "b", "compressed-tensors")
    answers = {a.engine: a for a in report.engines}
    assert answers["vllm 0.32 (CUDA)"].command == f"vllm serve {tmp_path / 'b'}"
    assert "loads gguf" in (answers["llama.cpp 2026-11 (CPU/GPU)"].reason or "")


def test_plain_floats_need_no_quantization_flag(tmp_path: Path) -> None:
    source = model(tmp_path / "a", module("mlp.up_proj", spec(4, 32, Zero.MINS)))
    report = transload.port(source, tmp_path / "b", "bf16")
    commands = {a.engine.partition(" ")[0]: a.command for a in report.engines}
    assert commands["vllm-ascend"] == f"vllm serve {tmp_path / 'b'}"
    assert commands["llama.cpp"] is None
