"""The CPU backend: its kernels in order of preference, its one device and what serves models on it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from transload.hal import Device, Kernel, Serving
from transload_cpu.device import host
from transload_cpu.native_kernel import NATIVE_KERNELS, NativePortable
from transload_cpu.onnx_kernel import OnnxKernel
from transload_cpu.reference_kernel import ReferenceKernel


class CpuBackend:
    """The host processor, always there."""

    name = "cpu"
    kernels: Sequence[Kernel] = (*NATIVE_KERNELS, OnnxKernel(), NativePortable(), ReferenceKernel())
    # vLLM's CPU build loads 4-bit weights in these formats; see its list of quantization methods, version 0.32.
    serving = Serving(engine="vllm", visible_devices=None, formats=("compressed-tensors", "gptq", "awq", "plain"))

    def unavailable(self) -> str | None:
        """None: a process that runs has a processor."""
        return None

    def devices(self) -> Sequence[Device]:
        """The host as one device."""
        return (host(),)

    def torch_device(self, device: Device) -> torch.device:
        """Torch's CPU device."""
        return torch.device("cpu")


backend = CpuBackend()
