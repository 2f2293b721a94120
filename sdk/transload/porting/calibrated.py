"""Calibrated tensors beside a quantized module: scales of static activations go with it, or are left out and named.

They belong to a way of multiplying, not to the weight: where the target's activations are not static, an engine has no
use for them, and some refuse to load them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from transload.checkpoint import Checkpoint
from transload.formats.base import Entry
from transload.porting.plan import Action, PortPlan

_SCALE = "input_scale"
_PARTS = (_SCALE, "input_zero_point")
_NEEDS_SCALES = "compressed-tensors"  # the format whose readers expect them


def settle_calibrated(plan: PortPlan, source: Checkpoint) -> None:
    """Takes calibrated tensors of other activations out of the plan, and refuses static ones without their scales."""
    static = {o.name: bool(o.spec and o.spec.act and o.spec.act.static) for o in plan.outputs() if _is_module(o.action)}
    left = [step for step in plan.steps if not static.get(_module(step.entry, source.entries), True)]
    plan.steps = [step for step in plan.steps if step not in left]
    plan.left_out = tuple(step.entry.name for step in left)
    if plan.format.name != _NEEDS_SCALES:
        return
    for name in (name for name, is_static in static.items() if is_static):
        if f"{name}.{_SCALE}" not in source.entries:
            plan.refusals.setdefault(
                name,
                f"its static activation scales have another form in '{source.format.name}': give activations 'int8' or "
                "'16bit'",
            )


def left_out_notes(plan: PortPlan) -> Iterator[str]:
    """What was left out, in a sentence for the report."""
    if plan.left_out:
        names = ", ".join(plan.left_out[:2]) + (", ..." if len(plan.left_out) > 2 else "")
        yield f"{len(plan.left_out)} static activation scales are left out, as the target's are not static: {names}"


def _is_module(action: Action) -> bool:
    return action is not Action.COPY


def _module(entry: Entry, entries: Mapping[str, Entry]) -> str:
    """The quantized module that a calibrated tensor belongs to, "" for other entries."""
    module, _, part = entry.name.rpartition(".")
    owner = entries.get(module)
    return module if part in _PARTS and owner is not None and owner.spec is not None else ""
