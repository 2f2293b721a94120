"""Which device runs which rank: tensor-parallel groups inside islands, instances on as few nodes as possible."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from transload.plan.pools import DevicePool
from transload.plan.search import Candidate


@dataclass(frozen=True, slots=True)
class Seat:
    """One device for one rank. device is its local index in the node."""

    replica: int
    dp_rank: int
    stage: int
    tp_rank: int
    node: str
    device: int
    device_type: str


def seats(candidate: Candidate) -> Iterator[Seat]:
    """A device for every rank of every replica, in the engine's rank order (DP outermost, then PP, then TP).

    Groups are taken island by island in the cluster's order, so that the groups of an instance are neighbours.
    """
    shape = candidate.fit.shape
    free = {id(pool): _groups(pool, shape.tp) for pool in candidate.pools}
    for replica in range(candidate.replicas):
        for dp_rank in range(shape.dp):
            for stage in range(shape.pp):
                pool = candidate.pools[stage] if len(candidate.pools) > 1 else candidate.pools[0]
                node, first = next(free[id(pool)])
                for tp_rank in range(shape.tp):
                    yield Seat(replica, dp_rank, stage, tp_rank, node, first + tp_rank, pool.device.name)


def _groups(pool: DevicePool, tp: int) -> Iterator[tuple[str, int]]:
    """(node, first local device) of every group of tp devices in the pool."""
    for island in pool.islands:
        for start in range(0, island.size - tp + 1, tp):
            yield island.node, island.first + start
