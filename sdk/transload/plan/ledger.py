"""Weight bytes on one rank, per part of the model: exact, from shapes and schemes, for any parallel shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from transload.plan.model import Model, Weight
from transload.plan.modules import Cut, Module, Part
from transload.plan.schemes import Parts, held, held_order
from transload.plan.shapes import Shape

VOCABULARY_STEP = 64  # vLLM pads vocabularies to this many rows (DEFAULT_VOCAB_PADDING_SIZE)

# What vLLM 0.32 builds on every pipeline stage although only the ends need it, by family.
REPEATED: Mapping[str, tuple[Part, ...]] = {
    "chatglm": (Part.EMBEDDING, Part.NORM, Part.HEAD),
    "qwen3_moe": (Part.EMBEDDING, Part.NORM, Part.HEAD),
    "qwen3_next": (Part.EMBEDDING, Part.HEAD),
    "qwen3_5": (Part.EMBEDDING, Part.VISION),
    "deepseek": (Part.VISION,),
}

PartBytes = dict[Part, Parts]


def piece(module: Module, ways: int) -> tuple[int, int]:
    """(N, K) of a module's piece on one of `ways` tensor-parallel ranks, rounded up where it does not divide."""
    n, k = module.n, module.k
    if module.cut is Cut.ROWS:
        return -(-n // ways), k
    if module.cut is Cut.COLUMNS:
        return n, -(-k // ways)
    if module.cut is Cut.KV_ROWS:
        return n // module.heads * max(1, -(-module.heads // ways)), k
    if module.cut is Cut.VOCABULARY:
        return -(-padded_vocabulary(n) // ways), k
    return n, k


def padded_vocabulary(rows: int) -> int:
    """Rows of an embedding or head in vLLM, a multiple of 64."""
    return -(-rows // VOCABULARY_STEP) * VOCABULARY_STEP


def weight_bytes(weight: Weight, ways: int, experts: int, platform: str) -> Parts:
    """Bytes of one weight (all `experts` local copies of it) on one of `ways` ranks. A bias has the width of bf16."""
    module = weight.module
    n, k = piece(module, ways)
    one = held(weight.scheme, n, k, platform, module.experts > 1)
    if module.bias:
        one = one.plus(Parts(side=2 * n))
    return one.times(experts if module.experts > 1 else 1)


def order_bytes(module: Module, experts: int) -> int:
    """Bytes of g_idx and of the order that sorts it, for all local copies of a column-parallel weight."""
    return held_order(module.k) * (experts if module.experts > 1 else 1)


@dataclass(slots=True, eq=False)
class Ledger:
    """Weight bytes of one model on one platform, remembered between questions."""

    model: Model
    platform: str
    _layers: dict[tuple[int, int, int, int, bool], PartBytes] = field(default_factory=dict)
    _totals: dict[tuple[int, int, int, int, bool], int] = field(default_factory=dict)

    def layer(self, kind: int, shape: Shape, experts: int) -> PartBytes:
        """Bytes of a decoder layer on a rank with `experts` local experts."""
        key = self._key(kind, shape, experts)
        if key not in self._layers:
            self._layers[key] = self._sum(self.model.kinds[kind], shape, experts)
        return self._layers[key]

    def layer_total(self, kind: int, shape: Shape, experts: int) -> int:
        """The same as one number."""
        key = self._key(kind, shape, experts)
        if key not in self._totals:
            self._totals[key] = sum(p.total for p in self.layer(kind, shape, experts).values())
        return self._totals[key]

    def ends(self, shape: Shape, first: bool, last: bool, speculation: bool) -> PartBytes:
        """Bytes of what lies outside the decoder layers on the first and last stage.

        A tied head costs nothing where the embedding lies, and a whole table on the last of several stages.
        """
        m, out, repeated = self.model, PartBytes(), REPEATED.get(self.model.info.family, ())
        if first or Part.EMBEDDING in repeated:
            _add(out, Part.EMBEDDING, weight_bytes(m.embed, shape.tp, 1, self.platform))
        if first or Part.VISION in repeated:
            for part, size in self._sum(m.vision, shape, 0).items():
                _add(out, part, size)
            if m.other_bytes:
                _add(out, Part.OTHER, Parts(codes=m.other_bytes))
        if last or Part.NORM in repeated:
            _add(out, Part.NORM, weight_bytes(m.norm, 1, 1, self.platform))
        if (last or Part.HEAD in repeated) and not (m.info.tied and Part.EMBEDDING in out):
            head = m.embed if m.info.tied else m.head
            _add(out, Part.HEAD, weight_bytes(head, shape.tp, 1, self.platform))
        if last and speculation:
            self._add_mtp(out, shape, first)
        return out

    def _add_mtp(self, out: PartBytes, shape: Shape, first: bool) -> None:
        count = self.model.info.mtp_layers
        experts = shape.experts_on(0, self.model.info.experts.count) if self.model.info.experts else 0
        for part, size in self._sum(self.model.mtp, shape, experts).items():
            _add(out, part, size.times(count))
        if not first:
            _add(out, Part.MTP, weight_bytes(self.model.embed, shape.tp, 1, self.platform))

    def stage(self, shape: Shape, start: int, stop: int, experts: int, speculation: bool) -> PartBytes:
        """Bytes per part on a rank of the stage that runs layers start .. stop - 1."""
        info = self.model.info
        out = self.ends(shape, start == 0, stop == info.layers, speculation)
        for kind, count in Counter(self.model.layer_kind[start:stop]).items():
            for part, size in self.layer(kind, shape, experts).items():
                _add(out, part, size.times(count))
        return out

    def _sum(self, weights: tuple[Weight, ...], shape: Shape, experts: int) -> PartBytes:
        """Modules of one fused matmul share the order of their inputs: g_idx counts once."""
        out, ordered = PartBytes(), set[tuple[str, Part]]()
        for weight in weights:
            module = weight.module
            ways = ways_of(module, shape, shared_whole(self.model, self.platform))
            size = weight_bytes(weight, ways, experts, self.platform)
            if weight.scheme.act_order and (module.fused, module.part) in ordered:
                size = size.plus(Parts(side=-order_bytes(module, experts)))
            if module.fused:
                ordered.add((module.fused, module.part))
            _add(out, module.part, size)
        return out

    def _key(self, kind: int, shape: Shape, experts: int) -> tuple[int, int, int, int, bool]:
        expert_ways = 1 if shape.ep else shape.expert_ranks
        return kind, shape.tp, expert_ways, experts, shape.sequence_parallel_experts


def ways_of(module: Module, shape: Shape, whole: bool) -> int:
    """How many ranks share one weight: experts flatten TP over DP, or stay whole under EP; whole: `shared_whole`."""
    if module.experts > 1:
        return 1 if shape.ep else shape.expert_ranks
    if (module.part is Part.SHARED or ".shared_expert" in module.name) and whole and shape.sequence_parallel_experts:
        return 1
    return shape.tp


def shared_whole(model: Model, platform: str) -> bool:
    """True when shared experts stay whole where sequences are split between experts.

    vllm-ascend switches that mode off (its platform names an all-to-all backend outside vLLM's list).
    """
    experts = model.info.experts
    return experts is not None and experts.shared_whole and platform != "ascend"


def _add(out: PartBytes, part: Part, size: Parts) -> None:
    out[part] = out[part].plus(size) if part in out else size
