"""Recipes from other tools' configurations, where they mean the same here; anything else is refused by name.

llm-compressor: the recipe.yaml of a oneshot run (GPTQModifier, AWQModifier, QuantizationModifier, SmoothQuantModifier).
GPTQModel: quantize_config.json, or a dict of the arguments of QuantizeConfig. Either also from the quantization_config
of a config.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from transload.errors import ConfigError, TransloadError, Unsupported
from transload.quantize.recipe import LARGEST_FILE, Recipe, read_recipe, said

_PRESETS = {
    "W4A16": "int4-g128", "W4A16_ASYM": "int4-g128-asym", "W8A16": "int8-channel", "W8A8": "int8-channel-a8",
    "INT8": "int8-channel-a8", "W4A8": "int4-g128-a8",
}  # fmt: skip
_METHODS = {"GPTQModifier": "gptq", "AWQModifier": "awq", "QuantizationModifier": "rtn"}
_READ = {"targets", "ignore", "scheme", "config_groups", "dampening_frac", "actorder", "smoothing_strength"}
# What does not change the numbers, or says how a run was carried out.
_RUNNING = {
    "sequential_targets", "offload_hessians", "block_size", "bypass_divisibility_checks", "sequential_update",
    "version", "n_grid", "max_iterations", "num_calibration_steps", "batched_quantization", "start", "end", "update",
    "offload_device", "index", "group",
}  # fmt: skip
_OWN_WAY = {
    "mappings": "which linears share a scale is read from the model here",
    "duo_scaling": "AWQ tries both ways of weighing inputs here",
}
# GPTQModel's fields that are read here, or that say how the result is packed.
_PACKING = {
    "bits", "w_bit", "group_size", "q_group_size", "sym", "zero_point", "desc_act", "act_group_aware", "static_groups",
    "dynamic", "lm_head", "damp_percent", "true_sequential", "modules_to_not_convert", "quant_method", "method",
    "checkpoint_format", "format", "pack_dtype", "pack_impl", "version", "meta", "is_marlin_format", "backend",
    "model_name_or_path", "model_file_base_name", "device", "offload_to_disk", "offload_to_disk_path",
}  # fmt: skip
_REFUSED = ("rotation", "v2", "gptaq", "adapter")


@dataclass(frozen=True, slots=True)
class Imported:
    """A recipe, and in sentences what of its source it does not say. origin: whose words it was in, "" for our own."""

    recipe: Recipe
    notes: tuple[str, ...] = ()
    origin: str = ""

    def to_yaml(self) -> str:
        """The recipe as a file of our own; settings at their defaults are left out, but for methods."""
        lines = [f"# from {self.origin}", *(f"# not carried: {note}" for note in self.notes)] if self.origin else []
        value = self.recipe.model_dump(mode="json", exclude_defaults=True)
        for rule, shown in zip(self.recipe.rules, value["rules"], strict=True):
            shown |= {} if rule.spec is None else {"method": rule.method}
        return "".join(f"{line}\n" for line in lines) + yaml.safe_dump(value, sort_keys=False, width=100)


def find_recipe(source: str | Path | Recipe) -> Imported:
    """A recipe by name, of a YAML file of our own, or from another tool's file.

    Raises ConfigError with the names, or with what is wrong; Unsupported for settings without a counterpart.
    """
    if isinstance(source, Recipe) or Path(source).suffix not in (".yaml", ".yml", ".json"):
        return Imported(read_recipe(source))
    if Path(source).suffix == ".json" or list(_modifiers(_read(Path(source)))):
        return imported(source)
    return Imported(read_recipe(source))


def import_recipe(source: str | Path | Mapping[str, Any], name: str = "") -> Recipe:
    """The recipe that says the same as another tool's configuration; see `imported`."""
    return imported(source, name).recipe


def imported(source: str | Path | Mapping[str, Any], name: str = "") -> Imported:
    """The recipe that says the same as another tool's configuration, a file or its contents.

    name: of the recipe, the file's where it is left out.

    Raises ConfigError for a file that is neither tool's, Unsupported for settings that have no counterpart here.
    """
    if isinstance(source, Mapping):
        return _imported(source, name or "imported")
    try:
        return _imported(_read(Path(source)), name or re.sub(r"[^A-Za-z0-9._-]", "-", Path(source).stem))
    except TransloadError as e:
        raise type(e)(str(e) if str(e).startswith(str(source)) else f"{source}: {e}") from e


def _imported(value: Mapping[str, Any], name: str) -> Imported:
    modifiers = list(_modifiers(value))
    try:
        if modifiers:
            return _llm_compressor(modifiers, name)
        if "bits" in value or "w_bit" in value:
            return _gptqmodel(value, name)
        if isinstance(value.get("config_groups"), Mapping):
            found = _llm_compressor(
                [("GPTQModifier", {k: value[k] for k in ("config_groups", "ignore") if k in value})], name
            )
            note = "the file says which schemes there are and not how codes were chosen: gptq"
            return Imported(found.recipe, (*found.notes, note), "a configuration of compressed-tensors")
    except ValidationError as e:
        raise ConfigError(said(e)) from e
    except (TypeError, ValueError, AttributeError, KeyError) as e:
        raise ConfigError(f"a setting has a value of another kind than its tool gives it: {e}") from e
    raise ConfigError("neither a recipe of llm-compressor (no modifiers) nor of GPTQModel (no bits)")


def _read(path: Path) -> Mapping[str, Any]:
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ConfigError(f"{path}: larger than the {LARGEST_FILE} bytes that a recipe may have")
        text = path.read_text(encoding="utf-8")
        value = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as e:
        raise ConfigError(f"{path}: cannot be read: {' '.join(str(e).split())[:200]}") from e
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: a recipe is a mapping with name and rules, or another tool's configuration")
    inner = value.get("quantization_config")
    return inner if isinstance(inner, dict) else value


def _gptqmodel(value: Mapping[str, Any], name: str) -> Imported:
    bits, group = int(value.get("bits", value.get("w_bit", 4))), int(value.get("group_size", 128))
    if value.get("desc_act") and not value.get("act_group_aware") and not value.get("static_groups"):
        raise Unsupported("desc_act: true makes a g_idx; here act_order stays inside groups (act_group_aware)")
    refused = [key for key in _REFUSED if value.get(key)]
    if refused:
        raise Unsupported(f"{', '.join(refused)} of GPTQModel: has no counterpart with the same numbers here")
    if value.get("lm_head"):
        raise Unsupported("lm_head: true quantizes the head, which stays in float here")
    method = str(value.get("quant_method", value.get("method", "gptq")))
    if method not in ("gptq", "awq"):
        raise Unsupported(f"quant_method '{method}': gptq and awq are imported")
    asym = "" if value.get("sym", not value.get("zero_point", False)) else "-asym"
    size = "channel" if group == -1 else f"g{group}"
    rules = [*_dynamic(value, f"int{bits}", size, asym, method)]
    skipped = value.get("modules_to_not_convert")
    if skipped:
        rules.insert(0, {"modules": list(skipped), "scheme": "float", "optional": True})
    rules.append({"modules": ["*"], "scheme": f"int{bits}-{size}{asym}", "method": method})
    more: dict[str, Any] = {"damping": float(value["damp_percent"])} if value.get("damp_percent") else {}
    more |= {"sequential": True} if value.get("true_sequential") and method == "gptq" else {}
    order = bool(value.get("act_group_aware", value.get("desc_act", False)))
    recipe = Recipe.model_validate({"name": name, "rules": rules, "act_order": order, **more})
    unread = sorted(key for key in value.keys() - _PACKING - {*_REFUSED} if value[key])
    notes = [f"{key}: nothing here has this setting" for key in unread]
    return Imported(recipe, tuple(notes), "a configuration of GPTQModel")


def _dynamic(value: Mapping[str, Any], bits: str, size: str, asym: str, method: str) -> Iterator[dict[str, Any]]:
    """Rules of GPTQModel's settings by pattern."""
    for pattern, changes in dict(value.get("dynamic") or {}).items():
        skip = pattern.startswith("-:") or changes is False
        own = {} if skip or not isinstance(changes, dict) else changes
        if own.keys() - {"bits", "group_size"}:
            raise Unsupported(f"dynamic '{pattern}': only bits and group_size are imported")
        width = f"int{own['bits']}" if "bits" in own else bits
        wide = size if "group_size" not in own else "channel" if own["group_size"] == -1 else f"g{own['group_size']}"
        scheme = "float" if skip else f"{width}-{wide}{asym}"
        regex = "re:" + pattern.removeprefix("-:").removeprefix("+:")
        yield {"modules": [regex], "scheme": scheme, "method": method, "optional": True}


def _modifiers(value: object) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Modifiers by class name, at any depth of stages."""
    for inner in value if isinstance(value, list) else ():
        yield from _modifiers(inner)
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if isinstance(key, str) and key.endswith("Modifier") and isinstance(inner, Mapping):
                yield key, inner
            else:
                yield from _modifiers(inner)


def _llm_compressor(modifiers: list[tuple[str, Mapping[str, Any]]], name: str) -> Imported:
    rules: list[dict[str, Any]] = []
    more: dict[str, Any] = {}
    notes: list[str] = []
    for kind, settings in modifiers:
        unknown = settings.keys() - _READ - _RUNNING - _OWN_WAY.keys() - {"kv_cache_scheme"}
        if unknown or settings.get("kv_cache_scheme"):
            raise Unsupported(f"{kind}: {', '.join(sorted(unknown)) or 'kv_cache_scheme'} has no counterpart here")
        notes += [f"{kind}.{key}: {why}" for key, why in _OWN_WAY.items() if settings.get(key)]
        if kind == "SmoothQuantModifier":
            more["smooth"] = float(settings.get("smoothing_strength", 0.5))
            continue
        if kind not in _METHODS:
            raise Unsupported(f"{kind}: there are {', '.join(_METHODS)} and SmoothQuantModifier")
        if kind == "GPTQModifier":
            more["damping"] = float(settings.get("dampening_frac", 0.01))
            more["act_order"] = settings.get("actorder", "static") is not None
            if settings.get("actorder") in ("group", "dynamic"):
                raise Unsupported("actorder: group makes a g_idx; here act_order stays inside groups")
        ignored = [i for i in settings.get("ignore") or () if i not in ("lm_head", "re:.*lm_head")]
        if ignored:
            rules.append({"modules": ignored, "scheme": "float", "optional": True})
        rules += _groups(settings, _METHODS[kind])
    return Imported(
        Recipe.model_validate({"name": name, "rules": rules, **more}), tuple(notes), "a recipe of llm-compressor"
    )


def _groups(settings: Mapping[str, Any], method: str) -> Iterator[dict[str, Any]]:
    groups, scheme = settings.get("config_groups"), settings.get("scheme")
    if isinstance(groups, Mapping):
        # Here the first rule that matches decides, so groups for all linears come last.
        for group in sorted(groups.values(), key=lambda g: "Linear" in _listed(g.get("targets", "Linear"))):
            yield _rule(group.get("targets", "Linear"), *_scheme(group), method)
        return
    if isinstance(scheme, Mapping):
        if not scheme.keys() <= _PRESETS.keys():  # an unnamed group
            yield _rule(settings.get("targets", "Linear"), *_scheme(scheme), method)
            return
        for preset, targets in scheme.items():
            yield _rule(targets, _PRESETS[preset], "dynamic", method)
        return
    if str(scheme) not in _PRESETS:
        raise Unsupported(f"scheme '{scheme}': {', '.join(_PRESETS)} are imported, and config_groups of integers")
    yield _rule(settings.get("targets", "Linear"), _PRESETS[str(scheme)], "dynamic", method)


def _listed(targets: object) -> list[str]:
    return [targets] if isinstance(targets, str) else list(targets) if isinstance(targets, list) else []


def _rule(targets: object, scheme: str, activations: str, method: str) -> dict[str, Any]:
    modules = ["*" if t == "Linear" else t for t in _listed(targets)]
    return {"modules": modules, "scheme": scheme, "method": method, "activations": activations}


def _scheme(group: Mapping[str, Any]) -> tuple[str, str]:
    """The text of a config group, and whether its activations are dynamic or static. Raises Unsupported for floats."""
    weights, acts = group.get("weights") or {}, group.get("input_activations")
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "channel")
    if weights.get("type", "int") != "int" or strategy not in ("group", "channel"):
        raise Unsupported(f"weights of type {weights.get('type')} per {strategy}: integers per group or channel are")
    if weights.get("actorder") in ("group", "dynamic"):
        raise Unsupported("actorder: group makes a g_idx; here act_order stays inside groups")
    text = f"int{weights.get('num_bits', 8)}-" + ("channel" if strategy == "channel" else f"g{weights['group_size']}")
    text += "" if weights.get("symmetric", True) else "-asym"
    if acts is None:
        return text, "dynamic"
    static = acts.get("dynamic") in (False, None)
    whole = acts.get("strategy", "tensor" if static else "token") == ("tensor" if static else "token")
    int8 = acts.get("num_bits") == 8 and acts.get("type", "int") == "int"
    if not (whole and int8 and acts.get("symmetric", True) and acts.get("dynamic") in (True, False, None)):
        raise Unsupported("input_activations: symmetric int8 is imported, dynamic per token or static per tensor")
    return text + "-a8", "static" if static else "dynamic"
