"""The quantization_config of compressed-tensors: config groups to schemes per module, and back.

A config group names its modules by `targets`: a full module path, "re:" and a regular expression that matches the
path's beginning, or a class of module ("Linear"). The most specific target wins, in that order. `ignore` is written the
same way. Field names: compressed-tensors 0.20 `quantization/quant_args.py` and `quant_scheme.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transload.errors import FormatError, Unsupported
from transload.formats import stored
from transload.formats.base import Json, Source
from transload.formats.rules import commonest, exceptions
from transload.headers.info import shown
from transload.quant import PER_CHANNEL, ActSpec, Grid, QuantSpec, Zero

METHOD = "compressed-tensors"
VERSION = "0.17.0"  # the oldest release whose readers know everything that is written here
PACK, INT, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
_LAYOUTS = {
    PACK, INT, FLOAT, "naive-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mixed-precision", "",
}  # fmt: skip
_ACT_ORDERED = ("group", "dynamic")  # actorder values that need a g_idx; "static" and "weight" do not


@dataclass(frozen=True, slots=True)
class Scheme:
    """One config group: how its weights are stored. strategy: tensor, channel, group, block or tensor_group."""

    bits: int
    type: str  # "int" or "float"
    strategy: str
    group_size: int
    symmetric: bool
    act: ActSpec | None
    act_order: bool
    block: tuple[int, int] | None = None  # [rows, columns] of a block strategy


class Groups:
    """The config groups of a checkpoint, asked by module name."""

    def __init__(self, source: Source) -> None:
        """Raises FormatError for groups that contradict themselves, Unsupported for what is not read here."""
        self._source = source
        config = stored.quantization_config(source)
        if config.get("sparsity_config"):
            raise Unsupported(f"{source.path}: quantization_config: sparse compressed-tensors checkpoints are not read")
        groups = config.get("config_groups")
        if not isinstance(groups, dict):
            raise FormatError(f"{source.path}: quantization_config: config_groups is {shown(groups, 60)}, no object")
        layout = stored.text(source, config, "format")
        self._targets: list[tuple[str, Scheme]] = []
        for name, group in groups.items():
            where = f"config_groups.{name}"
            targets = group.get("targets") if isinstance(group, dict) else None
            if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
                raise FormatError(f"{source.path}: quantization_config: {where}.targets is no list of names")
            _check_layout(source, group.get("format") or layout)
            scheme = _scheme(source, where, group)
            self._targets += [(target, scheme) for target in targets]

    def __call__(self, module: str) -> Scheme:
        """The scheme of a module that has quantized tensors: exact targets, then expressions, then classes."""
        found = [(_specificity(self._source, t, module), i, s) for i, (t, s) in enumerate(self._targets)]
        chosen = max(((rank, -i) for rank, i, _ in found), default=(0, 0))
        if chosen[0] == 0:
            raise FormatError(f"{self._source.path}: {shown(module)} is quantized, but no config group targets it")
        return self._targets[-chosen[1]][1]


def config_of(specs: Mapping[str, QuantSpec], floats: Sequence[str]) -> Json:
    """The quantization_config of modules with these schemes. floats: linear modules that stay in float."""
    fates: dict[str, QuantSpec | None] = {name: _group_key(spec) for name, spec in specs.items()}
    groups: dict[QuantSpec, list[str]] = {spec: [] for spec in fates.values() if spec is not None}
    default = commonest(fates) if fates else None
    if default is not None:
        groups[default].append("Linear")
    ignore: list[str] = []
    for pattern, fate in exceptions(fates | dict.fromkeys(floats), default):
        (ignore if fate is None else groups[fate]).append("re:" + pattern)
    if "lm_head" in specs:  # engines do not count the head among their linears
        groups[_group_key(specs["lm_head"])].append("lm_head")
    else:
        ignore = [*(p for p in ignore if p != "re:^lm_head$"), "lm_head"]
    layouts = {layout_of(spec) for spec in groups}
    return {
        "quant_method": METHOD,
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "version": VERSION,
        "config_groups": {f"group_{i}": _group(spec, names) for i, (spec, names) in enumerate(groups.items())},
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def layout_of(spec: QuantSpec) -> str:
    """The layout that holds a scheme: bytes where activations are quantized too, packed words where they are not."""
    if spec.grid is Grid.E4M3:
        return FLOAT
    return INT if spec.act else PACK


def _group_key(spec: QuantSpec) -> QuantSpec:
    """What a config group says; the dtype of scales is said by the tensors themselves."""
    return QuantSpec(spec.bits, spec.group_size, spec.grid, spec.zero, act=spec.act)


def _group(spec: QuantSpec, targets: list[str]) -> Json:
    weights: Json = {
        "num_bits": spec.bits,
        "type": "int" if spec.grid is Grid.INT else "float",
        "symmetric": spec.zero is not Zero.CODES,
        "strategy": "channel" if spec.group_size == PER_CHANNEL else "group",
        "group_size": None if spec.group_size == PER_CHANNEL else spec.group_size,
        "dynamic": False,
    }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": _activations(spec.act) if spec.act else None,
        "output_activations": None,
        "format": layout_of(spec),
    }


def _activations(act: ActSpec) -> Json:
    grouped = act.group_size != PER_CHANNEL
    return {
        "num_bits": act.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "tensor" if act.static else "group" if grouped else "token",
        "group_size": act.group_size if grouped else None,
        "dynamic": not act.static,
    }


def _check_layout(source: Source, layout: object) -> None:
    if layout not in _LAYOUTS:
        known = ", ".join(sorted(name for name in _LAYOUTS if name))
        raise Unsupported(f"{source.path}: compressed-tensors format {shown(layout, 40)} is not read; {known} are")


def _scheme(source: Source, where: str, group: Json) -> Scheme:
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise FormatError(f"{source.path}: quantization_config: {where}.weights is {shown(weights, 60)}, no object")
    strategy = stored.text(source, weights, "strategy")
    size = weights.get("group_size")
    if not strategy:
        strategy = "group" if isinstance(size, int) and size > 0 else "channel" if size == -1 else "tensor"
    grouped = strategy in ("group", "tensor_group")
    actorder = weights.get("actorder")
    return Scheme(
        bits=stored.choice(source, weights, "num_bits", (2, 3, 4, 5, 6, 7, 8)),
        type=stored.text(source, weights, "type", "int"),
        strategy=strategy,
        group_size=stored.group_size(source, weights) if grouped else PER_CHANNEL,
        symmetric=stored.flag(source, weights, "symmetric", True),
        act=_act(source, group.get("input_activations")),
        act_order=isinstance(actorder, str) and actorder.lower() in _ACT_ORDERED,
        block=_block(source, weights) if strategy == "block" else None,
    )


def _block(source: Source, weights: Json) -> tuple[int, int]:
    value = weights.get("block_structure")
    if isinstance(value, list) and len(value) == 2 and all(type(v) is int and 0 < v < 1 << 20 for v in value):
        return value[0], value[1]
    raise FormatError(f"{source.path}: quantization_config: block_structure is {shown(value, 60)}, expected two sizes")


def _act(source: Source, value: object) -> ActSpec | None:
    """Activations as int8; None for 16-bit ones and for FP8, whose rounding the engine chooses."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise FormatError(f"{source.path}: quantization_config: input_activations is {shown(value, 60)}, no object")
    if stored.text(source, value, "type", "int") == "float":
        return None
    bits = stored.integer(source, value, "num_bits", 8)
    if bits != 8 or not stored.flag(source, value, "symmetric", True):
        kind = "symmetric" if value.get("symmetric", True) else "asymmetric"
        raise Unsupported(f"{source.path}: {kind} activations of {bits} bits are not read; symmetric int8 ones are")
    static = value.get("dynamic") in (False, None)
    group = value.get("group_size")
    size = group if isinstance(group, int) and group > 0 and value.get("strategy") == "group" else PER_CHANNEL
    return ActSpec(8, size, static)


def _specificity(source: Source, target: str, module: str) -> int:
    if target.startswith("re:"):
        try:
            return 2 if re.match(target.removeprefix("re:"), module) else 0
        except (re.error, RecursionError, OverflowError) as e:
            raise FormatError(f"{source.path}: quantization_config: target {shown(target, 80)}: {e}") from e
    if "." in target or target == module:
        return 3 if target == module else 0
    # Without the model its modules have no classes; whatever has packed tensors and no better target is a linear.
    return 1
