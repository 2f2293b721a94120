"""ChatGLM's forward pass in plain float32 torch, and tiny random checkpoints in ChatGLM's layout.

Written from the definition that ChatGLM2, ChatGLM3 and GLM-4-9b publish as modeling_chatglm.py, one sequence at a time
and without a cache: an oracle that shares no line with transformers' `glm`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

CONFIG: dict[str, Any] = {
    "model_type": "chatglm",
    "architectures": ["ChatGLMForConditionalGeneration"],
    "padded_vocab_size": 128,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_layers": 2,
    "num_attention_heads": 4,
    "kv_channels": 16,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "seq_length": 64,
    "layernorm_epsilon": 1.5625e-07,
    "rmsnorm": True,
    "post_layer_norm": True,
    "original_rope": True,
    "apply_residual_connection_post_layernorm": False,
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "rope_ratio": 500,
    "tie_word_embeddings": False,
    "eos_token_id": [125, 126],
    "pad_token_id": 125,
    "torch_dtype": "float32",
}


def weights(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random tensors under ChatGLM's names."""
    torch.manual_seed(seed)
    hidden, width, heads = config["hidden_size"], config["kv_channels"], config["num_attention_heads"]
    groups = config["multi_query_group_num"] if config["multi_query_attention"] else heads
    found = {"transformer.embedding.word_embeddings.weight": torch.randn(config["padded_vocab_size"], hidden)}
    for i in range(config["num_layers"]):
        layer = f"transformer.encoder.layers.{i}"
        qkv = (heads + 2 * groups) * width
        found |= {
            f"{layer}.input_layernorm.weight": 1 + 0.1 * torch.randn(hidden),
            f"{layer}.self_attention.query_key_value.weight": 0.2 * torch.randn(qkv, hidden),
            f"{layer}.self_attention.query_key_value.bias": 0.2 * torch.randn(qkv),
            f"{layer}.self_attention.dense.weight": 0.2 * torch.randn(hidden, heads * width),
            f"{layer}.post_attention_layernorm.weight": 1 + 0.1 * torch.randn(hidden),
            f"{layer}.mlp.dense_h_to_4h.weight": 0.2 * torch.randn(2 * config["ffn_hidden_size"], hidden),
            f"{layer}.mlp.dense_4h_to_h.weight": 0.2 * torch.randn(hidden, config["ffn_hidden_size"]),
        }
    found["transformer.encoder.final_layernorm.weight"] = 1 + 0.1 * torch.randn(hidden)
    found["transformer.output_layer.weight"] = 0.2 * torch.randn(config["padded_vocab_size"], hidden)
    dim = width // 2
    found["transformer.rotary_pos_emb.inv_freq"] = 1.0 / (10000 ** (torch.arange(0, dim, 2).float() / dim))
    if not config["add_qkv_bias"]:
        found = {name: t for name, t in found.items() if not name.endswith("bias")}
    return found


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    """A checkpoint folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def logits(w: dict[str, Tensor], config: dict[str, Any], ids: Tensor, divide: bool = False) -> Tensor:
    """float32 [T, vocabulary] for tokens ids [T]. divide: positions are divided by rope_ratio (ChatGLM2-6B-32K)."""
    hidden = w["transformer.embedding.word_embeddings.weight"][ids]
    turns = _turns(len(ids), config["kv_channels"] // 2, float(config.get("rope_ratio", 1)), divide)
    for i in range(config["num_layers"]):
        name = f"transformer.encoder.layers.{i}"
        x = _norm(hidden, w[f"{name}.input_layernorm.weight"], config)
        hidden = hidden + _attention(x, w, f"{name}.self_attention", config, turns)
        x = _norm(hidden, w[f"{name}.post_attention_layernorm.weight"], config)
        gate, up = (x @ w[f"{name}.mlp.dense_h_to_4h.weight"].T).chunk(2, -1)
        hidden = hidden + (torch.nn.functional.silu(gate) * up) @ w[f"{name}.mlp.dense_4h_to_h.weight"].T
    return (
        _norm(hidden, w["transformer.encoder.final_layernorm.weight"], config) @ w["transformer.output_layer.weight"].T
    )


def _attention(x: Tensor, w: dict[str, Tensor], name: str, config: dict[str, Any], turns: Tensor) -> Tensor:
    width, heads = config["kv_channels"], config["num_attention_heads"]
    mixed = x @ w[f"{name}.query_key_value.weight"].T
    if config["add_qkv_bias"]:
        mixed = mixed + w[f"{name}.query_key_value.bias"]
    if config["multi_query_attention"]:
        groups = config["multi_query_group_num"]
        q, k, v = (
            part.view(len(x), -1, width) for part in mixed.split([heads * width, groups * width, groups * width], -1)
        )
        k, v = (t.repeat_interleave(heads // groups, 1) for t in (k, v))
    else:
        q, k, v = mixed.view(len(x), heads, 3 * width).split(width, -1)
    scores = torch.einsum("qhd,khd->hqk", _turned(q, turns), _turned(k, turns)) / math.sqrt(width)
    scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), float("-inf"))
    mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
    return mixed.reshape(len(x), -1) @ w[f"{name}.dense.weight"].T


def _turns(length: int, dim: int, ratio: float, divide: bool) -> Tensor:
    """Rotations of neighbouring pairs as complex numbers [T, dim / 2]."""
    base, step = (10000.0, 1 / ratio) if divide else (10000.0 * ratio, 1.0)
    theta = base ** -(torch.arange(0, dim, 2).double() / dim)
    angles = torch.outer(torch.arange(length).double() * step, theta)
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    """The first half of every head [T, heads, width] rotated, the second as it is."""
    half = x.shape[-1] // 2
    pairs = torch.view_as_complex(x[..., :half].reshape(*x.shape[:-1], half // 2, 2).contiguous())
    return torch.cat([torch.view_as_real(pairs * turns[:, None]).flatten(-2), x[..., half:]], -1)


def _norm(x: Tensor, weight: Tensor, config: dict[str, Any]) -> Tensor:
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config["layernorm_epsilon"])
