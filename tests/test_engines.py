"""Engine rules: every case was seen in the engine's own source or in a run of it (docs/engines.md)."""

from __future__ import annotations

import pytest

from transload.engines import (
    ENGINES,
    ONNXRUNTIME,
    VLLM_ASCEND_023,
    VLLM_ASCEND_MAIN,
    VLLM_CPU,
    VLLM_CUDA,
    Engine,
    Layer,
    Rule,
    find_engine,
)
from transload.errors import ConfigError
from transload.quant import PER_CHANNEL, ActSpec, Grid, QuantSpec, Zero

SYM, ASYM = QuantSpec(4, 128), QuantSpec(4, 128, zero=Zero.CODES)
TOKEN = ActSpec()

RUNS = [
    (VLLM_CUDA, "gptq", Layer(SYM), "W4A16"),
    (VLLM_CUDA, "gptq", Layer(QuantSpec(8, 128)), "W8A16"),
    (VLLM_CUDA, "awq", Layer(ASYM), "W4A16"),
    (VLLM_CUDA, "compressed-tensors", Layer(ASYM), "W4A16"),
    (VLLM_CPU, "compressed-tensors", Layer(SYM), "W4A8"),
    (ONNXRUNTIME, "onnx", Layer(QuantSpec(4, 32, zero=Zero.FLOATS)), "W4A16"),
    (ONNXRUNTIME, "onnx", Layer(QuantSpec(4, 32, act=ActSpec(group_size=32))), "W4A8"),
    (VLLM_CPU, "compressed-tensors", Layer(QuantSpec(8, PER_CHANNEL, act=TOKEN)), "W8A8"),
    (VLLM_ASCEND_MAIN, "msmodelslim", Layer(QuantSpec(4, PER_CHANNEL, act=TOKEN), experts=True), "W4A8"),
    (VLLM_ASCEND_023, "msmodelslim", Layer(QuantSpec(4, 256, act=TOKEN)), "W4A16"),
]

REFUSED = [
    (VLLM_CUDA, "gptq", Layer(ASYM), "midpoint zero points, not codes"),
    (VLLM_CUDA, "gptq", Layer(QuantSpec(4, 128, act_order=True)), "no act-order"),
    (VLLM_CUDA, "gptq", Layer(QuantSpec(3, 128)), "4 or 8 bits, not 3"),
    (VLLM_CUDA, "gguf", Layer(SYM), "not gguf"),
    (VLLM_CUDA, "bitsandbytes", Layer(QuantSpec(4, 64, Grid.NF4, Zero.NONE)), "not bitsandbytes"),
    (VLLM_CPU, "compressed-tensors", Layer(QuantSpec(8, 32)), "4 bits, not 8"),
    (VLLM_CPU, "compressed-tensors", Layer(QuantSpec(4, 32), experts=True), "group size"),
    (VLLM_ASCEND_MAIN, "msmodelslim", Layer(QuantSpec(4, 128, act=TOKEN), experts=True), "group size channel"),
    (VLLM_ASCEND_MAIN, "msmodelslim", Layer(QuantSpec(4, PER_CHANNEL, act=TOKEN)), "experts only"),
    (VLLM_ASCEND_MAIN, "awq", Layer(ASYM), "not awq"),
]


@pytest.mark.parametrize(("engine", "format", "layer", "executed"), RUNS)
def test_an_engine_runs_what_it_is_known_to_run(engine: Engine, format: str, layer: Layer, executed: str) -> None:
    rule = engine.covers(format, layer)
    assert isinstance(rule, Rule), rule
    assert rule.executed.format(bits=layer.spec.bits) == executed


@pytest.mark.parametrize(("engine", "format", "layer", "words"), REFUSED)
def test_an_engine_refuses_with_a_reason(engine: Engine, format: str, layer: Layer, words: str) -> None:
    reason = engine.covers(format, layer)
    assert isinstance(reason, str)
    assert words in reason


def test_engine_labels_are_unique() -> None:
    assert len({e.label for e in ENGINES}) == len(ENGINES)


W8A8, W4A8 = QuantSpec(8, PER_CHANNEL, act=TOKEN), QuantSpec(4, PER_CHANNEL, act=TOKEN)
BY_ARCH = [  # engine, format, layer, architecture, what runs or None, and its kernel
    (VLLM_CUDA, "gptq", Layer(SYM), "sm90", "W4A16", "Machete"),
    (VLLM_CUDA, "gptq", Layer(SYM), "sm80", "W4A16", "Marlin"),
    (VLLM_CUDA, "gptq", Layer(QuantSpec(4, 32)), "sm90", "W4A16", "Marlin"),
    (VLLM_CUDA, "compressed-tensors", Layer(SYM, experts=True), "sm90", "W4A16", "Marlin"),
    (VLLM_CUDA, "compressed-tensors", Layer(QuantSpec(8, 128, zero=Zero.CODES)), "sm90", "W8A16", "Machete"),
    (VLLM_CUDA, "compressed-tensors", Layer(QuantSpec(8, 128, zero=Zero.CODES)), "sm89", None, ""),
    (VLLM_CUDA, "compressed-tensors", Layer(QuantSpec(4, 256)), "sm120", "W4A16", "Triton"),
    (VLLM_CUDA, "compressed-tensors", Layer(W8A8), "sm90", "W8A8", "CUTLASS"),
    (VLLM_CUDA, "compressed-tensors", Layer(W8A8), "sm100", None, ""),
    (VLLM_CUDA, "compressed-tensors", Layer(W4A8), "sm90", None, ""),
    (VLLM_CUDA, "fp8", Layer(QuantSpec(8, 128, Grid.E4M3, Zero.NONE)), "sm80", "W8A16", "Marlin"),
    (VLLM_CPU, "compressed-tensors", Layer(SYM), "amx", "W4A8", "CPUWNA16"),
    (VLLM_CPU, "compressed-tensors", Layer(SYM), "avx512", "W4A16", "CPUWNA16"),
    (VLLM_CPU, "compressed-tensors", Layer(SYM, experts=True), "avx512", None, ""),
    (VLLM_ASCEND_023, "msmodelslim", Layer(W4A8, experts=True), "310p", None, ""),
    (VLLM_ASCEND_023, "msmodelslim", Layer(W8A8), "310p", "W8A8", "npu_quant_matmul"),
]


@pytest.mark.parametrize(("engine", "format", "layer", "arch", "executed", "kernel"), BY_ARCH)
def test_the_architecture_decides_what_runs(
    engine: Engine, format: str, layer: Layer, arch: str, executed: str | None, kernel: str
) -> None:
    rule = engine.covers(format, layer, arch)
    assert (rule.runs_as(layer.spec) if isinstance(rule, Rule) else None) == executed
    assert engine.kernels(format, layer, arch) == kernel


def test_without_an_architecture_every_kernel_is_named_and_the_trap_is_noted() -> None:
    assert VLLM_CUDA.kernels("gptq", Layer(SYM)) == "Machete on sm90, Marlin"
    trap = VLLM_CUDA.covers("gptq", Layer(SYM), "sm90")
    assert isinstance(trap, Rule)
    assert "VLLM_MARLIN_INPUT_DTYPE=int8 is a trap on sm90" in trap.note


def test_releases_and_architectures_that_are_not_known_are_refused_with_those_that_are() -> None:
    assert find_engine("vllm-ascend==0.23.0") is VLLM_ASCEND_023
    assert find_engine("tensorrt") is None
    with pytest.raises(ConfigError, match=r"the releases here are vllm-ascend==0\.23, vllm-ascend==main"):
        find_engine("vllm-ascend==0.18")
    assert VLLM_CUDA.checked_arch("SM_90") == "sm90"
    with pytest.raises(ConfigError, match="tells sm75, sm80"):
        VLLM_CUDA.checked_arch("910b")
