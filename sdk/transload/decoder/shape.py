"""The decoder that a config.json describes, as far as the ONNX graph can compute it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transload.errors import Unsupported


@dataclass(frozen=True, slots=True)
class Family:
    """What sets one family's layer apart from Llama's. Weight names are those of transformers."""

    head_norms: bool = False  # q_norm and k_norm over each head
    sandwich: bool = False  # norms after attention and after the MLP too
    fused_gate_up: bool = False
    interleaved_rope: bool = False


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(head_norms=True),
    "glm": Family(fused_gate_up=True, interleaved_rope=True),
    "glm4": Family(sandwich=True, fused_gate_up=True, interleaved_rope=True),
}


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """Sizes of one decoder. inv_freq: float32 [rotary_dim / 2]; rope_scale multiplies sine and cosine."""

    model_type: str
    family: Family
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    eps: float
    inv_freq: Tensor
    rope_scale: float


def decoder_shape(config: Mapping[str, Any], most_positions: int = 32768) -> DecoderShape:
    """Reads config.json. most_positions: of the rotary tables, which are part of the model; the context is cut to it.

    Raises Unsupported for what the graph does not compute: other families, mixtures of experts, sliding windows,
    rotary embeddings that depend on the length of the text.
    """
    from transformers import AutoConfig

    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        raise Unsupported(
            f"an ONNX graph is written for {', '.join(FAMILIES)}, not for '{kind}': port it to another target, or run "
            "it with `transload run`"
        )
    fields = {k: v for k, v in config.items() if k not in ("model_type", "quantization_config", "auto_map")}
    full = AutoConfig.for_model(kind, **fields)
    windows = [t for t in getattr(full, "layer_types", None) or () if t != "full_attention"]
    if windows or (getattr(full, "sliding_window", None) and kind == "mistral"):
        raise Unsupported(f"'{kind}' with sliding windows: the ONNX graph attends to everything")
    if getattr(full, "hidden_act", "silu") != "silu":
        raise Unsupported(f"'{kind}' with activation '{full.hidden_act}': the ONNX graph computes silu")
    head_dim = getattr(full, "head_dim", None) or full.hidden_size // full.num_attention_heads
    inv_freq, scale = _rotary(full, head_dim)
    if len(inv_freq) % 8:
        raise Unsupported(
            f"'{kind}' rotates {2 * len(inv_freq)} of a head's {head_dim} values; onnxruntime's attention needs a "
            "multiple of 16"
        )
    return DecoderShape(
        model_type=kind,
        family=FAMILIES[kind],
        layers=full.num_hidden_layers,
        hidden=full.hidden_size,
        heads=full.num_attention_heads,
        kv_heads=full.num_key_value_heads or full.num_attention_heads,
        head_dim=head_dim,
        vocabulary=full.vocab_size,
        context=min(full.max_position_embeddings, most_positions),
        eps=full.rms_norm_eps,
        inv_freq=inv_freq,
        rope_scale=scale,
    )


def _rotary(config: Any, head_dim: int) -> tuple[Tensor, float]:
    """Frequencies and the factor of sine and cosine, computed by transformers for every kind but the plain one."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters or {}
    kind = rope.get("rope_type", "default")
    if kind == "default":
        dim = int(head_dim * rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0)))
        steps = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
        return 1.0 / (rope["rope_theta"] ** steps), 1.0
    if kind in ("dynamic", "longrope") or kind not in ROPE_INIT_FUNCTIONS:
        raise Unsupported(f"rotary embedding '{kind}': its tables change with the text, and an ONNX graph has one")
    inv_freq, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return inv_freq, float(scale)
