"""Linears that engines fuse must share a scheme: q, k and v are one matmul in vLLM, and so are gate and up.

A checkpoint may mix schemes inside such a group (llama.cpp's quantizers do). Members are brought to one exact form
where there is one, else to the scheme that the caller allows, else refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from transload.formats.rules import FUSED
from transload.quant import QuantSpec
from transload.rewrite import exact_forms

if TYPE_CHECKING:
    from transload.porting.placing import Placer
    from transload.porting.plan import Output, PortPlan, Step


class _Member(NamedTuple):
    step: int
    place: int  # index among the step's outputs
    output: Output
    shape: tuple[int, ...]
    spec: QuantSpec


def agree(plan: PortPlan, placer: Placer) -> None:
    """Gives the members of every fused group one scheme, in place; refusals go to the placer."""
    for name, members in _groups(plan):
        agreed = len({m.output.spec and _shared(m.output.spec) for m in members}) == 1
        if agreed or any(m.output.name in placer.refusals for m in members):
            continue
        common = _common_form(members, placer)
        schemes = ", ".join(dict.fromkeys(str(m.output.spec or "float") for m in members))
        for m in members:
            if common is not None:
                new = placer.in_form(m.output.name, common, m.shape, m.output.expert)
            else:
                why = f"{name} is one fused layer in the engine, and its members differ: {schemes}"
                new = placer.requantized(m.output.name, m.spec, m.shape, m.output.expert, why)
            outputs = list(plan.steps[m.step].outputs)
            outputs[m.place] = new
            plan.steps[m.step] = replace(plan.steps[m.step], outputs=tuple(outputs))


def _groups(plan: PortPlan) -> Iterator[tuple[str, list[_Member]]]:
    """Fused name and members of every group that has all of them, at least one quantized in the target."""
    where = {
        output.name: (i, j, output, step) for i, step in enumerate(plan.steps) for j, output in enumerate(step.outputs)
    }
    for fused, names in FUSED.items():
        for first in [n for n in where if n.rpartition(".")[2] == names[0]]:
            parent = first.rpartition(".")[0]
            found = [where.get(f"{parent}.{name}") for name in names]
            members = [_member(*f) for f in found if f is not None]
            if len(members) == len(names) and any(m is not None for m in members):
                yield f"{parent}.{fused}", [m for m in members if m is not None]


def _member(i: int, j: int, output: Output, step: Step) -> _Member | None:
    if step.entry.spec is None:
        return None
    shape = step.entry.shape if output.expert is None else step.entry.shape[1:]
    return _Member(i, j, output, shape, step.entry.spec)


def _common_form(members: list[_Member], placer: Placer) -> QuantSpec | None:
    """The first exact form that every member has and the target takes."""
    if placer.options.everything or any(m.output.spec is None for m in members):
        return None
    forms = [list(exact_forms(m.spec)) for m in members]
    for form in forms[0]:
        if all(form in other for other in forms[1:]) and all(
            placer.refuses(m.output.name, form, m.shape) is None for m in members
        ):
            return form
    return None


def _shared(spec: QuantSpec) -> QuantSpec:
    """What members must share; the dtype of scales is the engine's own."""
    return QuantSpec(spec.bits, spec.group_size, spec.grid, spec.zero, act=spec.act, act_order=spec.act_order)
