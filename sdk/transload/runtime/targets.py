"""Which target every module of a model goes to: one device, or transformers' device_map."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from transload.errors import NoBackend, Unsupported
from transload.hal import Backend, Device, backends
from transload.runtime.placement import Target
from transload.runtime.spread import DISK, Place, Spread, device_of


class Targets:
    """The target of a module name. `base` holds scheme and dtype; devices come from the map where it names them."""

    def __init__(
        self, base: Target, device_map: Mapping[str, Place] | None = None, spread: Spread | None = None
    ) -> None:
        self.base, self._spread = base, spread
        if spread is not None:
            device_map = {prefix: device_of(place) for prefix, place in spread.places.items()}
        self._by_prefix = {prefix: _on(base, place) for prefix, place in (device_map or {}).items()}

    def of(self, module: str) -> Target:
        """The target of the longest prefix that covers `module`."""
        covering = [p for p in self._by_prefix if p == "" or f"{module}.".startswith(f"{p}.")]
        return self._by_prefix[max(covering, key=len)] if covering else self.base

    def filled(self, model: nn.Module, module: str) -> None:
        """Called after `module` got its weight: it leaves memory again when its place is the disk."""
        if self._spread is not None and self._spread.place_of(module) == DISK:
            self._spread.park(model, module)


def _on(base: Target, place: Place) -> Target:
    if place == DISK:
        raise Unsupported("device_map places modules on disk: transload.load(path, plan=...) does that, this does not")
    wanted = device_of(place)
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
