"""Asking the target before any work whether it takes what a recipe makes."""

from __future__ import annotations

from transload.checkpoint import Checkpoint
from transload.errors import CannotHold
from transload.models.roles import kept_in_float
from transload.porting.plan import pieces_of
from transload.porting.target import Target, find_targets
from transload.quant import QuantSpec
from transload.quantize.assign import Assignment
from transload.rewrite import exact_forms

_DTYPES = "scales, not"  # what formats.limits says of a scale's dtype


def check_target(source: Checkpoint, assignment: Assignment, to: str) -> Target:
    """The first target of the name that takes some form of every scheme.

    Raises CannotHold, listing kinds of modules, where there is none. An engine that loads several formats is answered
    for by the one that refuses fewest kinds.
    """
    found = [(target, _refusals(target, assignment)) for target in find_targets(to)]
    target, fewest = min(found, key=lambda one: len(one[1]))
    if fewest:
        lines = "; ".join(f"{reason} ({name} and the like)" for reason, name in fewest.items())
        raise CannotHold(f"'{to}' does not take what the recipe makes of {source.path}: {lines}")
    return target


def left_in_float(source: Checkpoint, assignment: Assignment, target: Target) -> dict[str, str]:
    """Entries that are quantized in the source, that the recipe leaves, and that the target does not take as they are.

    They are written as floats. Returns the reason by entry. Heads and embeddings are not among them: a port decides.
    """
    out: dict[str, str] = {}
    for entry in source.entries.values():
        if entry.spec is None or kept_in_float(entry.name) == "embedding":
            continue
        name, shape, _ = next(pieces_of(entry, source))
        if name not in assignment.modules and len(shape) == 2:
            reason = _refusal(target, name, entry.spec, (shape[0], shape[1]))
            if reason is not None:
                out[entry.name] = reason
    return out


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
