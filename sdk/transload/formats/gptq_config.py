"""The configuration of GPTQ checkpoints: one scheme, and `dynamic` rules for the modules that differ.

A rule is a regular expression that matches the beginning of a module's name: "-:" in front skips the module, "+:" or
nothing overrides fields. The first match wins. Source: GPTQModel 7.7 `QuantizeConfig.dynamic_get`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from transload.errors import FormatError, Unsupported
from transload.formats import stored
from transload.formats.base import Json, Source
from transload.formats.rules import commonest, exceptions
from transload.headers.info import shown
from transload.quant import PER_CHANNEL, QuantSpec, Zero

BITS = (2, 3, 4, 8)
_FILES = ("quantize_config.json", "gptq_config.json")  # where tools kept it before config.json


class Scheme(NamedTuple):
    """What a rule says. act_order is desc_act: groups follow a g_idx."""

    bits: int
    group_size: int
    symmetric: bool
    act_order: bool


def is_gptq(source: Source) -> bool:
    """True for quant_method gptq, or for qweights beside a quantize_config.json and no method at all."""
    method = stored.method(source)
    bare = not method and "quantization_config" not in source.config and source.json(_FILES[0]) is not None
    return method == "gptq" or (bare and bool(stored.modules(source, "qweight")) and _has_bits(source))


def _has_bits(source: Source) -> bool:
    config = stored.quantization_config(source, *_FILES)
    return "bits" in config and "version" not in config  # AWQ's file of the same name has a version


def version(source: Source) -> str:
    """The checkpoint_format, gptq or gptq_v2. Raises Unsupported for others."""
    config = stored.quantization_config(source, *_FILES)
    found = stored.text(source, config, "checkpoint_format") or stored.text(source, config, "format") or "gptq"
    if found not in ("gptq", "gptq_v2"):
        raise Unsupported(f"{source.path}: GPTQ checkpoint_format {shown(found, 40)} is not read; gptq and gptq_v2 are")
    return found


def config_of(name: str, specs: Mapping[str, QuantSpec], floats: Iterable[str]) -> Json:
    """The quantization_config of modules with these schemes. floats: linear modules that stay in float."""
    schemes = {m: Scheme(s.bits, s.group_size, s.zero is Zero.MIDPOINT, s.act_order) for m, s in specs.items()}
    base = commonest(schemes) if schemes else Scheme(4, 128, True, False)
    fates: dict[str, Scheme | None] = {**schemes, **{m: None for m in floats if m != "lm_head"}}
    config: Json = {
        "quant_method": "gptq",
        "checkpoint_format": name,
        "bits": base.bits,
        "group_size": base.group_size,
        "sym": base.symmetric,
        "desc_act": base.act_order,
        "lm_head": "lm_head" in specs,
        "pack_dtype": "int32",
    }
    rules = {_rule(pattern, fate): _overrides(fate) for pattern, fate in exceptions(fates, base)}
    if rules:
        config["dynamic"] = rules
    return config


class Schemes:
    """The scheme of a module: the configuration's, with the first matching `dynamic` rule laid over it."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.config = stored.quantization_config(source, *_FILES)
        self.rules = list(_dynamic(source, self.config))

    def __call__(self, module: str) -> Scheme:
        """The scheme of a module that has a qweight. Raises FormatError."""
        config: Mapping[str, object] = self.config
        for pattern, overrides in self.rules:
            if pattern.match(module):
                if overrides is None:
                    name = shown(f"{module}.qweight")
                    raise FormatError(f"{self.source.path}: tensor {name} is stored, but a dynamic rule skips it")
                config = {**config, **overrides}
                break
        size = stored.group_size(self.source, config)
        return Scheme(
            stored.choice(self.source, config, "bits", BITS),
            size,
            stored.flag(self.source, config, "sym", True),
            stored.flag(self.source, config, "desc_act") and size != PER_CHANNEL,  # one group has one order
        )


def _dynamic(source: Source, config: Json) -> Iterable[tuple[re.Pattern[str], Mapping[str, object] | None]]:
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise FormatError(f"{source.path}: quantization_config: dynamic is no object of rules")
    for key, overrides in dynamic.items():
        skip, pattern = key.startswith("-:"), re.sub(r"^[-+]:", "", key)
        if not isinstance(overrides, dict) and not skip:
            raise FormatError(f"{source.path}: quantization_config: dynamic rule {shown(key, 80)} has no overrides")
        try:
            yield re.compile(pattern), None if skip else overrides
        except (re.error, RecursionError, OverflowError) as e:
            raise FormatError(f"{source.path}: quantization_config: dynamic rule {shown(key, 80)}: {e}") from e


def _rule(pattern: str, fate: Scheme | None) -> str:
    return ("-:" if fate is None else "+:") + pattern


def _overrides(fate: Scheme | None) -> Json:
    if fate is None:
        return {}
    return {"bits": fate.bits, "group_size": fate.group_size, "sym": fate.symmetric, "desc_act": fate.act_order}
