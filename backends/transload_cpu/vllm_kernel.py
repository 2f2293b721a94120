"""TransloadLinearKernel: vLLM's weight-only linear layers, packed and multiplied by the native kernels.

Imported by `vllm_plugin.register` inside vLLM; vllm is imported here and nowhere else.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.kernels.linear import MPLinearKernel, MPLinearLayerConfig

from transload.bits import unpack
from transload.hal import Problem
from transload.quant import PER_CHANNEL, ActSpec, QTensor, QuantSpec, Zero
from transload_cpu.device import host
from transload_cpu.native_kernel import NATIVE_KERNELS, NativeKernel
from transload_cpu.native_ops import native_multiply
from transload_cpu.vllm_plugin import ACTIVATIONS


@lru_cache(maxsize=1)
def chosen() -> NativeKernel | str:
    """The best native kernel of this processor, or why there is none."""
    spec = QuantSpec(bits=4, group_size=32, scale_dtype=torch.bfloat16)
    refusals = []
    for kernel in NATIVE_KERNELS:
        refusal = kernel.refuses(Problem(32, 32, spec, torch.bfloat16), host())
        if refusal is None:
            return kernel
        refusals.append(refusal)
    return refusals[-1]


def spec_of(c: MPLinearLayerConfig) -> QuantSpec:
    """vLLM's layer in Transload's words. uint4b8 and uint8b128 are symmetric: codes with a fixed midpoint."""
    return QuantSpec(
        bits=c.weight_type.size_bits,
        group_size=PER_CHANNEL if c.group_size in (-1, c.full_weight_shape[0]) else c.group_size,
        zero=Zero.CODES if c.zero_points else Zero.MIDPOINT,
        scale_dtype=c.act_type,
        act=ActSpec() if os.environ.get(ACTIVATIONS) == "1" else None,
    )


class TransloadLinearKernel(MPLinearKernel):  # type: ignore[misc]  # vllm has no types here
    """Integer weights of 4 or 8 bits in groups, or one group a row; activations of 16 bits, or int8 when asked."""

    _isa: int
    _act_bits: int

    @classmethod
    def get_min_capability(cls) -> int:
        """Compute capability of a GPU; there is none."""
        return -1

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        """Whether the native kernel takes the layer, or a sentence."""
        kernel, weight = chosen(), c.weight_type
        if isinstance(kernel, str):
            return False, kernel
        if weight.is_floating_point() or weight.size_bits not in (4, 8):
            return False, f"Transload's kernels take integers of 4 or 8 bits here, not {weight}"
        if not c.zero_points and weight.bias != 1 << (weight.size_bits - 1):
            return False, f"symmetric codes have their zero in the middle, not at {weight.bias}"
        k, n = c.partition_weight_shape
        reason = kernel.refuses(Problem(n, k, spec_of(c), c.act_type), host())
        return reason is None, reason

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Packs the loaded words once, and lets go of them."""
        kernel = chosen()
        assert not isinstance(kernel, str)  # can_implement came before
        k, n = self.config.partition_weight_shape
        spec = spec_of(self.config)
        self._isa, self._act_bits = kernel.isa, 16 if spec.act is None else spec.act.bits
        words, scales, zeros = self._get_weight_params(layer)[:3]
        # Words of one output lie along the last axis in compressed-tensors, along the first in GPTQ and AWQ.
        codes = unpack(_outputs_first(words, "output_dim"), spec.bits, k)
        scale = _outputs_first(scales, "output_dim").contiguous()
        zero = None
        if spec.zero is Zero.CODES:
            # Zero points are packed along the outputs: [N * bits / 32, G] or its transpose.
            zero = unpack(_outputs_first(zeros, "output_dim").t(), spec.bits, n).t().contiguous()
        packed = kernel.pack(QTensor(spec, codes, scale, zeros=zero)).tensors["packed"]
        for name in (self.w_s_name, self.w_zp_name):
            if name is not None and getattr(layer, name, None) is not None:
                setattr(layer, name, torch.nn.Parameter(scale.new_empty(0), requires_grad=False))
        setattr(layer, self.w_q_name, torch.nn.Parameter(packed, requires_grad=False))

    def apply_weights(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] times the weight plus bias [N]: [..., N] in x's dtype."""
        k, n = self.config.partition_weight_shape
        packed = getattr(layer, self.w_q_name)
        y: Tensor = native_multiply(x.reshape(-1, k), packed, bias, None, n, self._act_bits, PER_CHANNEL, self._isa)
        return y.view(*x.shape[:-1], n)


def _outputs_first(parameter: Any, axis: str) -> Tensor:
    """The tensor with outputs as rows. vLLM's parameters say which of their axes the outputs are."""
    data: Tensor = parameter.data
    return data if getattr(parameter, axis) == 0 else data.t()
