"""What a user should know about a finished port: precision that changes, errors that are large, what engines refuse."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import isfinite

from transload.porting.plan import PortPlan
from transload.porting.precision import executions, warnings
from transload.requantize import Difference

LEAST_SQNR = 15.0  # dB; round-to-nearest to four bits per channel makes about 18, damaged weights 10 and less
_PREDICTION = ("eh_proj", "enorm", "hnorm", "shared_head", "mtp")  # tensors of layers of multi-token prediction


def plan_notes(plan: PortPlan, differences: Mapping[str, Difference | None]) -> Iterator[str]:
    """Sentences, none when everything runs as it was asked for and no module lost much."""
    yield from warnings(executions(plan), plan.target)
    yield from _damage(differences)
    yield from _prediction(plan)


def _damage(differences: Mapping[str, Difference | None]) -> Iterator[str]:
    """Modules that rounding has hurt: the text of the model should be looked at before anybody uses it."""
    low = {n: d for n, d in differences.items() if d is not None and isfinite(d.sqnr_db) and d.sqnr_db < LEAST_SQNR}
    if low:
        name, worst = min(low.items(), key=lambda item: item[1].sqnr_db)
        yield (
            f"{len(low)} modules have an SQNR below {LEAST_SQNR:.0f} dB, {name} {worst.sqnr_db:.1f} dB: compare "
            "the result's text with the source's before using it (transload eval, examples/perplexity.py)"
        )


def _prediction(plan: PortPlan) -> Iterator[str]:
    """vllm-ascend needs layers of multi-token prediction as FLOAT, and another reader of msModelSlim refuses them."""
    if plan.format.name != "msmodelslim":
        return
    parents = {
        o.name.rpartition(f".{part}.")[0] for o in plan.outputs() for part in _PREDICTION if f".{part}." in o.name
    }
    experts = [o.name for o in plan.outputs() if o.spec is None and ".experts." in o.name]
    if any(parent and name.startswith(f"{parent}.") for name in experts for parent in parents):
        yield "experts of multi-token prediction are FLOAT, as vllm-ascend needs them; SGLang refuses such a file"
