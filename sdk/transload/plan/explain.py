"""Why a plan is what it is: the binding constraint, and why every other shape falls short, in sentences and bytes."""

from __future__ import annotations

from transload.plan.result import Parallelism, Plan, Rejected
from transload.plan.units import show_bytes


def shape_name(p: Parallelism) -> str:
    """TP8 PP2 DP4 EP, leaving out what is 1."""
    words = [f"TP{p.tp}"] + [f"{name}{size}" for name, size in (("PP", p.pp), ("DP", p.dp)) if size > 1]
    return " ".join(words + (["EP"] if p.ep else []) + ([f"DCP{p.dcp}"] if p.dcp > 1 else []))


def explain(plan: Plan) -> list[str]:
    """Sentences from the most to the least important: the answer, what binds it, then every rejected shape."""
    lines = [headline(plan)]
    for d in plan.deployments:
        lines.append(f"{d.device}, {shape_name(d.parallelism)}: {d.binding}")
    if plan.fits and plan.bound_tokens:
        lines.append(
            f"no plan of this cluster can hold more than {plan.bound_tokens:,} KV tokens; this one holds "
            f"{plan.kv_tokens:,} ({plan.gap:.1%} below the bound)"
        )
    lines += plan.warnings
    lines += [sentence(r) for r in plan.rejected]
    more = plan.rejected_count - len(plan.rejected)
    return [*lines, f"{more} more shapes fail for the same reasons"] if more > 0 else lines


def headline(plan: Plan) -> str:
    """The answer in one sentence."""
    what = f"{plan.model} ({plan.recipe}) on {plan.cluster}"
    if not plan.fits:
        return f"{what}: does not fit; {plan.reason}"
    parts = [f"{d.replicas} x {shape_name(d.parallelism)} on {d.device}" for d in plan.deployments]
    return (
        f"{what}: fits as {', '.join(parts)}; {plan.kv_tokens:,} KV tokens, {plan.max_concurrency:g} sequences of "
        f"{plan.context:,} tokens"
    )


def sentence(r: Rejected) -> str:
    """Why one shape is not used."""
    short = f" ({show_bytes(r.short_bytes)} short a device)" if r.short_bytes and "short" not in r.reason else ""
    ways = f"; try {', or '.join(r.ways_out)}" if r.ways_out else ""
    return f"{shape_name(r.parallelism)} on {r.device}: {r.reason}{short}{ways}"
