"""Which target every module of a model goes to: one device, or transformers' device_map."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from transload.errors import NoBackend, Unsupported
from transload.hal import Backend, Device, backends
from transload.runtime.placement import Target

Place = torch.device | str | int


class Targets:
    """The target of a module name. `base` holds scheme and dtype; devices come from the map where it names them."""

    def __init__(self, base: Target, device_map: Mapping[str, Place] | None = None) -> None:
        self.base = base
        self._by_prefix = {prefix: _on(base, place) for prefix, place in (device_map or {}).items()}

    def of(self, module: str) -> Target:
        """The target of the longest prefix that covers `module`."""
        covering = [p for p in self._by_prefix if p == "" or f"{module}.".startswith(f"{p}.")]
        return self._by_prefix[max(covering, key=len)] if covering else self.base


def _on(base: Target, place: Place) -> Target:
    if place == "disk":
        raise Unsupported("device_map places modules on disk: quantized weights are not offloaded")
    wanted = torch.device(place)
    if wanted == base.torch_device or (wanted.type == base.torch_device.type and wanted.index is None):
        return base
    backend, device = _hal_device(wanted)
    return replace(base, backend=backend, device=device)


def _hal_device(wanted: torch.device) -> tuple[Backend, Device]:
    """The device that torch calls `wanted`. Raises NoBackend."""
    for backend in backends().values():
        if backend.unavailable() is None:
            for device in backend.devices():
                found = backend.torch_device(device)
                if found.type == wanted.type and (found.index or 0) == (wanted.index or 0):
                    return backend, device
    raise NoBackend(f"device_map names {wanted}, which no installed backend serves; see `transload devices`")
