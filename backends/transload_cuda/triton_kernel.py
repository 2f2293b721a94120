"""Our own kernels for integer weights of 2 to 8 bits, written in Triton: they need nothing but torch."""

from __future__ import annotations

from abc import abstractmethod
from importlib.util import find_spec
from typing import ClassVar

import torch
from torch import Tensor

from transload.errors import BackendError, ConfigError
from transload.hal import Device, Kernel, Packed, Problem
from transload.quant import QTensor
from transload_cuda import layouts
from transload_cuda.configs import STEP_A8, STEP_A16
from transload_cuda.device import arch_number, on_device

X_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LEAST_ARCH = 80  # Ampere: the first with bfloat16 and asynchronous copies
LONGEST_A8 = (2**31 - 1) // (127 * 255)  # inputs whose int8 products, summed in 32 bits, cannot overflow


class TritonKernel(Kernel):
    """Dense and grouped products of a weight in the layout of `layouts`, one launch each, capturable in CUDA graphs.

    Groups are any multiple of `step` or the whole row. Zeros may be the midpoint, integers, floats or mins. Sums are
    exact integers for int8 activations and float32 otherwise; y is rounded to x's dtype once.
    """

    step: ClassVar[int]

    def refuses(self, p: Problem, device: Device) -> str | None:
        """None for integer codes in groups that tensor cores can sum, on Ampere or later."""
        if find_spec("triton") is None:
            return "triton is not installed; pip install 'transload[cuda]'"
        if arch_number(device.arch) < LEAST_ARCH:
            return f"it needs compute capability 8.0 or later, {device.model} is {device.arch}"
        if p.x_dtype not in X_DTYPES:
            return f"x must be float16, bfloat16 or float32, not {p.x_dtype}"
        if p.experts == 0:
            return "there are no experts"
        return self._refuses_activations(p) or layouts.refuses_weight(p.n, p.k, p.spec, self.step)

    @abstractmethod
    def _refuses_activations(self, p: Problem) -> str | None:
        """None when the kernel multiplies with the activations that `p` asks for; otherwise why not."""

    def pack(self, w: QTensor) -> Packed:
        """`codes` uint8 [..., N, K / 2] (two halves of a row in a byte), `scales`, `zeros` and `mins` [..., G, N]."""
        return layouts.pack(self.name, w)

    def unpack(self, p: Packed) -> QTensor:
        """The exact inverse of `pack`."""
        return layouts.unpack(p)

    def place(self, p: Packed, device: torch.device) -> Packed:
        """`p` on a GPU. Raises BackendError when it does not fit."""
        with on_device(self.name, f"{p.nbytes} bytes of weight"):
            return super().place(p, device)

    def rows(self, p: Packed, index: Tensor) -> QTensor:
        """Output rows `index` (int64 [R]) of a packed linear."""
        return layouts.rows(p, index)

    def matmul(self, x: Tensor, w: Packed, bias: Tensor | None = None) -> Tensor:
        """x [M, K] times w.T plus bias [N]: [M, N] in x's dtype."""
        return self._multiply(x, w, bias, None)

    def grouped_matmul(self, x: Tensor, w: Packed, counts: Tensor, bias: Tensor | None = None) -> Tensor:
        """Rows sorted by expert, counts int64 [E] rows each, bias [E, N]: [M, N], all experts in one launch.

        The counts are read by the GPU only. Rows beyond their sum belong to no expert and give zeros.
        """
        return self._multiply(x, w, bias, counts)

    def _multiply(self, x: Tensor, w: Packed, bias: Tensor | None, counts: Tensor | None) -> Tensor:
        layouts.check_x(self.name, x, w, bias, counts)
        if x.dtype not in X_DTYPES:
            raise ConfigError(f"kernel '{self.name}': x is {x.dtype}, expected float16, bfloat16 or float32")
        if x.shape[0] == 0:
            return x.new_empty(0, w.n)
        if torch.compiler.is_compiling():
            from transload_cuda.jit.ops import traced_multiply

            return traced_multiply(x, w, bias, counts)
        return self._launch(x, w, bias, counts)

    def _launch(self, x: Tensor, w: Packed, bias: Tensor | None, counts: Tensor | None, swiglu: bool = False) -> Tensor:
        from transload_cuda.jit import launch

        if not x.is_cuda and not launch.INTERPRETED:
            raise ConfigError(f"kernel '{self.name}': x is on {x.device}, expected a CUDA device")
        with on_device(self.name, f"x [M={x.shape[0]}, K={w.k}] to y [N={w.n}]"):
            try:
                return launch.multiply(x, w.tensors, w.spec, w.n, bias, counts, None, swiglu)
            except launch.OutOfResources as e:
                config = launch.find_config(x, w.spec, w.n, counts)
                raise BackendError(f"kernel '{self.name}': {config} does not fit this GPU: {e}") from e


class TritonA16(TritonKernel):
    """W4A16 and the other widths with 16-bit activations (float32 ones are multiplied as TF32)."""

    name: ClassVar[str] = "triton-a16"
    step: ClassVar[int] = STEP_A16

    def _refuses_activations(self, p: Problem) -> str | None:
        return f"16-bit activations only, not {p.spec.act}; triton-a8 takes int8" if p.spec.act else None


class TritonA8(TritonKernel):
    """W4A8 and the other widths with activations quantized to int8 on the fly, per token or token and group."""

    name: ClassVar[str] = "triton-a8"
    step: ClassVar[int] = STEP_A8

    def _refuses_activations(self, p: Problem) -> str | None:
        act = p.spec.act
        if act is None:
            return "int8 activations only, not 16-bit ones; triton-a16 takes them"
        if act.static:
            return "static activation scales belong to the engine; activations are quantized dynamically here"
        if p.spec.act_order and 0 < act.group_size < p.k:
            return "act-order weights with activation scales per group: use scales per token"
        if p.k > LONGEST_A8:
            return f"K={p.k} may overflow 32-bit sums; at most {LONGEST_A8}"
        return None

    def swiglu_experts(self, x: Tensor, gate_up: Packed, down: Packed, counts: Tensor) -> Tensor | None:
        """Three launches: both products, and between them one that gates and quantizes. None while a graph is traced,
        where torch's compiler fuses what it can."""
        if torch.compiler.is_compiling() or x.shape[0] == 0:
            return None
        both = self.grouped_matmul(x, gate_up, counts)
        layouts.check_x(self.name, both[:, : down.k], down, None, counts)
        return self._launch(both[:, : down.k], down, None, counts, swiglu=True)
