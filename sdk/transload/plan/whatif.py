"""What-if: single changes that make a model fit, or fit better, the smallest change first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from transload.errors import TransloadError
from transload.plan.catalogue import devices
from transload.plan.cluster import Cluster, Node
from transload.plan.model import build_model
from transload.plan.planner import Question, answer
from transload.plan.recipes import recipe_by_name
from transload.plan.result import Parallelism, Plan
from transload.plan.schemes import Kind, Scheme
from transload.plan.search import ANY_SHAPE


@dataclass(frozen=True, slots=True)
class Change:
    """One change and the plan it leads to. kind: setting, cache, context, quantization, devices. size: for sorting."""

    kind: str
    text: str
    size: float
    fits: bool
    kv_tokens: int
    max_concurrency: float
    parallelism: Parallelism
    reason: str


_RECIPES = (
    "int8-channel",
    "w8a8",
    "fp8",
    "int4-g128-experts",
    "int4-g32-experts",
    "w4a8",
    "int4-g128",
    "int4-g64",
    "int4-g32",
)
_CONTEXT_STEP = 512  # tokens
_ORDER = ("setting", "cache", "context", "quantization", "devices")


def what_if(question: Question, only_fitting: bool = True) -> list[Change]:
    """Single changes to the question, smallest first: settings, then cache, context, quantization, devices.

    only_fitting: leave out changes that still do not fit. Requantizing is something Transload can do
    (`transload quantize`, `transload port --requantize`).
    """
    found = []
    for kind, text, size, changed in _changes(question):
        try:
            plan = answer(changed)
        except TransloadError:
            continue
        if plan.fits or not only_fitting:
            found.append(_change(kind, text, size, plan))
    return sorted(found, key=lambda c: (_ORDER.index(c.kind), c.size, -c.kv_tokens))


def _change(kind: str, text: str, size: float, plan: Plan) -> Change:
    reason = "" if plan.fits else plan.reason
    return Change(kind, text, size, plan.fits, plan.kv_tokens, plan.max_concurrency, plan.parallelism, reason)


def _changes(q: Question) -> Iterator[tuple[str, str, float, Question]]:
    """(kind, words, size, changed question)."""
    if q.wish != ANY_SHAPE:
        yield "setting", "any shape instead of the one asked for", 0.0, replace(q, wish=ANY_SHAPE)
    if (q.utilization or 0.92) < 0.95:
        yield "setting", "--gpu-memory-utilization 0.95", 0.0, replace(q, utilization=0.95)
    small = q.workload.model_copy(update={"batched_tokens": 2048})
    if (q.workload.batched_tokens or 8192) > 2048:
        yield "setting", "--max-num-batched-tokens 2048", 1.0, replace(q, workload=small)
    if q.workload.kv_dtype == "bf16":
        eight = q.workload.model_copy(update={"kv_dtype": "fp8"})
        yield "cache", "--kv-cache-dtype fp8", 0.5, replace(q, workload=eight)
    yield from _shorter(q)
    yield from _requantized(q)
    yield from _more_devices(q)


def _shorter(q: Question) -> Iterator[tuple[str, str, float, Question]]:
    """The longest context that fits, to _CONTEXT_STEP tokens; typical lengths go with it. Nothing when all of it fits.

    A shorter context never makes a fit disappear, so halving the interval finds the longest.
    """
    asked = q.workload.context
    low, high = 0, min(asked - 1, q.model.info.max_position or asked) // _CONTEXT_STEP
    if high < 1 or not _fits(_with_context(q, _CONTEXT_STEP)) or _fits(q):
        return
    while low < high:
        middle = (low + high + 1) // 2
        if _fits(_with_context(q, middle * _CONTEXT_STEP)):
            low = middle
        else:
            high = middle - 1
    context = low * _CONTEXT_STEP
    yield "context", f"--max-model-len {context}", 1 - context / asked, _with_context(q, context)


def _with_context(q: Question, context: int) -> Question:
    update = {"context": context, "prompt": None, "output": None}
    return replace(q, workload=q.workload.model_copy(update=update))


def _fits(q: Question) -> bool:
    try:
        return answer(q).fits
    except TransloadError:
        return False


def _requantized(q: Question) -> Iterator[tuple[str, str, float, Question]]:
    """Fewer bits, and other group sizes when groups are what breaks."""
    bits, seen = _average_bits(q), set[tuple[Scheme, ...]]()
    for name in _RECIPES:
        model = build_model(q.model.info, recipe_by_name(name), q.model.name)
        if model.schemes() in seen:  # w4a8 of a dense model is w8a8
            continue
        seen.add(model.schemes())
        changed = replace(q, model=model, models=None)
        lost = bits - _average_bits(changed)
        regrouped = lost > -5 and any(s.grouped for s in q.model.schemes())
        if lost > 0.05 or (regrouped and model.recipe.name != q.model.recipe.name):
            yield "quantization", f"quantize to {name}", max(abs(lost), 0.01), changed


def _average_bits(q: Question) -> float:
    """Bits a weight, over the layers."""
    sizes = [(w.module.n * w.module.k * w.module.experts, w.scheme) for k in q.model.kinds for w in k if w.module.k > 1]
    bits = sum(n * (s.block[1] * 8 / s.block[0] if s.kind is Kind.BLOCKS else s.bits) for n, s in sizes)
    return bits / max(sum(n for n, _ in sizes), 1)


def _more_devices(q: Question) -> Iterator[tuple[str, str, float, Question]]:
    """More nodes like the first one, and the first kind of device with more memory of the same vendor."""
    first = q.cluster.nodes[0]
    for times in (2, 3, 4):
        more = first.model_copy(update={"count": first.count * times})
        yield (
            "devices",
            f"{times} times the nodes '{first.name}'",
            float(times),
            replace(q, cluster=_with(q.cluster, more)),
        )
    now = first.devices[0].resolve()
    larger = {d.name: d for d in devices().values() if d.vendor == now.vendor and d.memory > now.memory * 1.05}
    for device in sorted(larger.values(), key=lambda d: (d.memory, d.name))[:4]:
        entry = first.devices[0].model_copy(
            update={"type": device.name, "memory": None, "bandwidth": None, "link": None}
        )
        swapped = first.model_copy(update={"devices": (entry, *first.devices[1:])})
        yield (
            "devices",
            f"{device.name} instead of {now.name}",
            device.memory / now.memory,
            replace(q, cluster=_with(q.cluster, swapped)),
        )


def _with(cluster: Cluster, first: Node) -> Cluster:
    return cluster.model_copy(update={"nodes": (first, *cluster.nodes[1:])})
