"""Recipes from other tools' configurations, where they mean the same here; anything else is refused by name.

llm-compressor: the recipe.yaml of a oneshot run (GPTQModifier, AWQModifier, QuantizationModifier, SmoothQuantModifier).
GPTQModel: quantize_config.json, or a dict of the arguments of QuantizeConfig.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from transload.errors import ConfigError, Unsupported
from transload.quantize.recipe import Recipe

_PRESETS = {
    "W4A16": "int4-g128", "W4A16_ASYM": "int4-g128-asym", "W8A16": "int8-channel", "W8A8": "int8-channel-a8",
    "INT8": "int8-channel-a8",
}  # fmt: skip
_METHODS = {"GPTQModifier": "gptq", "AWQModifier": "awq", "QuantizationModifier": "rtn"}
# What does not change the numbers, or says how a run was carried out.
_IGNORED = {
    "sequential_targets", "offload_hessians", "block_size", "bypass_divisibility_checks", "sequential_update",
    "version", "targets", "ignore", "scheme", "config_groups", "dampening_frac", "actorder", "n_grid", "duo_scaling",
    "mappings", "smoothing_strength", "kv_cache_scheme", "max_iterations", "num_calibration_steps",
}  # fmt: skip


def import_recipe(source: str | Path | Mapping[str, Any], name: str = "imported") -> Recipe:
    """The recipe that says the same as another tool's configuration, a file or its contents.

    Raises ConfigError for a file that is neither tool's, Unsupported for settings that have no counterpart here.
    """
    value = source if isinstance(source, Mapping) else _read(Path(source))
    if "bits" in value or "w_bit" in value:
        return _gptqmodel(value, name)
    modifiers = list(_modifiers(value))
    if not modifiers:
        raise ConfigError("neither a recipe of llm-compressor (no modifiers) nor of GPTQModel (no bits)")
    return _llm_compressor(modifiers, name)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as e:
        raise ConfigError(f"{path}: cannot be read: {' '.join(str(e).split())[:200]}") from e
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a mapping")
    inner = value.get("quantization_config")
    return inner if isinstance(inner, dict) else value


def _gptqmodel(value: Mapping[str, Any], name: str) -> Recipe:
    bits, group = int(value.get("bits", value.get("w_bit", 4))), int(value.get("group_size", 128))
    if value.get("desc_act") and not value.get("act_group_aware") and not value.get("static_groups"):
        raise Unsupported("desc_act: true makes a g_idx; here act_order stays inside groups (act_group_aware)")
    if any(value.get(key) for key in ("rotation", "v2", "gptaq", "adapter")):
        raise Unsupported("rotation, gptaq and adapters of GPTQModel have no counterpart with the same numbers here")
    method = str(value.get("quant_method", value.get("method", "gptq")))
    if method not in ("gptq", "awq"):
        raise Unsupported(f"quant_method '{method}': gptq and awq are imported")
    asym = "" if value.get("sym", not value.get("zero_point", False)) else "-asym"
    size = "channel" if group == -1 else f"g{group}"
    rules: list[dict[str, Any]] = []
    for pattern, changes in dict(value.get("dynamic") or {}).items():
        skip = pattern.startswith("-:") or changes is False
        regex = "re:" + pattern.removeprefix("-:").removeprefix("+:")
        own = {} if skip or not isinstance(changes, dict) else changes
        if own.keys() - {"bits", "group_size"}:
            raise Unsupported(f"dynamic '{pattern}': only bits and group_size are imported")
        width, wide = own.get("bits", bits), own.get("group_size", group)
        scheme = "float" if skip else f"int{width}-{'channel' if wide == -1 else f'g{wide}'}{asym}"
        rules.append({"modules": [regex], "scheme": scheme, "method": method, "optional": True})
    rules.append({"modules": ["*"], "scheme": f"int{bits}-{size}{asym}", "method": method})
    more = {"damping": float(value["damp_percent"])} if value.get("damp_percent") else {}
    order = bool(value.get("act_group_aware", value.get("desc_act", False)))
    return Recipe.model_validate({"name": name, "rules": rules, "act_order": order, **more})


def _modifiers(value: object) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Modifiers by class name, at any depth of stages."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if isinstance(key, str) and key.endswith("Modifier") and isinstance(inner, Mapping):
                yield key, inner
            else:
                yield from _modifiers(inner)


def _llm_compressor(modifiers: list[tuple[str, Mapping[str, Any]]], name: str) -> Recipe:
    rules: list[dict[str, Any]] = []
    more: dict[str, Any] = {}
    for kind, settings in modifiers:
        unknown = settings.keys() - _IGNORED
        if unknown or settings.get("kv_cache_scheme"):
            raise Unsupported(f"{kind}: {', '.join(sorted(unknown)) or 'kv_cache_scheme'} has no counterpart here")
        if kind == "SmoothQuantModifier":
            more["smooth"] = float(settings.get("smoothing_strength", 0.5))
            continue
        if kind not in _METHODS:
            raise Unsupported(f"{kind}: there are {', '.join(_METHODS)} and SmoothQuantModifier")
        if "dampening_frac" in settings:
            more["damping"] = float(settings["dampening_frac"])
        if kind == "GPTQModifier":
            more["act_order"] = settings.get("actorder", "static") is not None
            if settings.get("actorder") in ("group", "dynamic"):
                raise Unsupported("actorder: group makes a g_idx; here act_order stays inside groups")
        ignored = [i for i in settings.get("ignore") or () if i != "lm_head"]
        if ignored:
            rules.append({"modules": ignored, "scheme": "float", "optional": True})
        rules += _groups(settings, _METHODS[kind])
    return Recipe.model_validate({"name": name, "rules": rules, **more})


def _groups(settings: Mapping[str, Any], method: str) -> Iterator[dict[str, Any]]:
    groups = settings.get("config_groups")
    if groups is None:
        scheme = str(settings.get("scheme", ""))
        if scheme not in _PRESETS:
            raise Unsupported(f"scheme '{scheme}': {', '.join(_PRESETS)} are imported, and config_groups of integers")
        yield _rule(settings.get("targets", "Linear"), _PRESETS[scheme], method)
        return
    for group in groups.values():
        yield _rule(group.get("targets", "Linear"), _scheme(group), method)


def _rule(targets: object, scheme: str, method: str) -> dict[str, Any]:
    named = [targets] if isinstance(targets, str) else list(targets) if isinstance(targets, list) else []
    return {"modules": ["*" if t == "Linear" else t for t in named], "scheme": scheme, "method": method}


def _scheme(group: Mapping[str, Any]) -> str:
    """The text of a config group. Raises Unsupported for floats, blocks and static activations."""
    weights, acts = group.get("weights") or {}, group.get("input_activations")
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "channel")
    if weights.get("type", "int") != "int" or strategy not in ("group", "channel"):
        raise Unsupported(f"weights of type {weights.get('type')} per {strategy}: integers per group or channel are")
    text = f"int{weights.get('num_bits', 8)}-" + ("channel" if strategy == "channel" else f"g{weights['group_size']}")
    text += "" if weights.get("symmetric", True) else "-asym"
    if acts is None:
        return text
    dynamic = acts.get("dynamic") is True and acts.get("num_bits") == 8 and acts.get("type", "int") == "int"
    if not dynamic or acts.get("strategy", "token") != "token" or not acts.get("symmetric", True):
        raise Unsupported("input_activations: only dynamic symmetric int8 per token is imported")
    return text + "-a8"
