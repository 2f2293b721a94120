"""The device catalogue: memory, rates and islands by name (data/devices.yaml), and the engine constants."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from transload.errors import ConfigError
from transload.plan.units import Size

Platform = Literal["cuda", "ascend", "cpu"]


class DeviceType(BaseModel):
    """One kind of device. memory is what the engine sees as total; rates are per second, link is one direction."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=80)
    vendor: str = Field(min_length=1, max_length=40)
    platform: Platform
    arch: str = ""
    memory: Size = Field(gt=0)
    bandwidth: Size = Field(gt=0, description="memory bandwidth, bytes per second")
    flops: dict[str, float] = Field(default_factory=dict, description="dense operations per second by operand width")
    link: Size = Field(gt=0, description="bytes per second to the other devices of the island, one direction")
    island: int = Field(default=1, ge=1, le=4096, description="devices joined by `link` in one server")
    aliases: tuple[str, ...] = ()
    source: str = ""

    def rate(self, width: str) -> float:
        """Operations per second for operands of `width`, falling back to the next wider one that is listed."""
        order = ("fp4", "int8", "fp8", "bf16")
        for name in order[order.index(width) :]:
            if name in self.flops:
                return self.flops[name]
        return 1e12


class Constant(BaseModel):
    """One number about an engine, with where it comes from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float | str
    kind: Literal["measured", "estimated"] = "estimated"
    source: str = ""


@lru_cache(maxsize=1)
def devices() -> Mapping[str, DeviceType]:
    """Every device of the catalogue by lower-case name and alias."""
    found: dict[str, DeviceType] = {}
    for row in _load("devices.yaml")["devices"]:
        device = DeviceType.model_validate(row)
        for name in (device.name, *device.aliases):
            found[name.lower()] = device
    return found


def device(name: str) -> DeviceType:
    """The device called `name`. Raises ConfigError that offers the nearest names.

    >>> device("a3").island
    16
    """
    known = devices()
    if name.lower() in known:
        return known[name.lower()]
    names = sorted({d.name for d in known.values()})
    near = difflib.get_close_matches(name.lower(), list(known), 3, 0.4)
    offers = list(dict.fromkeys(known[n].name for n in near)) or [n for n in names if n[0] == name[:1].upper()]
    raise ConfigError(
        f"device '{name[:80]}' is not in the catalogue; nearest: {', '.join(offers or names)}; or describe it with "
        "platform, memory, bandwidth and link"
    )


@lru_cache(maxsize=1)
def default_constants() -> Mapping[str, Mapping[str, Constant]]:
    """The engine constants that ship with the planner, by platform."""
    return read_constants(_load("constants.yaml"))


def read_constants(data: object) -> Mapping[str, Mapping[str, Constant]]:
    """Checked constants from parsed YAML: platform -> name -> Constant."""
    if not isinstance(data, dict):
        raise ConfigError("constants: expected a mapping of platforms")
    return {
        str(platform): {str(name): Constant.model_validate(row) for name, row in rows.items()}
        for platform, rows in data.items()
        if isinstance(rows, dict)
    }


def _load(name: str) -> dict[str, list[dict[str, object]]]:
    text = (files("transload.plan") / "data" / name).read_text(encoding="utf-8")
    data: dict[str, list[dict[str, object]]] = yaml.safe_load(text)
    return data
