"""Which scheme every module has: from config.json's quantization_config, a description file, or a recipe by name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from transload.errors import ConfigError
from transload.models.roles import skipped
from transload.plan.modules import Module, Part
from transload.plan.schemes import (
    BF16,
    FP8_CHANNEL,
    MXFP4,
    NVFP4,
    Kind,
    Scheme,
    blocks,
    fp8_block,
    integer,
    integer_act,
)

_LINEARS = (Part.ATTENTION, Part.LINEAR, Part.MLP, Part.EXPERTS, Part.SHARED, Part.INDEXER)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A scheme for every module. default covers linears; experts, when given, covers routed experts instead.

    keep: module names (or runs of components, or "re:" patterns) that stay in 16 bits. named: exact module -> scheme.
    """

    name: str
    default: Scheme
    experts: Scheme | None = None
    keep: tuple[str, ...] = ()
    named: Mapping[str, Scheme] | None = None

    def scheme(self, module: Module, full_name: str) -> Scheme:
        """The scheme of one module; full_name is its name in the checkpoint."""
        if not module.quantizable:
            return BF16
        if self.named is not None:
            return self.named.get(full_name, BF16)
        if module.part is Part.HEAD or skipped(full_name, self.keep):
            return BF16
        if module.part is Part.EXPERTS and self.experts is not None:
            return self.experts
        if module.part is Part.MTP and ".experts." in full_name and self.experts is not None:
            return self.experts
        return self.default if module.part in (*_LINEARS, Part.MTP) else BF16

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """Every scheme that the recipe can give."""
        found = (self.default, *((self.experts,) if self.experts else ()), *(self.named or {}).values())
        return tuple(dict.fromkeys(found))


FLOAT_RECIPE = Recipe("bf16", BF16)

# Names that people write. g is a group size; "-experts" quantizes routed experts only and leaves the rest in 16 bits.
RECIPES = ("bf16", "fp8", "fp8-channel", "int4-g128", "int4-g64", "int4-g32", "int4-channel", "int8-channel",
           "gptq-g128", "awq-g128", "int4-g128-experts", "int4-g64-experts", "int4-g32-experts", "w8a8", "w4a8",
           "nvfp4", "mxfp4", "nvfp4-experts", "mxfp4-experts")  # fmt: skip
_INTEGER = re.compile(r"(?P<kind>int4|int8|w4a16|w8a16|gptq|awq)-(?P<group>g\d{1,5}|channel)(?P<asym>-asym)?")
_FIXED: Mapping[str, Scheme] = {
    "bf16": BF16,
    "fp16": BF16,
    "fp8": fp8_block(),
    "fp8-channel": FP8_CHANNEL,
    "w8a8": integer_act(8),
    "nvfp4": NVFP4,
    "mxfp4": MXFP4,
}


def recipe_by_name(name: str) -> Recipe:
    """The recipe called `name` ("as if quantized to"). Raises ConfigError offering the nearest names.

    w4a8 is what published GLM, Kimi and Qwen MoE recipes for Ascend do: routed experts W4A8 per channel, every other
    linear W8A8.

    >>> recipe_by_name("int4-g32-experts").experts.name
    'int4 g32'
    """
    text = name.strip().lower()
    base = text.removesuffix("-experts")
    scheme = _FIXED.get(base) or _integer_scheme(base)
    if text == "w4a8":
        return Recipe(name, integer_act(8), experts=integer_act(4))
    if scheme is None:
        near = difflib.get_close_matches(text, RECIPES, 3, 0.4) or list(RECIPES)
        raise ConfigError(f"recipe '{name}' is not known; nearest are {', '.join(near)}")
    return Recipe(name, BF16, experts=scheme) if base != text else Recipe(name, scheme)


def _integer_scheme(name: str) -> Scheme | None:
    match = _INTEGER.fullmatch(name)
    if match is None:
        return None
    group = -1 if match["group"] == "channel" else int(match["group"][1:])
    if group == 0:
        return None
    bits = 8 if match["kind"] in ("int8", "w8a16") else 4
    return integer(bits, group, asymmetric=match["kind"] == "awq" or bool(match["asym"]))


def recipe_from_config(quantization: Mapping[str, object] | None) -> Recipe:
    """The recipe that config.json's quantization_config describes; bf16 without one.

    Raises ConfigError naming the method or field that is not understood.
    """
    if quantization is None:
        return FLOAT_RECIPE
    method = str(quantization.get("quant_method") or quantization.get("quant_algo") or "").lower()
    reader = _METHODS.get(method)
    if reader is None:
        raise ConfigError(
            f"quantization_config: quant_method '{method or 'missing'}' is not understood; known are "
            f"{', '.join(sorted(_METHODS))}; give a recipe by name instead"
        )
    return reader(quantization)


def _gptq(q: Mapping[str, object]) -> Recipe:
    bits, group = _integer_field(q, "bits", 4), _integer_field(q, "group_size", 128)
    sym, order = q.get("sym", True) is not False, q.get("desc_act") is True
    keep = () if q.get("lm_head") else ("lm_head",)
    scheme = integer(bits, group, asymmetric=not sym, act_order=order and group > 0)
    return Recipe(f"gptq {scheme.name}", scheme, keep=keep)


def _awq(q: Mapping[str, object]) -> Recipe:
    bits = _integer_field(q, "bits", 4)
    group = _integer_field(q, "group_size", 128)
    scheme = integer(bits, group, asymmetric=q.get("zero_point", True) is not False)
    return Recipe(f"awq {scheme.name}", scheme, keep=_strings(q.get("modules_to_not_convert")))


def _fp8(q: Mapping[str, object]) -> Recipe:
    size = q.get("weight_block_size")
    if isinstance(size, list) and len(size) == 2 and all(isinstance(v, int) and v > 0 for v in size):
        scheme = fp8_block(size[0], size[1])
    else:
        scheme = FP8_CHANNEL
    return Recipe(
        scheme.name, scheme, keep=_strings(q.get("modules_to_not_convert")) + _strings(q.get("ignored_layers"))
    )


def _compressed_tensors(q: Mapping[str, object]) -> Recipe:
    groups = q.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ConfigError("quantization_config: compressed-tensors without config_groups")
    first = next(iter(groups.values()))
    weights = first.get("weights") if isinstance(first, Mapping) else None
    if not isinstance(weights, Mapping):
        raise ConfigError("quantization_config: config_groups has a group without weights")
    scheme = _compressed_scheme(weights, bool(first.get("input_activations")))
    return Recipe(f"compressed-tensors {scheme.name}", scheme, keep=_strings(q.get("ignore")))


def _compressed_scheme(weights: Mapping[str, object], activations: bool) -> Scheme:
    bits, group = _integer_field(weights, "num_bits", 4), weights.get("group_size")
    size = group if isinstance(group, int) and group > 0 else -1
    if weights.get("type") == "float":
        return (NVFP4 if size == 16 else MXFP4) if bits == 4 else FP8_CHANNEL
    if activations:
        return integer_act(bits, size)
    return integer(bits, size, weights.get("symmetric") is False, weights.get("actorder") in ("group", "dynamic"))


def _bitsandbytes(q: Mapping[str, object]) -> Recipe:
    if q.get("load_in_8bit"):
        scheme = blocks("llm.int8", 1, 1)
    elif q.get("bnb_4bit_use_double_quant"):
        scheme = blocks("nf4 double", 16384, 8192 + 256 + 4)
    else:
        scheme = blocks("nf4", 64, 36)
    return Recipe(scheme.name, scheme, keep=_strings(q.get("llm_int8_skip_modules")))


def _modelopt(q: Mapping[str, object]) -> Recipe:
    scheme = NVFP4 if "fp4" in str(q.get("quant_algo", "")).lower() else FP8_CHANNEL
    return Recipe(scheme.name, scheme, keep=_strings(q.get("ignore")) + _strings(q.get("exclude_modules")))


_METHODS: Mapping[str, Callable[[Mapping[str, object]], Recipe]] = {
    "gptq": _gptq,
    "awq": _awq,
    "fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
    "bitsandbytes": _bitsandbytes,
    "mxfp4": lambda q: Recipe("mxfp4", BF16, experts=MXFP4),
    "modelopt": _modelopt,
    "nvfp4": _modelopt,
    "fp8_per_tensor": _fp8,
}


def recipe_from_description(description: Mapping[str, object]) -> Recipe:
    """The recipe in msModelSlim's quant_model_description.json: tensor name -> type, one entry a tensor."""
    words = {
        "W8A8_DYNAMIC": integer_act(8),
        "W8A8": integer_act(8),
        "W4A8_DYNAMIC": integer_act(4),
        "W8A16": integer(8, -1),
        "W4A16": integer(4, _integer_field(description, "group_size", 0) or -1),
        "W4A4_DYNAMIC": integer_act(4),
    }
    named = {
        name.removesuffix(".weight"): words[kind]
        for name, kind in description.items()
        if name.endswith(".weight") and isinstance(kind, str) and kind in words
    }
    return Recipe("msmodelslim", BF16, named=named)


def has_four_bits(recipe: Recipe) -> bool:
    """True when some module is stored in four bits or less."""
    return any(s.bits <= 4 and s.kind is not Kind.FLOAT for s in recipe.schemes)


def _integer_field(values: Mapping[str, object], name: str, default: int) -> int:
    value = values.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not -1 <= value <= 1 << 16:
        raise ConfigError(f"quantization_config: '{name}' is {value!r:.40}, expected an integer")
    return value


def _strings(value: object) -> tuple[str, ...]:
    return tuple(v for v in value if isinstance(v, str)) if isinstance(value, list) else ()
