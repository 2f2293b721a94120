"""From llama.cpp's tensor names to Hugging Face's, per architecture, and what llama.cpp did to the rows on the way.

Most tensors are renamed and nothing else. Three things need more: llama-family q and k, whose rows llama.cpp
interleaves for its rotary embedding; ChatGLM's fused q, k, v, which transformers keeps apart; and expert stacks, which
stay one tensor [E, N, K] here and get one name per expert when they are written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from transload.errors import FormatError, Unsupported
from transload.headers.info import shown

Metadata = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Part:
    """A Hugging Face tensor inside a GGUF tensor.

    rows: the stored rows it takes, None for all. heads: above 0, every head's rows are interleaved (first and second
    half in turn) and must be put back. column: a vector that Hugging Face stores as [1, K].
    """

    name: str  # full name, "model.layers.0.self_attn.q_proj.weight"
    rows: tuple[int, int] | None = None
    heads: int = 0
    column: bool = False


TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_MLP = {
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FUSED_MLP = {"ffn_norm": "post_attention_layernorm", "ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"}
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}
_MIXTRAL_EXPERTS = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.w1",
    "ffn_up_exps": "block_sparse_moe.experts.w3",
    "ffn_down_exps": "block_sparse_moe.experts.w2",
}
_SHARED_EXPERT = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_SHARED_EXPERTS = {
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
_MLA = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_output": "self_attn.o_proj",
}
_INDEXER = {
    "indexer.k_norm": "self_attn.indexer.k_norm",
    "indexer.proj": "self_attn.indexer.weights_proj",
    "indexer.attn_k": "self_attn.indexer.wk",
    "indexer.attn_q_b": "self_attn.indexer.wq_b",
}
_NEXTN = {
    "nextn.eh_proj": "eh_proj",
    "nextn.enorm": "enorm",
    "nextn.hnorm": "hnorm",
    "nextn.embed_tokens": "embed_tokens",
    "nextn.shared_head_head": "shared_head.head",
    "nextn.shared_head_norm": "shared_head.norm",
}

# Inside a layer, without ".weight" and ".bias". Checked against transformers' models in the tests.
LAYERS: dict[str, dict[str, str]] = {
    "llama": _ATTENTION | _MLP | _MIXTRAL_EXPERTS,
    "qwen2": _ATTENTION | _MLP,
    "qwen2moe": _ATTENTION | _MLP | _EXPERTS | _SHARED_EXPERT,
    "qwen3": _ATTENTION | _QK_NORM | _MLP,
    "qwen3moe": _ATTENTION | _QK_NORM | _MLP | _EXPERTS,
    "chatglm": _ATTENTION | _FUSED_MLP,
    "glm4": _ATTENTION
    | _FUSED_MLP
    | {"post_attention_norm": "post_self_attn_layernorm", "post_ffw_norm": "post_mlp_layernorm"},
    "glm4moe": _ATTENTION
    | _QK_NORM
    | _MLP
    | _EXPERTS
    | _SHARED_EXPERTS
    | _NEXTN
    | {"post_attention_norm": "post_attention_layernorm"},
    "deepseek2": _MLA | _MLP | _EXPERTS | _SHARED_EXPERTS,
    "glm-dsa": _MLA | _MLP | _EXPERTS | _SHARED_EXPERTS | _INDEXER | _NEXTN,
    "minimax-m2": _ATTENTION | _QK_NORM | _MLP | _MIXTRAL_EXPERTS,
}

ARCHITECTURES = tuple(LAYERS)

# The router's correction bias has a name of its own; in GGUF it ends in ".bias".
_ROUTER_BIAS = {"minimax-m2": "block_sparse_moe.e_score_correction_bias"}
_DEFAULT_ROUTER_BIAS = "mlp.gate.e_score_correction_bias"

_BLOCK = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")
_OUTER = re.compile(r"([a-z_]+)\.(weight|bias)")
_NOT_WEIGHTS = {"rope_freqs", "attn_rot_embd"}  # factors that a config says in other words


def architecture_of(metadata: Metadata) -> str:
    """The architecture that a GGUF file states. Raises Unsupported when its names are not known here."""
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in LAYERS:
        raise Unsupported(f"GGUF architecture {shown(name)}: known ones are {', '.join(ARCHITECTURES)}")
    return name


def parts(metadata: Metadata, name: str, shape: tuple[int, ...]) -> tuple[Part, ...]:
    """The Hugging Face tensors inside the GGUF tensor `name`; none for rotary factors.

    shape is in torch's order. Raises FormatError for names that the architecture does not have.
    """
    arch = architecture_of(metadata)
    if outer := _OUTER.fullmatch(name):
        stem, suffix = outer.groups()
        if stem in _NOT_WEIGHTS:
            return ()
        if stem in TOP:
            return (Part(f"{TOP[stem]}.{suffix}"),)
    if block := _BLOCK.fullmatch(name):
        layer, stem, suffix = block.groups()
        if stem in _NOT_WEIGHTS:
            return ()
        prefix = f"model.layers.{layer}."
        if stem == "exp_probs_b":
            return (Part(prefix + router_bias(arch)),)
        if stem == "attn_qkv" and arch in ("chatglm", "glm4"):
            return _split_qkv(metadata, prefix + "self_attn.", suffix, shape)
        if stem in LAYERS[arch]:
            heads = _interleaved_heads(metadata, arch, stem)
            column = stem == "ffn_gate_inp_shexp" and len(shape) == 1
            return (Part(f"{prefix}{LAYERS[arch][stem]}.{suffix}", heads=heads, column=column),)
    raise FormatError(f"tensor {shown(name)} does not belong to GGUF architecture '{arch}'")


def router_bias(arch: str) -> str:
    """Hugging Face's name, inside a layer, of the router's correction bias."""
    return _ROUTER_BIAS.get(arch, _DEFAULT_ROUTER_BIAS)


def number(metadata: Metadata, key: str, default: int | None = None) -> int:
    """The integer `<architecture>.<key>` of the metadata. Raises FormatError when it is missing or no integer."""
    full = f"{metadata.get('general.architecture')}.{key}"
    value = metadata.get(full, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 31:
        raise FormatError(f"metadata {full} is {shown(value)}, expected a whole number below 2**31")
    return value


def _interleaved_heads(metadata: Metadata, arch: str, stem: str) -> int:
    """Only llama.cpp's `llama` architecture (Llama, Mistral, Mixtral) reorders q and k."""
    if arch != "llama" or stem not in ("attn_q", "attn_k"):
        return 0
    heads = number(metadata, "attention.head_count")
    return heads if stem == "attn_q" else number(metadata, "attention.head_count_kv", heads)


def _split_qkv(metadata: Metadata, prefix: str, suffix: str, shape: tuple[int, ...]) -> tuple[Part, ...]:
    heads = number(metadata, "attention.head_count")
    kv_heads = number(metadata, "attention.head_count_kv", heads)
    rows, total = shape[0], heads + 2 * kv_heads
    if total == 0 or rows % total:
        raise FormatError(f"{rows} fused q, k, v rows do not divide into {heads} + 2 x {kv_heads} heads")
    size = rows // total
    edges = (0, heads * size, (heads + kv_heads) * size, rows)
    return tuple(
        Part(f"{prefix}{member}_proj.{suffix}", rows=(edges[i], edges[i + 1])) for i, member in enumerate("qkv")
    )
