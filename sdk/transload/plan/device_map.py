"""transformers' device_map from a plan: whole layers on the devices of one node, then RAM, then disk.

device_map cannot cut a layer, so the question is not the engine's: a model may be spread by layers where no engine
starts, and layers may live in RAM or on disk. Sizes are the ledger's; a device keeps room for the plan's buffers, and
every layer brings the cache of one request of full context.
"""

from __future__ import annotations

import math

from transload.errors import DoesNotFit
from transload.plan.cluster import Cluster
from transload.plan.fit import Fitter
from transload.plan.overheads import Batch, overheads
from transload.plan.result import Plan, Room
from transload.plan.shapes import Shape
from transload.plan.units import show_bytes

_PREFIX = {"cuda": "", "ascend": "npu:"}


def device_map(plan: Plan) -> dict[str, int | str]:
    """Module name -> device, in model order: 0, 1 .. for CUDA, "npu:0" for Ascend, "cpu", "disk".

    Rooms are filled in order and never returned to, so that a request passes every device once; a head that is tied to
    the embedding lies beside it. Where some layers go to disk, RAM keeps room for the largest of them on its way.
    Raises DoesNotFit when they are too small, naming the first module that finds no place.
    """
    out = _filled(plan, 0)
    if "disk" in out.values():
        out = _filled(plan, max(m.size for m in plan.modules))
    return out


def _filled(plan: Plan, passing: int) -> dict[str, int | str]:
    """passing: bytes of RAM kept free for modules on their way from the disk."""
    out: dict[str, int | str] = {}
    at, left = 0, [room.size - (passing if room.device == "cpu" else 0) for room in plan.rooms]
    for module in plan.modules:
        if module.tied_to:
            out[module.name] = out[module.tied_to]
            continue
        size = module.size + module.cache
        while at < len(left) and left[at] < size:
            at += 1
        if at == len(left):
            raise DoesNotFit(
                f"{plan.model}: {module.name} ({show_bytes(size)}) and what follows fit neither the devices of the "
                "first node nor its RAM and disk; raise host_memory or disk in the cluster file"
            )
        left[at] -= size
        out[module.name] = plan.rooms[at].device
    return out


def rooms(cluster: Cluster, fitters: dict[str, Fitter]) -> tuple[Room, ...]:
    """The places of a cluster's first node in the order in which they are filled: accelerators, RAM, disk."""
    node, found, index = cluster.nodes[0], list[Room](), 0
    host = node.host_memory
    for entry in node.devices:
        device = entry.resolve()
        fitter = fitters[device.platform]
        budget = math.ceil(device.memory * min(fitter.utilization, entry.usable))
        batch = Batch(min(2048, fitter.workload.context), 1)
        lines = overheads(fitter.model, Shape(), 0, True, batch, fitter.workload, fitter.constants)
        room = max(0, budget - sum(line.size for line in lines))
        if device.platform == "cpu":
            host += room + budget * (entry.count - 1)
            continue
        for _ in range(entry.count):
            name = f"{_PREFIX[device.platform]}{index}"
            found.append(Room(device=int(name) if name.isdecimal() else name, size=room))
            index += 1
    found += [Room(device="cpu", size=host)] if host else []
    return (*found, Room(device="disk", size=node.disk)) if node.disk else tuple(found)
