"""Weight bytes of every rank equal a naive count, for every family, format and kind of parallelism."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from plan.models import config
from plan.naive import rank_bytes, tensors
from transload.models.info import read_model
from transload.plan.ledger import Ledger
from transload.plan.model import build_model
from transload.plan.recipes import Recipe, recipe_by_name
from transload.plan.schemes import integer
from transload.plan.shapes import Shape, even_cuts

_GOLDEN = Path(__file__).parents[1] / "golden" / "plan"
_SMALL = json.loads((_GOLDEN / "vllm_parameters.json").read_text())["configs"]
_RING = {  # shapes chosen here: the published config of Ring-2.5 was not at hand, only its kinds of layers
    "architectures": ["BailingMoeV2_5ForCausalLM"], "model_type": "bailing_hybrid", "hidden_size": 2048,
    "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 128, "intermediate_size": 5120,
    "moe_intermediate_size": 512, "vocab_size": 157184, "kv_lora_rank": 512, "q_lora_rank": 1536,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "layer_group_size": 4, "num_experts": 32,
    "first_k_dense_replace": 1, "num_shared_experts": 1, "num_experts_per_tok": 8, "num_hidden_layers": 10,
}  # fmt: skip


def _cut(name: str, layers: int) -> dict[str, Any]:
    """A published model with fewer layers."""
    c = config(name)
    inner = c.get("text_config", c)
    inner["num_hidden_layers"] = layers
    inner.pop("layer_types", None)
    return c


FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": _SMALL["Llama"],
    "Qwen2.5-7B": _SMALL["Qwen2.5-7B"],
    "Qwen3-8B": _cut("Qwen3-8B", 7),
    "Qwen3-235B-A22B": _cut("Qwen3-235B-A22B", 5),
    "Qwen3-Next": _SMALL["Qwen3-Next"],
    "Qwen3.5-397B-A17B": _cut("Qwen3.5-397B-A17B", 4),
    "ChatGLM3": _SMALL["ChatGLM3"],
    "GLM-4-9b": _SMALL["GLM-4-9b-hf"],
    "GLM-4-32B-0414": _SMALL["GLM-4-32B-0414"],
    "GLM-4.5-Air": _cut("GLM-4.5-Air", 5),
    "GLM-4.6": _cut("GLM-4.6", 5),
    "GLM-5": _cut("GLM-5", 5),
    "GLM-5.2": _cut("GLM-5.2", 5),
    "DeepSeek-V3": _cut("DeepSeek-V3", 5),
    "Kimi-K2-Instruct": _cut("Kimi-K2-Instruct", 4),
    "Kimi-K2.5": _cut("Kimi-K2.5", 3),
    "MiniMax-M2.5": _cut("MiniMax-M2.5", 4),
    "Ring-2.5": _RING,
}
TENSORS = {name: list(tensors(c)) for name, c in FAMILIES.items()}
SHAPES = [(1, 1, 1, False), (2, 1, 1, False), (4, 2, 1, False), (2, 1, 2, False), (2, 1, 2, True), (4, 2, 2, True),
          (8, 1, 1, True), (4, 1, 6, True)]  # fmt: skip
# recipe, the naive count's form of linears and of routed experts, platform
FORMS = {
    "bf16": ("bf16", "bf16", "cpu"),
    "int4-g32": ("int4-32", "int4-32", "cpu"),
    "awq-g64": ("awq-64", "awq-64", "cpu"),
    "gptq act-order": ("gptq-32", "gptq-32", "cpu"),
    "int4-g32-experts": ("bf16", "int4-32", "cpu"),
    "fp8": ("fp8", "fp8", "cpu"),
    "nvfp4-experts": ("bf16", "nvfp4", "cpu"),
    "mxfp4-experts": ("bf16", "mxfp4", "cpu"),
    "w8a8": ("w8a8", "w8a8", "ascend"),
    "w4a8": ("w8a8", "w4a8", "ascend"),
    "int4-g64-experts": ("bf16", "int4-64", "ascend"),
}


def _recipe(name: str) -> Recipe:
    return Recipe(name, integer(4, 32, act_order=True)) if name == "gptq act-order" else recipe_by_name(name)


def _divides(c: dict[str, Any], shape: tuple[int, int, int, bool], form: str) -> bool:
    """True where the cut is even and leaves whole groups: other shapes are refused, see test_documented."""
    t = c.get("text_config", c)
    tp, pp, dp, ep = shape
    experts = t.get("num_experts") or t.get("n_routed_experts") or t.get("num_local_experts") or 0
    if pp > (t.get("num_hidden_layers") or t["num_layers"]) or (not experts and (dp > 1 or ep)):
        return False
    heads = [t["num_attention_heads"], t.get("linear_num_key_heads", tp), t.get("linear_num_value_heads", tp)]
    widths = [t.get("ffn_hidden_size") or t["intermediate_size"]] if "intermediate_size" in t or not experts else []
    widths += [t["num_attention_heads"] * (t.get("head_dim") or t.get("v_head_dim") or 128)]
    group = int(form.partition("-")[2] or 1)
    inner = t.get("moe_intermediate_size") or t.get("intermediate_size") or tp
    return (
        all(h % tp == 0 for h in heads)
        and all(w % (tp * group) == 0 for w in widths)
        and (not experts or inner % ((tp if ep else tp * dp) * group) == 0)
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_rank_equals_a_naive_count(family: str, form: str) -> None:
    c = FAMILIES[family]
    linear, expert, platform = FORMS[form]
    info = read_model(c)
    ledger = Ledger(build_model(info, _recipe(form)), platform)
    compared = 0
    for sizes in SHAPES:
        if not (_divides(c, sizes, linear) and _divides(c, sizes, expert)):
            continue
        tp, pp, dp, ep = sizes
        shape, cuts = Shape(tp, pp, dp, ep), even_cuts(info.layers, pp)
        for rank in sorted({0, tp - 1, tp * pp - 1, tp * pp * dp - 1}):
            stage, replica = rank // tp % pp, rank // (tp * pp)
            experts = shape.experts_on(replica * tp + rank % tp, info.experts.count) if info.experts else 0
            start = sum(cuts[:stage])
            parts = ledger.stage(shape, start, start + cuts[stage], experts, speculation=False)
            counted = rank_bytes(c, TENSORS[family], (linear, expert), platform, sizes, rank)
            assert sum(p.total for p in parts.values()) == counted, f"{shape} rank {rank}: {parts}"
            compared += 1
    assert compared
