"""Engine instances of a plan: which nodes each one spans, with which devices, and in which form it starts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transload.errors import ConfigError
from transload.launch.site import Form
from transload.plan.result import Deployment, Parallelism, Plan, Rank

Shape = Literal["one node", "native", "dp", "ray"]
_NODE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,90}[A-Za-z0-9])?")


@dataclass(frozen=True, slots=True)
class NodePart:
    """What one node runs of an instance: its local devices in rank order, and the DP ranks that start there."""

    node: str
    devices: tuple[int, ...]
    device_types: tuple[str, ...]
    dp_ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Instance:
    """One engine: one API, one address. parts[0] is the head.

    number counts all instances of a plan, slot those whose head is on the same node.
    """

    number: int
    slot: int
    deployment: int
    replica: int
    plan: Deployment
    parts: tuple[NodePart, ...]
    shape: Shape

    @property
    def head(self) -> str:
        """The node whose API answers."""
        return self.parts[0].node

    @property
    def parallelism(self) -> Parallelism:
        """TP, PP, DP, EP and DCP of the instance."""
        return self.plan.parallelism


def instances(plan: Plan, form: Form = "auto") -> tuple[Instance, ...]:
    """Every engine instance of a plan, in the plan's order.

    Raises DoesNotFit when the plan does not fit, ConfigError when its ranks contradict its deployments or the form
    cannot start an instance.
    """
    plan.require()
    ranks: dict[tuple[int, int], list[Rank]] = {}
    for rank in plan.ranks:
        ranks.setdefault((rank.deployment, rank.replica), []).append(rank)
    found: list[Instance] = []
    for d, deployment in enumerate(plan.deployments):
        for replica in range(deployment.replicas):
            own = sorted(ranks.pop((d, replica), []), key=lambda r: r.rank)
            _check_ranks(d, replica, deployment, own)
            parts = _parts(own)
            shape = _shape(deployment, parts, own, form)
            slot = sum(other.head == parts[0].node for other in found)
            found.append(Instance(len(found), slot, d, replica, deployment, parts, shape))
    if ranks:
        d, replica = next(iter(ranks))
        raise ConfigError(f"plan: ranks are given for deployment {d}, replica {replica}, which the plan does not have")
    return tuple(found)


def _check_ranks(d: int, replica: int, deployment: Deployment, ranks: Sequence[Rank]) -> None:
    size = deployment.parallelism
    wanted = size.tp * size.pp * size.dp
    if [r.rank for r in ranks] != list(range(wanted)):
        raise ConfigError(
            f"plan: deployment {d}, replica {replica} has {len(ranks)} ranks, its TP {size.tp} x PP {size.pp} x DP "
            f"{size.dp} needs ranks 0 to {wanted - 1}"
        )
    strange = next((r.node for r in ranks if not _NODE.fullmatch(r.node)), None)
    if strange is not None:
        raise ConfigError(f"plan: {strange!r:.80} is no name for a node: letters, digits, '.', '_' and '-' are")
    seats = [(r.node, r.device) for r in ranks]
    if len(set(seats)) != len(seats):
        twice = next(s for s in seats if seats.count(s) > 1)
        raise ConfigError(f"plan: deployment {d}, replica {replica} puts two ranks on device {twice[1]} of {twice[0]}")


def _parts(ranks: Sequence[Rank]) -> tuple[NodePart, ...]:
    nodes = list(dict.fromkeys(r.node for r in ranks))
    return tuple(
        NodePart(
            node,
            tuple(r.device for r in ranks if r.node == node),
            tuple(r.device_type for r in ranks if r.node == node),
            tuple(dict.fromkeys(r.dp_rank for r in ranks if r.node == node)),
        )
        for node in nodes
    )


def _shape(deployment: Deployment, parts: Sequence[NodePart], ranks: Sequence[Rank], form: Form) -> Shape:
    """The form an instance starts in, or ConfigError saying why the asked one cannot start it."""
    if len(parts) == 1:
        return "one node"
    dp_inside = deployment.parallelism.dp > 1 and sum(len(p.dp_ranks) for p in parts) == deployment.parallelism.dp
    order = [r.node for r in ranks]
    native = len({len(p.devices) for p in parts}) == 1 and order == [p.node for p in parts for _ in p.devices]
    if form == "dp" and not dp_inside:
        raise ConfigError(f"form 'dp': a data-parallel rank of {_named(deployment)} spans nodes; use native or ray")
    if form == "native" and not native:
        counts = ", ".join(f"{len(p.devices)} on {p.node}" for p in parts)
        raise ConfigError(f"form 'native' needs equal numbers of devices on every node, found {counts}; use ray")
    shape = form if form != "auto" else "dp" if dp_inside else "native" if native else "ray"
    if shape == "ray" and deployment.parallelism.dp > 1:
        raise ConfigError(f"form 'ray': {_named(deployment)} would hang, vLLM's DP over Ray nodes does (vllm#44878)")
    if shape == "ray" and deployment.platform == "cpu":
        raise ConfigError(f"form 'ray': vLLM on CPU runs {_named(deployment)} in its native form only")
    return shape


def _named(deployment: Deployment) -> str:
    size = deployment.parallelism
    return f"TP {size.tp} x PP {size.pp} x DP {size.dp} on {deployment.device}"
