"""What a recipe means for one checkpoint: a scheme and a method by stored module, from headers alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from transload.checkpoint import Checkpoint
from transload.errors import ConfigError
from transload.porting.plan import pieces_of
from transload.quant import ActSpec
from transload.quantize.layerwise import Assigned
from transload.quantize.recipe import Recipe, Rule, fitted

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_NOT_LINEAR = ("emb", "norm", "conv")


@dataclass(slots=True)
class Assignment:
    """modules: what becomes of every module that is quantized. shapes: its [N, K]. notes: for the report."""

    modules: dict[str, Assigned] = field(default_factory=dict)
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def layer_of(name: str) -> int | None:
    """The number of the decoder layer that a stored name belongs to, None outside of layers."""
    match = _LAYER.search(name)
    return int(match.group(1)) if match else None


def assign(recipe: Recipe, checkpoint: Checkpoint, layers: int) -> Assignment:
    """Applies a recipe. layers: how many decoder layers the model has; what lies behind (MTP layers) stays in float.

    Raises ConfigError for a rule that decides about no module, unless it is optional.
    """
    out, used = Assignment(), set[Rule]()
    behind = 0
    for name, (n, k) in linears(checkpoint):
        layer = layer_of(name)
        if layer is not None and layer >= layers:
            behind += 1
            continue
        rule = recipe.rule(name, layer, layers)
        if rule is None or rule.spec is None:
            continue
        used.add(rule)
        spec = fitted(rule.spec, k)
        if spec is None:
            out.notes.append(f"{name} stays in float: {k} inputs do not divide into groups")
            continue
        note = "" if spec == rule.spec else f"groups of {spec.group_size}: {rule.spec.group_size} do not divide {k}"
        if layer is None and rule.activations == "static":
            spec = replace(spec, act=ActSpec())
            note = "; ".join(n for n in (note, "not in a decoder layer: its activations are dynamic") if n)
        out.modules[name] = Assigned(spec, rule.method, note)
        out.shapes[name] = n, k
    for rule in recipe.rules:
        if rule.spec is not None and rule not in used and not rule.optional:
            where = "" if rule.layers is None else f" in layers {', '.join(map(str, rule.layers))}"
            raise ConfigError(
                f"recipe '{recipe.name}': its rule for {', '.join(rule.modules)}{where} names no module of "
                f"{checkpoint.path}; mark it optional, or choose a recipe for this kind of model"
            )
    if not out.modules:
        raise ConfigError(f"recipe '{recipe.name}' quantizes no module of {checkpoint.path}")
    out.notes += _rounded_again(checkpoint, out)
    if behind:
        out.notes.append(f"{behind} linears behind the last decoder layer (multi-token prediction) keep their numbers")
    return out


def _rounded_again(checkpoint: Checkpoint, made: Assignment) -> Iterator[str]:
    """Modules whose source is quantized, by its schemes: their losses add up."""
    schemes: dict[str, int] = {}
    for entry in checkpoint.entries.values():
        if entry.spec is not None:
            count = sum(name in made.modules for name, _, _ in pieces_of(entry, checkpoint))
            schemes[str(entry.spec)] = schemes.get(str(entry.spec), 0) + count
    found = {scheme: count for scheme, count in schemes.items() if count}
    if found:
        which = ", ".join(f"{scheme} x {count}" for scheme, count in found.items())
        yield (
            f"{sum(found.values())} modules are quantized in the source ({which}) and were rounded once more from its "
            "numbers: what both roundings lose adds up, and a comparison with this source shows the second alone"
        )


def linears(checkpoint: Checkpoint) -> Iterator[tuple[str, tuple[int, int]]]:
    """Module name and [N, K] of everything that may be a linear; experts of a stack one by one."""
    for entry in checkpoint.entries.values():
        if entry.spec is None and not entry.name.endswith(".weight"):
            continue
        for name, shape, _ in pieces_of(entry, checkpoint):
            module = name.removesuffix(".weight")
            last = module.rpartition(".")[2]
            if len(shape) == 2 and not any(word in last for word in _NOT_LINEAR):
                yield module, (shape[0], shape[1])


def layer_count(config: Mapping[str, object]) -> int:
    """The number of decoder layers that config.json says, else a large number."""
    inner = config.get("text_config")
    for fields in (inner if isinstance(inner, Mapping) else {}, config):
        for key in ("num_hidden_layers", "num_layers", "n_layer"):
            value = fields.get(key)
            if isinstance(value, int):
                return value
    return 1 << 30
