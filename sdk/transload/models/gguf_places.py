"""Where llama.cpp keeps a Hugging Face tensor: the inverse of `gguf_names`, for the architectures that are written.

q, k and v stay apart also where llama.cpp's own converter once fused them: its loaders take both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from transload.errors import Unsupported
from transload.headers.info import shown
from transload.models.fields import Fields
from transload.models.gguf_names import LAYERS, TOP, router_bias

# model_type -> architecture. Left out are those whose kv_b_proj llama.cpp splits and transposes (DeepSeek, GLM-5).
WRITTEN: Mapping[str, str] = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "glm": "chatglm",
    "glm4": "glm4",
    "glm4_moe": "glm4moe",
    "minimax_m2": "minimax-m2",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+?)(?:\.(weight|bias))?")
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(.+)")
_OUTER = {ours: theirs for theirs, ours in TOP.items()}
_ROUTERS = ("ffn_gate_inp", "ffn_gate_inp_shexp")


@dataclass(frozen=True, slots=True)
class Place:
    """The GGUF tensor that holds a Hugging Face tensor.

    expert: its place in a stack, None for a tensor of its own. heads: above 0, the halves of every head are stored in
    turn, row by row. column: stored as a vector, where Hugging Face has [1, K]. single: llama.cpp wants float32.
    """

    name: str  # "blk.0.attn_q.weight"
    expert: int | None = None
    heads: int = 0
    column: bool = False
    single: bool = False


def architecture_for(config: Mapping[str, object]) -> str:
    """llama.cpp's architecture for a config.json. Raises Unsupported listing the model types that are written."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in WRITTEN:
        way = "; with layout 'native' this is 'glm'" if kind == "chatglm" else ""
        raise Unsupported(f"no GGUF is written for model_type {shown(kind)}: written are {', '.join(WRITTEN)}{way}")
    return WRITTEN[kind]


def place_of(arch: str, config: Mapping[str, object], name: str) -> Place | None:
    """The place of a Hugging Face tensor by full name; None when the architecture has none for it."""
    stem, _, suffix = name.rpartition(".")
    if stem in _OUTER:
        return Place(f"{_OUTER[stem]}.{suffix}", single=stem == "model.norm")
    match = _LAYER.fullmatch(name)
    if match is None:
        return None
    block, inner = f"blk.{match[1]}.", match[2]
    if inner == router_bias(arch):
        return Place(f"{block}exp_probs_b.bias", single=True)
    expert = _EXPERT.fullmatch(inner)
    if expert is not None:
        inner = f"{expert[1]}.{expert[3]}"
    inside = _inside(arch)
    if inner not in inside or match[3] is None:
        return None
    stored = inside[inner]
    return Place(
        f"{block}{stored}.{match[3]}",
        expert=None if expert is None else int(expert[2]),
        heads=_heads(arch, config, stored),
        column=stored == "ffn_gate_inp_shexp",
        single=stored in _ROUTERS or stored.endswith("norm") or match[3] == "bias",
    )


@cache
def _inside(arch: str) -> dict[str, str]:
    """Hugging Face's name inside a layer -> llama.cpp's; of two names for one tensor the later one is the newer."""
    return {ours: theirs for theirs, ours in LAYERS[arch].items()}


def _heads(arch: str, config: Mapping[str, object], stored: str) -> int:
    """Only llama.cpp's `llama` architecture reorders q and k."""
    if arch != "llama" or stored not in ("attn_q", "attn_k"):
        return 0
    fields = Fields(config, "config.json")
    heads = fields.count("num_attention_heads")
    return heads if stored == "attn_q" else fields.count("num_key_value_heads", default=heads)
