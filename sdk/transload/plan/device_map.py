"""transformers' device_map from a plan: whole layers on the devices of one node, then RAM, then disk.

device_map cannot cut a layer, so a tensor-parallel plan is spread by layers over the same devices. Each device keeps
room for the plan's buffers and for its share of the cache of the layers it gets.
"""

from __future__ import annotations

from transload.errors import DoesNotFit
from transload.plan.result import Plan
from transload.plan.units import show_bytes

_PREFIX = {"cuda": "", "ascend": "npu:", "cpu": "cpu"}


def device_map(plan: Plan, node: str | None = None) -> dict[str, int | str]:
    """Module name -> device, in model order: 0, 1 .. for CUDA, "npu:0" for Ascend, "cpu", "disk".

    Devices are filled in order; what does not fit goes to the node's RAM and then its disk, as far as the cluster
    file allows. Raises DoesNotFit when even those are too small.
    """
    here = plan.ranks[0].node if plan.ranks and node is None else node
    rooms = _rooms(plan, here)
    out: dict[str, int | str] = {}
    at = 0
    for module in plan.modules:
        while at < len(rooms) and rooms[at][1] < module.size:
            at += 1
        if at == len(rooms):
            raise DoesNotFit(
                f"{plan.model}: {module.name} ({show_bytes(module.size)}) and what follows fit neither the devices of "
                f"{here or 'this node'} nor its RAM and disk; raise host_memory or disk in the cluster file"
            )
        name, room = rooms[at]
        rooms[at] = (name, room - module.size)
        out[module.name] = name
    return out


def _rooms(plan: Plan, node: str | None) -> list[tuple[int | str, int]]:
    """(device, bytes for weights) of every place on the node, in the order in which they are filled."""
    rooms: list[tuple[int | str, int]] = []
    total = sum(m.size for m in plan.modules) or 1
    seen: dict[int, int] = {}
    cache = sum(r.kv_bytes for r in plan.ranks if r.node == node)
    for rank in plan.ranks:
        if rank.node != node or rank.device in seen:
            continue
        deployment = plan.deployments[rank.deployment]
        stage = deployment.stages[rank.stage]
        budget = stage.budget - rank.activation_bytes - rank.overhead_bytes
        # Every byte of weights brings its share of the cache with it, at most what the plan gave the cache.
        per_request = cache / max(deployment.max_concurrency * deployment.replicas, 1e-9) if cache else 0.0
        seen[rank.device] = round(budget / (1 + min(per_request, cache) / total))
        rooms.append((_name(deployment.platform, rank.device), seen[rank.device]))
    if plan.offload.host:
        rooms.append(("cpu", plan.offload.host))
    if plan.offload.disk:
        rooms.append(("disk", plan.offload.disk))
    return rooms


def _name(platform: str, index: int) -> int | str:
    prefix = _PREFIX[platform]
    return index if not prefix else prefix if prefix == "cpu" else f"{prefix}{index}"
