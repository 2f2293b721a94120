"""Deployments that vendors document, and refusals that users met, come out as documented.

Sources: vllm-ascend tutorials GLM5.md and GLM4.x.md (main, 2026-08), vllm-ascend issue 12839, llm-compressor issue 54,
vllm issues 9913 and 17604.
"""

from __future__ import annotations

import pytest

from plan.models import config
from transload.plan.planner import plan
from transload.plan.result import Plan

# model, recipe, cluster, shape, context, sequences, batched tokens, utilization, fits
ROWS = [
    ("GLM-5", "w4a8", "16xA3", {"tp": 16, "ep": True}, 200_000, 16, 4096, 0.95, True),
    ("GLM-5", "w8a8", "16xA3", {"tp": 16, "ep": True}, 40_960, 16, 4096, 0.95, True),
    ("GLM-5", "w4a8", "8x910B3", {"tp": 8, "ep": True}, 32_768, 8, 4096, 0.95, True),
    ("GLM-5", "bf16", "2x16xA3", {"tp": 16, "dp": 2, "ep": True}, 8192, 16, 4096, 0.95, True),
    ("GLM-5", "bf16", "16xA3", {}, 8192, 16, 4096, 0.95, False),
    ("GLM-5", "w4a8", "2x8x910B3", {"tp": 8, "dp": 2, "ep": True}, 131_072, 2, 4096, 0.95, True),
    ("GLM-5", "w8a8", "2x16xA3", {"tp": 16, "dp": 2, "ep": True}, 200_000, 16, 4096, 0.95, True),
    ("GLM-4.6", "w8a8", "16xA3", {"tp": 8, "dp": 2, "ep": True}, 133_000, 16, 8192, 0.9, True),
    ("GLM-4.6", "w8a8", "2x8x910B3", {"tp": 8, "dp": 2, "ep": True}, 140_000, 16, 8192, 0.9, True),
    ("Qwen3-235B-A22B", "int4-g128", "4xH100", {}, 32_768, 16, None, None, True),
    ("Qwen3-235B-A22B", "bf16", "4xH100", {}, 32_768, 16, None, None, False),
]


def _plan(model, recipe, cluster, shape, context, sequences, batched, utilization) -> Plan:
    workload = {"context": context, "concurrency": sequences, "batched_tokens": batched}
    return plan(config(model), cluster, workload, recipe=recipe, gpu_memory_utilization=utilization, **shape)


@pytest.mark.parametrize("row", ROWS, ids=lambda r: f"{r[0]}-{r[1]}-{r[2]}-{r[4]}")
def test_documented_deployment(row) -> None:
    *question, fits = row
    answer = _plan(*question)
    assert answer.fits is fits, answer.reason
    if fits:
        assert answer.kv_tokens >= row[4]


def test_glm5_w8a8_weighs_49_gb_a_die_as_users_measured() -> None:
    answer = _plan("GLM-5", "w8a8", "16xA3", {"tp": 16, "ep": True}, 40_960, 16, 4096, 0.95)
    assert answer.ranks[0].weights_bytes == pytest.approx(49e9, rel=0.02)


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_glm45_air_int4_g128_is_refused_for_its_groups(tp: int) -> None:
    answer = _plan("GLM-4.5-Air", "int4-g128", "8xH100", {"tp": tp, "dp": 1}, 32_768, 16, None, None)
    assert not answer.fits
    refusal = next(r for r in answer.rejected if not r.parallelism.ep)
    assert refusal.rule == "quantization groups"
    assert f"1408/{tp} = {1408 // tp} inputs a rank are {1408 / tp / 128:g} groups of 128" in refusal.reason
    assert any("EP" in way for way in refusal.ways_out)
    assert any("16 bits" in way for way in refusal.ways_out)


def test_glm45_air_fits_with_the_ways_out() -> None:
    offered = {2: "32", 4: "32"}
    for tp, group in offered.items():
        answer = _plan(
            "GLM-4.5-Air", f"int4-g{group}-experts", "8xH100", {"tp": tp, "ep": False}, 32_768, 16, None, None
        )
        assert answer.fits, answer.reason
    assert _plan("GLM-4.5-Air", "int4-g128-experts", "8xH100", {"tp": 4, "ep": True}, 32_768, 16, None, None).fits


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_qwen25_72b_int4_g128_is_refused_for_its_groups(tp: int) -> None:
    answer = _plan("Qwen2.5-72B", "int4-g128", "8xH100", {"tp": tp, "pp": 1}, 32_768, 16, None, None)
    assert not answer.fits
    assert (
        f"29568/{tp} = {29568 // tp} inputs a rank are {29568 / tp / 128:g} groups of 128" in answer.rejected[0].reason
    )


def test_qwen3_235b_at_tp8_tears_groups_of_its_experts() -> None:
    answer = _plan("Qwen3-235B-A22B", "int4-g128", "8xH100", {"tp": 8, "ep": False, "dp": 1}, 32_768, 16, None, None)
    assert "1536/8 = 192 inputs a rank are 1.5 groups" in answer.rejected[0].reason
    assert _plan("Qwen3-235B-A22B", "int4-g128", "8xH100", {"tp": 8, "ep": True, "dp": 1}, 32_768, 16, None, None).fits


def test_engines_of_ascend_load_what_they_document() -> None:
    dense = plan(config("Qwen3-8B"), "8x910B3", {"context": "32k"}, recipe="int4-g128")
    assert not dense.fits
    assert "no weight-only integer linear" in dense.reason
    assert plan(config("Qwen3-8B"), "8x910B3", {"context": "32k"}, recipe="w8a8").fits
    assert plan(config("GLM-5"), "16xA3", {"context": "32k"}, recipe="w4a8", engine="vllm-ascend==main").fits


def test_groups_in_activation_order_are_refused_as_vllm_does() -> None:
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": True}
    answer = plan({**config("Qwen3-8B"), "quantization_config": gptq}, "1xH100", {"context": 4096})
    assert not answer.fits
    assert "no longer loads groups in activation order" in answer.reason
    channel = {**gptq, "group_size": -1}
    assert plan({**config("Qwen3-8B"), "quantization_config": channel}, "1xH100", {"context": 4096}).fits


def test_formats_that_a_device_or_engine_lacks_are_refused() -> None:
    for model, cluster, recipe, words in [
        ("GLM-4.6", "8xH100", "w4a8", "no int4 weights with int8 activations"),
        ("Qwen3-8B", "2x310P", "int4-g128", "no 4-bit matrix products"),
        ("Qwen3-8B", "1xV100", "int4-g128", "compute capability 7.5"),
        ("Qwen3-8B", "8x910B3", "fp8", "does not load fp8"),
    ]:
        answer = plan(config(model), cluster, {"context": 4096}, recipe=recipe)
        assert not answer.fits
        assert words in answer.reason
