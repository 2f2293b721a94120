"""The CUDA backend: its kernels in order of preference, its devices and what serves models on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from transload.hal import Device, Kernel, Serving
from transload_cuda.dequantize_kernel import DequantizeKernel
from transload_cuda.device import devices, missing
from transload_cuda.humming_kernel import HummingKernel
from transload_cuda.int4pack_kernel import Int4PackKernel
from transload_cuda.triton_kernel import TritonA8, TritonA16


class CudaBackend:
    """NVIDIA GPUs through torch's CUDA build."""

    name = "cuda"
    kernels: Sequence[Kernel] = (HummingKernel(), TritonA8(), TritonA16(), Int4PackKernel(), DequantizeKernel())
    # Quantized formats in vLLM's own list of methods, version 0.32. It has no gguf and no bitsandbytes any more.
    serving = Serving(
        engine="vllm",
        visible_devices="CUDA_VISIBLE_DEVICES",
        formats=("plain", "compressed-tensors", "gptq", "gptq_v2", "awq", "fp8"),
    )

    def unavailable(self) -> str | None:
        """None when torch can use a GPU; otherwise what is missing and how to get it."""
        return missing()

    def devices(self) -> Sequence[Device]:
        """The GPUs that torch sees, in torch's order; empty when unavailable."""
        return devices()

    def torch_device(self, device: Device) -> torch.device:
        """cuda:<index>."""
        return torch.device("cuda", device.index)


backend = CudaBackend()
