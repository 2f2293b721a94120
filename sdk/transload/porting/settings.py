"""What a checkpoint says once for all of its modules: AWQ and msModelSlim have one group size per file.

Modules that need another value than the rest are rounded to a scheme that agrees where the caller allows one, else
refused, before a byte is written.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from transload.quant import PER_CHANNEL

if TYPE_CHECKING:
    from transload.porting.placing import Placer
    from transload.porting.plan import Output, PortPlan, Step


def settle(plan: PortPlan, placer: Placer) -> None:
    """Gives every setting of a file one value, in place; refusals go to the placer."""
    for setting in sorted({setting for output in plan.outputs() for setting in _settings(plan, output)}):
        wanted = _wanted(plan, setting)
        for i, step in enumerate(plan.steps):
            outputs = [_agreeing(plan, placer, step, output, setting, wanted) for output in step.outputs]
            plan.steps[i] = replace(step, outputs=tuple(outputs))


def _agreeing(plan: PortPlan, placer: Placer, step: Step, output: Output, setting: str, wanted: int) -> Output:
    """The module as it is where it agrees, else in a scheme that the caller allows and that does, else refused."""
    value = _settings(plan, output).get(setting, wanted)
    if value == wanted or output.name in placer.refusals:
        return output
    why = f"'{plan.format.name}' has one {setting} per file, here {_word(wanted)}, and this module has {_word(value)}"
    new = output
    if step.entry.spec is not None and output.rounded is None:
        shape = step.entry.shape if output.expert is None else step.entry.shape[1:]
        new = placer.requantized(output.name, step.entry.spec, shape, output.expert, why)
    if _settings(plan, new).get(setting, wanted) != wanted:
        placer.refusals.setdefault(output.name, why)
    return new


def _wanted(plan: PortPlan, setting: str) -> int:
    """The value of the schemes that the caller asked for where they have one, else that of most modules."""
    values = [(o.rounded is not None, v) for o in plan.outputs() if (v := _settings(plan, o).get(setting)) is not None]
    asked = [value for rounded, value in values if rounded]
    return Counter(asked or [value for _, value in values]).most_common(1)[0][0]


def _settings(plan: PortPlan, output: Output) -> dict[str, int]:
    return {} if output.spec is None else dict(plan.format.once_per_file(output.spec))


def _word(value: int) -> str:
    return "one per channel" if value in (0, PER_CHANNEL) else str(value)
