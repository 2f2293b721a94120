"""Per-module schemes as few rules: a default and regular expressions for the modules that differ."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping
from typing import TypeVar

F = TypeVar("F", bound=Hashable)

# Engines fuse linears that share an input, and ask the rules for the fused name.
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}


def commonest(fates: Mapping[str, F]) -> F:
    """The fate that most modules share; the first one on a tie."""
    return Counter(fates.values()).most_common(1)[0][0]


def exceptions(fates: Mapping[str, F], default: F) -> list[tuple[str, F]]:
    """Anchored regular expressions with the fate of every module whose fate is not `default`.

    Modules that differ only in numbers share one expression when they share a fate:
    model.layers.3.mlp.gate and model.layers.7.mlp.gate become ^model\\.layers\\.\\d+\\.mlp\\.gate$.
    Fused names (qkv_proj) are added when every member has the same fate.
    """
    alike: dict[str, dict[str, F]] = defaultdict(dict)
    for name, fate in (dict(fates) | _fused(fates)).items():
        alike[_pattern(name)][name] = fate
    rules: list[tuple[str, F]] = []
    for pattern, members in alike.items():
        if len(set(members.values())) == 1:
            members = {pattern: next(iter(members.values()))}
        else:
            members = {f"^{re.escape(name)}$": fate for name, fate in members.items()}
        rules += [(rule, fate) for rule, fate in members.items() if fate != default]
    return rules


def _pattern(name: str) -> str:
    parts = (r"\d+" if part.isdecimal() else re.escape(part) for part in name.split("."))
    return "^" + r"\.".join(parts) + "$"


def _fused(fates: Mapping[str, F]) -> dict[str, F]:
    found: dict[str, F] = {}
    for fused, members in FUSED.items():
        for name in fates:
            parent, _, last = name.rpartition(".")
            if last != members[0]:
                continue
            each = {fates.get(f"{parent}.{m}" if parent else m) for m in members}
            if len(each) == 1:
                found[f"{parent}.{fused}" if parent else fused] = fates[name]
    return found
