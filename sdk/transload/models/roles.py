"""Which modules of a model keep their float weights when the rest is quantized, and why.

The answer is read from the module's name alone, so that planning and porting can ask without building a model.
Quantizers agree on these: a router decides which expert runs, so a small error there changes the whole layer; vision
and audio towers and their projectors are small, run once per picture and lose visibly; the gates of linear attention
are small and act on every later token; an indexer decides what attention sees; draft layers only guess, and engines
load them in 16 bits; heads and embeddings are the ends of the model, where errors are not averaged out.
"""

from __future__ import annotations

import re

# One component of a dotted name, whole. "gate" is a router; "gate_proj" is an ordinary linear and does not match.
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate", "moe_gate", "weights_proj"})
_TOWERS = frozenset(
    {
        "visual", "vision_tower", "vision_model", "vision_encoder", "vision_embed_tokens", "vision_backbone",
        "vit", "vpm", "image_encoder", "image_newline", "audio_tower", "audio_model", "audio_encoder",
        "speech_encoder", "sam_model", "clip_model",
    }
)  # fmt: skip
_PROJECTORS = frozenset(
    {
        "multi_modal_projector", "mm_projector", "vision_projection", "vision_projector", "embed_vision",
        "embed_audio", "audio_projector", "merger", "patch_merger", "connector", "aligner", "resampler", "attn_pool",
        "projector",
    }
)  # fmt: skip
# Projections of linear attention that set its decay and gates, and its short convolution.
_GATES = frozenset(
    {
        "in_proj_ba", "in_proj_a", "in_proj_b", "b_proj", "f_proj", "f_a_proj", "f_b_proj", "g_proj", "g_a_proj",
        "g_b_proj", "conv1d", "q_conv1d", "k_conv1d", "v_conv1d",
    }
)  # fmt: skip
_INDEXERS = frozenset({"indexer"})
_DRAFTS = frozenset({"mtp", "nextn", "eh_proj", "shared_head"})
_ABSORBED = frozenset({"kv_b_proj"})  # engines multiply it into queries and outputs after loading
_HEADS = frozenset({"lm_head", "embed_out", "score", "classifier", "qa_outputs", "output_layer"})
_EMBEDDINGS = frozenset({"embed_tokens", "wte", "tok_embeddings", "word_embeddings"})

_REASONS: tuple[tuple[str, frozenset[str]], ...] = (
    ("vision or audio tower", _TOWERS),
    ("projector between modalities", _PROJECTORS),
    ("router", _ROUTERS),
    ("gate of linear attention", _GATES),
    ("indexer of sparse attention", _INDEXERS),
    ("multi-token prediction", _DRAFTS),
    ("absorbed into latent attention", _ABSORBED),
    ("output head", _HEADS),
    ("embedding", _EMBEDDINGS),
)


def kept_in_float(name: str, heads: bool = True) -> str | None:
    """Why the module `name` keeps float weights by default, or None when it may be quantized.

    heads: False to let the output head and the embedding be quantized too.

    >>> kept_in_float("model.layers.0.mlp.gate")
    'router'
    >>> kept_in_float("model.layers.0.mlp.gate_proj") is None
    True
    """
    parts = frozenset(name.split("."))
    for reason, names in _REASONS:
        if not parts.isdisjoint(names) and (heads or names not in (_HEADS, _EMBEDDINGS)):
            return reason
    return None


def skipped(name: str, patterns: tuple[str, ...]) -> str | None:
    """The pattern of a skip list that covers module `name`, or None.

    A pattern is a dotted name or a run of whole components of one ("lm_head", "layers.0", "model.layers.3.mlp"), or a
    regular expression for the whole name after "re:" (the spelling of compressed-tensors' ignore lists).
    """
    for pattern in patterns:
        if pattern.startswith("re:"):
            if re.match(pattern.removeprefix("re:"), name):
                return pattern
        elif f".{pattern}." in f".{name}.":
            return pattern
    return None


# Components that say what a linear is for, in the order in which they are asked: experts lie inside an mlp.
_ROLES: tuple[tuple[str, frozenset[str]], ...] = (
    ("shared_experts", frozenset({"shared_experts", "shared_expert", "shared_mlp"})),
    ("experts", frozenset({"experts"})),
    ("attention", frozenset({"self_attn", "attn", "attention", "self_attention", "linear_attn", "cross_attn"})),
    ("mlp", frozenset({"mlp", "feed_forward", "ffn", "block_sparse_moe"})),
)
_ROLE_OF_KEPT = {
    "vision or audio tower": "tower",
    "projector between modalities": "projector",
    "router": "router",
    "output head": "lm_head",
    "embedding": "embedding",
}
ROLES: tuple[str, ...] = (*(role for role, _ in _ROLES), *_ROLE_OF_KEPT.values())


def role_of(name: str) -> str | None:
    """What the module `name` is for: one of ROLES, or None where its name says nothing.

    >>> role_of("model.layers.3.mlp.experts.17.down_proj"), role_of("model.layers.0.mlp.down_proj")
    ('experts', 'mlp')
    """
    kept = kept_in_float(name)
    if kept in _ROLE_OF_KEPT:
        return _ROLE_OF_KEPT[kept]
    parts = frozenset(name.split("."))
    return next((role for role, names in _ROLES if not parts.isdisjoint(names)), None)
