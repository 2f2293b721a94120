"""From chosen candidates to a Plan: ledgers, ranks, and the words that explain them."""

from __future__ import annotations

from collections.abc import Sequence

from transload.plan.fit import NO_BATCH, Fitter, Stage
from transload.plan.kv import blocks_of_request
from transload.plan.modules import Part
from transload.plan.place import seats
from transload.plan.result import (
    Deployment,
    Line,
    ModulePlace,
    Option,
    Parallelism,
    Rank,
    Rejected,
    Speed,
    StageLedger,
)
from transload.plan.roofline import UNCERTAINTY
from transload.plan.search import Candidate, is_uneven
from transload.plan.shapes import Shape
from transload.plan.units import show_bytes


def parallelism(shape: Shape) -> Parallelism:
    """A shape as data."""
    return Parallelism(tp=shape.tp, pp=shape.pp, dp=shape.dp, ep=shape.ep, dcp=shape.dcp)


def deployment(candidate: Candidate, fitter: Fitter, weight: float) -> Deployment:
    """One deployment of a chosen candidate. weight: its share of the traffic."""
    fit, pool, speed = candidate.fit, candidate.fit.pool, candidate.speed
    assert pool is not None
    assert speed is not None
    workload, kinds = fitter.workload, dict.fromkeys(p.device.name for p in candidate.pools)
    caches, _ = fitter.groups(fit.shape)
    return Deployment(
        engine=fitter.engine.label,
        recipe=fitter.model.recipe.name,
        vendor=candidate.pools[0].device.vendor,
        platform=fitter.engine.platform,
        device=" + ".join(kinds),
        parallelism=parallelism(fit.shape),
        replicas=candidate.replicas,
        devices=fit.shape.devices * candidate.replicas,
        cuts=fit.cuts,
        uneven=is_uneven(fit),
        gpu_memory_utilization=min(fitter.utilization, *(p.usable for p in candidate.pools)),
        max_model_len=workload.context,
        max_num_seqs=fit.sequences,
        max_num_batched_tokens=fit.batch.tokens,
        kv_cache_dtype=workload.kv_dtype,
        block_size=max((c.block for c in caches.values()), default=fitter.engine.block),
        speculative_tokens=workload.speculative_tokens,
        prefix_caching=workload.prefix_caching,
        vision=workload.vision or fitter.model.info.vision is None,
        kv_blocks=pool.blocks,
        kv_tokens=pool.tokens * fit.shape.dp,
        max_concurrency=round(pool.concurrency * fit.shape.dp, 2),
        router_weight=weight,
        speed=Speed(
            decode_tokens_per_second=_digits(candidate.rate),
            milliseconds_per_token=_digits(speed.step * 1e3),
            first_token_milliseconds=_digits(speed.first_token(workload.prompt or workload.average_tokens) * 1e3),
            uncertainty=UNCERTAINTY,
        ),
        stages=tuple(_stage_ledger(i, s, pool.blocks * pool.block_bytes[i]) for i, s in enumerate(fit.stages)),
        binding=_binding(candidate),
    )


def _stage_ledger(index: int, stage: Stage, kv_bytes: int) -> StageLedger:
    order = list(Part)
    weights = sorted(stage.weights.items(), key=lambda item: order.index(item[0]))
    lines = [Line(name=part.value, group="weights", size=size.total, kind="exact") for part, size in weights]
    lines.append(Line(name="KV cache", group="kv", size=kv_bytes, kind="exact"))
    for o in stage.overheads:
        group = "activation" if o.activation else "overhead"
        kind = "measured" if o.kind == "measured" else "estimated"
        lines.append(Line.model_validate({"name": o.name, "group": group, "size": o.size, "kind": kind}))
    stored = {
        name: sum(getattr(size, name) for size in stage.weights.values())
        for name in ("codes", "scales", "zeros", "side")
    }
    return StageLedger(
        stage=index,
        device=stage.device.name,
        layers=(stage.start, stage.stop),
        total=stage.device.memory,
        budget=stage.budget,
        available=stage.available,
        lines=tuple(lines),
        stored=stored,
    )


def ranks(candidate: Candidate, fitter: Fitter, number: int) -> list[Rank]:
    """Every rank with its device and bytes. Ranks with fewer experts are lighter; the cache is the same on all."""
    fit = candidate.fit
    assert fit.pool is not None
    shape, out = fit.shape, []
    sizes: dict[tuple[int, int], int] = {}
    experts = fitter.model.info.experts
    for seat in seats(candidate):
        stage = fit.stages[seat.stage]
        held = shape.experts_on(seat.dp_rank * shape.tp + seat.tp_rank, experts.count) if experts else 0
        if (seat.stage, held) not in sizes:
            sizes[seat.stage, held] = _weight_bytes(fitter, shape, stage, held)
        weights, cache = sizes[seat.stage, held], fit.pool.blocks * fit.pool.block_bytes[seat.stage]
        activation = sum(o.size for o in stage.overheads if o.activation)
        overhead = stage.overhead_bytes - activation
        out.append(
            Rank(
                deployment=number,
                replica=seat.replica,
                rank=(seat.dp_rank * shape.pp + seat.stage) * shape.tp + seat.tp_rank,
                node=seat.node,
                device=seat.device,
                device_type=seat.device_type,
                stage=seat.stage,
                tp_rank=seat.tp_rank,
                dp_rank=seat.dp_rank,
                layers=(stage.start, stage.stop),
                experts=held,
                weights_bytes=weights,
                kv_bytes=cache,
                activation_bytes=activation,
                overhead_bytes=overhead,
                free_bytes=stage.device.memory - weights - cache - activation - overhead,
            )
        )
    return out


def _weight_bytes(fitter: Fitter, shape: Shape, stage: Stage, experts: int) -> int:
    parts = fitter.ledger.stage(shape, stage.start, stage.stop, experts, fitter.workload.speculative_tokens > 0)
    return sum(size.total for part, size in parts.items() if part in stage.weights)


def _binding(candidate: Candidate) -> str:
    """What stops the pool from being larger, in a sentence."""
    fit = candidate.fit
    assert fit.pool is not None
    sizes = fit.pool.block_bytes
    tightest = min(range(len(fit.stages)), key=lambda i: fit.stages[i].available // max(sizes[i], 1))
    stage = fit.stages[tightest]
    where = f"stage {tightest}: " if fit.shape.pp > 1 else ""
    return (
        f"{where}{stage.device.name} gives {show_bytes(stage.budget)}; weights take {show_bytes(stage.weight_bytes)}, "
        f"buffers {show_bytes(stage.overhead_bytes)}, which leaves {show_bytes(stage.available)} for {fit.pool.blocks} "
        "KV blocks"
    )


def option(candidate: Candidate, best: tuple[str, ...]) -> Option:
    """A candidate as one row of the trade-offs."""
    assert candidate.speed is not None
    return Option(
        device=" + ".join(dict.fromkeys(p.device.name for p in candidate.pools)),
        parallelism=parallelism(candidate.fit.shape),
        replicas=candidate.replicas,
        devices=candidate.fit.shape.devices * candidate.replicas,
        kv_tokens=candidate.tokens,
        decode_tokens_per_second=_digits(candidate.rate),
        milliseconds_per_token=_digits(candidate.speed.step * 1e3),
        best=best,
    )


def rejected(candidate: Candidate) -> Rejected:
    """Why a candidate does not work."""
    fit = candidate.fit
    device = " + ".join(dict.fromkeys(p.device.name for p in candidate.pools))
    shape = parallelism(fit.shape)
    if fit.broken:
        reason = "; ".join(v.text for v in fit.broken)
        ways = tuple(dict.fromkeys(way for v in fit.broken for way in v.ways_out))
        return Rejected(device=device, parallelism=shape, rule=fit.broken[0].rule, reason=reason, ways_out=ways)
    return Rejected(device=device, parallelism=shape, rule="memory", reason=fit.reason, short_bytes=fit.short)


def module_places(fitter: Fitter) -> tuple[ModulePlace, ...]:
    """Whole modules with their bytes, in the order of the model: for placement by layers."""
    info, names = fitter.model.info, fitter.model.info.names
    one, ledger = Shape(), fitter.ledger
    experts = info.experts.count if info.experts else 0
    first = ledger.ends(one, True, False, False)
    last = ledger.ends(one, False, True, False)
    serving, (caches, _) = fitter.serving(one, NO_BATCH), fitter.groups(one)
    cached = [0] * info.layers
    for name, cache in caches.items():
        cached[min(int(name.split(".")[1]), info.layers - 1)] += cache.page * blocks_of_request(cache, serving)
    layers = [
        ModulePlace(name=f"{names.layers}.{i}", size=ledger.layer_total(kind, one, experts), cache=cached[i])
        for i, kind in enumerate(fitter.model.layer_kind)
    ]
    vision = sum(first[p].total for p in (Part.VISION, Part.OTHER) if p in first)
    tower = [ModulePlace(name=info.vision.prefix, size=vision)] if info.vision is not None else []
    embed = ModulePlace(name=names.embed, size=first[Part.EMBEDDING].total)
    head = 0 if info.tied else last[Part.HEAD].total if Part.HEAD in last else 0
    return (
        *tower,
        embed,
        *layers,
        ModulePlace(name=names.norm, size=last[Part.NORM].total),
        ModulePlace(name=names.head, size=head, tied_to=names.embed if info.tied else ""),
    )


def near_misses(candidates: Sequence[Candidate], limit: int) -> tuple[Rejected, ...]:
    """Rejected shapes worth reading: those short of the fewest bytes first, then one for each broken rule and TP."""
    by_bytes = sorted((c for c in candidates if not c.fit.broken), key=lambda c: (c.fit.short, c.fit.shape))
    seen: dict[tuple[str, str, int, bool], Candidate] = {}
    for c in sorted((c for c in candidates if c.fit.broken), key=_usual_first):
        seen.setdefault((c.pools[0].device.name, c.fit.broken[0].text, c.fit.shape.tp, c.fit.shape.ep), c)
    rules = list(seen.values())[: max(limit - 10, limit // 2)]
    return tuple(rejected(c) for c in [*rules, *by_bytes[: limit - len(rules)]])


def _usual_first(candidate: Candidate) -> tuple[bool, int, int, Shape]:
    """Sizes that people ask for come first: TP a power of two, no DP."""
    shape = candidate.fit.shape
    return bool(shape.tp & (shape.tp - 1)), shape.dp, shape.pp, shape


def _digits(value: float) -> float:
    """Three significant digits: more would pretend to know."""
    return float(f"{value:.3g}")
