"""Which of transformers' classes computes a model, where its configuration alone would mislead."""

from __future__ import annotations

from collections.abc import Mapping

# model_type of a publisher's configuration -> transformers' name for the same layers under the same names.
SAME_MODEL: Mapping[str, str] = {"kimi_k2": "deepseek_v3"}

# Architectures that transformers 5.23 has no class for although it knows a model of their model_type.
_ABSENT: Mapping[str, str] = {
    "BailingMoeV2_5ForCausalLM": (
        "transformers has no class for Ring-2.5 and Ling-2.5 (BailingMoeV2_5ForCausalLM, lightning attention); its "
        "'bailing_hybrid' computes their successor. Porting and planning work; vLLM runs the model"
    ),
}
_QUANTIZATION = ("quantization_config", "compression_config")


def not_in_transformers(config: Mapping[str, object]) -> str | None:
    """Why no class of transformers computes the model of a config.json, in a sentence; else None."""
    named = config.get("architectures")
    return next((_ABSENT[a] for a in named if a in _ABSENT), None) if isinstance(named, list) else None


def without_quantization(config: Mapping[str, object]) -> dict[str, object]:
    """A config.json without its quantization, also inside text_config, which is read here and not by transformers."""
    clean = {name: value for name, value in config.items() if name not in _QUANTIZATION}
    inner = clean.get("text_config")
    if isinstance(inner, Mapping):
        clean["text_config"] = {name: value for name, value in inner.items() if name not in _QUANTIZATION}
    return clean
