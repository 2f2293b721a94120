"""Speed from first principles: the larger of memory time and arithmetic time, plus collectives. An estimate.

Real engines reach a part of these rates and add launch costs; published numbers lie within about UNCERTAINTY of the
result for large models. It ranks shapes; it does not replace a benchmark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transload.plan.catalogue import DeviceType
from transload.plan.cluster import Links
from transload.plan.fit import Fit, Fitter, Stage
from transload.plan.modules import Part
from transload.plan.shapes import Shape

UNCERTAINTY = 0.4
_MEMORY_EFFICIENCY, _COMPUTE_EFFICIENCY = 0.75, 0.5
_LAUNCH = 5e-6  # seconds a layer for launching its kernels from a graph


@dataclass(frozen=True, slots=True)
class Speed:
    """Of one instance: tokens a second over all sequences, seconds for one token of a sequence, and prefill."""

    decode_tokens: float
    step: float
    prefill_tokens: float

    def first_token(self, prompt: int) -> float:
        """Seconds until a prompt of that length has its first token on an idle instance."""
        return prompt / self.prefill_tokens + self.step


def speed(fitter: Fitter, fit: Fit, links: Links, spans_nodes: bool) -> Speed:
    """The estimate for a shape that fits, with as many sequences as the pool holds at average length."""
    shape, workload = fit.shape, fitter.workload
    assert fit.pool is not None
    held = max(1, min(fit.sequences, int(fit.pool.tokens / max(workload.average_tokens, 1))))
    micro = max(1, math.ceil(held / shape.pp))
    times = [_decode(fitter, fit, i, micro, links, spans_nodes) for i in range(shape.pp)]
    prefill = max(_prefill(fitter, stage, shape, fit.batch.tokens) for stage in fit.stages)
    in_flight = min(held, micro * shape.pp)
    rate = shape.dp * in_flight / (max(times) * shape.pp if held >= shape.pp else sum(times))
    return Speed(rate, sum(times), shape.dp * fit.batch.tokens / prefill)


def _decode(fitter: Fitter, fit: Fit, index: int, batch: int, links: Links, spans_nodes: bool) -> float:
    """Seconds of one stage for one step of `batch` sequences on each data-parallel rank."""
    stage, shape, info = fit.stages[index], fit.shape, fitter.model.info
    touched = stage.weight_bytes - sum(
        stage.weights[p].total for p in (Part.EMBEDDING, Part.VISION) if p in stage.weights
    )
    if info.experts is not None and Part.EXPERTS in stage.weights:
        share = 1 - (1 - info.experts.per_token / info.experts.count) ** (batch * shape.dp)
        touched -= round(stage.weights[Part.EXPERTS].total * (1 - share))
    assert fit.pool is not None
    per_request = fit.pool.request_blocks * fit.pool.block_bytes[index]
    cache = batch * per_request * min(1.0, fitter.workload.average_tokens / fitter.workload.context)
    memory = (touched + cache) / (stage.device.bandwidth * _MEMORY_EFFICIENCY)
    compute = 2 * batch * _active(fitter, stage, shape) / (stage.device.rate(fitter.operands) * _COMPUTE_EFFICIENCY)
    layers = stage.stop - stage.start
    return max(memory, compute) + _collectives(fitter, stage, shape, batch, links, spans_nodes) + layers * _LAUNCH


def _prefill(fitter: Fitter, stage: Stage, shape: Shape, tokens: int) -> float:
    compute = 2 * tokens * _active(fitter, stage, shape) / (stage.device.rate(fitter.operands) * _COMPUTE_EFFICIENCY)
    return max(compute, stage.weight_bytes / (stage.device.bandwidth * _MEMORY_EFFICIENCY), 1e-6)


def _active(fitter: Fitter, stage: Stage, shape: Shape) -> float:
    """Parameters that a token is multiplied with on one rank of the stage."""
    info, total = fitter.model.info, 0.0
    for kind, count in fitter.kinds_between(stage.start, stage.stop):
        total += count * fitter.active(kind)
    total += info.vocab * info.hidden if stage.stop == info.layers else 0
    return total / shape.tp


def _collectives(fitter: Fitter, stage: Stage, shape: Shape, batch: int, links: Links, spans_nodes: bool) -> float:
    """Two all-reduces a layer inside the TP group, and the exchange of tokens between expert ranks."""
    info, layers = fitter.model.info, stage.stop - stage.start
    message, seconds = batch * info.hidden * 2, 0.0
    if shape.tp > 1:
        ring = 2 * (shape.tp - 1) / shape.tp * message / stage.device.link
        seconds += 2 * layers * (ring + 8e-6)
    if shape.dcp > 1:  # queries are gathered and partial results merged in every layer
        seconds += layers * (2 * message / stage.device.link + 16e-6)
    if info.experts is not None and shape.dp > 1:
        link = min(stage.device.link, links.between_nodes) if spans_nodes else stage.device.link
        seconds += layers * (2 * message * info.experts.per_token / link + 2 * (links.latency if spans_nodes else 8e-6))
    if shape.pp > 1:
        seconds += message / links.between_nodes + links.latency
    return seconds


def router_weights(rates: Sequence[float]) -> list[float]:
    """Shares of the traffic in proportion to predicted rates, summing to 1."""
    total = sum(rates)
    return [round(r / total, 4) if total else 0.0 for r in rates]


def slowest(devices: Sequence[DeviceType]) -> DeviceType:
    """The device that a group of unlike devices waits for."""
    return min(devices, key=lambda d: (d.bandwidth, d.name))
