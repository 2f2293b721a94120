"""Engine rules: every case was seen in the engine's own source or in a run of it (docs/engines.md)."""

from __future__ import annotations

import pytest

from transload.engines import ENGINES, VLLM_ASCEND_023, VLLM_ASCEND_MAIN, VLLM_CPU, VLLM_CUDA, Engine, Layer, Rule
from transload.quant import PER_CHANNEL, ActSpec, Grid, QuantSpec, Zero

SYM, ASYM = QuantSpec(4, 128), QuantSpec(4, 128, zero=Zero.CODES)
TOKEN = ActSpec()

RUNS = [
    (VLLM_CUDA, "gptq", Layer(SYM), "W4A16"),
    (VLLM_CUDA, "gptq", Layer(QuantSpec(8, 128)), "W8A16"),
    (VLLM_CUDA, "awq", Layer(ASYM), "W4A16"),
    (VLLM_CUDA, "compressed-tensors", Layer(ASYM), "W4A16"),
    (VLLM_CPU, "compressed-tensors", Layer(SYM), "W4A8"),
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
