"""Names, metadata and rotary factors of the writing direction: the inverse of reading, and the gguf package's own."""

from __future__ import annotations

from typing import Any

import gguf
import pytest
from gguf_model import CASES, Case, build

import transload
from transload.errors import ConfigError, Unsupported
from transload.headers import read_gguf_header
from transload.models.gguf_config import hf_config
from transload.models.gguf_llama3 import llama3_factors, llama3_scaling
from transload.models.gguf_metadata import add_config, rope_factors
from transload.models.gguf_names import parts
from transload.models.gguf_places import WRITTEN, architecture_for, place_of

CASES_WRITTEN = [case for case in CASES if case.model_type in WRITTEN]
LLAMA = {
    "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320,
    "num_hidden_layers": 2, "intermediate_size": 96, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def keys(arch: str, config: dict[str, Any]) -> dict[str, Any]:
    writer = gguf.GGUFWriter(None, arch)
    add_config(writer, arch, config)
    return {key: value.value for key, value in writer.kv_data[0].items()}


@pytest.mark.parametrize("case", CASES_WRITTEN, ids=lambda c: c.arch)
def test_every_tensor_goes_back_to_the_name_it_was_read_from(case: Case, tmp_path: Any) -> None:
    build(case, tmp_path / "m.gguf")
    header = read_gguf_header(tmp_path / "m.gguf")
    config = transload.open(tmp_path / "m.gguf").config
    assert architecture_for(config) == case.arch
    for info in header.tensors.values():
        for part in parts(header.metadata, info.name, info.shape):
            name = part.name.replace(".experts.", ".experts.3.")
            place = place_of(case.arch, config, name)
            assert place is not None, name
            assert place.name == info.name
            assert (place.expert, place.heads, place.column) == (
                3 if name != part.name else None, part.heads, part.column,
            )  # fmt: skip
            assert info.dtype == "F32" or not place.single


@pytest.mark.parametrize("case", CASES_WRITTEN, ids=lambda c: c.arch)
def test_metadata_says_what_the_config_says(case: Case, tmp_path: Any) -> None:
    build(case, tmp_path / "m.gguf")
    source = transload.open(tmp_path / "m.gguf")
    header = read_gguf_header(tmp_path / "m.gguf")
    metadata = dict(header.metadata) | keys(case.arch, source.config)
    assert hf_config(metadata, header.tensors) == source.config


def test_names_without_a_place_are_told_apart() -> None:
    assert place_of("llama", LLAMA, "model.vision.blocks.0.weight") is None
    assert place_of("llama", LLAMA, "model.layers.0.self_attn.q_norm.weight") is None
    assert place_of("llama", LLAMA, "model.layers.0.self_attn.q_proj.g_idx") is None


def test_unknown_models_are_refused_with_the_known_ones() -> None:
    with pytest.raises(Unsupported, match=r"model_type 'gpt_neox': written are llama, .*glm4_moe"):
        architecture_for({"model_type": "gpt_neox"})


@pytest.mark.parametrize(
    ("arch", "fields", "says"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window is 'True'"),
        ("qwen3moe", {"norm_topk_prob": False}, "norm_topk_prob is 'False'"),
        ("qwen3moe", {"norm_topk_prob": True, "mlp_only_layers": [0]}, "mlp_only_layers"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling 'dynamic'"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(arch: str, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(Unsupported, match=says):
        keys(arch, LLAMA | fields)


def test_a_missing_dimension_is_named() -> None:
    with pytest.raises(ConfigError, match="num_hidden_layers"):
        keys("llama", {k: v for k, v in LLAMA.items() if k != "num_hidden_layers"})


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_rotary_settings_are_found_where_both_generations_of_configs_keep_them(place: str) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 5e5}
    found = keys("llama", LLAMA | {place: yarn} | ({"rope_theta": 5e5} if place == "rope_scaling" else {}))
    assert found["llama.rope.freq_base"] == 5e5
    assert found["llama.rope.scaling.type"] == "yarn"
    assert found["llama.rope.scaling.factor"] == 4.0
    assert found["llama.rope.scaling.original_context_length"] == 64


def test_llama3s_factors_are_read_back_as_their_rule() -> None:
    config = LLAMA | {"rope_scaling": LLAMA3, "rope_theta": 500000.0, "head_dim": 128}
    factors = rope_factors("llama", config)
    assert len(factors) == 64
    assert llama3_scaling(factors, 500000.0) == {"rope_scaling": LLAMA3}
    assert rope_factors("llama", LLAMA) == []
    with pytest.raises(Unsupported, match="only Llama's own bounds"):
        llama3_factors(LLAMA3 | {"low_freq_factor": 2.0}, 500000.0, 64)
