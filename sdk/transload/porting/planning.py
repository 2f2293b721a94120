"""Making the plan of a port: from the source's headers, for one target, or for the first of several that works.

Nothing is read and nothing is written here. Refusals are collected, so that the caller can show all of them at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from transload.checkpoint import Checkpoint
from transload.porting.calibrated import settle_calibrated
from transload.porting.fused import agree
from transload.porting.placing import Placer
from transload.porting.plan import Options, Output, PortPlan, Step, pieces_of
from transload.porting.schemes import AUTO, Choice, Schemes, parse_schemes
from transload.porting.settings import settle
from transload.porting.target import Target
from transload.quant import QuantSpec
from transload.requantize import parse_spec

# What "auto" tries, most faithful first: codes of up to four bits keep their width, wider ones get eight.
NARROW = ("int4-g32-asym", "int4-g32", "int4-g64", "int4-g128", "int4-channel", "int4-channel-a8")
WIDE = ("int8-g32", "int8-g128", "int8-channel", "int8-channel-a8")
_NARROW_BITS = 4


def plan_port(source: Checkpoint, target: Target, options: Options) -> PortPlan:
    """Decides every step; modules that cannot go are in `refusals`."""
    plan, place = PortPlan(target, options), Placer(source, target, options)
    for entry in source.entries.values():
        outputs: list[Output] = []
        for name, shape, expert in pieces_of(entry, source):
            if entry.spec is None:
                outputs.append(place.floating(name, entry.dtype, shape, expert))
            else:
                spec = entry.spec if options.act is None else replace(entry.spec, act=options.act[0])
                outputs.append(place.quantized(name, spec, shape, expert))
        plan.steps.append(Step(entry, tuple(outputs)))
    if target.fuses:
        agree(plan, place)
    settle(plan, place)
    plan.refusals = place.refusals
    settle_calibrated(plan, source)
    return plan


def plan_first(
    source: Checkpoint, targets: Sequence[Target], options: Options, requantize: Schemes | str | None
) -> PortPlan:
    """The plan for the first target that takes every number, else for the first that takes them with `requantize`.

    requantize: schemes, or "auto" for the target's own choice. When no target works, the plan of the first one, with
    its refusals. Raises ConfigError for a pattern that decides about no module.
    """
    if isinstance(requantize, Schemes):
        requantize.check(_roundable(source, options.everything))
    first = None
    if not options.everything:
        for target in targets:
            plan = plan_port(source, target, replace(options, requantize=None))
            if not plan.refusals:
                return plan
            first = first or plan
    for target in targets if requantize is not None else ():
        schemes = auto_schemes(source, target, options) if isinstance(requantize, str) else requantize
        plan = plan_port(source, target, replace(options, requantize=schemes))
        if not plan.refusals:
            return plan
        first = plan if first is None or first.options.requantize is None else first
    assert first is not None
    return first


def auto_schemes(source: Checkpoint, target: Target, options: Options) -> Schemes | None:
    """What "auto" stands for: the engine's own schemes by role for a mixture of experts, else the widths kept.

    None when no scheme of a width is taken: four bits never become eight unasked.
    """
    mixed = target.engine.mixed if target.engine is not None else ()
    if mixed and any(".experts." in f".{name}." for name in _roundable(source, options.everything)):
        schemes = parse_schemes(mixed)
        assert isinstance(schemes, Schemes)
        return schemes
    placer = Placer(source, target, options)
    narrow: list[tuple[str, tuple[int, ...]]] = []
    wide: list[tuple[str, tuple[int, ...]]] = []
    for name, spec, shape in _refused(source, target, options):
        (narrow if spec is not None and spec.bits <= _NARROW_BITS else wide).append((name, shape))
    choices = []
    for modules, texts, bits in ((narrow, NARROW, _NARROW_BITS), (wide, WIDE, 16)):
        taken = (s for s in map(parse_spec, texts) if all(placer.rounds_to(name, s, shape) for name, shape in modules))
        scheme = next(taken, None) if modules else None
        if modules and scheme is None:
            return None
        if scheme is not None:
            choices.append(Choice("", scheme, bits))
    return Schemes(tuple(choices))


def _refused(
    source: Checkpoint, target: Target, options: Options
) -> Iterator[tuple[str, QuantSpec | None, tuple[int, ...]]]:
    """Name, scheme and shape of every module that needs another scheme."""
    exact = plan_port(source, target, replace(options, requantize=None, everything=False))
    for step in exact.steps:
        for output in step.outputs:
            if output.name in exact.refusals or (options.everything and step.entry.spec is not None):
                yield output.name, step.entry.spec, step.entry.shape if output.expert is None else step.entry.shape[1:]


def _roundable(source: Checkpoint, floats: bool) -> Iterator[str]:
    """The modules that a scheme may be for: quantized ones, and linears in float where those are meant too."""
    for entry in source.entries.values():
        if entry.spec is not None or (floats and entry.name.endswith(".weight") and len(entry.shape) > 1):
            for name, _, _ in pieces_of(entry, source):
                yield name.removesuffix(".weight")


__all__ = ["AUTO", "auto_schemes", "plan_first", "plan_port"]
