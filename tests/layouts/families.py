"""A tiny random model of every family, by transformers' own configuration classes, and what of it is quantized.

`quantized` are the modules that rounding on load quantizes, numbers as *, under the names on disk.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig

_SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
_MOE = _SIZES | {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
_MLA = _MOE | {
    "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
    "v_head_dim": 16, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1,
    "topk_group": 1, "head_dim": 16,
}  # fmt: skip
_DELTA = {
    "num_hidden_layers": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4, "head_dim": 16, "full_attention_interval": 2,
}  # fmt: skip

_QKVO = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_EXPERTS = ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj", "mlp.experts.*.down_proj")
_SHARED = tuple(name.replace("mlp.", "mlp.shared_experts.") for name in _MLP)
_SHARED_ONE = tuple(name.replace("mlp.", "mlp.shared_expert.") for name in _MLP)
_LATENT = tuple(f"self_attn.{name}" for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"))
_FUSED = ("mlp.gate_up_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Family:
    """config: makes the configuration. layer: where layers begin on disk. floats: reasons for what stays in float."""

    config: Callable[[], PretrainedConfig]
    quantized: tuple[str, ...]
    floats: frozenset[str] = frozenset({"output head", "embedding"})
    layer: str = "model.layers.*"


_ENDS = frozenset({"output head", "embedding"})
_ROUTED = _ENDS | {"router"}
_LINEAR = frozenset({"gate of linear attention"})
_LATENT_FLOATS = _ROUTED | {"absorbed into latent attention"}

FAMILIES: dict[str, Family] = {
    "llama": Family(lambda: transformers.LlamaConfig(**_SIZES), (*_QKVO, *_MLP)),
    "qwen2": Family(lambda: transformers.Qwen2Config(**_SIZES, tie_word_embeddings=True), (*_QKVO, *_MLP),
                    frozenset({"embedding"})),
    "qwen3": Family(lambda: transformers.Qwen3Config(**_SIZES, head_dim=16), (*_QKVO, *_MLP)),
    "qwen3_moe": Family(
        lambda: transformers.Qwen3MoeConfig(**_MOE, head_dim=16, num_experts=4, mlp_only_layers=[1]),
        (*_QKVO, *_MLP, *_EXPERTS), _ROUTED,
    ),
    "qwen3_next": Family(
        lambda: transformers.Qwen3NextConfig(
            **_MOE | _DELTA, num_experts=4, shared_expert_intermediate_size=32, decoder_sparse_step=1
        ),
        (*_QKVO, *_EXPERTS, *_SHARED_ONE, "linear_attn.in_proj_qkvz", "linear_attn.out_proj"), _ROUTED | _LINEAR,
    ),
    "qwen3_5": Family(
        lambda: transformers.Qwen3_5TextConfig(**_SIZES | _DELTA),
        (*_QKVO, *_MLP, "linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.out_proj"), _ENDS | _LINEAR,
    ),
    "qwen3_5_vl": Family(
        lambda: transformers.Qwen3_5Config(
            text_config=_SIZES | _DELTA,
            vision_config={"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4,
                           "out_hidden_size": 64, "num_position_embeddings": 16, "deepstack_visual_indexes": []},
        ),
        (*_QKVO, *_MLP, "linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.out_proj"),
        _ENDS | _LINEAR | {"vision or audio tower"}, "model.language_model.layers.*",
    ),
    "qwen3_5_moe": Family(
        lambda: transformers.Qwen3_5MoeTextConfig(
            **_MOE | _DELTA, num_experts=4, shared_expert_intermediate_size=32
        ),
        (*_QKVO, *_EXPERTS, *_SHARED_ONE, "linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.out_proj"),
        _ROUTED | _LINEAR,
    ),
    "glm": Family(lambda: transformers.GlmConfig(**_SIZES, head_dim=16), (*_QKVO, *_FUSED)),
    "glm4": Family(lambda: transformers.Glm4Config(**_SIZES, head_dim=16), (*_QKVO, *_FUSED)),
    "glm4_moe": Family(
        lambda: transformers.Glm4MoeConfig(
            **_MOE, head_dim=16, n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1, n_group=1,
            topk_group=1, use_qk_norm=True, attention_bias=True,
        ),
        (*_QKVO, *_MLP, *_EXPERTS, *_SHARED), _ROUTED,
    ),
    "glm4_moe_lite": Family(
        lambda: transformers.Glm4MoeLiteConfig(**_MLA), (*_LATENT, *_MLP, *_EXPERTS, *_SHARED), _LATENT_FLOATS
    ),
    "glm_moe_dsa": Family(
        lambda: transformers.GlmMoeDsaConfig(**_MLA, index_n_heads=2, index_head_dim=32, index_topk=8),
        (*_LATENT, *_MLP, *_EXPERTS, *_SHARED), _LATENT_FLOATS | {"indexer of sparse attention"},
    ),
    "deepseek_v3": Family(
        lambda: transformers.DeepseekV3Config(**_MLA), (*_LATENT, *_MLP, *_EXPERTS, *_SHARED), _LATENT_FLOATS
    ),
    "minimax_m2": Family(
        lambda: transformers.MiniMaxM2Config(**_SIZES, head_dim=16, num_local_experts=4, num_experts_per_tok=2),
        (*_QKVO, *(f"block_sparse_moe.experts.*.w{i}" for i in (1, 2, 3))), _ROUTED,
    ),
    "bailing_hybrid": Family(
        lambda: transformers.BailingHybridConfig(
            **_MLA | {"q_lora_rank": None}, num_local_experts=4, layer_group_size=2, num_mtp_layers=0
        ),
        ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.dense",
         "attention.kv_a_proj_with_mqa", *_MLP, *_EXPERTS, *_SHARED), _LATENT_FLOATS | _LINEAR,
    ),
    "kimi_k2": Family(
        lambda: transformers.DeepseekV3Config(**_MLA), (*_LATENT, *_MLP, *_EXPERTS, *_SHARED), _LATENT_FLOATS
    ),
    "kimi_k25": Family(
        lambda: transformers.Kimi_K25Config(
            text_config=_MLA | {"model_type": "kimi_k2"},
            vision_config={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
                           "num_attention_heads": 2, "patch_size": 2, "pos_emb_height": 4, "pos_emb_width": 4},
            projection_hidden_size=32, tie_word_embeddings=False,
        ),
        (*_LATENT, *_MLP, *_EXPERTS, *_SHARED),
        _LATENT_FLOATS | {"vision or audio tower", "projector between modalities"},
        "language_model.model.layers.*",
    ),
}  # fmt: skip


def model_class(config: PretrainedConfig) -> Any:
    """transformers' generating class for a configuration."""
    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    return auto._model_mapping[type(config)]


def make(name: str, folder: Path) -> PretrainedConfig:
    """A float32 checkpoint under the names of published ones; weights large enough that a wrong layer shows."""
    torch.manual_seed(0)
    config = FAMILIES[name].config()
    model = model_class(config)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    if name == "kimi_k2":  # the publisher's own name for DeepSeek-V3's layers
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | {"model_type": "kimi_k2"}))
    if name == "kimi_k25":  # transformers 5.23 gives the language model's layers the name of the vision tower's
        tensors = load_file(folder / "model.safetensors")
        renamed = {
            n.replace("language_model.model.blocks.", "language_model.model.layers."): t for n, t in tensors.items()
        }
        save_file(renamed, folder / "model.safetensors")
    return config


# Ring-2.5-1T, whose class transformers lacks: names of its published checkpoint, (rows, columns) cut down. Layer 0 is
# dense with lightning attention, layer 1 sparse with latent attention.
RING: dict[str, tuple[int, ...]] = {
    "model.word_embeddings.weight": (96, 64),
    "model.layers.0.input_layernorm.weight": (64,),
    "model.layers.0.attention.query_key_value.weight": (192, 64),
    "model.layers.0.attention.query_layernorm.weight": (16,),
    "model.layers.0.attention.key_layernorm.weight": (16,),
    "model.layers.0.attention.g_proj.weight": (64, 64),
    "model.layers.0.attention.g_norm.weight": (64,),
    "model.layers.0.attention.dense.weight": (64, 64),
    "model.layers.0.mlp.gate_proj.weight": (96, 64),
    "model.layers.0.mlp.up_proj.weight": (96, 64),
    "model.layers.0.mlp.down_proj.weight": (64, 96),
    "model.layers.1.attention.q_a_proj.weight": (32, 64),
    "model.layers.1.attention.q_a_layernorm.weight": (32,),
    "model.layers.1.attention.q_b_proj.weight": (128, 32),
    "model.layers.1.attention.kv_a_proj_with_mqa.weight": (48, 64),
    "model.layers.1.attention.kv_b_proj.weight": (128, 32),
    "model.layers.1.attention.dense.weight": (64, 64),
    "model.layers.1.mlp.gate.weight": (4, 64),
    "model.layers.1.mlp.gate.expert_bias": (4,),
    "model.layers.1.mlp.experts.0.gate_proj.weight": (32, 64),
    "model.layers.1.mlp.experts.0.down_proj.weight": (64, 32),
    "model.layers.1.mlp.shared_experts.down_proj.weight": (64, 32),
    "model.mtp.layers.0.attention.dense.weight": (64, 64),
    "model.norm.weight": (64,),
    "lm_head.weight": (96, 64),
}
RING_FLOATS = ("word_embeddings", "g_proj", "mlp.gate", "kv_b_proj", "lm_head", "mtp")
RING_CONFIG = {"architectures": ["BailingMoeV2_5ForCausalLM"], "model_type": "bailing_hybrid", "num_hidden_layers": 2}
