"""Who takes part in the GPU benchmark: each made ready for one weight, or refusing with a sentence.

Everyone gets the same symmetric 4-bit weight with bfloat16 scales. torchao, humming and bitsandbytes can only quantize
the dequantized weight for themselves: they compute with other numbers, and the error beside their times says how far
off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from transload.errors import Unsupported
from transload.hal import Device, Kernel, Packed, Problem
from transload.quant import ActSpec, QTensor

Product = Callable[[Tensor], Tensor]
LEAST_INT_MM_ROWS = 17  # torch._int_mm takes more than 16


@dataclass(frozen=True, slots=True)
class Peer:
    """name; scheme: what is executed; make: from a weight and a device to x -> y."""

    name: str
    scheme: str
    make: Callable[[QTensor, torch.device], Product]


@dataclass(frozen=True, slots=True)
class Ours:
    """One of our kernels with one kind of activations. chosen: `hal.choose` takes it for these."""

    name: str
    scheme: str
    kernel: Kernel
    act: ActSpec | None
    chosen: bool

    def packed(self, w: QTensor, at: torch.device) -> Packed:
        """The weight where the kernel reads it."""
        return self.kernel.place(self.kernel.pack(w.with_act(self.act)), at)


def ours(kernels: Sequence[Kernel], device: Device, w: QTensor) -> Iterator[Ours]:
    """Every kernel that takes the weight: bfloat16 activations, int8 with one scale a token, and with one a group."""
    for act in (None, ActSpec(), ActSpec(group_size=w.spec.group_size)):
        problem = Problem.of(w.with_act(act), torch.bfloat16)
        takers = [kernel for kernel in kernels if kernel.refuses(problem, device) is None]
        groups = f" g{act.group_size}" if act and act.group_size > 0 else ""
        for kernel in takers:
            scheme = kernel.executed(problem)
            yield Ours(f"transload {kernel.name}{groups}", scheme, kernel, act, kernel is takers[0])


def cublas(w: QTensor, at: torch.device) -> Product:
    """A dense bfloat16 linear of the dequantized weight: the yardstick."""
    weight = w.dequantize(torch.float32).to(at, torch.bfloat16)
    return lambda x: torch.nn.functional.linear(x, weight)


def int4pack(w: QTensor, at: torch.device) -> Product:
    """PyTorch's own 4-bit product, `aten._weight_int4pack_mm`; the even input in the high nibble."""
    pairs = w.codes.to(at).reshape(w.n, w.k // 2, 2)
    tiles = torch.ops.aten._convert_weight_to_int4pack(pairs[..., 0] * 16 + pairs[..., 1], 8)
    scale = w.scales.to(at, torch.bfloat16).T.contiguous()
    sides = torch.stack((scale, torch.zeros_like(scale)), -1)
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, tiles, w.spec.group_size, sides)


def int8_cublas(w: QTensor, at: torch.device) -> Product:
    """The integer product alone, without scales: the ceiling of any W4A8 kernel."""
    codes = (w.codes.to(torch.int16) - w.spec.midpoint).to(torch.int8).to(at)

    def product(x: Tensor) -> Tensor:
        if x.shape[0] < LEAST_INT_MM_ROWS:
            raise Unsupported(f"it takes {LEAST_INT_MM_ROWS} rows or more")
        return torch._int_mm(torch.zeros(x.shape, dtype=torch.int8, device=x.device), codes.t())

    return product


def torchao(w: QTensor, at: torch.device) -> Product:
    """torchao's int4 weight-only linear."""
    quantization = _library("torchao.quantization")
    linear = torch.nn.Linear(w.k, w.n, bias=False, dtype=torch.bfloat16, device=at)
    linear.weight = torch.nn.Parameter(w.dequantize(torch.float32).to(at, torch.bfloat16), requires_grad=False)
    quantization.quantize_(linear, quantization.Int4WeightOnlyConfig(group_size=w.spec.group_size))
    return linear


def bitsandbytes(w: QTensor, at: torch.device) -> Product:
    """bitsandbytes' NF4 linear, blocks of 64."""
    bnb = _library("bitsandbytes")
    layer = bnb.nn.Linear4bit(w.k, w.n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    weight = w.dequantize(torch.float32).to(torch.bfloat16)
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    placed: Product = layer.to(at)
    return placed


def humming(activations: str | None) -> Callable[[QTensor, torch.device], Product]:
    """humming's layer with bfloat16 or int8 activations, as its own project calls it."""

    def make(w: QTensor, at: torch.device) -> Product:
        layer = _library("humming.layer").HummingLayer(
            shape_n=w.n, shape_k=w.k, weight_config={"dtype": f"int{w.spec.bits}", "group_size": w.spec.group_size},
            input_config={"dtype": activations} if activations else None, torch_dtype=torch.bfloat16,
        ).to(at)  # fmt: skip
        layer.load_from_unquantized(w.dequantize(torch.float32).to(at, torch.bfloat16))
        layer.transform()
        product: Product = layer
        return product

    return make


def gemlite(w: QTensor, at: torch.device) -> Product:
    """gemlite's Triton linear on our codes and scales."""
    core = _library("gemlite.core")
    layer = core.GemLiteLinear(
        w.spec.bits, group_size=w.spec.group_size, in_features=w.k, out_features=w.n,
        input_dtype=core.DType.BF16, output_dtype=core.DType.BF16, scaled_activations=False,
    )  # fmt: skip
    zeros = torch.full_like(w.scales, w.spec.midpoint)
    layer.pack(w.codes.to(at), w.scales.to(at), zeros.to(at), bias=None)
    product: Product = layer
    return product


def _library(module: str) -> Any:
    return import_module(module)


CUBLAS = "torch bf16"
INT4PACK = "torch int4pack"

# torch first: it is always there, quick to set up, and what the targets compare with.
TORCH = (
    Peer(CUBLAS, "W16A16", cublas),
    Peer(INT4PACK, "W4A16", int4pack),
    Peer("torch int8 only", "int8", int8_cublas),
)
STRANGERS = (
    Peer("torchao", "W4A16", torchao),
    Peer("humming", "W4A16", humming(None)),
    Peer("humming int8", "W4A8", humming("int8")),
    Peer("gemlite", "W4A16", gemlite),
    Peer("bitsandbytes nf4", "W4A16", bitsandbytes),
)
