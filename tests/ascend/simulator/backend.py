"""The Ascend backend as it is, on a device that the simulator pretends to have."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch_npu

from simulator import npu_ops
from transload.hal import Device
from transload_ascend.backend import AscendBackend

assert npu_ops  # importing it registers the operators
torch_npu.npu._lazy_init = lambda: None  # initialises a device; only its product number is asked for here


class SimulatedAscend(AscendBackend):
    """Kernels, names and limits of the real backend; tensors stay in CPU memory."""

    def __init__(self, arch: str = "910B", model: str = "Ascend910B3") -> None:
        self._device = Device("ascend", 0, model, arch, 64 << 30, 61 << 30)

    def unavailable(self) -> str | None:
        return None

    def devices(self) -> Sequence[Device]:
        return (self._device,)

    def torch_device(self, device: Device) -> torch.device:
        return torch.device("cpu")
