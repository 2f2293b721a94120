"""W4A16 by humming-kernels, the vLLM project's kernels that are compiled for a GPU when they are first used.

They have not been run by this project on a device yet. So they are taken only when TRANSLOAD_HUMMING=1 asks for them,
and every weight proves its product before it is used: one that is off raises an error.

`pack` writes what humming calls a packed weight (its pack_weight.cuh, version 0.1.19): unsigned codes, LSB-first in
int32 words along K; for 4 bits, codes 1 2 3 4 5 6 7 8 are the word 0x87654321. Its tile order belongs to the GPU.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor

from transload import bits
from transload.errors import BackendError, ConfigError
from transload.hal import Device, Kernel, Packed, Problem
from transload.quant import PER_CHANNEL, Grid, QTensor, QuantSpec, Zero
from transload_cuda.device import arch_number, on_device
from transload_cuda.layouts import check_placed, check_x

OPT_IN = "TRANSLOAD_HUMMING"
GROUPS = (PER_CHANNEL, 32, 64, 128, 256)
TILE_N, TILE_K = 64, 32  # transform_humming_weight refuses other multiples for 16-bit activations
LOCKS = 2048  # counters of its split sums; every layer has its own, because layers may run beside each other
PROOF_ROWS = 16
PROOF_ERROR = 1e-2  # a product of bfloat16 operands is off by 2e-3, one in another order by 1.4
UNPACK_ROWS = 1024  # inputs read back at a time


class HummingKernel(Kernel):
    """Symmetric integer weights of 2 to 8 bits, x and scales in the same 16-bit dtype, on Ampere or later."""

    name: ClassVar[str] = "humming"

    def refuses(self, p: Problem, device: Device) -> str | None:
        """None where humming keeps every number, is installed and was asked for."""
        spec, k = p.spec, p.k
        group = k if spec.group_size == PER_CHANNEL else spec.group_size
        checks = (
            (find_spec("humming") is None, "humming-kernels is not installed"),
            (os.environ.get(OPT_IN) != "1", f"its results are not proved on a device yet; {OPT_IN}=1 takes it"),
            (spec.act is not None, "16-bit activations only: for int8 ones it would round group scales to integers"),
            (p.experts is not None, "dense layers only"),
            (arch_number(device.arch) < 80, f"it needs compute capability 8.0 or later, not {device.arch}"),
            (p.x_dtype not in (torch.float16, torch.bfloat16), f"x must be float16 or bfloat16, not {p.x_dtype}"),
            (spec.grid is not Grid.INT, f"integer codes only, not {spec.grid.value}"),
            (spec.bits == 8 and p.x_dtype == torch.bfloat16, "it would change 8-bit codes for bfloat16"),
            (spec.zero is not Zero.MIDPOINT, f"symmetric weights only, not with {spec.zero.value}"),
            (spec.scale_dtype != p.x_dtype, f"it would round {spec.scale_dtype} scales to {p.x_dtype}"),
            (spec.act_order, "no act-order"),
            (spec.group_size not in GROUPS, f"groups of 32 to 256 or the whole row only, not {spec.group_size}"),
            (p.n % TILE_N != 0 or k % TILE_K != 0, f"[N={p.n}, K={k}] is not a multiple of [{TILE_N}, {TILE_K}]"),
            (group < 1 or k % max(group, 1) != 0, f"K={k} is not a multiple of the group of {group}"),
        )  # fmt: skip
        return next((reason for refused, reason in checks if refused), None)

    def pack(self, w: QTensor) -> Packed:
        """`weight` int32 [N, K * bits / 32], `weight_scale` [N, G] as they are."""
        tensors = {"weight": bits.pack(w.codes, w.spec.bits, torch.int32), "weight_scale": w.scales.contiguous()}
        return Packed(self.name, w.spec, w.n, w.k, tensors)

    def unpack(self, p: Packed) -> QTensor:
        """The exact inverse of `pack`, also of a placed weight."""
        if "tiles" in p.tensors:
            return QTensor(p.spec, _codes_of_tiles(p), p.tensors["scales"])
        return QTensor(p.spec, bits.unpack(p.tensors["weight"], p.spec.bits, p.k), p.tensors["weight_scale"])

    def place(self, p: Packed, device: torch.device) -> Packed:
        """`tiles` and `tile_scales` in the GPU's order, `scales` as they were, `locks`.

        Raises BackendError when the weight does not fit, or when its product is not that of its numbers.
        """
        transform = import_module("humming.transform").transform_humming_tensors
        with on_device(self.name, f"{p.nbytes} bytes of weight"):
            given = {name: t.to(device) for name, t in p.tensors.items()}
            found = transform(_layer_config(p.n, p.k, p.spec, device), given)
            locks = torch.zeros(LOCKS, dtype=torch.int32, device=device)
        named = {"tiles": found["weight"], "tile_scales": found["weight_scale"], "scales": given["weight_scale"]}
        placed = replace(p, tensors={**named, "locks": locks})
        _prove(placed, self.unpack(replace(p, tensors=given)))
        return placed

    def matmul(self, x: Tensor, w: Packed, bias: Tensor | None = None) -> Tensor:
        """x [M, K] in the scales' dtype times w.T plus bias [N]: [M, N]."""
        check_x(self.name, x, w, bias, None)
        if x.dtype != w.spec.scale_dtype:
            raise ConfigError(f"kernel '{self.name}': x is {x.dtype}, expected {w.spec.scale_dtype}")
        if x.shape[0] == 0:
            return x.new_empty(0, w.n)
        check_placed(w, "tiles")
        with on_device(self.name, f"x [M={x.shape[0]}, K={w.k}] to y [N={w.n}]"):
            y = _multiply(x.contiguous(), w, w.tensors["tile_scales"])
        return y if bias is None else y + bias.to(y.dtype)


def _multiply(x: Tensor, w: Packed, scales: Tensor) -> Tensor:
    forward = import_module("humming.forward").humming_forward
    config = _layer_config(w.n, w.k, w.spec, x.device)
    y: Tensor = forward(config, inputs=x, weight=w.tensors["tiles"], weight_scale=scales, locks=w.tensors["locks"])
    return y


@cache
def _layer_config(n: int, k: int, spec: QuantSpec, device: torch.device) -> Any:
    """humming's description of a layer, from shapes alone."""
    schema = import_module("humming.schema").HummingWeightSchema(
        b_dtype=f"uint{spec.bits}", weight_scale_group_size=max(spec.group_size, 0)
    )
    prepare = import_module("humming.transform").prepare_layer_config
    return prepare(n, k, schema, torch_dtype=spec.scale_dtype, device=device)


def _prove(placed: Packed, w: QTensor) -> None:
    """Raises BackendError unless the product of a few random rows is that of the dequantized weight."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(PROOF_ROWS, w.k, generator=random).to(placed.tensors["tiles"].device, w.spec.scale_dtype)
    truth = x.float() @ w.dequantize().T
    y = _multiply(x, placed, placed.tensors["tile_scales"]).float()
    error = float((y - truth).norm() / truth.norm()) if truth.any() else float(y.norm())
    if not error < PROOF_ERROR:
        shape = f"[N={w.n}, K={w.k}]"
        raise BackendError(f"kernel 'humming': the product of {shape} is off by {error:.1e}; unset {OPT_IN} to go on")


def _codes_of_tiles(p: Packed) -> Tensor:
    """uint8 [N, K]: with scales of 1, the product with rows of the identity is the codes less their midpoint."""
    tiles, ones = p.tensors["tiles"], torch.ones_like(p.tensors["tile_scales"])
    parts = []
    for start in range(0, p.k, UNPACK_ROWS):
        rows = min(UNPACK_ROWS, p.k - start)
        unit = torch.zeros(rows, p.k, dtype=p.spec.scale_dtype, device=tiles.device)
        unit[torch.arange(rows), torch.arange(start, start + rows)] = 1
        parts.append((_multiply(unit, p, ones) + p.spec.midpoint).to(torch.uint8).T)
    return torch.cat(parts, dim=1).contiguous()
