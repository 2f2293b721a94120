"""The Ascend backend: its kernels in order of preference, its devices and what serves models on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from transload.hal import Device, Kernel, Serving
from transload_ascend.device import devices, missing
from transload_ascend.experts import GroupedW4A8, GroupedW4A16, GroupedW8A8
from transload_ascend.w4a8 import W4A8
from transload_ascend.w4a16 import W4A16, W4A16NZ
from transload_ascend.w8a8 import W8A8
from transload_ascend.wide import W4A16Wide


class AscendBackend:
    """Huawei Ascend NPUs through torch_npu and CANN."""

    name = "ascend"
    kernels: Sequence[Kernel] = (
        W4A8(),
        W4A16(),
        W4A16NZ(),
        W4A16Wide(),
        W8A8(),
        GroupedW4A8(),
        GroupedW4A16(),
        GroupedW8A8(),
    )
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
