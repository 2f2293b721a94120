"""Calibrated tensors beside a quantized module: scales of static activations go with it, or are left out and named.

They belong to a way of multiplying, not to the weight: where the target's activations are not static, an engine has no
use for them, and some refuse to load them. A format that keeps more than the scale (msModelSlim) makes its tensors of
the scale, the weight's scales and the bias.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from transload.checkpoint import Checkpoint
from transload.formats.base import Entry, Format
from transload.porting.moving import Value
from transload.porting.plan import Action, Output, PortPlan

_SCALE = "input_scale"
_PARTS = (_SCALE, "input_zero_point")
_NEED_SCALES = ("compressed-tensors", "msmodelslim")  # formats whose readers expect them


def settle_calibrated(plan: PortPlan, source: Checkpoint) -> None:
    """Takes calibrated tensors of other activations out of the plan, and refuses static ones without their scales.

    Where the target keeps more than the scale, the scale's tensors become a part of their module.
    """
    static = {o.name: o for o in plan.outputs() if _is_module(o.action) and o.spec and o.spec.act and o.spec.act.static}
    modules = {o.name for o in plan.outputs() if _is_module(o.action)}
    left = [s for s in plan.steps if (owner := _module(s.entry, source.entries)) in modules and owner not in static]
    plan.left_out = tuple(step.entry.name for step in left)
    folded = _keeps_more(plan.format)
    if folded:
        left += [step for step in plan.steps if _module(step.entry, source.entries) in static]
    gone = {step.entry.name for step in left}
    plan.steps = [step for step in plan.steps if step.entry.name not in gone]
    if plan.format.name not in _NEED_SCALES:
        return
    for name in static:
        if f"{name}.{_SCALE}" not in source.entries:
            plan.refusals.setdefault(
                name,
                f"its static activation scales have another form in '{source.format.name}': give activations 'int8' or "
                "'16bit'",
            )
        elif f"{name}.{_PARTS[1]}" in source.entries and folded:
            plan.refusals.setdefault(name, "its activations have a zero point, which is not written here")
    if folded and not plan.refusals:
        plan.steps = [
            replace(step, outputs=tuple(_with_layout(o, plan, source) for o in step.outputs)) for step in plan.steps
        ]


def calibrated_tensors(value: Value, output: Output, plan: PortPlan, source: Checkpoint) -> dict[str, Tensor]:
    """The tensors of a module's static activations that lie beside it in formats that keep more than the scale."""
    if isinstance(value, Tensor) or output.action is Action.COPY or not _is_folded(output, plan):
        return {}
    scale = source.read(source.entries[f"{output.name}.{_SCALE}"]).float().reshape(1)
    bias = source.entries.get(f"{output.name}.bias")
    read = None if bias is None else source.read(bias)
    return plan.format.calibrated(output.name, value.scales, scale, read, _dtype(source))


def _with_layout(output: Output, plan: PortPlan, source: Checkpoint) -> Output:
    """An output with the places of its calibrated tensors, found by making them of a scale of one."""
    if output.spec is None or not _is_folded(output, plan):
        return output
    n = output.tensors[f"{output.name}.weight"][1][0]
    made = plan.format.calibrated(output.name, torch.ones(n, 1), torch.ones(1), None, _dtype(source))
    return replace(output, tensors={**output.tensors, **{name: (t.dtype, tuple(t.shape)) for name, t in made.items()}})


def _is_folded(output: Output, plan: PortPlan) -> bool:
    act = None if output.spec is None else output.spec.act
    return act is not None and act.static and _keeps_more(plan.format)


def _dtype(source: Checkpoint) -> str:
    """What config.json calls the model's dtype, "" where it does not."""
    return str(source.config.get("dtype") or source.config.get("torch_dtype") or "")


def _keeps_more(format: Format) -> bool:
    return type(format).calibrated is not Format.calibrated


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
