"""The device that the tests of this folder run on, real or simulated."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from transload.hal import Device
from transload_ascend import backend as real
from transload_ascend.backend import AscendBackend


@dataclass(frozen=True)
class Npu:
    backend: AscendBackend
    device: Device
    torch_device: torch.device
    simulated: bool


def _chosen() -> Npu:
    if os.environ["TRANSLOAD_NPU"] == "simulator":
        from simulator.backend import SimulatedAscend

        backend: AscendBackend = SimulatedAscend()
    else:
        backend = real
        assert backend.unavailable() is None, backend.unavailable()
    device = backend.devices()[0]
    return Npu(backend, device, backend.torch_device(device), backend is not real)


NPU = _chosen()
