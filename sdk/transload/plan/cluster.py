"""The cluster: nodes, their devices and links, as a person writes them in YAML."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from transload.errors import ConfigError
from transload.plan.catalogue import DeviceType, Platform, device
from transload.plan.units import Size
from transload.plan.yamlfile import read_yaml

MOST_DEVICES = 100_000


class Devices(BaseModel):
    """Equal devices in a node: by catalogue name, or described by memory and rates (which also override the catalogue).

    island: how many of them the fast link joins; the catalogue's number by default, at most `count`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: str = Field(min_length=1, max_length=80, description="catalogue name, or a name of your own")
    count: int = Field(default=1, ge=1, le=4096)
    vendor: str | None = None
    platform: Platform | None = None
    memory: Size | None = Field(default=None, gt=0)
    bandwidth: Size | None = Field(default=None, gt=0)
    link: Size | None = Field(default=None, gt=0)
    island: int | None = Field(default=None, ge=1, le=4096)
    flops: dict[str, float] | None = None
    usable: float = Field(default=1.0, gt=0, le=1, description="fraction that other programs leave free")

    def resolve(self) -> DeviceType:
        """The device with every field known. Raises ConfigError for an unknown name without a full description."""
        if self.memory is not None and self.platform is not None:
            base: dict[str, object] = {
                "name": self.type,
                "vendor": self.vendor or self.platform,
                "platform": self.platform,
            }
            base |= {"memory": self.memory, "bandwidth": self.bandwidth or 10**12, "link": self.link or 16 * 10**9}
            base |= {"island": self.island or self.count, "flops": self.flops or {}}
            return DeviceType.model_validate(base)
        known = device(self.type)
        given = {k: v for k, v in self.model_dump().items() if k in _OVERRIDES and v is not None}
        return known.model_copy(update=given)


_OVERRIDES = ("vendor", "platform", "memory", "bandwidth", "link", "island", "flops")


class Node(BaseModel):
    """One machine, or `count` equal ones named name-0, name-1, ..."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=80, pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$")
    count: int = Field(default=1, ge=1, le=MOST_DEVICES)
    address: str | None = Field(
        default=None, max_length=253, description="how other nodes reach it; {} is the number in NAME-0, NAME-1 .."
    )
    interface: str | None = Field(default=None, max_length=120, description="network interface with this address")
    devices: tuple[Devices, ...] = Field(min_length=1)
    host_memory: Size = Field(default=0, description="RAM that offloading may use")
    disk: Size = Field(default=0, description="disk that offloading may use")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the machines this entry stands for."""
        return (self.name,) if self.count == 1 else tuple(f"{self.name}-{i}" for i in range(self.count))


class Links(BaseModel):
    """The network between nodes: bytes per second per node, one direction, and the latency of a message."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    between_nodes: Size = Field(default=25 * 10**9, gt=0)
    latency: float = Field(default=10e-6, gt=0, lt=1, description="seconds")


class Cluster(BaseModel):
    """Everything that a plan may place a model on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = "cluster"
    nodes: tuple[Node, ...] = Field(min_length=1)
    links: Links = Links()

    @model_validator(mode="after")
    def _check(self) -> Cluster:
        total = sum(node.count * sum(d.count for d in node.devices) for node in self.nodes)
        if total > MOST_DEVICES:
            raise ValueError(f"{total} devices, more than the {MOST_DEVICES} that a plan can hold")
        names = [name for node in self.nodes for name in node.names]
        twice = next((n for n, later in zip(sorted(names), sorted(names)[1:], strict=False) if n == later), None)
        if twice:
            raise ValueError(f"two nodes are called '{twice}'")
        return self

    @property
    def device_count(self) -> int:
        """Devices in all nodes."""
        return sum(node.count * sum(d.count for d in node.devices) for node in self.nodes)


def load_cluster(source: Cluster | Mapping[str, object] | str | Path) -> Cluster:
    """A checked Cluster from a YAML file, a mapping, or a short form "8xH100", "2x8xA3" (nodes x devices x type).

    Raises ConfigError naming the file, the field and what was found.
    """
    if isinstance(source, Cluster):
        return source
    if isinstance(source, Mapping):
        return _validated(source, "cluster")
    short = _short_form(str(source))
    if short is not None:
        return _validated(short, str(source))
    path = Path(source)
    data = read_yaml(path)
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path}: expected a mapping with 'nodes', found {type(data).__name__}")
    return _validated(data, str(path))


def _short_form(text: str) -> Mapping[str, object] | None:
    parts = text.split("x")
    if Path(text).exists() or not 2 <= len(parts) <= 3 or not all(p.isdecimal() and len(p) < 7 for p in parts[:-1]):
        return None
    nodes, count = (int(parts[0]), int(parts[1])) if len(parts) == 3 else (1, int(parts[0]))
    return {"nodes": [{"name": "node", "count": nodes, "devices": [{"type": parts[-1], "count": count}]}]}


def _validated(data: Mapping[str, object], source: str) -> Cluster:
    try:
        cluster = Cluster.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(p) for p in first["loc"]) or "cluster"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise ConfigError(f"{source}: {place}: {first['msg']}, found {first['input']!r:.60}{more}") from error
    for node in cluster.nodes:
        for entry in node.devices:
            entry.resolve()
    return cluster
