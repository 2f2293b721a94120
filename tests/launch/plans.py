"""Plans for the tests of launch: every family, every parallelism, three platforms, one node and several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import transload
from plan.models import config
from transload.launch import Site
from transload.plan.result import Plan

_LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    "max_position_embeddings": 131072, "dtype": "bfloat16", "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
_GLM = {
    "architectures": ["Glm4ForCausalLM"], "model_type": "glm4", "hidden_size": 6144, "intermediate_size": 23040,
    "num_hidden_layers": 61, "num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 151552, "max_position_embeddings": 32768, "attention_bias": False, "dtype": "bfloat16",
    "rms_norm_eps": 1e-5, "partial_rotary_factor": 0.5, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
_QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864,
    "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
    "max_position_embeddings": 32768, "dtype": "bfloat16", "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
    "hidden_act": "silu", "tie_word_embeddings": True,
}  # fmt: skip
_QWEN3_MOE = {
    **_QWEN2, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048,
    "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
    "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
    "decoder_sparse_step": 1, "norm_topk_prob": True, "max_position_embeddings": 40960, "tie_word_embeddings": False,
}  # fmt: skip
_QWEN3_NEXT = {
    **_QWEN3_MOE, "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "num_attention_heads": 16,
    "num_key_value_heads": 2, "head_dim": 256, "num_experts": 512, "num_experts_per_tok": 10,
    "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "linear_num_key_heads": 16,
    "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4, "partial_rotary_factor": 0.25, "max_position_embeddings": 262144,
}  # fmt: skip
_DEEPSEEK_V2 = {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "hidden_size": 2048,
    "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 27, "num_attention_heads": 16,
    "num_key_value_heads": 16, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
    "first_k_dense_replace": 1, "moe_layer_freq": 1, "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 102400, "max_position_embeddings": 163840,
    "dtype": "bfloat16", "rms_norm_eps": 1e-6, "rope_theta": 10000, "topk_method": "greedy", "n_group": 1,
    "topk_group": 1, "scoring_func": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 1.0,
    "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False,
}  # fmt: skip
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "Llama-3.3-70B": _LLAMA,
    "Mistral-7B": {
        **_LLAMA, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32768,
        "max_position_embeddings": 32768, "sliding_window": None,
    },
    "GLM-4-32B": _GLM,
    "GLM-4-9B": {
        **_GLM, "architectures": ["GlmForCausalLM"], "model_type": "glm", "hidden_size": 4096,
        "intermediate_size": 13696, "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 2,
        "attention_bias": True, "max_position_embeddings": 131072, "pad_token_id": 151329,
    },
    "Qwen2.5-0.5B": _QWEN2,
    "Qwen3-30B-A3B": _QWEN3_MOE,
    "Qwen3-Next-80B-A3B": _QWEN3_NEXT,
    "DeepSeek-V2-Lite": _DEEPSEEK_V2,
}  # fmt: skip
_MISSING = {  # what the planner does not need and vLLM does
    "GLM-4.6": {"architectures": ["Glm4MoeForCausalLM"], "dtype": "bfloat16"},
    "Qwen2.5-72B": {"max_position_embeddings": 32768, "dtype": "bfloat16"},
}


def model(name: str) -> dict[str, Any]:
    """config.json of a model, without quantization: cases name a recipe."""
    if name in CONFIGS:
        return {**CONFIGS[name], "_name_or_path": name}
    return {**config(name), **_MISSING.get(name, {}), "_name_or_path": name}


@dataclass(frozen=True)
class Case:
    """A question to the planner, and how its answer is started. nodes: machines of the first instance."""

    name: str
    cluster: str | Mapping[str, object]
    recipe: str
    shape: Mapping[str, Any]
    nodes: int = 1
    workload: Mapping[str, object] = field(default_factory=dict)
    site: Site = field(default_factory=Site)
    tag: str = ""

    @property
    def id(self) -> str:
        """Qwen3-8B-1xH100-tp1."""
        where = self.cluster if isinstance(self.cluster, str) else str(self.cluster["name"])
        shape = "-".join(f"{k}{int(v)}" for k, v in self.shape.items())
        return "-".join(w for w in (self.name, where, self.recipe, shape, self.tag) if w)

    def plan(self) -> Plan:
        """The planner's answer."""
        return _planned(self.id)


@cache
def _planned(case_id: str) -> Plan:
    case = next(c for c in CASES if c.id == case_id)
    return transload.plan(model(case.name), case.cluster, case.workload, recipe=case.recipe, **case.shape)


def addresses(count: int) -> Site:
    """Nodes node-0, node-1 .. with addresses and interfaces."""
    names = [f"node-{i}" for i in range(count)]
    return Site(
        addresses={name: f"10.0.0.{i + 1}" for i, name in enumerate(names)},
        interfaces=dict.fromkeys(names, "eth0"),
    )


_TWO = addresses(2)
_NATIVE = Site(form="native", addresses=_TWO.addresses)
_RAY = Site(form="ray", addresses=_TWO.addresses)
_CARDS = {
    "name": "unlike-cards",
    "nodes": [
        {
            "name": "desk",
            "devices": [{"type": "RTX-5090"}, {"type": "RTX-4090"}, {"type": "L4"}],
        }
    ],
}
_VENDORS = {
    "name": "two-vendors",
    "nodes": [
        {"name": "nvidia", "address": "10.0.0.1", "devices": [{"type": "H100", "count": 8}]},
        {"name": "ascend", "address": "10.0.0.2", "devices": [{"type": "910B3", "count": 8}]},
    ],
}
_CPU = {
    "name": "cpus",
    "nodes": [{"name": "node", "count": 2, "devices": [{"type": "CPU", "memory": "16 GiB"}]}],
}

CASES = (
    # dense, one node
    Case("Qwen2.5-0.5B", "1xL4", "int4-g128", {}),
    Case("Qwen3-8B", "1xH100", "bf16", {}),
    Case("Qwen3-8B", "2xRTX-4090", "int4-g128", {"pp": 2}),
    Case("Mistral-7B", "1xL4", "int4-g128", {}),
    Case("Llama-3.3-70B", "4xA100", "bf16", {"tp": 4}),
    Case("Llama-3.3-70B", "2xH100", "fp8", {"tp": 2}, workload={"kv_dtype": "fp8", "context": "64k"}, tag="kv-fp8"),
    Case("GLM-4-32B", "2xH100", "bf16", {"tp": 2}),
    Case("GLM-4-9B", "1xL40S", "bf16", {}, workload={"context": "32k"}),
    Case("Qwen2.5-72B", "8xA100", "bf16", {"tp": 4, "pp": 2}),
    Case("Qwen3-8B", _CARDS, "bf16", {"tp": 1, "pp": 3}),
    # mixtures, one node
    Case("Qwen3-30B-A3B", "2xH100", "int4-g128", {"tp": 2, "ep": True}),
    Case("Qwen3-30B-A3B", "8xH100", "bf16", {"tp": 1, "dp": 8, "ep": True}),
    Case("Qwen3-235B-A22B", "8xH100", "int4-g128", {"tp": 8, "ep": True}),
    Case("Qwen3-Next-80B-A3B", "4xH100", "bf16", {"tp": 4}),
    Case("Qwen3.5-397B-A17B", "8xH200", "int4-g128-experts", {"tp": 8}),
    Case("GLM-4.5-Air", "4xH100", "bf16", {"tp": 4}, workload={"speculative_tokens": 1}, tag="mtp"),
    Case(
        "Qwen3.5-397B-A17B",
        "8xH200",
        "int4-g128-experts",
        {"tp": 8, "ep": True},
        workload={"vision": False, "prefix_caching": False},
        tag="text",
    ),
    Case("Qwen3-8B", "2xH100", "bf16", {"tp": 2}, workload={"kv_dtype": "int8"}, tag="kv-int8"),
    Case("MiniMax-M2.5", "8xH100", "fp8", {"tp": 4, "dp": 2, "ep": True}),
    Case("DeepSeek-V2-Lite", "2xA100", "bf16", {"tp": 2}),
    Case("DeepSeek-V3", "8xB200", "int4-g128", {"tp": 8, "dcp": 8}),
    Case("Kimi-K2.5", "8xB200", "int4-g128-experts", {"tp": 8}),
    # several nodes
    Case("Llama-3.3-70B", "2x4xA100", "bf16", {"tp": 4, "pp": 2}, 2, site=_TWO),
    Case("Qwen3-235B-A22B", "2x8xH100", "bf16", {"tp": 8, "pp": 2}, 2, site=_TWO),
    Case("Kimi-K2-Instruct", "2x8xH200", "fp8", {"tp": 8, "pp": 2}, 2, site=_TWO),
    Case("DeepSeek-V3", "2x8xH200", "fp8", {"tp": 8, "dp": 2, "ep": True}, 2, site=_TWO),
    Case("DeepSeek-V3", "2x8xH200", "fp8", {"tp": 8, "dp": 2, "ep": True}, 2, site=_NATIVE, tag="native"),
    Case("GLM-4.6", "4x8xA100", "int4-g64-experts", {"tp": 8, "dp": 4, "ep": True}, 4, site=addresses(4)),
    Case("Qwen3-235B-A22B", "2x8xA100", "bf16", {"tp": 8, "pp": 2}, 2, site=_RAY, tag="ray"),
    # Ascend
    Case("GLM-5", "16xA3", "w4a8", {"tp": 16, "ep": True}, workload={"context": "128k"}),
    Case("GLM-5", "2x8x910B3", "w4a8", {"tp": 8, "dp": 2, "ep": True}, 2, site=_TWO),
    Case("GLM-5", "2x8x910B3", "w4a8", {"tp": 8, "pp": 2}, 2, site=_TWO),
    Case("GLM-5.2", "2x16xA3", "w8a8", {"tp": 16, "dp": 2, "ep": True}, 2, site=_TWO),
    Case("GLM-4.6", "16xA3", "w8a8", {"tp": 8, "dp": 2, "ep": True}),
    Case("Qwen3-235B-A22B", "16xA3", "w8a8", {"tp": 16, "ep": True}),
    Case("Qwen3-8B", "2x910B4", "bf16", {"tp": 2}),
    Case("Kimi-K2-Instruct", "2x8x910B3", "w4a8", {"tp": 8, "dp": 2, "ep": True}, 2, site=_TWO),
    # CPU, and two vendors
    Case("Qwen2.5-0.5B", "1xCPU", "bf16", {}),
    Case("Qwen2.5-0.5B", _CPU, "bf16", {"tp": 1}),
    Case("GLM-4.6", _VENDORS, "cuda=int4-g64-experts,ascend=w4a8", {"tp": 8, "ep": True}),
)
