"""llama.cpp's metadata for a model whose facts are in a config.json: the inverse of `gguf_config`.

Keys and their types are those of llama.cpp's converter. What the architecture computes in one way only, and the config
wants in another, is refused: a file that loads and answers wrongly is worse than none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transload.errors import Unsupported
from transload.headers.gguf import GgufMetadata
from transload.headers.info import shown
from transload.models.fields import Fields
from transload.models.gguf_config import FAMILIES
from transload.models.gguf_llama3 import llama3_factors

_OF_THE_FILE = ("general.architecture", "general.file_type", "general.alignment", "general.quantization_version")
_SIGMOID = 2  # llama.cpp's number for a sigmoid router
_FLOATS = ("attention.layer_norm_rms_epsilon", "expert_weights_scale", "rope.freq_base")
_NORMALIZES = {"qwen3moe": True, "qwen2moe": False}  # whether llama.cpp renormalizes the chosen experts
_PARTIAL_ROTARY = ("chatglm", "glm4", "glm4moe")


def add_config(writer: Any, arch: str, config: Mapping[str, object]) -> None:
    """Adds everything that llama.cpp reads about a model's dimensions to a gguf.GGUFWriter.

    Raises Unsupported for what the architecture does not compute, ConfigError for missing fields.
    """
    fields = Fields(config, "config.json")
    _check(arch, config)
    for key, value in (_renamed(arch, config) | _derived(arch, fields) | _rope(arch, fields)).items():
        full = f"{arch}.{key}"
        if isinstance(value, bool):
            writer.add_bool(full, value)
        elif isinstance(value, str):
            writer.add_string(full, value)
        elif isinstance(value, float) or key in _FLOATS:
            writer.add_float32(full, float(value))
        else:
            writer.add_uint32(full, value)


def copy_metadata(writer: Any, metadata: GgufMetadata) -> None:
    """Adds the metadata of another GGUF file, except what describes that file and not its model."""
    from gguf import GGUFValueType

    for key in metadata:
        if key in _OF_THE_FILE or key.startswith(("split.", "quantize.")):
            continue
        value = metadata[key]
        kind, element = metadata.types(key)
        if not isinstance(value, list):
            writer.add_key_value(key, value, GGUFValueType(kind))
        elif value:
            writer.add_key_value(key, value, GGUFValueType(kind), GGUFValueType(element))


def rope_factors(arch: str, config: Mapping[str, object]) -> list[float]:
    """Llama 3's rotary factors, which llama.cpp keeps as the tensor `rope_freqs.weight`; [] for other models."""
    scaling = _scaling(config)
    if arch != "llama" or scaling.get("rope_type", scaling.get("type")) != "llama3":
        return []
    fields = Fields(config, "config.json")
    return llama3_factors(scaling, _theta(config), _head_size(fields) // 2)


def _check(arch: str, config: Mapping[str, object]) -> None:
    """What loads and would compute something else. Raises Unsupported."""
    fields = Fields(config, "config.json")
    refused = {
        "hidden_act": fields.text("hidden_act", "silu") != "silu",
        "use_sliding_window": fields.flag("use_sliding_window", default=False),
        "mlp_only_layers": bool(config.get("mlp_only_layers")),
        "decoder_sparse_step": fields.count("decoder_sparse_step", default=1) not in (0, 1),
        "norm_topk_prob": arch in _NORMALIZES and fields.flag("norm_topk_prob", default=False) is not _NORMALIZES[arch],
    }
    for name in (n for n, bad in refused.items() if bad):
        raise Unsupported(
            f"config.json: {name} is {shown(config.get(name))}, and llama.cpp's '{arch}' has no such model"
        )


def _renamed(arch: str, config: Mapping[str, object]) -> dict[str, Any]:
    """Keys that are a config field under another name."""
    family = FAMILIES["mixtral" if config.get("model_type") == "mixtral" else arch]
    found = {key: config.get(name) for key, name in family.every_key().items()}
    return {key: value for key, value in found.items() if isinstance(value, (bool, int, float))}


def _derived(arch: str, fields: Fields) -> dict[str, Any]:
    heads = fields.count("num_attention_heads")
    nextn = fields.count("num_nextn_predict_layers", default=0)
    found: dict[str, Any] = {
        "block_count": fields.count("num_hidden_layers") + nextn,
        "attention.head_count_kv": fields.count("num_key_value_heads", default=0) or heads,
        "vocab_size": fields.count("vocab_size"),
    }
    if fields.values.get("head_dim") is not None:
        found |= {"attention.key_length": _head_size(fields), "attention.value_length": _head_size(fields)}
    if nextn:
        found["nextn_predict_layers"] = nextn
    if arch in ("glm4moe", "minimax-m2"):
        found["expert_gating_func"] = _SIGMOID
    if arch == "minimax-m2":
        found["feed_forward_length"] = fields.count("intermediate_size")  # its loader sizes experts by this key
    return found


def _rope(arch: str, fields: Fields) -> dict[str, Any]:
    found: dict[str, Any] = {"rope.freq_base": _theta(fields.values)}
    if arch in _PARTIAL_ROTARY:
        found["rope.dimension_count"] = int(_head_size(fields) * _partial(fields.values))
    elif arch == "llama":
        found["rope.dimension_count"] = _head_size(fields)
    elif arch == "minimax-m2":
        found["rope.dimension_count"] = fields.count("rotary_dim", default=0) or _head_size(fields) // 2
    scaling = _scaling(fields.values)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind in ("default", "llama3"):
        return found
    factor, original = scaling.get("factor"), scaling.get("original_max_position_embeddings")
    if kind not in ("yarn", "linear") or not isinstance(factor, (int, float)):
        raise Unsupported(f"config.json: rope_scaling {shown(kind)}: linear, yarn and llama3 have a place in GGUF")
    found |= {"rope.scaling.type": kind, "rope.scaling.factor": float(factor)}
    if isinstance(original, int):
        found["rope.scaling.original_context_length"] = original
    return found


def _parameters(config: Mapping[str, object]) -> Mapping[str, object]:
    """Where transformers 5 keeps everything rotary; older files have the fields at the top."""
    found = config.get("rope_parameters")
    return found if isinstance(found, Mapping) else {}


def _scaling(config: Mapping[str, object]) -> Mapping[str, object]:
    found = config.get("rope_scaling")
    return found if isinstance(found, Mapping) else _parameters(config)


def _theta(config: Mapping[str, object]) -> float:
    for where in (config, _parameters(config)):
        value = where.get("rope_theta")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    return 10000.0


def _partial(config: Mapping[str, object]) -> float:
    for where in (config, _parameters(config)):
        value = where.get("partial_rotary_factor")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    return 0.5  # of every GLM


def _head_size(fields: Fields) -> int:
    return fields.count("head_dim", default=0) or fields.count("hidden_size") // fields.count("num_attention_heads")
