"""Does one shape fit on one kind of device, and what does its KV pool hold: the arithmetic of an engine's start."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from transload.plan.caches import layer_caches
from transload.plan.catalogue import Constant, DeviceType
from transload.plan.constraints import Violation, device_violation, violations
from transload.plan.engines import Engine
from transload.plan.kv import Cache, Group, Pool, Serving, blocks_of_request, group_layers, pool_of_groups
from transload.plan.ledger import Ledger, PartBytes
from transload.plan.model import Model
from transload.plan.modules import Part
from transload.plan.overheads import Batch, Overhead, overheads
from transload.plan.schemes import Kind
from transload.plan.shapes import Shape, even_cuts
from transload.plan.units import show_bytes
from transload.plan.workload import Workload

NO_BATCH = Batch(0, 0)


@dataclass(frozen=True, slots=True)
class Stage:
    """One pipeline stage on its fattest rank, in bytes. budget: what the engine may use of the device."""

    start: int
    stop: int
    device: DeviceType
    budget: int
    weights: PartBytes
    weight_bytes: int
    overheads: tuple[Overhead, ...]

    @property
    def overhead_bytes(self) -> int:
        """All lines beside weights and cache."""
        return sum(line.size for line in self.overheads)

    @property
    def available(self) -> int:
        """Bytes left for the KV pool; negative when even the weights do not fit."""
        return self.budget - self.weight_bytes - self.overhead_bytes


@dataclass(frozen=True, slots=True)
class Fit:
    """The outcome for one shape. sequences: per data-parallel rank. short: missing bytes on the binding stage.

    reason is empty when it fits. pool is of one data-parallel rank.
    """

    shape: Shape
    fits: bool
    reason: str
    stages: tuple[Stage, ...] = ()
    pool: Pool | None = None
    sequences: int = 0
    batch: Batch = NO_BATCH
    short: int = 0
    binding: int = 0
    broken: tuple[Violation, ...] = ()

    @property
    def cuts(self) -> tuple[int, ...]:
        """Layers of each stage."""
        return tuple(s.stop - s.start for s in self.stages)


@dataclass(slots=True, eq=False)
class Fitter:
    """Answers `fit` for many shapes of one model on one engine, remembering what shapes share."""

    model: Model
    engine: Engine
    workload: Workload
    constants: Mapping[str, Constant]
    utilization: float
    ledger: Ledger = field(init=False)
    operands: str = field(init=False)
    _groups: dict[tuple[int, int], tuple[dict[str, Cache], list[Group]]] = field(default_factory=dict)
    _stage_groups: dict[tuple[int, int, tuple[tuple[int, int], ...]], list[list[Group]]] = field(default_factory=dict)
    _parts: dict[tuple[int, int, int, bool, bool, int, int], PartBytes] = field(default_factory=dict)
    _active: dict[int, int] = field(default_factory=dict)
    _devices: dict[str, tuple[Violation, ...]] = field(default_factory=dict)
    _broken: dict[tuple[int, int, bool, int, bool], tuple[Violation, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.model, self.engine.platform)
        kinds = {s.kind for s in self.model.schemes()}
        self.operands = "int8" if Kind.INT_ACT in kinds else "fp8" if Kind.FP8 in kinds else "bf16"

    def kinds_between(self, start: int, stop: int) -> list[tuple[int, int]]:
        """(kind, number) of the layers start .. stop - 1."""
        return list(Counter(self.model.layer_kind[start:stop]).items())

    def active(self, kind: int) -> int:
        """Parameters of a layer that one token is multiplied with, over all ranks."""
        if kind not in self._active:
            experts = self.model.info.experts
            self._active[kind] = sum(
                w.module.n * w.module.k * (experts.per_token if experts and w.module.experts > 1 else 1)
                for w in self.model.kinds[kind]
                if w.module.k > 1 and w.module.part is not Part.ABSORBED
            )
        return self._active[kind]

    def broken(self, shape: Shape) -> tuple[Violation, ...]:
        """Rules that the shape breaks."""
        many_stages = shape.pp > self.model.info.layers
        key = (shape.tp, shape.dp, shape.ep, shape.dcp, many_stages)
        if key not in self._broken:
            self._broken[key] = tuple(violations(self.model, shape, self.engine))
        return self._broken[key]

    def fit(
        self,
        shape: Shape,
        devices: Sequence[DeviceType],
        sequences: int,
        usable: float = 1.0,
        cuts: Sequence[int] | None = None,
    ) -> Fit:
        """The outcome of a shape whose stage i runs on devices[i] (one entry: all stages alike).

        sequences: max-num-seqs of a data-parallel rank. cuts: layers of each stage, vLLM's default when None.
        """
        unfit = [v for d in dict.fromkeys(d.arch for d in devices) for v in self._unfit(d, devices)]
        broken = (*unfit, *self.broken(shape))
        if broken:
            return Fit(shape, False, str(broken[0]), broken=broken)
        if self.workload.context > (self.model.info.max_position or self.workload.context):
            longest = self.model.info.max_position
            text = f"context {self.workload.context} is longer than the model's {longest} positions"
            return Fit(shape, False, text, broken=(Violation("context", text, (f"--context {longest}",)),))
        cuts = cuts or even_cuts(self.layers, shape.pp)
        stages, batch = self._stages(shape, devices, sequences, usable, cuts)
        poorest = min(range(len(stages)), key=lambda i: stages[i].available)
        if stages[poorest].available <= 0:
            return _too_heavy(shape, stages, poorest, sequences, batch)
        return self._with_pool(shape, stages, sequences, batch)

    def _unfit(self, arch: str, devices: Sequence[DeviceType]) -> tuple[Violation, ...]:
        """What a kind of device cannot run of this model."""
        if arch not in self._devices:
            found = device_violation(self.model, next(d for d in devices if d.arch == arch))
            self._devices[arch] = (found,) if found is not None else ()
        return self._devices[arch]

    def stages_of(
        self, shape: Shape, devices: Sequence[DeviceType], sequences: int, usable: float
    ) -> tuple[Stage, ...]:
        """Ledgers of the stages under the engine's default cut."""
        return self._stages(shape, devices, sequences, usable, even_cuts(self.layers, shape.pp))[0]

    @property
    def layers(self) -> int:
        """Decoder layers of the model."""
        return self.model.info.layers

    def serving(self, shape: Shape, batch: Batch) -> Serving:
        """The engine's settings that its cache depends on."""
        steps = self.engine.async_steps if shape.pp == 1 else shape.pp + 1
        states = (2 if self.workload.prefix_caching else 1) + self.workload.speculative_tokens
        return Serving(self.workload.context, steps * batch.tokens, shape.dcp, states)

    def groups(self, shape: Shape) -> tuple[dict[str, Cache], list[Group]]:
        """Caches by layer and cache groups of the whole model."""
        key = (shape.tp, shape.dcp)
        if key not in self._groups:
            caches = layer_caches(self.model.info, shape, self.engine, self.workload)
            self._groups[key] = (caches, group_layers(caches))
        return self._groups[key]

    def stage_groups(self, shape: Shape, bounds: Sequence[tuple[int, int]]) -> list[list[Group]]:
        """Cache groups as each stage sees them."""
        _, groups = self.groups(shape)
        if len(bounds) == 1:
            return [groups]
        key = (shape.tp, shape.dcp, tuple(bounds))
        if key not in self._stage_groups:
            ranks = [[g.only(self._names(groups, start, stop)) for g in groups] for start, stop in bounds]
            self._stage_groups[key] = ranks
        return self._stage_groups[key]

    def _names(self, groups: Sequence[Group], start: int, stop: int) -> frozenset[str]:
        end = math.inf if stop == self.layers else stop
        return frozenset(n for g in groups for n in g.names if start <= int(n.split(".")[1]) < end)

    def _stages(
        self, shape: Shape, devices: Sequence[DeviceType], sequences: int, usable: float, cuts: Sequence[int]
    ) -> tuple[tuple[Stage, ...], Batch]:
        kinds = list(devices) * shape.pp if len(devices) == 1 else list(devices)
        smallest = min(d.memory for d in kinds)
        tokens = self.workload.batched_tokens or self.engine.default_batched_tokens(smallest)
        batch = Batch(max(tokens, sequences), sequences)
        stages, start = [], 0
        for count, device in zip(cuts, kinds, strict=True):
            stages.append(self._stage(shape, start, start + count, device, batch, usable))
            start += count
        return tuple(stages), batch

    def _stage(self, shape: Shape, start: int, stop: int, device: DeviceType, batch: Batch, usable: float) -> Stage:
        info, speculation = self.model.info, self.workload.speculative_tokens > 0
        experts = shape.experts_on(0, info.experts.count) if info.experts else 0
        key = (shape.tp, 1 if shape.ep else shape.dp, experts, shape.ep, shape.dp > 1, start, stop)
        if key not in self._parts:
            self._parts[key] = self.ledger.stage(shape, start, stop, experts, speculation)
        weights = self._parts[key]
        if not self.workload.vision:
            weights = {part: size for part, size in weights.items() if part.value != "vision tower"}
        lines = overheads(self.model, shape, stop - start, stop == info.layers, batch, self.workload, self.constants)
        budget = math.ceil(device.memory * min(self.utilization, usable))
        total = sum(p.total for p in weights.values())
        return Stage(start, stop, device, budget, weights, total, tuple(lines))

    def _with_pool(self, shape: Shape, stages: tuple[Stage, ...], sequences: int, batch: Batch) -> Fit:
        groups = self.stage_groups(shape, [(s.start, s.stop) for s in stages])
        serving = self.serving(shape, batch)
        pool = pool_of_groups(groups, [s.available for s in stages], serving)
        needed, words = self._demand(groups[0], pool, serving, sequences)
        gaps = [(needed + 1) * size - s.available for size, s in zip(pool.block_bytes, stages, strict=True)]
        binding = max(range(len(stages)), key=lambda i: gaps[i])
        short = max(gaps[binding], 0)
        reason = ""
        if short:
            have = show_bytes(stages[binding].available)
            need = show_bytes((needed + 1) * pool.block_bytes[binding])
            where = f" on stage {binding}" if shape.pp > 1 else ""
            reason = f"KV cache for {words} needs {need} a device, {have} are left{where}: {show_bytes(short)} short"
        return Fit(shape, not short, reason, stages, pool, sequences, batch, short, binding)

    def _demand(self, groups: Sequence[Group], pool: Pool, serving: Serving, sequences: int) -> tuple[int, str]:
        """(blocks that must be in the pool, what for)."""
        full = f"one request of {self.workload.context} tokens"
        needs = [(pool.request_blocks, full)]
        if self.workload.hold_all:
            needs.append((pool.request_blocks * sequences, f"{sequences} requests of {self.workload.context} tokens"))
        if typical := self.workload.typical_tokens:
            each = sum(max(blocks_of_request(c, serving, typical) for c in g.caches) for g in groups)
            needs.append((each * sequences, f"{sequences} requests of {typical} tokens"))
        return max(needs)


def _too_heavy(shape: Shape, stages: tuple[Stage, ...], worst: int, sequences: int, batch: Batch) -> Fit:
    stage = stages[worst]
    over = -stage.available
    what = "weights" if stage.weight_bytes > stage.budget else "weights and buffers"
    where = f" on stage {worst}" if shape.pp > 1 else ""
    reason = (
        f"{what} need {show_bytes(stage.weight_bytes + stage.overhead_bytes)} a device, "
        f"{show_bytes(stage.budget)} may be used{where}: {show_bytes(over)} short before any KV cache"
    )
    return Fit(shape, False, reason, stages, None, sequences, batch, over, worst)
