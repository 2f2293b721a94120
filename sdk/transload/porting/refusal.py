"""One error for everything that a target cannot take, short enough to read also when it is a thousand experts."""

from __future__ import annotations

from dataclasses import replace

from transload.checkpoint import Checkpoint
from transload.errors import CannotHold
from transload.porting.plan import Action, PortPlan, plan_port
from transload.requantize import parse_spec

# Schemes that a target may take where it does not take the source's, most faithful first.
_SCHEMES = ("int8-g32", "int8-g128", "int8-channel", "int8-channel-a8", "int4-g32-asym", "int4-g128", "int4-channel-a8")


def refused(source: Checkpoint, plan: PortPlan) -> CannotHold:
    """The error that lists every refusal of a plan, modules grouped by reason and role."""
    quantized = sum(output.action is not Action.COPY for output in plan.outputs())
    lines = [f"{reason} ({_roles(names)})" for reason, names in _by_reason(plan.refusals).items()]
    scheme = _scheme_that_works(source, plan)
    ways = "another target"
    if scheme is not None:
        ways = f"--requantize {scheme}, which changes these modules and reports the error; or another target"
    return CannotHold(
        f"'{plan.target.name}' cannot take {len(plan.refusals)} of {quantized} quantized modules exactly: "
        f"{'; '.join(lines)}. What would work: {ways}: 'transload' holds every scheme, 'fp32' "
        "dequantizes"
    )


def _scheme_that_works(source: Checkpoint, plan: PortPlan) -> str | None:
    """The first scheme with which the port would run, other than the one that was given."""
    for text in _SCHEMES:
        options = replace(plan.options, requantize=parse_spec(text))
        if not plan_port(source, plan.target, options).refusals:
            return text
    return None


def _by_reason(refusals: dict[str, str]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for name, reason in refusals.items():
        grouped.setdefault(reason, []).append(name)
    return grouped


def _roles(names: list[str]) -> str:
    """Modules that differ only in numbers as one: 24 x model.layers.*.mlp.down_proj."""
    roles: dict[str, int] = {}
    for name in names:
        role = ".".join("*" if part.isdecimal() else part for part in name.split("."))
        roles[role] = roles.get(role, 0) + 1
    return ", ".join(name if count == 1 else f"{count} x {name}" for name, count in roles.items())
