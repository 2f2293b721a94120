"""Tiny GGUF files of whole models: transformers' own random weights, named, ordered and quantized as llama.cpp does."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

TEXT = [
    "def reverse(s):\n    return s[::-1]  # done",
    "The quick brown fox jumps over the lazy dog, twice. It's 12345 o'clock!",
    "你好，世界！模型可以在不同的硬件上运行。",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TYPES = ("Q8_0", "Q4_0", "Q5_0", "Q4_1", "Q5_1")  # what the gguf package quantizes


@dataclass(frozen=True)
class Case:
    """One architecture: transformers' model_type and sizes, and the keys that llama.cpp writes for it."""

    arch: str
    model_type: str
    config: dict[str, Any]
    keys: dict[str, Any] = field(default_factory=dict)


_SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
}  # fmt: skip
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_MOE_KEYS = {"expert_used_count": 2, "expert_feed_forward_length": 32}
_GROUPED = _MOE | {
    "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5,
    "norm_topk_prob": True, "n_group": 1, "topk_group": 1,
}  # fmt: skip
_GROUPED_KEYS = _MOE_KEYS | {
    "expert_count": 4, "expert_shared_count": 1, "leading_dense_block_count": 1, "expert_weights_scale": 2.5,
    "expert_weights_norm": True, "expert_group_count": 1, "expert_group_used_count": 1, "expert_gating_func": 2,
}  # fmt: skip
_MLA = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
    "num_key_value_heads": 4,
}  # fmt: skip
_MLA_KEYS = {
    "attention.q_lora_rank": 32, "attention.kv_lora_rank": 32, "attention.key_length": 48,
    "attention.value_length": 32, "rope.dimension_count": 16, "attention.head_count_kv": 4,
}  # fmt: skip
_HEAD = {"head_dim": 32}
_HEAD_KEYS = {"attention.key_length": 32, "attention.value_length": 32}

CASES = (
    Case("llama", "llama", {"head_dim": 16}, {"rope.dimension_count": 16}),
    Case("qwen2", "qwen2", {}),
    Case("qwen3", "qwen3", _HEAD, _HEAD_KEYS),
    Case(
        "qwen2moe",
        "qwen2_moe",
        _MOE | {"num_experts": 4, "shared_expert_intermediate_size": 64},
        _MOE_KEYS | {"expert_count": 4, "expert_shared_feed_forward_length": 64},
    ),
    Case(
        "qwen3moe",
        "qwen3_moe",
        _MOE | _HEAD | {"num_experts": 4, "norm_topk_prob": True},
        _MOE_KEYS | _HEAD_KEYS | {"expert_count": 4},
    ),
    Case("chatglm", "glm", _HEAD | {"attention_bias": True}, _HEAD_KEYS | {"rope.dimension_count": 16}),
    Case("glm4", "glm4", _HEAD | {"attention_bias": True}, _HEAD_KEYS | {"rope.dimension_count": 16}),
    Case(
        "glm4moe",
        "glm4_moe",
        _GROUPED | _HEAD | {"attention_bias": True, "use_qk_norm": True},
        _GROUPED_KEYS | _HEAD_KEYS | {"rope.dimension_count": 16},
    ),
    Case("deepseek2", "deepseek_v3", _GROUPED | _MLA, _GROUPED_KEYS | _MLA_KEYS),
    Case(
        "glm-dsa",
        "glm_moe_dsa",
        _GROUPED | _MLA | {"index_topk": 8, "index_head_dim": 32, "index_n_heads": 2},
        _GROUPED_KEYS
        | _MLA_KEYS
        | {
            "attention.indexer.head_count": 2,
            "attention.indexer.key_length": 32,
            "attention.indexer.top_k": 8,
        },
    ),
    Case(
        "minimax-m2",
        "minimax_m2",
        _HEAD
        | {
            "intermediate_size": 32,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rotary_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
        _MOE_KEYS | _HEAD_KEYS | {"expert_count": 4, "rope.dimension_count": 16, "expert_gating_func": 2},
    ),
)


def build(case: Case, path: Path, tied: bool = False) -> tuple[Any, dict[str, Tensor]]:
    """Writes a GGUF file. Returns transformers' config and what the file means: HF name on disk -> float32 tensor."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(case.model_type, **(_SIZES | case.config), tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = {name: torch.randn_like(t) * 0.1 for name, t in model.state_dict().items()}
    if tied:
        weights.pop("lm_head.weight", None)
    writer = gguf.GGUFWriter(str(path), case.arch)
    _write_metadata(writer, case)
    meant = _write_tensors(writer, case, config, _llama_cpp_tensors(weights))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return config, meant


def _write_metadata(writer: gguf.GGUFWriter, case: Case) -> None:
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(case.config.get("intermediate_size", 96))
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    if "attention.head_count_kv" not in case.keys:
        writer.add_head_count_kv(2)
    for key, value in case.keys.items():
        full = f"{case.arch}.{key}"
        if isinstance(value, bool):
            writer.add_bool(full, value)
        elif isinstance(value, float):
            writer.add_float32(full, value)
        else:
            writer.add_uint32(full, value)
    add_tokenizer(writer)


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    """A byte-level BPE tokenizer trained on three lines, its specials marked as llama.cpp marks them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=317, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    import json

    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get) + SPECIAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 3) + [3] * 3)
    writer.add_token_merges([" ".join(m) if isinstance(m, list) else m for m in model["merges"]])
    writer.add_bos_token_id(len(tokens) - 3)
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_pad_token_id(len(tokens) - 3)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)


def _llama_cpp_tensors(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' state dict with its fused experts taken apart, gate rows before up rows."""
    found: dict[str, Tensor] = {}
    for name, t in weights.items():
        if name.endswith("experts.gate_up_proj"):
            gate, up = t.chunk(2, dim=1)
            found |= {name.replace("gate_up_proj", "gate_proj"): gate, name.replace("gate_up_proj", "up_proj"): up}
        else:
            found[name] = t
    return found


def _write_tensors(writer: gguf.GGUFWriter, case: Case, config: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == case.arch)
    names = gguf.get_tensor_name_map(arch, 2)
    meant: dict[str, Tensor] = {}
    for i, (name, t) in enumerate(tensors.items()):
        stem, _, suffix = name.rpartition(".")
        if suffix not in ("weight", "bias"):
            stem, suffix = name, "weight"
        if stem.endswith("e_score_correction_bias"):
            suffix = "bias"
        target = names.get_name(stem) or names.get_name(stem.removesuffix("_bias")) or _by_hand(stem)
        assert target, f"{case.arch}: the gguf package has no name for {name}"
        stored = _interleaved(t, target, config) if case.arch == "llama" else t
        stored = stored.squeeze(0) if target.endswith("ffn_gate_inp_shexp") else stored
        kind = TYPES[i % len(TYPES)] if t.dim() > 1 and t.shape[-1] % 32 == 0 and t.shape[0] > 1 else "F32"
        if "ffn_gate_inp" in target:
            kind = "F32"
        if kind == "F32":
            writer.add_tensor(f"{target}.{suffix}", stored.contiguous().numpy())
            value = t
        else:
            qtype = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(f"{target}.{suffix}", gguf.quantize(stored.contiguous().numpy(), qtype), raw_dtype=qtype)
            value = torch.from_numpy(gguf.dequantize(gguf.quantize(t.contiguous().numpy(), qtype), qtype))
        meant |= _on_disk(name, value, case)
    return meant


def _by_hand(stem: str) -> str | None:
    """Names that the gguf package lists under other spellings of the same tensors."""
    parts = stem.split(".")
    prefix = f"blk.{parts[2]}." if len(parts) > 3 else ""
    known = {"indexer.k_norm": "indexer.k_norm", "gate.e_score_correction_bias": "exp_probs_b"}
    return next((prefix + ours for theirs, ours in known.items() if stem.endswith(theirs)), None)


def _interleaved(t: Tensor, target: str, config: Any) -> Tensor:
    """llama.cpp's LlamaModel.permute: the two halves of every head become alternating rows."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(target.rpartition(".")[2])
    if heads is None:
        return t
    array = t.numpy()
    swapped = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:]).swapaxes(1, 2)
    return torch.from_numpy(np.ascontiguousarray(swapped).reshape(array.shape))


# MiniMax's names on disk, which transformers renames while it loads.
_MINIMAX = {
    "mlp.experts": "block_sparse_moe.experts", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2",
    "mlp.gate": "block_sparse_moe.gate", "mlp.e_score_correction_bias": "block_sparse_moe.e_score_correction_bias",
}  # fmt: skip


def _on_disk(name: str, value: Tensor, case: Case) -> dict[str, Tensor]:
    """The name or names on disk: experts have one each."""
    if case.arch == "minimax-m2":
        for ours, theirs in _MINIMAX.items():
            name = name.replace(ours, theirs)
    if ".experts." not in name:
        return {name: value}
    head, tail = name.split(".experts.")
    tail = tail.removesuffix(".weight")
    return {f"{head}.experts.{e}.{tail}.weight": value[e] for e in range(len(value))}
