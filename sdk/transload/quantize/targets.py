"""Asking the target before any work whether it takes what a recipe makes."""

from __future__ import annotations

from transload.checkpoint import Checkpoint
from transload.errors import CannotHold
from transload.porting.target import find_targets
from transload.quantize.assign import Assignment
from transload.rewrite import exact_forms


def check_target(source: Checkpoint, assignment: Assignment, to: str) -> None:
    """Raises CannotHold, listing kinds of modules, when no form of a scheme is taken by any target of the name."""
    refusals: dict[str, str] = {}
    for target in find_targets(to):
        refusals = {}
        asked: dict[object, str | None] = {}
        for name, assigned in assignment.modules.items():
            shape = assignment.shapes[name]
            key = (assigned.spec, shape, ".experts." in name)
            if key not in asked:
                forms = list(exact_forms(assigned.spec))
                reasons = [target.refuses(name, form, shape) for form in forms]
                asked[key] = None if None in reasons else reasons[0]
            reason = asked[key]
            if reason is not None:
                refusals.setdefault(f"{assigned.spec}: {reason}", name)
        if not refusals:
            return
    lines = "; ".join(f"{reason} ({name} and the like)" for reason, name in refusals.items())
    raise CannotHold(f"'{to}' does not take what the recipe makes of {source.path}: {lines}")
