"""Device pools: the interchangeable devices of a cluster, with the islands they lie in."""

from __future__ import annotations

from dataclasses import dataclass

from transload.plan.catalogue import DeviceType
from transload.plan.cluster import Cluster


@dataclass(frozen=True, slots=True)
class Island:
    """Devices of one node that a fast link joins. first: local index of the first one."""

    node: str
    first: int
    size: int


@dataclass(frozen=True, slots=True)
class DevicePool:
    """All devices of one kind. usable: the fraction of memory that other programs leave free."""

    device: DeviceType
    usable: float
    islands: tuple[Island, ...]

    @property
    def count(self) -> int:
        """Devices in the pool."""
        return sum(i.size for i in self.islands)

    def groups(self, tp: int) -> int:
        """Tensor-parallel groups of `tp` devices that fit into single islands."""
        return sum(i.size // tp for i in self.islands)

    @property
    def largest_island(self) -> int:
        """Devices of the largest island."""
        return max(i.size for i in self.islands)


def device_pools(cluster: Cluster) -> list[DevicePool]:
    """The pools of a cluster, in the order in which their devices are first named."""
    found: dict[tuple[DeviceKey, float], tuple[DeviceType, list[Island]]] = {}
    for node in cluster.nodes:
        entries, first = [], 0
        for entry in node.devices:
            entries.append((entry.resolve(), entry.usable, first, entry.count))
            first += entry.count
        for name in node.names:
            for device, usable, start, count in entries:
                islands = found.setdefault((_key(device), usable), (device, []))[1]
                step = min(device.island, count)
                islands += [Island(name, start + i, min(step, count - i)) for i in range(0, count, step)]
    return [DevicePool(device, usable, tuple(islands)) for (_, usable), (device, islands) in found.items()]


DeviceKey = tuple[str, str, str, int, int, int, int]


def _key(d: DeviceType) -> DeviceKey:
    return d.name, d.vendor, d.platform, d.memory, d.bandwidth, d.link, d.island
