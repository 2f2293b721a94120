"""The search: every shape on every pool of devices, exactly, and the choice among those that fit.

Devices of a pool are interchangeable, so a shape is judged once for the pool, not once a placement; a thousand devices
change counts only. A shape is t x p x d devices in TP groups that lie inside one island. Enumerated are all t that an
island offers, all p up to MOST_STAGES, and d up to MOST_REPLICAS of a mixture of experts, EP on and off.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from transload.models.info import Attention
from transload.plan.cluster import Links
from transload.plan.cut import Chain, best_cut, best_order
from transload.plan.fit import Fit, Fitter
from transload.plan.kv import Keeps
from transload.plan.model import Model
from transload.plan.pools import DevicePool
from transload.plan.roofline import Speed, speed
from transload.plan.shapes import Shape, even_cuts
from transload.plan.workload import Workload

MOST_STAGES, MOST_REPLICAS, MOST_MIXED_GROUPS = 16, 64, 16
_ALIKE = 1.1
_ROUND = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


@dataclass(frozen=True, slots=True)
class Wish:
    """A shape, or part of one, that must be used. None: the search decides."""

    tp: int | None = None
    pp: int | None = None
    dp: int | None = None
    ep: bool | None = None
    dcp: int | None = None

    def allows(self, shape: Shape) -> bool:
        """True when the shape has every wished field."""
        return all(
            wished is None or wished == given
            for wished, given in (
                (self.tp, shape.tp), (self.pp, shape.pp), (self.dp, shape.dp), (self.ep, shape.ep),
                (self.dcp, shape.dcp),
            )
        )  # fmt: skip


ANY_SHAPE = Wish()


@dataclass(frozen=True, slots=True)
class Candidate:
    """A shape judged on a pool (or on several of one vendor, one for each stage). replicas: instances that there are.

    pools[i] is the pool of stage i; one entry when all are alike.
    """

    pools: tuple[DevicePool, ...]
    fit: Fit
    replicas: int
    speed: Speed | None = None

    @property
    def tokens(self) -> int:
        """KV tokens of all replicas."""
        return self.fit.pool.tokens * self.fit.shape.dp * self.replicas if self.fit.pool else 0

    @property
    def concurrency(self) -> float:
        """Sequences of full context that all replicas hold together."""
        return self.fit.pool.concurrency * self.fit.shape.dp * self.replicas if self.fit.pool else 0.0

    @property
    def headroom(self) -> int:
        """Bytes a device could lose, on the tightest stage, before one request of full context no longer fits."""
        pool = self.fit.pool
        if pool is None:
            return 0
        needed = pool.request_blocks + 1
        return min(s.available - needed * b for s, b in zip(self.fit.stages, pool.block_bytes, strict=True))

    @property
    def rate(self) -> float:
        """Decoded tokens a second of all replicas."""
        return self.speed.decode_tokens * self.replicas if self.speed else 0.0


@dataclass(slots=True, eq=False)
class Search:
    """Candidates of one platform's pools for one model."""

    fitter: Fitter
    links: Links
    wish: Wish = ANY_SHAPE

    def candidates(self, pools: list[DevicePool]) -> Iterator[Candidate]:
        """Every shape on every pool, fitting or not; then, for a vendor with several pools, mixed pipelines."""
        for pool in pools:
            for shape in self._shapes(pool):
                yield self._judge(pool, shape)
        for vendor in dict.fromkeys(p.device.vendor for p in pools):
            yield from self._mixed([p for p in pools if p.device.vendor == vendor])

    def _shapes(self, pool: DevicePool) -> Iterator[Shape]:
        moe = self.fitter.model.info.experts is not None
        for tp in range(1, pool.largest_island + 1):
            if not _useful_tp(tp, self.fitter.model, self.wish):
                continue
            for pp in range(1, min(pool.groups(tp), MOST_STAGES, self.fitter.layers) + 1):
                for dp in self._replica_counts(pool, tp, pp, moe):
                    for ep in (False, True) if (moe and tp * dp > 1) or self.wish.ep else (False,):
                        for dcp in self._context_ways(tp, dp):
                            shape = Shape(tp, pp, dp, ep, dcp)
                            if self.wish.allows(shape):
                                yield shape

    def _replica_counts(self, pool: DevicePool, tp: int, pp: int, moe: bool) -> list[int]:
        """DP sizes: every one inside a node; beyond that, instances that fill 1, 2, 3, 4, 6, 8, 12 .. whole nodes.

        vLLM's native multi-node mode wants equal numbers of devices on every node (planner facts C.3).
        """
        most = min(pool.groups(tp) // pp, MOST_REPLICAS)
        if self.wish.dp is not None:
            return [self.wish.dp] if self.wish.dp <= most else []
        if not moe:
            return [1]
        node = pool.largest_island
        inside = [d for d in range(1, most + 1) if tp * pp * d <= node or d == 1]
        beyond = [n * node // (tp * pp) for n in _ROUND if n * node % (tp * pp) == 0]
        return sorted({*inside, *(d for d in beyond if 1 < d <= most)})

    def _context_ways(self, tp: int, dp: int) -> list[int]:
        """DCP sizes for MLA caches: none or the whole TP group, where DP does not already spread the cache."""
        info = self.fitter.model.info
        latent = set(info.attention) == {Attention.MLA} and info.indexer is None
        if self.wish.dcp is not None:
            return [self.wish.dcp]
        return [1, tp] if latent and tp > 1 and dp == 1 else [1]

    def _judge(self, pool: DevicePool, shape: Shape) -> Candidate:
        workload = self.fitter.workload
        replicas = pool.groups(shape.tp) // (shape.pp * shape.dp)
        if workload.objective in ("fewest", "latency"):
            replicas = 1
        sequences = max(1, math.ceil(workload.concurrency / (replicas * shape.dp)))
        fit = self.fitter.fit(shape, [pool.device], sequences, pool.usable)
        if not fit.fits and not fit.broken and shape.pp > 1:
            fit = self._recut(fit, [pool] * shape.pp, sequences) or fit
        return self._timed(Candidate((pool,), fit, replicas))

    def _recut(self, fit: Fit, pools: list[DevicePool], sequences: int) -> Fit | None:
        """The same shape with layers cut for its memory instead of evenly, when that fits."""
        chain, capacity = self._chain(fit, pools, sequences)
        cut = best_cut(chain, capacity)
        if cut is None:
            return None
        usable = min(p.usable for p in pools)
        better = self.fitter.fit(fit.shape, [p.device for p in pools], sequences, usable, cut.cuts)
        return better if better.fits else None

    def _chain(self, fit: Fit, pools: list[DevicePool], sequences: int) -> tuple[Chain, list[int]]:
        """Bytes of every layer and its cache, and what each stage's device has for them."""
        shape, fitter = fit.shape, self.fitter
        _, groups = fitter.groups(shape)
        info, ledger = fitter.model.info, fitter.ledger
        experts = shape.experts_on(0, info.experts.count) if info.experts else 0
        weights = [ledger.layer_total(kind, shape, experts) for kind in fitter.model.layer_kind]
        block = [0] * info.layers
        for group in groups:
            for name, cache in zip(group.names, group.caches, strict=True):
                block[min(int(name.split(".")[1]), info.layers - 1)] += -(-cache.page // len(groups))
        speculation = fitter.workload.speculative_tokens > 0
        first = sum(p.total for p in ledger.ends(shape, True, False, speculation).values())
        last = sum(p.total for p in ledger.ends(shape, False, True, speculation).values())
        even = fitter.stages_of(shape, [p.device for p in pools], sequences, min(p.usable for p in pools))
        per_layer = max(s.overhead_bytes for s in even)
        return Chain(tuple(weights), tuple(block), first, last), [s.budget - per_layer for s in even]

    def _mixed(self, pools: list[DevicePool]) -> Iterator[Candidate]:
        """Pipelines over unlike devices of one vendor, one instance over all of them, stages in the best order."""
        if len(pools) < 2 or len(pools) > 4:
            return
        for tp in range(1, min(p.largest_island for p in pools) + 1):
            counts = [p.groups(tp) for p in pools]
            stages = sum(counts)
            if not 2 <= stages <= min(MOST_MIXED_GROUPS, self.fitter.layers):
                continue
            if not _useful_tp(tp, self.fitter.model, self.wish):
                continue
            for ep in (False, True) if self.fitter.model.info.experts and tp > 1 else (False,):
                shape = Shape(tp, stages, 1, ep)
                if self.wish.allows(shape):
                    yield self._mixed_shape(shape, pools, counts)

    def _mixed_shape(self, shape: Shape, pools: list[DevicePool], counts: list[int]) -> Candidate:
        sequences = self.fitter.workload.concurrency
        order = [pool for pool, count in zip(pools, counts, strict=True) for _ in range(count)]
        usable = min(p.usable for p in pools)
        fit = self.fitter.fit(shape, [p.device for p in order], sequences, usable)
        if fit.broken:
            return Candidate(tuple(order), fit, 1)
        chain, capacity = self._chain(fit, order, sequences)
        starts = [sum(counts[:k]) for k in range(len(counts))]
        cut = best_order(chain, [capacity[s] for s in starts], counts)
        if cut is not None:
            order = [pools[k] for k in cut.kinds]
            fit = self.fitter.fit(shape, [p.device for p in order], sequences, usable, cut.cuts)
        return self._timed(Candidate(tuple(order), fit, 1))

    def _timed(self, candidate: Candidate) -> Candidate:
        fit = candidate.fit
        if not fit.fits:
            return candidate
        spans = fit.shape.devices > min(p.largest_island for p in candidate.pools)
        return replace(candidate, speed=speed(self.fitter, fit, self.links, spans))


def _useful_tp(tp: int, model: Model, wish: Wish) -> bool:
    """TP sizes worth judging: those that divide the query heads, and those asked for (to say why they fail)."""
    return wish.tp == tp or (wish.tp is None and model.info.heads % tp == 0)


def is_uneven(fit: Fit) -> bool:
    """True when the layers are not cut the way the engine does by default."""
    return fit.cuts != even_cuts(sum(fit.cuts), fit.shape.pp)


def satisfied(candidate: Candidate, workload: Workload) -> bool:
    """True when the wished concurrency fits at full context."""
    return candidate.concurrency >= workload.concurrency


def score(candidate: Candidate, workload: Workload) -> tuple[float, ...]:
    """Larger is better. Holding every sequence comes first, then the objective, then fewer and simpler devices.

    Throughputs within a step of _ALIKE count as equal: a roofline does not tell them apart, a person does.
    """
    assert candidate.speed is not None
    shape = candidate.fit.shape
    odd = float(bool(shape.dp & (shape.dp - 1)))
    simple = (-float(shape.pp), -odd, -float(shape.devices), -float(shape.dcp), -float(shape.tp))
    value = {
        "throughput": float(round(math.log(max(candidate.rate, 1e-9), _ALIKE))),
        "latency": -candidate.speed.step,
        "tokens": float(candidate.tokens),
        "fewest": -float(shape.devices * candidate.replicas),
    }[workload.objective]
    return (float(satisfied(candidate, workload)), value, *simple, float(candidate.tokens))


def pareto(candidates: list[Candidate]) -> list[Candidate]:
    """Candidates that no other beats in tokens, rate, latency and number of devices at once."""
    points = [(c, (c.tokens, c.rate, -(c.speed.step if c.speed else 0.0), -c.fit.shape.devices)) for c in candidates]
    points.sort(key=lambda p: p[1], reverse=True)
    kept: list[tuple[Candidate, tuple[float, ...]]] = []
    for candidate, point in points:
        if not any(all(a >= b for a, b in zip(other, point, strict=True)) for _, other in kept):
            kept.append((candidate, point))
    return [c for c, _ in kept]


def bound_tokens(fitter: Fitter, pools: list[DevicePool]) -> int:
    """KV tokens that no plan on these pools exceeds: all usable bytes but one copy of the weights, none replicated."""
    info, one = fitter.model.info, Shape()
    experts = info.experts.count if info.experts else 0
    weights = sum(p.total for p in fitter.ledger.stage(one, 0, info.layers, experts, False).values())
    usable = sum(p.count * math.ceil(p.device.memory * min(fitter.utilization, p.usable)) for p in pools)
    caches, _ = fitter.groups(one)
    token = sum(c.token_bytes for c in caches.values() if c.keeps is Keeps.TOKENS)
    return max(0, usable - weights) // token if token else 0
