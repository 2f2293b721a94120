"""config.json and generation_config.json of a model that has only a GGUF file.

llama.cpp's keys are renamed per architecture; what the file does not say is left to transformers' defaults only where
every model of the architecture has the same value, and is read off the tensors where they show it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite

from transload.errors import FormatError
from transload.headers import TensorInfo
from transload.headers.info import shown
from transload.models.gguf_llama3 import llama3_scaling
from transload.models.gguf_names import architecture_of, number

Json = dict[str, object]
Metadata = Mapping[str, object]
Tensors = Mapping[str, TensorInfo]


@dataclass(frozen=True, slots=True)
class Family:
    """model_type and class of an architecture, and the keys that it has besides those of every decoder."""

    model_type: str
    architecture: str
    keys: dict[str, str] = field(default_factory=dict)  # GGUF key without the architecture -> config key
    fixed: Json = field(default_factory=dict)  # what llama.cpp assumes and does not write

    def every_key(self) -> dict[str, str]:
        """All keys, those of every decoder too."""
        return _COMMON | self.keys


_COMMON = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_DENSE = {"feed_forward_length": "intermediate_size"}
_EXPERTS = {"expert_used_count": "num_experts_per_tok", "expert_feed_forward_length": "moe_intermediate_size"}
_GROUPED_EXPERTS = {
    "expert_count": "n_routed_experts",
    "expert_shared_count": "n_shared_experts",
    "leading_dense_block_count": "first_k_dense_replace",
    "expert_weights_scale": "routed_scaling_factor",
    "expert_weights_norm": "norm_topk_prob",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
}
_MLA = {"attention.q_lora_rank": "q_lora_rank", "attention.kv_lora_rank": "kv_lora_rank"}
_INDEXER = {
    "attention.indexer.head_count": "index_n_heads",
    "attention.indexer.key_length": "index_head_dim",
    "attention.indexer.top_k": "index_topk",
}

FAMILIES = {
    "llama": Family("llama", "LlamaForCausalLM", _DENSE),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", _DENSE),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", _DENSE),
    "qwen2moe": Family(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        _DENSE
        | _EXPERTS
        | {"expert_count": "num_experts", "expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
    ),
    # llama.cpp always renormalizes the chosen experts of this architecture, and writes no key for it.
    "qwen3moe": Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        _DENSE | _EXPERTS | {"expert_count": "num_experts"},
        {"norm_topk_prob": True},
    ),
    "chatglm": Family("glm", "GlmForCausalLM", _DENSE),
    "glm4": Family("glm4", "Glm4ForCausalLM", _DENSE),
    "glm4moe": Family("glm4_moe", "Glm4MoeForCausalLM", _DENSE | _EXPERTS | _GROUPED_EXPERTS),
    "deepseek2": Family("deepseek_v2", "DeepseekV2ForCausalLM", _DENSE | _EXPERTS | _GROUPED_EXPERTS | _MLA),
    "glm-dsa": Family("glm_moe_dsa", "GlmMoeDsaForCausalLM", _DENSE | _EXPERTS | _GROUPED_EXPERTS | _MLA | _INDEXER),
    "minimax-m2": Family(
        "minimax_m2",
        "MiniMaxM2ForCausalLM",
        {
            "expert_count": "num_local_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "intermediate_size",
            "rope.dimension_count": "rotary_dim",
        },
        {"use_qk_norm": True, "use_routing_bias": True, "scoring_func": "sigmoid"},
    ),
}
# Written as architecture `llama`, with experts.
FAMILIES["mixtral"] = Family(
    "mixtral",
    "MixtralForCausalLM",
    _DENSE | {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
)
_DEEPSEEK_V3 = Family("deepseek_v3", "DeepseekV3ForCausalLM", FAMILIES["deepseek2"].keys)
_WITH_MLA = ("deepseek2", "glm-dsa")
_PARTIAL_ROTARY = ("chatglm", "glm4", "glm4moe")
_SIGMOID = 2  # llama.cpp's number for a sigmoid router (LLAMA_EXPERT_GATING_FUNC_TYPE_SIGMOID)


def hf_config(metadata: Metadata, tensors: Tensors, rope_factors: Sequence[float] = ()) -> Json:
    """config.json of the model in a GGUF file. rope_factors: the tensor `rope_freqs.weight` where there is one.

    Raises Unsupported for unknown architectures and rotary factors, and FormatError when a key that the architecture
    needs is missing.
    """
    arch = architecture_of(metadata)
    family = _family(arch, metadata)
    config: Json = {"architectures": [family.architecture], "model_type": family.model_type, "hidden_act": "silu"}
    for key, name in family.every_key().items():
        if f"{arch}.{key}" in metadata:
            config[name] = _scalar(metadata, f"{arch}.{key}")
    missing = [key for key in _COMMON if f"{arch}.{key}" not in metadata]
    if missing:
        raise FormatError(f"metadata has no {arch}.{missing[0]}, which every model of the architecture has")
    config |= family.fixed
    config |= _layers(metadata) | _heads(arch, metadata, tensors) | _rope(arch, metadata, config)
    config |= _switches(arch, tensors) | {"vocab_size": _vocabulary(metadata, tensors)} | special_ids(metadata)
    config.setdefault("pad_token_id", None)  # a class's own default may lie outside of this vocabulary (GlmConfig)
    if rope_factors:
        config |= llama3_scaling(rope_factors, config["rope_theta"])
    config["tie_word_embeddings"] = "output.weight" not in tensors
    return config


def generation_config(metadata: Metadata) -> Json:
    """generation_config.json: the special tokens, and greedy decoding unless the user asks otherwise."""
    return {"_from_model_config": True} | special_ids(metadata)


def special_ids(metadata: Metadata) -> Json:
    """bos, eos and pad token ids under transformers' names. Several ends of generation become a list."""
    ids: Json = {}
    for name, key in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        value = _token_id(metadata, key)
        if value is not None:
            ids[name] = value
    ends = [_token_id(metadata, key) for key in ("eos", "eot", "eom")]
    known = list(dict.fromkeys(end for end in ends if end is not None))
    if len(known) > 1:
        ids["eos_token_id"] = known
    return ids


def _token_id(metadata: Metadata, key: str) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{key}_token_id")
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31 else None


def _family(arch: str, metadata: Metadata) -> Family:
    if arch == "llama" and number(metadata, "expert_count", 0):
        return FAMILIES["mixtral"]
    if arch == "deepseek2" and metadata.get("deepseek2.expert_gating_func") == _SIGMOID:
        return _DEEPSEEK_V3
    return FAMILIES[arch]


def _layers(metadata: Metadata) -> Json:
    """llama.cpp counts multi-token-prediction layers among the blocks."""
    nextn = number(metadata, "nextn_predict_layers", 0)
    layers: Json = {"num_hidden_layers": number(metadata, "block_count") - nextn}
    return layers | ({"num_nextn_predict_layers": nextn} if nextn else {})


def _heads(arch: str, metadata: Metadata, tensors: Tensors) -> Json:
    heads = number(metadata, "attention.head_count")
    if heads == 0:
        raise FormatError(f"metadata {arch}.attention.head_count is 0")
    if arch in _WITH_MLA:
        return {"num_key_value_heads": heads} | _mla_heads(arch, metadata, tensors)
    found: Json = {"num_key_value_heads": number(metadata, "attention.head_count_kv", heads)}
    if arch not in ("qwen2", "qwen2moe"):
        found["head_dim"] = _head_size(metadata)
    return found


def _mla_heads(arch: str, metadata: Metadata, tensors: Tensors) -> Json:
    """Head widths: the `_mla` keys where llama.cpp stores the absorbed form, else the plain ones."""
    rope = number(metadata, "rope.dimension_count")
    key = number(metadata, "attention.key_length_mla", number(metadata, "attention.key_length"))
    value = number(metadata, "attention.value_length_mla", number(metadata, "attention.value_length"))
    found: Json = {"qk_nope_head_dim": key - rope, "qk_rope_head_dim": rope, "v_head_dim": value}
    if f"{arch}.attention.q_lora_rank" not in metadata:
        found["q_lora_rank"] = None
    return found


def _rope(arch: str, metadata: Metadata, config: Json) -> Json:
    rope: Json = {"rope_theta": _scalar(metadata, f"{arch}.rope.freq_base", 10000.0)}
    kind, factor = metadata.get(f"{arch}.rope.scaling.type"), metadata.get(f"{arch}.rope.scaling.factor")
    if isinstance(kind, str) and kind in ("yarn", "linear") and isinstance(factor, float):
        scaling: Json = {"rope_type": kind, "type": kind, "factor": _scalar(metadata, f"{arch}.rope.scaling.factor")}
        original = metadata.get(f"{arch}.rope.scaling.original_context_length")
        if isinstance(original, int):
            scaling["original_max_position_embeddings"] = original
        rope["rope_scaling"] = scaling | (_yarn_deepseek(arch, metadata) if kind == "yarn" else {})
    if arch in _PARTIAL_ROTARY:
        size = max(_head_size(metadata), 1)
        rope["partial_rotary_factor"] = number(metadata, "rope.dimension_count", size // 2) / size
    return rope


def _head_size(metadata: Metadata) -> int:
    heads = max(number(metadata, "attention.head_count"), 1)
    return number(metadata, "attention.key_length", number(metadata, "embedding_length") // heads)


def _yarn_deepseek(arch: str, metadata: Metadata) -> Json:
    """DeepSeek's two mscale values are equal; llama.cpp keeps a tenth of them as the log multiplier."""
    multiplier = metadata.get(f"{arch}.rope.scaling.yarn_log_multiplier")
    if not isinstance(multiplier, float) or not isfinite(multiplier):
        return {}
    mscale = _short_float(multiplier * 10)
    return {"mscale": mscale, "mscale_all_dim": mscale, "beta_fast": 32, "beta_slow": 1}


def _switches(arch: str, tensors: Tensors) -> Json:
    """What only the tensors show: biases and norms that some models of an architecture have and others do not."""
    biased = "blk.0.attn_q.bias" in tensors or "blk.0.attn_qkv.bias" in tensors
    switches: Json = {}
    if arch in ("llama", "qwen3", "qwen3moe", "chatglm", "glm4", "glm4moe"):
        switches["attention_bias"] = biased
    if arch == "glm4moe":
        switches["use_qk_norm"] = "blk.0.attn_q_norm.weight" in tensors
    return switches


def _vocabulary(metadata: Metadata, tensors: Tensors) -> int:
    """Rows of the embedding table: the tokenizer may list fewer tokens."""
    table = tensors.get("token_embd.weight")
    if table is not None and len(table.shape) == 2:
        return table.shape[0]
    return number(metadata, "vocab_size")


def _scalar(metadata: Metadata, key: str, default: float | None = None) -> bool | int | float:
    """A number of the metadata, floats as `_short_float`. Raises FormatError for anything else."""
    value = metadata.get(key, default)
    if not isinstance(value, (bool, int, float)) or not isfinite(value) or abs(value) >= 1 << 62:
        raise FormatError(f"metadata {key} is {shown(value)}, expected a number")
    return _short_float(value) if isinstance(value, float) else value


def _short_float(value: float) -> float:
    """A float32 as the shortest decimal that means it: 9.999999974752427e-07 is 1e-06."""
    for digits in range(1, 18):
        short = float(f"{value:.{digits}g}")
        if abs(short - value) <= abs(value) * 2.0**-25:
            return short
    return value
