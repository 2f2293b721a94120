"""The Plan: what the planner answers, as data. It survives JSON unchanged and is equal for equal questions."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from transload.errors import DoesNotFit


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Parallelism(_Value):
    """How one instance is cut. ep is true when experts are spread whole; dcp cuts an MLA cache along tokens."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: bool = False
    dcp: int = 1


class Line(_Value):
    """One line of a ledger. group: weights, kv, activation or overhead. kind: where the number comes from."""

    name: str
    group: Literal["weights", "kv", "activation", "overhead"]
    size: int
    kind: Literal["exact", "measured", "estimated"]


class StageLedger(_Value):
    """Every byte of one pipeline stage's fattest rank. budget is what the engine may use, total what the device has.

    stored: the same weights as codes, scales, zeros and side tensors (g_idx, biases, scale_bias).
    """

    stage: int
    device: str
    layers: tuple[int, int]
    total: int
    budget: int
    available: int
    lines: tuple[Line, ...]
    stored: dict[str, int]


class Speed(_Value):
    """Estimates from a roofline; the truth lies within about `uncertainty` of them (0.4 = 40 %)."""

    decode_tokens_per_second: float
    milliseconds_per_token: float
    first_token_milliseconds: float
    uncertainty: float


class Deployment(_Value):
    """Equal instances of the engine on one vendor's devices. kv_tokens and max_concurrency are of one instance.

    cuts: layers per stage, as VLLM_PP_LAYER_PARTITION takes them; uneven when not the engine's default.
    router_weight: share of the traffic that each of the replicas should get, times the number of replicas.
    """

    engine: str
    recipe: str
    vendor: str
    platform: str
    device: str
    parallelism: Parallelism
    replicas: int
    devices: int
    cuts: tuple[int, ...]
    uneven: bool
    gpu_memory_utilization: float
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_cache_dtype: str
    block_size: int
    speculative_tokens: int = 0
    prefix_caching: bool = True
    vision: bool = True
    kv_blocks: int
    kv_tokens: int
    max_concurrency: float
    router_weight: float
    speed: Speed
    stages: tuple[StageLedger, ...]
    binding: str


class Rank(_Value):
    """One worker on one device; free_bytes is what is left of the device, the engine's reserve included."""

    deployment: int
    replica: int
    rank: int
    node: str
    device: int
    device_type: str
    stage: int
    tp_rank: int
    dp_rank: int
    layers: tuple[int, int]
    experts: int
    weights_bytes: int
    kv_bytes: int
    activation_bytes: int
    overhead_bytes: int
    free_bytes: int


class Rejected(_Value):
    """A shape that does not work, with the first rule it breaks or the bytes it lacks."""

    device: str
    parallelism: Parallelism
    rule: str
    reason: str
    ways_out: tuple[str, ...] = ()
    short_bytes: int = 0


class Option(_Value):
    """A shape that works, for the list of trade-offs. best: what it is the best at."""

    device: str
    parallelism: Parallelism
    replicas: int
    devices: int
    kv_tokens: int
    decode_tokens_per_second: float
    milliseconds_per_token: float
    best: tuple[str, ...] = ()


class ModulePlace(_Value):
    """A module of the checkpoint when whole, for placement by layers: its weights, and the cache of one request.

    tied_to: the module whose numbers it shares, and beside which it is placed.
    """

    name: str
    size: int
    cache: int = 0
    tied_to: str = ""


class Room(_Value):
    """A place for whole modules on the first node: a device with what its buffers leave, RAM, or disk."""

    device: int | str
    size: int


class Plan(_Value):
    """The answer. fits and reason first; then what runs where, and why nothing else does.

    kv_tokens and max_concurrency are over all replicas. bound_tokens: no plan of this cluster can hold more KV tokens
    (relaxation: one copy of the weights, every other usable byte a cache without replication); gap = 1 - kv / bound.
    """

    version: int = 1
    model: str
    recipe: str
    cluster: str
    fits: bool
    reason: str
    parallelism: Parallelism
    deployments: tuple[Deployment, ...] = ()
    ranks: tuple[Rank, ...] = ()
    kv_tokens: int = 0
    max_concurrency: float = 0.0
    headroom_bytes: int = 0
    binding: str = ""
    bound_tokens: int = 0
    gap: float = 0.0
    context: int = 0
    concurrency: int = 0
    objective: str = "throughput"
    options: tuple[Option, ...] = ()
    rejected: tuple[Rejected, ...] = ()
    rejected_count: int = 0
    warnings: tuple[str, ...] = ()
    modules: tuple[ModulePlace, ...] = Field(default=(), repr=False)
    rooms: tuple[Room, ...] = ()

    def require(self) -> Plan:
        """The plan itself when it fits. Raises DoesNotFit with the reason otherwise."""
        if not self.fits:
            raise DoesNotFit(f"{self.model} on {self.cluster}: {self.reason}")
        return self

    def to_json(self) -> str:
        """The plan as JSON text, keys in a fixed order."""
        return self.model_dump_json(indent=2)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote."""
        return cls.model_validate_json(text)

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON, replacing a file of that name in one step."""
        target = Path(path)
        part = target.with_name(target.name + ".part")
        part.write_text(self.to_json() + "\n", encoding="utf-8")
        part.replace(target)

    def device_map(self) -> dict[str, int | str]:
        """transformers' device_map over the devices of the cluster's first node, its RAM and disk: whole layers.

        Raises DoesNotFit when all of them together are too small. See plan/device_map.py.
        """
        from transload.plan.device_map import device_map

        return device_map(self)
