"""One process of an engine: what to start, where, and how to tell that it is up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Role = Literal["head", "worker"]


@dataclass(frozen=True, slots=True)
class EngineCommand:
    """One process to start on one node, without a shell.

    argv: the program and its arguments; argv[0] is a bare name ("vllm" or "ray") that the caller may replace by a path.
    env: variables to set on top of the inherited environment. setup: commands to run to their end first (ray start).
    node: the plan's name of the machine. address: where the other nodes reach it. head_address: the node that answers.
    role: "head" serves HTTP on `port` of head_address, "worker" serves none and waits for the head. health_path: the
    head answers 200 there once the weights are loaded. instance: which of the plan's engine instances (all replicas of
    all deployments, numbered from 0) the process belongs to; an instance is up when every process of it runs and its
    head is healthy. devices: the node's local device numbers, in the order of the ranks that run on them.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str]
    node: str
    port: int
    role: Role
    health_path: str
    address: str
    head_address: str
    instance: int
    deployment: int
    replica: int
    devices: tuple[int, ...]
    setup: tuple[tuple[str, ...], ...] = field(default=())

    @property
    def name(self) -> str:
        """A short name that is unique within a plan: engine-0 for a head, engine-0-worker-NODE for the others."""
        base = f"engine-{self.instance}"
        return base if self.role == "head" else f"{base}-worker-{self.node}"

    @property
    def health_url(self) -> str:
        """The address that tells whether the instance answers; the same for its head and its workers."""
        host = f"[{self.head_address}]" if ":" in self.head_address else self.head_address
        return f"http://{host}:{self.port}{self.health_path}"
