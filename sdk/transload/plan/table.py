"""A plan as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from transload.plan.explain import headline, sentence, shape_name
from transload.plan.result import Deployment, Plan, Rank, StageLedger
from transload.plan.units import show_bytes
from transload.plan.whatif import Change

_COLOURS = {"weights": "blue", "kv": "green", "activation": "yellow", "overhead": "magenta", "free": "bright_black"}
_WIDTH = 16
MOST_RANKS, MOST_REASONS = 16, 12


def plan_table(plan: Plan, reasons: int = MOST_REASONS) -> RenderableType:
    """Headline, deployments, one bar a device, the ledger, the trade-offs and why other shapes fail."""
    parts: list[RenderableType] = [Text(headline(plan), style="bold green" if plan.fits else "bold red"), ""]
    if plan.fits:
        parts += [_deployments(plan), "", _devices(plan), "", *[_ledger(d, plan) for d in plan.deployments]]
        parts += ["", _options(plan)] if len(plan.options) > 1 else []
    parts += [Text(f"! {w}", style="yellow") for w in plan.warnings]
    if plan.rejected and reasons:
        parts += ["", Text(f"Why not ({plan.rejected_count} shapes rejected):", style="bold")]
        parts += [Text("  " + sentence(r)) for r in plan.rejected[:reasons]]
    return Group(*parts)


def changes_table(changes: Sequence[Change], fits: bool = False) -> RenderableType:
    """What-if: single changes that fit, the smallest first. fits: the plan already does."""
    title = "What single changes would give" if fits else "What would make it fit"
    table = _table("change", "then fits as", "KV tokens", "sequences", title=title)
    for c in changes:
        name = shape_name(c.parallelism) if c.fits else "does not fit"
        table.add_row(escape(c.text), name, f"{c.kv_tokens:,}", f"{c.max_concurrency:g}")
    return table if changes else Text("no single change makes it fit", style="yellow")


def _deployments(plan: Plan) -> RenderableType:
    table = _table("devices", "shape", "times", "KV tokens", "seqs", "tokens/s", "ms/token", "share")
    engines = dict.fromkeys(f"{d.engine} on {d.device}" for d in plan.deployments)
    for d in plan.deployments:
        table.add_row(
            f"{d.devices} x {d.device}",
            shape_name(d.parallelism),
            str(d.replicas),
            f"{d.kv_tokens * d.replicas:,}",
            f"{d.max_concurrency * d.replicas:.4g}",
            f"~{d.speed.decode_tokens_per_second:g}",
            f"~{d.speed.milliseconds_per_token:g}",
            f"{d.router_weight:.0%}",
        )
    cuts = [Text(f"{d.device}: layers cut {','.join(map(str, d.cuts))}") for d in plan.deployments if d.uneven]
    note = f"{', '.join(engines)}; speeds are estimates, within about {plan.deployments[0].speed.uncertainty:.0%}"
    return Group(table, *cuts, Text(note, style="dim"))


def _devices(plan: Plan) -> Table:
    table = _table("device", "layers", "weights", "KV cache", "buffers", "free", "")
    rows = _alike(plan.ranks)
    for ranks in rows[:MOST_RANKS]:
        r = ranks[0]
        total = plan.deployments[r.deployment].stages[r.stage].total
        sizes = (r.weights_bytes, r.kv_bytes, r.activation_bytes, r.overhead_bytes, r.free_bytes)
        shown = (r.weights_bytes, r.kv_bytes, r.activation_bytes + r.overhead_bytes, r.free_bytes)
        table.add_row(_where(ranks), _layers(r), *map(show_bytes, shown), _bar(sizes, total))
    if len(rows) > MOST_RANKS:
        table.add_row(f"... {sum(len(r) for r in rows[MOST_RANKS:])} more devices", *[""] * 6)
    return table


def _alike(ranks: Sequence[Rank]) -> list[list[Rank]]:
    """Neighbours that hold the same, in one row."""
    rows: list[list[Rank]] = []
    for r in ranks:
        same = rows and rows[-1][0].node == r.node and _content(rows[-1][0]) == _content(r)
        rows[-1].append(r) if same else rows.append([r])
    return rows


def _content(r: Rank) -> tuple[int | tuple[int, int], ...]:
    return r.layers, r.experts, r.weights_bytes, r.kv_bytes, r.free_bytes


def _where(ranks: Sequence[Rank]) -> str:
    first, last = ranks[0].device, ranks[-1].device
    return f"{ranks[0].node}:{first}" if len(ranks) == 1 else f"{ranks[0].node}:{first}-{last}"


def _layers(rank: Rank) -> str:
    experts = f" x{rank.experts}E" if rank.experts else ""
    return f"{rank.layers[0]}-{rank.layers[1] - 1}{experts}"


def _bar(sizes: Sequence[int], total: int) -> Text:
    bar = Text()
    for size, colour in zip(sizes, _COLOURS.values(), strict=True):
        bar.append("█" * round(_WIDTH * max(size, 0) / max(total, 1)), style=colour)
    return bar


def _ledger(deployment: Deployment, plan: Plan) -> Table:
    stages = _distinct(deployment.stages)
    title = f"Ledger of {shape_name(deployment.parallelism)} on {deployment.device}, bytes a device"
    table = _table("line", *(f"stage {s.stage} ({s.device})" for s in stages), "", title=title)
    names = dict.fromkeys((line.group, line.name) for s in stages for line in s.lines)
    for group, name in names:
        found = [next((x for x in s.lines if (x.group, x.name) == (group, name)), None) for s in stages]
        kind = next(x.kind for x in found if x)
        cells = [show_bytes(x.size) if x else "-" for x in found]
        table.add_row(Text(name, style=_COLOURS[group]), *cells, Text(kind, style="" if kind == "exact" else "dim"))
    table.add_row("of which codes / scales", *(_stored(s) for s in stages), "exact", end_section=True)
    table.add_row("engine may use", *(show_bytes(s.budget) for s in stages), "")
    return table


def _stored(stage: StageLedger) -> str:
    side = stage.stored["scales"] + stage.stored["zeros"] + stage.stored["side"]
    return f"{show_bytes(stage.stored['codes'])} / {show_bytes(side)}"


def _distinct(stages: Sequence[StageLedger]) -> list[StageLedger]:
    """First, a middle and last stage: the others look like the middle one."""
    return list(stages) if len(stages) <= 3 else [stages[0], stages[1], stages[-1]]


def _options(plan: Plan) -> Table:
    table = _table("shape", "devices", "KV tokens", "tokens/s", "ms/token", "best at", title="Trade-offs (Pareto list)")
    for o in plan.options[:8]:
        table.add_row(
            f"{o.replicas} x {shape_name(o.parallelism)}",
            f"{o.devices} x {o.device}",
            f"{o.kv_tokens:,}",
            f"~{o.decode_tokens_per_second:g}",
            f"~{o.milliseconds_per_token:g}",
            ", ".join(o.best),
        )
    return table


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(box=None, title=title, title_justify="left", title_style="bold", pad_edge=False)
    for i, name in enumerate(columns):
        right = i > 0 and name in _NUMBERS
        table.add_column(name, justify="right" if right else "left", no_wrap=name in ("device", "devices"))
    return table


_NUMBERS = (
    "times",
    "KV tokens",
    "sequences",
    "seqs",
    "tokens/s",
    "ms/token",
    "share",
    "weights",
    "KV cache",
    "buffers",
    "free",
)
