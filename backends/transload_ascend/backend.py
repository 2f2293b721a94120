"""The Ascend backend: its kernels in order of preference, its devices and what serves models on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from transload.hal import Device, Kernel, Serving
from transload_ascend.device import devices, missing


class AscendBackend:
    """Huawei Ascend NPUs through torch_npu and CANN."""

    name = "ascend"
    kernels: Sequence[Kernel] = ()
    # vllm-ascend 0.23 loads msModelSlim's own folders and some compressed-tensors schemes; no AWQ and no GPTQ.
    serving = Serving(
        engine="vllm-ascend",
        visible_devices="ASCEND_RT_VISIBLE_DEVICES",
        formats=("plain", "msmodelslim", "compressed-tensors"),
    )

    def unavailable(self) -> str | None:
        """None when torch can use an NPU; otherwise what is missing and how to get it."""
        return missing()

    def devices(self) -> Sequence[Device]:
        """The NPUs that torch sees, in torch's order; empty when unavailable."""
        return devices()

    def torch_device(self, device: Device) -> torch.device:
        """npu:<index>."""
        return torch.device("npu", device.index)


backend = AscendBackend()
