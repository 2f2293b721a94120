"""plan(): from a model, a cluster and a workload to a Plan. Pure: the same question has the same answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from transload.errors import ConfigError
from transload.plan.assemble import deployment, module_places, near_misses, option, parallelism, ranks
from transload.plan.catalogue import Constant, default_constants
from transload.plan.cluster import Cluster, load_cluster
from transload.plan.device_map import rooms
from transload.plan.engines import check_engine_name, engine_for
from transload.plan.fit import Fitter
from transload.plan.model import Model
from transload.plan.pools import DevicePool, device_pools
from transload.plan.result import Option, Parallelism, Plan
from transload.plan.roofline import router_weights
from transload.plan.search import ANY_SHAPE, Candidate, Search, Wish, bound_tokens, pareto, satisfied, score
from transload.plan.sources import ModelSource, load_model
from transload.plan.workload import Workload, read_workload

MOST_REJECTED, MOST_OPTIONS = 60, 24


@dataclass(frozen=True, slots=True)
class Question:
    """Everything that a plan depends on, checked."""

    model: Model
    cluster: Cluster
    workload: Workload
    wish: Wish = ANY_SHAPE
    engine: str | None = None
    utilization: float | None = None
    constants: Mapping[str, Mapping[str, Constant]] | None = None
    models: Mapping[str, Model] | None = None  # platform -> the same model in that vendor's format

    def model_for(self, platform: str) -> Model:
        """The checkpoint that a platform serves."""
        return (self.models or {}).get(platform, self.model)


def ask(
    model: ModelSource,
    cluster: Cluster | Mapping[str, object] | str | Path,
    workload: Workload | Mapping[str, object] | str | Path | None = None,
    recipe: str | None = None,
) -> Question:
    """A checked Question. recipe: one for all, or one for each platform: "cuda=int4-g128,ascend=w4a8"."""
    recipes = _recipes(recipe)
    models = {platform: load_model(model, name) for platform, name in recipes.items() if platform}
    first = next(iter(models.values()), None)
    whole = load_model(model, recipes[""]) if "" in recipes or first is None else first
    return Question(whole, load_cluster(cluster), checked_workload(workload), models=models or None)


def _recipes(text: str | None) -> dict[str, str | None]:
    """Platform -> recipe name; "" is every platform."""
    if text is None or "=" not in text:
        return {"": text}
    out: dict[str, str | None] = {}
    for part in text.split(","):
        platform, _, name = part.strip().partition("=")
        if platform not in default_constants() or not name:
            raise ConfigError(
                f"recipe '{part.strip()[:60]}': expected {', '.join(default_constants())}, '=' and a recipe"
            )
        out[platform] = name
    return out


def plan(
    model: ModelSource,
    cluster: Cluster | Mapping[str, object] | str | Path,
    workload: Workload | Mapping[str, object] | str | Path | None = None,
    *,
    recipe: str | None = None,
    tp: int | None = None,
    pp: int | None = None,
    dp: int | None = None,
    ep: bool | None = None,
    dcp: int | None = None,
    engine: str | None = None,
    gpu_memory_utilization: float | None = None,
    constants: Mapping[str, Mapping[str, Constant]] | None = None,
) -> Plan:
    """The best plan for a model on a cluster, or the reason why there is none (`Plan.fits`, `Plan.reason`).

    model: a folder, a config.json (path, URL or mapping) or a Model. cluster: a YAML file, a mapping, or "8xH100".
    recipe: plan as if quantized so ("int4-g128", "w4a8"; see plan/recipes.py), or one for each platform
    ("cuda=int4-g128,ascend=w4a8"). tp .. dcp fix parts of the shape.
    Raises ConfigError for input that contradicts itself, FormatError for damaged checkpoints.

    >>> plan("config.json", "4xH100", {"context": "32k", "concurrency": 16}, recipe="int4-g128")  # doctest: +SKIP
    """
    question = replace(
        ask(model, cluster, workload, recipe),
        wish=checked_wish(tp, pp, dp, ep, dcp),
        engine=engine,
        utilization=gpu_memory_utilization,
        constants=constants,
    )
    return answer(question)


def checked_workload(workload: Workload | Mapping[str, object] | str | Path | None) -> Workload:
    """A Workload from a mapping or a YAML file. Raises ConfigError naming the field."""
    if isinstance(workload, Workload):
        return workload
    if isinstance(workload, str | Path):
        workload = read_workload(workload)
    try:
        return Workload.model_validate(workload or {})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(p) for p in first["loc"]) or "workload"
        raise ConfigError(f"workload: {place}: {first['msg']}, found {first['input']!r:.60}") from error


def checked_wish(tp: int | None, pp: int | None, dp: int | None, ep: bool | None, dcp: int | None) -> Wish:
    """A Wish of sensible sizes. Raises ConfigError otherwise."""
    return Wish(_wished("tp", tp), _wished("pp", pp), _wished("dp", dp), ep, _wished("dcp", dcp))


def answer(question: Question) -> Plan:
    """The plan for a checked question."""
    fitters, judged = judge(question)
    fitting = [c for c in judged if c.fit.fits]
    chosen = choose(fitting, question.workload)
    plan = Plan(
        model=question.model.name,
        recipe=_recipe_names(question, fitters),
        cluster=question.cluster.name,
        fits=bool(chosen),
        reason="" if chosen else _why_not(judged),
        parallelism=parallelism(chosen[0].fit.shape) if chosen else Parallelism(),
        context=question.workload.context,
        concurrency=question.workload.concurrency,
        objective=question.workload.objective,
        rejected=near_misses([c for c in judged if not c.fit.fits], MOST_REJECTED),
        rejected_count=len(judged) - len(fitting),
        modules=module_places(next(iter(fitters.values()))),
        rooms=rooms(question.cluster, fitters),
    )
    return _with_chosen(plan, question, fitters, chosen, fitting) if chosen else plan


def judge(question: Question) -> tuple[dict[str, Fitter], list[Candidate]]:
    """(fitter of each platform, every candidate judged)."""
    if question.engine is not None:
        check_engine_name(question.engine)
    wanted = _fraction(question.utilization)
    constants = question.constants or default_constants()
    fitters: dict[str, Fitter] = {}
    judged: list[Candidate] = []
    for platform, pools in _by_platform(question.cluster).items():
        engine = engine_for(platform, question.engine)
        utilization = wanted or engine.utilization
        fitter = Fitter(question.model_for(platform), engine, question.workload, constants[platform], utilization)
        fitters[platform] = fitter
        judged += Search(fitter, question.cluster.links, question.wish).candidates(pools)
    return fitters, judged


def choose(fitting: list[Candidate], workload: Workload) -> list[Candidate]:
    """The candidates to deploy: one for the whole cluster, or the best of every pool when replicas add up.

    Pipelines over several pools of a vendor are taken where they beat what the pools do alone.
    """
    if not fitting:
        return []
    if workload.objective in ("latency", "fewest"):
        return [max(fitting, key=lambda c: score(c, workload))]
    alone: dict[int, Candidate] = {}
    for c in (c for c in fitting if len(c.pools) == 1):
        key = id(c.pools[0])
        if key not in alone or score(c, workload) > score(alone[key], workload):
            alone[key] = c
    mixed = [c for c in fitting if len(c.pools) > 1]
    for candidate in sorted(mixed, key=lambda c: score(c, workload), reverse=True):
        replaced = [alone[id(p)] for p in {id(p): p for p in candidate.pools}.values() if id(p) in alone]
        worth = sum(c.tokens if workload.objective == "tokens" else c.rate for c in replaced)
        gain = candidate.tokens if workload.objective == "tokens" else candidate.rate
        if gain > worth:
            others = [c for c in alone.values() if c not in replaced]
            return sorted([candidate, *others], key=lambda c: -c.rate)
    return sorted(alone.values(), key=lambda c: -c.rate)


def _with_chosen(
    plan: Plan, question: Question, fitters: Mapping[str, Fitter], chosen: list[Candidate], fitting: list[Candidate]
) -> Plan:
    weights = router_weights([c.rate for c in chosen])
    using = [fitters[c.pools[0].device.platform] for c in chosen]
    deployments = tuple(deployment(c, f, w) for c, f, w in zip(chosen, using, weights, strict=True))
    placed = [r for n, (c, f) in enumerate(zip(chosen, using, strict=True)) for r in ranks(c, f, n)]
    tokens = sum(c.tokens for c in chosen)
    bound = sum(bound_tokens(f, _by_platform(question.cluster)[platform]) for platform, f in fitters.items())
    return plan.model_copy(
        update={
            "deployments": deployments,
            "ranks": tuple(placed),
            "kv_tokens": tokens,
            "max_concurrency": round(sum(c.concurrency for c in chosen), 2),
            "headroom_bytes": min(c.headroom for c in chosen),
            "binding": deployments[0].binding,
            "bound_tokens": bound,
            "gap": round(max(0.0, 1 - tokens / bound), 4) if bound else 0.0,
            "options": _options(fitting),
            "warnings": _warnings(question, chosen, len(placed)),
        }
    )


def _recipe_names(question: Question, fitters: Mapping[str, Fitter]) -> str:
    names = {platform: question.model_for(platform).recipe.name for platform in fitters}
    if len(set(names.values())) == 1:
        return next(iter(names.values()))
    return ", ".join(f"{name} on {platform}" for platform, name in names.items())


def _options(fitting: list[Candidate]) -> tuple[Option, ...]:
    """The Pareto list, the best of each kind named, fastest first."""
    front = pareto(fitting)
    best: dict[int, list[str]] = {}
    for word, key in _BESTS:
        best.setdefault(id(max(front, key=key)), []).append(word)
    rows = sorted(front, key=lambda c: (id(c) not in best, -c.rate, c.fit.shape))[:MOST_OPTIONS]
    return tuple(option(c, tuple(best.get(id(c), ()))) for c in rows)


_BESTS: tuple[tuple[str, Callable[[Candidate], float]], ...] = (
    ("most KV tokens", lambda c: c.tokens),
    ("highest throughput", lambda c: c.rate),
    ("lowest latency", lambda c: -(c.speed.step if c.speed else 0.0)),
    ("fewest devices an instance", lambda c: -c.fit.shape.devices),
)


def _why_not(judged: list[Candidate]) -> str:
    """The nearest miss, or the rule that stops most shapes."""
    heavy = [c for c in judged if not c.fit.broken]
    if heavy:
        nearest = min(heavy, key=lambda c: (c.fit.short, c.fit.shape))
        return f"nearest is {nearest.fit.shape} on {nearest.pools[0].device.name}: {nearest.fit.reason}"
    if not judged:
        return "no shape: the asked sizes need more devices, or larger islands, than the cluster has"
    first = min(judged, key=lambda c: (len(c.fit.broken), c.fit.shape))
    return f"{first.fit.shape} on {first.pools[0].device.name}: {first.fit.broken[0]}"


def _warnings(question: Question, chosen: list[Candidate], used: int) -> tuple[str, ...]:
    workload, info, out = question.workload, question.model.info, list(question.model.notes)
    held = sum(c.concurrency for c in chosen)
    if not any(satisfied(c, workload) for c in chosen) and held < workload.concurrency:
        out.append(
            f"the KV pool holds {held:.1f} sequences of {workload.context} tokens at once, {workload.concurrency} may "
            "run; longer ones wait or are preempted"
        )
    for c in chosen:
        t, d = c.fit.shape.tp, c.fit.shape.dcp
        copies = t // d if info.mla is not None else max(1, t // info.kv_heads)
        if copies > 1 and info.linear is None:
            way = "DP attention or DCP" if info.mla is not None else "a smaller TP with more replicas"
            out.append(
                f"{c.pools[0].device.name}: every token is cached {copies} times under TP {t}; {way} would hold more"
            )
        experts = info.experts
        if experts is not None and c.fit.shape.ep and experts.count % c.fit.shape.expert_ranks:
            out.append(
                f"{experts.count} experts over {c.fit.shape.expert_ranks} ranks are uneven; the fullest rank decides"
            )
    idle = question.cluster.device_count - used
    if idle and workload.objective in ("throughput", "tokens"):
        out.append(f"{idle} of {question.cluster.device_count} devices stay idle")
    return tuple(out)


def _by_platform(cluster: Cluster) -> dict[str, list[DevicePool]]:
    out: dict[str, list[DevicePool]] = {}
    for pool in device_pools(cluster):
        out.setdefault(pool.device.platform, []).append(pool)
    return out


def _wished(name: str, value: int | None) -> int | None:
    if value is not None and not 1 <= value <= 100_000:
        raise ConfigError(f"{name} {value}: expected a positive number of devices")
    return value


def _fraction(value: float | None) -> float | None:
    if value is not None and not 0 < value <= 1:
        raise ConfigError(f"gpu_memory_utilization {value}: expected more than 0 and at most 1")
    return value
