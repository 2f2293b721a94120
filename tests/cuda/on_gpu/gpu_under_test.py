"""The backend and device that the tests of this folder run on: a GPU, or CPU tensors under Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from transload.hal import Backend, Device, Kernel
from transload_cuda.backend import CudaBackend
from transload_cuda.triton_kernel import TritonKernel

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class InterpretedCuda(CudaBackend):
    """The CUDA backend's Triton kernels on CPU tensors; the device claims to be of the H200's architecture."""

    kernels: Sequence[Kernel] = tuple(k for k in CudaBackend.kernels if isinstance(k, TritonKernel))

    def unavailable(self) -> str | None:
        return None

    def devices(self) -> Sequence[Device]:
        return (Device("cuda", 0, "Triton interpreter", "sm_90", 141 << 30, 140 << 30),)

    def torch_device(self, device: Device) -> torch.device:
        return torch.device("cpu")


@dataclass(frozen=True)
class UnderTest:
    backend: Backend
    device: Device

    @property
    def at(self) -> torch.device:
        return self.backend.torch_device(self.device)


def _found() -> UnderTest:
    backend = InterpretedCuda() if INTERPRETED else CudaBackend()
    reason = backend.unavailable()
    assert reason is None, reason
    return UnderTest(backend, backend.devices()[0])


GPU = _found()
