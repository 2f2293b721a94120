"""Recipes: which scheme and which method every linear of a model gets, and the text that calibrates them.

A recipe is a YAML file. The first rule that matches a module decides; a module that no rule matches stays in float, and
so do routers, heads, embeddings and vision towers, whatever the rules say.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from transload.errors import ConfigError
from transload.models.roles import kept_in_float, skipped
from transload.quant import PER_CHANNEL, ActSpec, QuantSpec
from transload.requantize import parse_spec

Method = Literal["rtn", "mse", "gptq", "awq", "awq+gptq"]
LARGEST_FILE = 1 << 20


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Rule(_Strict):
    """A scheme for some modules.

    modules: runs of whole name components ("self_attn", "mlp.experts") or "re:..." for the whole name; "*" is every
    linear. layers: numbers of decoder layers, negative ones from the end; none means all. scheme: "float", or what
    `requantize.parse_spec` reads ("int4-g128", "int8-channel-a8"). method: how the codes are chosen, see
    docs/quantize.md. activations: whether an int8 activation finds its scale anew for every token ("dynamic"), or one
    for the whole tensor was found with the calibration text ("static"). optional: the rule may match nothing.
    """

    modules: tuple[str, ...] = Field(min_length=1)
    layers: tuple[int, ...] | None = None
    scheme: str
    method: Method = "gptq"
    activations: Literal["dynamic", "static"] = "dynamic"
    optional: bool = False

    @field_validator("scheme")
    @classmethod
    def _known(cls, text: str) -> str:
        if text != "float":
            parse_spec(text)
        return text

    @model_validator(mode="after")
    def _static_has_int8(self) -> Rule:
        if self.activations == "static" and (self.scheme == "float" or parse_spec(self.scheme).act is None):
            raise ValueError(f"static activations need a scheme with int8 ones, such as int8-channel-a8: {self.scheme}")
        return self

    @property
    def spec(self) -> QuantSpec | None:
        """The scheme, None for float."""
        if self.scheme == "float":
            return None
        spec = parse_spec(self.scheme)
        return replace(spec, act=ActSpec(static=True)) if self.activations == "static" else spec

    def matches(self, module: str, layer: int | None, layers: int) -> bool:
        """Whether the rule speaks of a module of decoder layer `layer` (None: outside of them) of `layers`."""
        if self.layers is not None and (layer is None or not {layer, layer - layers} & set(self.layers)):
            return False
        return "*" in self.modules or skipped(module, self.modules) is not None


class Calibration(_Strict):
    """How much text is run through the model. samples x tokens is what a layer sees; seed picks the windows."""

    samples: int = Field(default=64, ge=1)
    tokens: int = Field(default=512, ge=8)
    seed: int = 0
    chat: bool = False  # wrap every document in the model's chat template
    precision: Literal["float32", "bfloat16"] = "float32"  # of the linears while text runs through the model
    expert_tokens: int = Field(default=64, ge=0)  # experts that saw fewer are rounded to nearest, and listed


class Recipe(_Strict):
    """Rules, transformations and calibration. See docs/quantize.md for what each of them does.

    smooth: SmoothQuant's strength between 0 and 1, or none. rotate: Hadamard rotation of the residual stream and of the
    value heads. damping: added to the Hessian's diagonal, in units of its mean. act_order: quantize important inputs
    first, inside the groups, so that no g_idx is needed. sequential: later linears of a layer see the rounding of
    earlier ones (slower).
    """

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$")
    summary: str = ""
    rules: tuple[Rule, ...] = Field(min_length=1)
    smooth: float | None = Field(default=None, gt=0, lt=1)
    rotate: bool = False
    damping: float = Field(default=0.05, ge=0, le=1)
    act_order: bool = True
    sequential: bool = False
    calibration: Calibration = Calibration()

    @model_validator(mode="after")
    def _quantizes(self) -> Recipe:
        if all(rule.spec is None for rule in self.rules):
            raise ValueError("no rule quantizes anything")
        return self

    @property
    def calibrated(self) -> bool:
        """True when text has to be run through the model."""
        methods = {rule.method for rule in self.rules if rule.spec is not None}
        static = any(rule.activations == "static" for rule in self.rules)
        return self.smooth is not None or static or not methods <= {"rtn", "mse"}

    def rule(self, module: str, layer: int | None, layers: int) -> Rule | None:
        """The rule that decides about a module; None when it stays in float."""
        if kept_in_float(module) is not None:
            return None
        found = next((r for r in self.rules if r.matches(module, layer, layers)), None)
        return None if found is None or found.spec is None else found

    def schemes(self) -> str:
        """The schemes in one short text: "int8-channel-a8 static, int4-channel-a8"."""
        said = (
            f"{r.scheme} static" if r.activations == "static" else r.scheme for r in self.rules if r.spec is not None
        )
        return ", ".join(dict.fromkeys(said))


def shipped() -> dict[str, Recipe]:
    """Every recipe that comes with Transload, by name."""
    found = [f for f in files("transload.quantize").joinpath("recipes").iterdir() if f.name.endswith(".yaml")]
    recipes = [_parse(f.read_text(encoding="utf-8"), f.name) for f in found]
    return {r.name: r for r in sorted(recipes, key=lambda r: r.name)}


def read_recipe(source: str | Path | Recipe) -> Recipe:
    """The recipe of a name, or of a YAML file at a path. Raises ConfigError with the names, or with what is wrong."""
    if isinstance(source, Recipe):
        return source
    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        known = shipped()
        if str(source) in known:
            return known[str(source)]
        raise ConfigError(
            f"no recipe '{source}': there are {', '.join(known)}, .yaml files, and .json files of GPTQModel"
        )
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ConfigError(f"{path}: larger than the {LARGEST_FILE} bytes that a recipe may have")
        return _parse(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: cannot be read: {e}") from e


def _parse(text: str, where: str) -> Recipe:
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as e:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(e).split())[:200]}") from e
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: a recipe is a mapping with name and rules")
    try:
        return Recipe.model_validate(value)
    except ValidationError as e:
        raise ConfigError(f"{where}: {said(e)}") from e


def said(error: ValidationError) -> str:
    """What pydantic found, in one line: place and reason, without the errors that follow from others."""
    found = error.errors()
    own = [d for d in found if d["type"] != "too_short"] or found  # a broken rule is missing from its list, too
    wrong = (f"{'.'.join(str(p) for p in d['loc']) or 'recipe'}: {d['msg'].removeprefix('Value error, ')}" for d in own)
    return "; ".join(list(wrong)[:4])


def fitted(spec: QuantSpec, k: int) -> QuantSpec | None:
    """The scheme with the largest group, its own or 64, 32 or 16, that divides K inputs; None when none does."""
    if spec.group_size == PER_CHANNEL or k % spec.group_size == 0:
        return spec
    size = next((g for g in (64, 32, 16) if g < spec.group_size and k % g == 0), None)
    return None if size is None else replace(spec, group_size=size)
