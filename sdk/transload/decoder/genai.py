"""genai_config.json: what onnxruntime-genai, and anyone else who generates with the graph, has to know about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transload.decoder.shape import DecoderShape

_TYPES = {"glm": "chatglm", "glm4": "chatglm"}  # names of architectures in onnxruntime-genai, where they differ


def genai_config(shape: DecoderShape, config: Mapping[str, Any], generation: Mapping[str, Any]) -> dict[str, object]:
    """config: config.json. generation: generation_config.json, {} where there is none; its end tokens win."""

    def token(name: str) -> Any:
        return generation.get(name, config.get(name))

    ends = token("eos_token_id")
    pad = token("pad_token_id")
    first_end = ends[0] if isinstance(ends, list) else ends
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": "model.onnx",
        "head_size": shape.head_dim,
        "hidden_size": shape.hidden,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
    }
    model = {
        "bos_token_id": token("bos_token_id"),
        "context_length": shape.context,
        "decoder": decoder,
        "eos_token_id": ends,
        "pad_token_id": first_end if pad is None else pad,
        "type": _TYPES.get(shape.model_type, shape.model_type),
        "vocab_size": shape.vocabulary,
    }
    search = {"do_sample": False, "max_length": shape.context, "past_present_share_buffer": False}
    return {"model": {k: v for k, v in model.items() if v is not None}, "search": search}
