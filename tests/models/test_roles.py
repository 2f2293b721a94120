"""Which modules stay in float, by name."""

from __future__ import annotations

import pytest

from transload.models.roles import kept_in_float, skipped

KEPT = {
    "model.layers.0.mlp.gate": "router",
    "model.layers.0.block_sparse_moe.gate": "router",
    "model.layers.0.mlp.shared_expert_gate": "router",
    "model.layers.3.self_attn.indexer.weights_proj": "router",
    "model.visual.blocks.0.attn.qkv": "vision or audio tower",
    "model.vision_tower.encoder.layers.0.self_attn.q_proj": "vision or audio tower",
    "audio_tower.layers.0.fc1": "vision or audio tower",
    "visual.merger.mlp.0": "vision or audio tower",
    "model.multi_modal_projector.linear_1": "projector between modalities",
    "model.layers.0.linear_attn.in_proj_ba": "gate of linear attention",
    "model.layers.0.linear_attn.in_proj_a": "gate of linear attention",
    "model.layers.0.linear_attn.conv1d": "gate of linear attention",
    "model.layers.0.attention.g_proj": "gate of linear attention",
    "model.layers.3.self_attn.indexer.wq_b": "indexer of sparse attention",
    "model.layers.46.eh_proj": "multi-token prediction",
    "model.layers.46.shared_head.head": "multi-token prediction",
    "mtp.layers.0.self_attn.q_proj": "multi-token prediction",
    "model.layers.0.self_attn.kv_b_proj": "absorbed into latent attention",
    "lm_head": "output head",
    "transformer.output_layer": "output head",
    "model.embed_tokens": "embedding",
}
QUANTIZED = (
    "model.layers.0.mlp.gate_proj",
    "model.layers.0.mlp.experts.17.gate_proj",
    "model.layers.0.mlp.shared_experts.gate_up_proj",
    "model.language_model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.kv_a_proj_with_mqa",
    "model.layers.0.linear_attn.in_proj_qkvz",
    "model.layers.0.linear_attn.out_proj",
)


@pytest.mark.parametrize("name", KEPT)
def test_ends_routers_towers_and_gates_stay_in_float(name: str) -> None:
    assert kept_in_float(name) == KEPT[name]


@pytest.mark.parametrize("name", QUANTIZED)
def test_ordinary_linears_do_not(name: str) -> None:
    assert kept_in_float(name) is None


def test_heads_and_embeddings_may_be_asked_for() -> None:
    assert kept_in_float("lm_head", heads=False) is None
    assert kept_in_float("model.layers.0.mlp.gate", heads=False) == "router"


PATTERNS = [
    ("lm_head", "lm_head", True),
    ("layers.1", "model.layers.1.mlp.up_proj", True),
    ("layers.1", "model.layers.11.mlp.up_proj", False),
    ("proj", "model.layers.1.mlp.up_proj", False),
    (r"re:.*\.k_proj$", "model.layers.1.self_attn.k_proj", True),
    (r"re:k_proj", "model.layers.1.self_attn.k_proj", False),
]


@pytest.mark.parametrize(("pattern", "name", "covers"), PATTERNS)
def test_skip_patterns_cover_whole_name_components(pattern: str, name: str, covers: bool) -> None:
    assert skipped(name, (pattern,)) == (pattern if covers else None)
