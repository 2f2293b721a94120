"""In which precision an engine runs the result of a port: what the source asked for, what is written, what is executed.

Engines run W4A8 files as W4A16 and the reverse without saying so; here it is said before the engine is started.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from transload.engine import Rule
from transload.porting.plan import Output, PortPlan, Step
from transload.porting.target import Target
from transload.quant import QuantSpec


@dataclass(frozen=True, slots=True)
class Execution:
    """Modules that an engine runs alike. requested, written and executed are schemes: W4A16, W8A8.

    requested: by the source, by `activations` or by `requantize`. kernel: the engine's own name for what multiplies.
    """

    requested: str
    written: str
    executed: str
    kernel: str
    modules: int
    experts: bool
    note: str

    @property
    def as_requested(self) -> bool:
        """True when the engine multiplies with as many bits as were asked for."""
        return self.executed.partition(" ")[0] == self.requested


def executions(plan: PortPlan) -> tuple[Execution, ...]:
    """How the target's engine runs every quantized module; empty where the target is no engine."""
    counts: dict[tuple[str, str, str, str, bool, str], int] = {}
    for step in plan.steps:
        for output in step.outputs:
            for key in _keys(plan, step, output):
                counts[key] = counts.get(key, 0) + 1
    return tuple(
        Execution(requested, written, executed, kernel, count, experts, note)
        for (requested, written, executed, kernel, experts, note), count in counts.items()
    )


def _keys(plan: PortPlan, step: Step, output: Output) -> Iterator[tuple[str, str, str, str, bool, str]]:
    target, spec = plan.target, output.spec
    if spec is None or target.engine is None:
        return
    shape = step.entry.shape if output.expert is None else step.entry.shape[1:]
    layer = target.layer(output.name, spec, shape)
    rule = target.rule(layer)
    if isinstance(rule, Rule):
        kernels = target.engine.kernels(target.format.name, layer, target.arch)
        requested = _requested(plan, step, output).scheme
        yield requested, spec.scheme, rule.runs_as(spec), kernels, layer.experts, rule.note


def _requested(plan: PortPlan, step: Step, output: Output) -> QuantSpec:
    if output.rounded is not None:
        return output.rounded
    spec = step.entry.spec or output.spec
    assert spec is not None
    return (
        spec
        if plan.options.act is None
        else QuantSpec(spec.bits, spec.group_size, spec.grid, spec.zero, act=plan.options.act[0])
    )


def warnings(found: tuple[Execution, ...], target: Target) -> Iterator[str]:
    """A sentence for everything that runs in another precision than was asked for, and every rule's own note."""
    for e in found:
        if not e.as_requested:
            what = "routed experts" if e.experts else "layers"
            if e.written == e.executed:
                yield f"{target.label} has no {e.requested} for {e.modules} {what}: written and run as {e.executed}"
            else:
                declared = "" if e.written == e.requested else f", declared as {e.written},"
                yield f"{target.label} runs {e.modules} {what} of {e.requested}{declared} as {e.executed}"
    yield from dict.fromkeys(e.note for e in found if e.note)
