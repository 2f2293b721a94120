"""Asking the target before any work whether it takes what a recipe makes."""

from __future__ import annotations

from transload.checkpoint import Checkpoint
from transload.errors import CannotHold
from transload.porting.target import Target, find_targets
from transload.quant import QuantSpec
from transload.quantize.assign import Assignment
from transload.rewrite import exact_forms

_DTYPES = "scales, not"  # what formats.limits says of a scale's dtype


def check_target(source: Checkpoint, assignment: Assignment, to: str) -> None:
    """Raises CannotHold, listing kinds of modules, when no form of a scheme is taken by any target of the name.

    An engine that loads several formats is answered for by the one that refuses fewest kinds.
    """
    found = [_refusals(target, assignment) for target in find_targets(to)]
    fewest = min(found, key=len)
    if fewest:
        lines = "; ".join(f"{reason} ({name} and the like)" for reason, name in fewest.items())
        raise CannotHold(f"'{to}' does not take what the recipe makes of {source.path}: {lines}")


def _refusals(target: Target, assignment: Assignment) -> dict[str, str]:
    """Reasons, each with the first module that it is for."""
    refusals: dict[str, str] = {}
    asked: dict[object, str | None] = {}
    for name, assigned in assignment.modules.items():
        shape = assignment.shapes[name]
        key = (assigned.spec, shape, ".experts." in name)
        if key not in asked:
            asked[key] = _refusal(target, name, assigned.spec, shape)
        reason = asked[key]
        if reason is not None:
            refusals.setdefault(f"{assigned.spec}: {reason}", name)
    return refusals


def _refusal(target: Target, name: str, spec: QuantSpec, shape: tuple[int, int]) -> str | None:
    """None when a form is taken; else the engine's reason where the format holds one, or the format's."""
    forms = list(exact_forms(spec))
    reasons = [target.refuses(name, form, shape) for form in forms]
    if None in reasons:
        return None
    own = [r for f, r in zip(forms, reasons, strict=True) if (f.bits, f.zero) == (spec.bits, spec.zero)]
    held = (reason for form, reason in zip(forms, reasons, strict=True) if not target.format.cannot_hold(form, shape))
    other = (reason for reason in own if reason and _DTYPES not in reason)  # a wider scale is written where asked
    return next(held, None) or next(other, reasons[0])
