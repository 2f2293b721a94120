"""The competitors of the CUDA benchmark, each made ready for one weight or refusing with a sentence.

Every competitor gets the same symmetric 4-bit weight in groups of 128 with bfloat16 scales. One that can only quantize
for itself says so by `own`: its error is then against its own idea of the weight and not compared.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from transload.hal import Device, Kernel, Problem
from transload.quant import ActSpec, QTensor

Product = Callable[[Tensor], Tensor]


class Refused(Exception):
    """This competitor does not run this weight; the reason."""


@dataclass(frozen=True)
class Peer:
    """name; scheme: what is executed; make: from a weight and a device to x -> y."""

    name: str
    scheme: str
    make: Callable[[QTensor, torch.device], Product]
    own: bool = False


def kernel_peer(kernel: Kernel, device: Device, act: ActSpec | None) -> Peer:
    """One of our kernels."""

    def make(w: QTensor, at: torch.device) -> Product:
        w = w.with_act(act)
        reason = kernel.refuses(Problem.of(w, torch.bfloat16), device)
        if reason:
            raise Refused(reason)
        packed = kernel.place(kernel.pack(w), at)
        return lambda x: kernel.matmul(x, packed)

    return Peer(f"transload {kernel.name}" + (f" g{act.group_size}" if act and act.group_size > 0 else ""),
                f"W4A{8 if act else 16}", make)  # fmt: skip


def cublas(w: QTensor, at: torch.device) -> Product:
    weight = w.dequantize(torch.float32).to(at, torch.bfloat16)
    return lambda x: torch.nn.functional.linear(x, weight)


def int8_cublas(w: QTensor, at: torch.device) -> Product:
    """The integer product alone, without scales: the ceiling of any W4A8 kernel."""
    codes = (w.codes.to(torch.int16) - 8).to(torch.int8).to(at)

    def product(x: Tensor) -> Tensor:
        if x.shape[0] <= 16:
            raise Refused("torch._int_mm needs more than 16 rows")
        q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
        return torch._int_mm(q, codes.t())

    return product


def torchao(w: QTensor, at: torch.device) -> Product:
    quantization = _needed("torchao.quantization")
    linear = _linear(w, at)
    quantization.quantize_(linear, quantization.Int4WeightOnlyConfig(group_size=128))
    return linear


def bitsandbytes(w: QTensor, at: torch.device) -> Product:
    bnb = _needed("bitsandbytes")
    layer = bnb.nn.Linear4bit(w.k, w.n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    weight = w.dequantize(torch.float32).to(torch.bfloat16)
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    placed: Product = layer.to(at)
    return placed


def humming(w: QTensor, at: torch.device) -> Product:
    return _humming(w, at, None)


def humming_a8(w: QTensor, at: torch.device) -> Product:
    return _humming(w, at, {"dtype": "int8"})


def _humming(w: QTensor, at: torch.device, activations: dict[str, str] | None) -> Product:
    layers = _needed("humming.layer")
    layer = layers.HummingLayer(
        shape_n=w.n, shape_k=w.k, weight_config={"dtype": "int4", "group_size": 128},
        input_config=activations, torch_dtype=torch.bfloat16,
    ).to(at)  # fmt: skip
    layer.load_from_unquantized(w.dequantize(torch.float32).to(at, torch.bfloat16))
    layer.transform()
    return layer  # type: ignore[no-any-return]


def gemlite(w: QTensor, at: torch.device) -> Product:
    core = _needed("gemlite.core")
    layer = core.GemLiteLinear(
        4, group_size=128, in_features=w.k, out_features=w.n,
        input_dtype=core.DType.BF16, output_dtype=core.DType.BF16, scaled_activations=False,
    )  # fmt: skip
    zeros = torch.full_like(w.scales, 8.0)
    layer.pack(w.codes.to(at), w.scales.to(at), zeros.to(at), bias=None)
    return layer  # type: ignore[no-any-return]


def _linear(w: QTensor, at: torch.device) -> torch.nn.Linear:
    linear = torch.nn.Linear(w.k, w.n, bias=False, dtype=torch.bfloat16, device=at)
    linear.weight = torch.nn.Parameter(w.dequantize(torch.float32).to(at, torch.bfloat16), requires_grad=False)
    return linear


def _needed(module: str):  # type: ignore[no-untyped-def]
    try:
        return importlib.import_module(module)
    except Exception as e:  # a stranger's package may fail in any way
        raise Refused(f"{module}: {type(e).__name__}: {e}") from e


STRANGERS = (
    Peer("cuBLAS bf16", "W16A16", cublas),
    Peer("torch._int_mm", "int8 only", int8_cublas, own=True),
    Peer("torchao int4", "W4A16", torchao, own=True),
    Peer("humming", "W4A16", humming, own=True),
    Peer("humming int8", "W4A8", humming_a8, own=True),
    Peer("gemlite", "W4A16", gemlite),
    Peer("bitsandbytes nf4", "W4A16", bitsandbytes, own=True),
)


def peers(kernels: tuple[Kernel, ...], device: Device) -> tuple[Peer, ...]:
    """Everyone who takes part."""
    ours = tuple(
        kernel_peer(kernel, device, act)
        for kernel in kernels
        for act in ((ActSpec(), ActSpec(group_size=128)) if kernel.name == "triton-a8" else (None,))
    )
    return ours + STRANGERS
