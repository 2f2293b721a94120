"""One error for everything that a target cannot take, short enough to read also when it is a thousand experts.

It names the two ways out, both computed: a scheme that the target does load, and targets that take these numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

from transload.checkpoint import Checkpoint
from transload.engines import ENGINES
from transload.errors import CannotHold
from transload.formats import FORMATS
from transload.formats.base import Entry, Format
from transload.formats.neutral import Neutral
from transload.formats.plain import Plain
from transload.porting.placing import Placer
from transload.porting.plan import Action, Options, PortPlan, pieces_of
from transload.porting.planning import auto_schemes, plan_port
from transload.porting.schemes import AUTO, Choice, Schemes
from transload.porting.target import Target, find_targets
from transload.quant import ActSpec
from transload.requantize import parse_spec

# Schemes that a target may take where it does not take the source's, most faithful first.
_SCHEMES = (
    "int8-g32", "int8-g128", "int8-channel", "int8-channel-a8", "int4-g32-asym", "int4-g128", "int4-g128-a8",
    "int4-channel", "int4-channel-a8",
)  # fmt: skip
_NAMED = 3  # engines and formats that a message names


def refused(source: Checkpoint, plan: PortPlan, asked: Schemes | str | None = None) -> CannotHold:
    """The error that lists every refusal of a plan, modules grouped by reason and role. asked: what was requested."""
    quantized = sum(output.action is not Action.COPY for output in plan.outputs())
    lines = [f"{reason} ({_roles(names)})" for reason, names in _by_reason(plan.refusals).items()]
    how = " exactly" if asked is None else ""
    message = f"'{plan.target.name}' cannot take {len(plan.refusals)} of {quantized} quantized modules{how}: "
    if asked == AUTO:
        message += "auto keeps the width of codes, and no such scheme is loaded there. "
    ways = [*_schemes_that_work(source, plan, asked), *_targets_that_fit(source, plan)]
    return CannotHold(f"{message}{'; '.join(lines)}. What would work: {'; or '.join(ways)}")


def _schemes_that_work(source: Checkpoint, plan: PortPlan, asked: Schemes | str | None) -> Iterator[str]:
    """Options of the same port with which it runs, as a user would type them."""
    for word, act in (("int8", ActSpec()), ("16bit", None)):
        options = replace(plan.options, requantize=None, act=(act,))
        if plan.options.act is None and not plan.options.everything and _fits(source, plan.target, options):
            yield f"--activations {word}, which changes no weight"
    auto = auto_schemes(source, plan.target, plan.options) if asked is None else None
    if auto is not None and _fits(source, plan.target, replace(plan.options, requantize=auto)):
        alone = len(auto.choices) == 1
        short = "; ".join(_short(choice).removeprefix("the rest " if alone else "") for choice in auto.choices)
        yield f"--requantize auto ({short}), which changes these modules and reports the error"
    for text in _SCHEMES:
        options = replace(plan.options, requantize=Schemes((Choice("", parse_spec(text)),)))
        if _fits(source, plan.target, options):
            yield f"--requantize {text}, which changes these modules and reports the error"
            return


def _short(choice: Choice) -> str:
    """A choice without what a reader does not need: experts W4A8 per channel."""
    spec = choice.scheme
    assert spec is not None
    group = "per channel" if spec.group_size < 0 else f"in groups of {spec.group_size}"
    zero = " with zero points" if spec.zero.value == "codes" else ""
    width = f"codes of up to {choice.up_to} bits " if choice.up_to <= 8 else ""
    return f"{choice.pattern or width or 'the rest '}{' ' if choice.pattern else ''}{spec.scheme} {group}{zero}"


def _targets_that_fit(source: Checkpoint, plan: PortPlan) -> Iterator[str]:
    """Other targets that take every number of the source as it is: engines, the same one first, and formats."""
    engine = plan.target.engine
    name = engine.name if engine is not None else ""
    engines = sorted((e for e in ENGINES if e is not engine), key=lambda e: e.name != name) if engine else []
    formats = [f.name for f in FORMATS if _is_written(f) and f.name != plan.target.name]
    options = Options(floats=plan.options.floats, act=plan.options.act)
    fitting: list[str] = []
    for names in ([e.target for e in engines], formats):
        found = (n for n in names if any(_fits(source, target, options) for target in find_targets(n)))
        fitting += islice(found, _NAMED)
    if fitting:
        several = "one of " if len(fitting) > 1 else ""
        yield f"--to {several}{', '.join(fitting)}, which takes these numbers as they are"
    yield "--to transload, which holds every scheme"
    yield "--to fp32, which dequantizes"


def _fits(source: Checkpoint, target: Target, options: Options) -> bool:
    """True when a plan has no refusals. One module of each kind is asked first: plans of many experts are long."""
    placer = Placer(source, target, options)
    for entry in _one_of_each_kind(source):
        spec = entry.spec if options.act is None or entry.spec is None else replace(entry.spec, act=options.act[0])
        name, shape, expert = next(pieces_of(entry, source))
        if spec is not None:
            placer.quantized(name, spec, shape, expert)
        if placer.refusals:
            return False
    once = type(target.format).once_per_file is not Format.once_per_file
    return not (target.fuses or once) or not plan_port(source, target, options).refusals


def _one_of_each_kind(source: Checkpoint) -> Iterator[Entry]:
    """Quantized entries that differ in scheme, shape, last name or in being an expert."""
    seen = set()
    for entry in source.entries.values():
        kind = (entry.spec, entry.shape, entry.name.rpartition(".")[2], ".experts." in entry.name)
        if entry.spec is not None and kind not in seen:
            seen.add(kind)
            yield entry


def _is_written(format: Format) -> bool:
    generic = isinstance(format, (Plain, Neutral))  # these take everything, and are named apart
    return format.container == "safetensors" and type(format).encode is not Format.encode and not generic


def _by_reason(refusals: dict[str, str]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for name, reason in refusals.items():
        grouped.setdefault(reason, []).append(name)
    return grouped


def _roles(names: Sequence[str]) -> str:
    """Modules that differ only in numbers as one: 24 x model.layers.*.mlp.down_proj."""
    roles: dict[str, int] = {}
    for name in names:
        role = ".".join("*" if part.isdecimal() else part for part in name.split("."))
        roles[role] = roles.get(role, 0) + 1
    return ", ".join(name if count == 1 else f"{count} x {name}" for name, count in roles.items())
