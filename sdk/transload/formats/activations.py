"""What a checkpoint says about activations and the cache beside its weights, and no entry holds: named, never silent.

A QuantSpec knows int8 activations. FP8 ones, their calibrated scales, and the scheme of the cache of keys and values
are the engine's to use; a report says what became of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from transload.formats import stored
from transload.formats.base import Entry, Json, Source

_CALIBRATED = frozenset({"input_scale", "input_offset", "input_global_scale", "quant_bias", "deq_scale"})
_CACHE = (".k_scale", ".v_scale", ".q_scale", ".k_proj.output_scale", ".v_proj.output_scale")
_CACHE_FIELDS = ("kv_cache_scheme", "kv_cache_quant_algo", "kv_cache_dtype")
_FILES = ("hf_quant_config.json",)


def activation_notes(source: Source, entries: Iterable[Entry]) -> Iterator[str]:
    """Sentences about activations and caches that the entries do not hold."""
    config = _declared(source)
    if _float_activations(config):
        yield (
            "the source multiplies with FP8 activations; targets here take int8 or 16-bit ones, and get 16-bit unless "
            "activations are asked for"
        )
    used = [name for e in entries if e.spec is not None for name in e.tensors]
    left = [name for name in used if name.rpartition(".")[2] in _CALIBRATED]
    if left:
        parts = ", ".join(sorted({name.rpartition(".")[2] for name in left}))
        count = f"{len(left)} tensor{'s' if len(left) > 1 else ''}"
        yield f"static activation scales are read with their weights and not carried: {count} ({parts})"
    scheme = next((config[field] for field in _CACHE_FIELDS if config.get(field)), None)
    scales = sum(name.endswith(_CACHE) for name in source.infos)
    if scheme is not None or scales:
        yield (
            f"the cache of keys and values is quantized ({_cache(scheme)}, {scales} scales): a target in "
            "compressed-tensors keeps a kv_cache_scheme; with others, tell the engine (vllm serve --kv-cache-dtype fp8)"
        )


def keep_cache_scheme(source: Mapping[str, object], target: Json) -> None:
    """Gives a compressed-tensors config.json the kv_cache_scheme of a compressed-tensors source, in place."""
    ours, theirs = (_quantization(config) for config in (source, target))
    if ours.get("kv_cache_scheme") and theirs.get("quant_method") == ours.get("quant_method") == "compressed-tensors":
        theirs["kv_cache_scheme"] = ours["kv_cache_scheme"]


def _declared(source: Source) -> Json:
    """The quantization configuration, that of ModelOpt flattened."""
    config = stored.quantization_config(source, *_FILES)
    nested = config.get("quantization")
    return config | nested if isinstance(nested, dict) else config


def _float_activations(config: Json) -> bool:
    if config.get("quant_method") == "fp8" or config.get("quant_algo") in ("FP8", "W4A8_AWQ"):
        return True
    groups = config.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        activations = group.get("input_activations") if isinstance(group, dict) else None
        if isinstance(activations, dict) and activations.get("type") == "float":
            return True
    return False


def _quantization(config: Mapping[str, object]) -> Json:
    for place in (config, config.get("text_config")):
        found = place.get("quantization_config") if isinstance(place, Mapping) else None
        if isinstance(found, dict):
            return found
    return {}


def _cache(scheme: object) -> str:
    if isinstance(scheme, dict):
        return f"{scheme.get('num_bits', 8)}-bit {scheme.get('type', 'float')}"
    return str(scheme)[:20] if isinstance(scheme, str) else "its scheme is not declared"
