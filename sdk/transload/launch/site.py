"""What a plan does not know about the place it runs in: addresses, interfaces, ports, names, extra arguments."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from transload.errors import ConfigError
from transload.plan.cluster import Cluster

_ADDRESS = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._:-]{0,252})")
_INTERFACE = re.compile(r"[A-Za-z0-9^=][A-Za-z0-9._:,=^-]{0,120}")

Form = Literal["auto", "native", "dp", "ray"]
FORMS: tuple[Form, ...] = ("auto", "native", "dp", "ray")


@dataclass(frozen=True, slots=True)
class Site:
    """How nodes are reached and what the services are called.

    nodes: every node that there is, to be sure that the plan was made for this cluster; empty when that is not known.
    addresses, interfaces: by the plan's node names; a node without an address is reached by its name, one without an
    interface gets none in EngineCommand.env, and rendered scripts look it up where they run. port: of the first
    instance's API, the others follow. master_port, rpc_port, ray_port: the first of those that instances talk on.
    form: how instances over several nodes start; "auto" takes the DP form where every data-parallel rank lies inside a
    node, else the engine's native multi-node mode, and Ray where nodes give unequal numbers of devices.
    arguments, env: appended to every engine's command line and environment. additional_config: vllm-ascend's own JSON.
    msmodelslim: whether the Ascend checkpoint needs --quantization ascend; None decides by the plan's recipe.
    hccl_buffsize: MB, held twice by every HCCL communicator. images: container images by platform instead of the
    engines' own. directory: where the rendered folder lies on the nodes, for systemd units.
    """

    nodes: tuple[str, ...] = ()
    addresses: Mapping[str, str] = field(default_factory=dict)
    interfaces: Mapping[str, str] = field(default_factory=dict)
    served_name: str | None = None
    host: str = "0.0.0.0"
    port: int = 8000
    master_port: int = 29501
    rpc_port: int = 13389
    ray_port: int = 6379
    form: Form = "auto"
    arguments: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    additional_config: Mapping[str, object] = field(default_factory=dict)
    msmodelslim: bool | None = None
    hccl_buffsize: int = 200
    images: Mapping[str, str] = field(default_factory=dict)
    directory: str = "/opt/transload"

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ConfigError(f"form '{self.form}': expected one of {', '.join(FORMS)}")
        for name in ("port", "master_port", "rpc_port", "ray_port"):
            value = getattr(self, name)
            if not 1 <= value <= 65535:
                raise ConfigError(f"{name} {value}: expected 1 to 65535")
        for what, values, pattern in (
            ("address", self.addresses, _ADDRESS),
            ("interface", self.interfaces, _INTERFACE),
        ):
            for node, value in values.items():
                if not pattern.fullmatch(value):
                    raise ConfigError(f"{what} of node {node}: {value!r:.80} is not a name or number of one")
        if not self.directory.startswith("/") or re.search(r"[\s'\"\\$%]", self.directory):
            raise ConfigError(f"directory {self.directory!r:.80}: expected an absolute path without blanks and quotes")

    @classmethod
    def of(cls, cluster: Cluster) -> Site:
        """The site that a cluster file describes: addresses and interfaces of its nodes.

        Raises ConfigError when several equal nodes are given one address.
        """
        addresses, interfaces = {}, {}
        for node in cluster.nodes:
            if node.address and node.count > 1 and "{}" not in node.address:
                raise ConfigError(
                    f"node {node.name}: {node.count} nodes cannot share the address {node.address}; "
                    "write {} where their number stands"
                )
            for number, name in enumerate(node.names):
                if node.address:
                    addresses[name] = node.address.replace("{}", str(number))
                if node.interface:
                    interfaces[name] = node.interface
        names = tuple(name for node in cluster.nodes for name in node.names)
        return cls(nodes=names, addresses=addresses, interfaces=interfaces)

    def address(self, node: str) -> str:
        """Where the others reach a node; its own name when nothing better was said."""
        return self.addresses.get(node, node)

    def host_ip(self, node: str) -> str | None:
        """The node's address when it is an IP address, which is what engines bind to; None for a host name."""
        try:
            return str(ipaddress.ip_address(self.address(node)))
        except ValueError:
            return None


def additional(text: str) -> dict[str, object]:
    """vllm-ascend's --additional-config from JSON text. Raises ConfigError unless it is an object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"additional config: not valid JSON: {str(error)[:100]}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"additional config: expected a JSON object, found {type(value).__name__}")
    return value
