"""Tiny random models of several architectures, made by transformers' own configuration classes."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel


def _llama(**more: object) -> PreTrainedModel:
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, **more,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def _qwen2() -> PreTrainedModel:
    config = transformers.Qwen2Config(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.Qwen2ForCausalLM(config)


def _qwen3_moe() -> PreTrainedModel:
    config = transformers.Qwen3MoeConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=5, num_experts_per_tok=2,
        decoder_sparse_step=1, mlp_only_layers=[1], max_position_embeddings=64,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config)


def _glm4_moe() -> PreTrainedModel:
    config = transformers.Glm4MoeConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, n_routed_experts=6, num_experts_per_tok=2,
        n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.Glm4MoeForCausalLM(config)


def _qwen2_5_vl() -> PreTrainedModel:
    text = {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "rope_scaling": {"type": "default", "mrope_section": [2, 3, 3], "rope_type": "default"},
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
        "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16,
        "fullatt_block_indexes": [1],
    }  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=90, video_token_id=91, vision_start_token_id=92,
        vision_end_token_id=93,
    )  # fmt: skip
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


MODELS = {
    "llama": _llama,
    "qwen2-tied": _qwen2,
    "qwen3-moe": _qwen3_moe,
    "glm4-moe": _glm4_moe,
    "qwen2.5-vl": _qwen2_5_vl,
}


def make(name: str, folder: Path, seed: int = 0) -> PreTrainedModel:
    """A float32 model saved in `folder`; weights large enough that a wrong layer shows in the logits."""
    torch.manual_seed(seed)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    return model


def inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Two short rows of tokens, with one small picture each where the model takes pictures."""
    torch.manual_seed(1)
    ids = torch.randint(0, 80, (2, 12))
    if not hasattr(model.config, "vision_config"):
        return {"input_ids": ids}
    grid = torch.tensor([[1, 4, 4], [1, 4, 4]])
    ids[:, 2], ids[:, 3:7], ids[:, 7] = 92, 90, 93
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(32, 3 * 2 * 4 * 4),
        "image_grid_thw": grid,
        "mm_token_type_ids": (ids == 90).long(),
    }


def logits(model: PreTrainedModel) -> torch.Tensor:
    """The logits of `inputs`, float32."""
    with torch.no_grad():
        return model(**inputs(model)).logits.float()


def with_weights_of(quantized: PreTrainedModel, reference: PreTrainedModel) -> PreTrainedModel:
    """`reference` with every quantized weight replaced by its dequantized numbers: what W4A16 must compute."""
    from transload.runtime.standins import Quantized

    with torch.no_grad():
        for name, module in quantized.named_modules():
            if isinstance(module, Quantized):
                members = ("weight",) if hasattr(module, "tied") else ("gate_up_proj", "down_proj")
                for member in members:
                    parameter = reference.get_parameter(f"{name}.{member}")
                    parameter.copy_(module.qtensor(member).dequantize())
    return reference


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative error ||a - b|| / ||b||."""
    return float((a - b).norm() / b.norm())
