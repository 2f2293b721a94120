"""Other people's 4-bit products on the same codes and scales, each called as its own project calls it.

This file also runs alone in another environment (worker.py), where transload is not installed: it imports nothing from
it, and nothing but numpy and torch at the top. A peer that cannot be imported or cannot hold the case raises; the
message is reported in its place.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, util
from pathlib import Path
from platform import machine
from typing import Any

import numpy as np
import torch

Call = Callable[[], torch.Tensor]
_SLOW = 10**9  # products that kernels in plain C++ are not given


@dataclass(frozen=True, slots=True, eq=False)
class Data:
    """codes: uint8 [N, K] with midpoint 8; scales: float32 [N, G], exact in float16; x: float32 [M, K].

    With experts, codes and scales have a first dimension E, and counts int64 [E] are the rows of x of each.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    x: torch.Tensor
    group: int
    threads: int
    counts: torch.Tensor | None = None

    def dequantized(self) -> torch.Tensor:
        """The weight as float32 [N, K]."""
        return (self.codes.float() - 8) * self.scales.repeat_interleave(self.group, 1)

    def experts(self) -> list[Data]:
        """One linear for every expert that has rows."""
        assert self.counts is not None
        parts = zip(self.codes, self.scales, torch.split(self.x, self.counts.tolist()), strict=True)
        return [Data(codes, scales, x, self.group, self.threads) for codes, scales, x in parts if len(x)]


@dataclass(frozen=True, slots=True)
class Peer:
    """name as shown, the scheme that it really computes, and how to set it up for one case."""

    name: str
    scheme: str
    prepare: Callable[[Data], Call]


def torch_bf16(d: Data) -> Call:
    """A dense bfloat16 linear: what a 4-bit kernel has to beat."""
    w, x = d.dequantized().bfloat16(), d.x.bfloat16()
    return lambda: torch.nn.functional.linear(x, w)


def torch_fp32(d: Data) -> Call:
    """A dense float32 linear."""
    w = d.dequantized()
    return lambda: torch.nn.functional.linear(d.x, w)


def torch_int_mm(d: Data) -> Call:
    """W8A8 with one scale per token and output: other numbers, a bound for int8 products."""
    w = d.dequantized()
    sw = w.abs().amax(1) / 127
    wq = (w / sw[:, None]).round().to(torch.int8).T

    def call() -> torch.Tensor:
        sx = d.x.abs().amax(1, keepdim=True) / 127
        xq = (d.x / sx).round().to(torch.int8)
        return torch._int_mm(xq, wq).float() * sx * sw

    return call


def torch_int4pack(d: Data) -> Call:
    """torch's own W4A16 kernel for CPUs, as torchao calls it."""
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(d.codes.int(), 2)
    zeros = torch.zeros_like(d.scales.T)  # w = (code - 8) * scale + zero
    sides = torch.stack([d.scales.T, zeros], -1).contiguous().bfloat16()
    x = d.x.bfloat16()
    return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, d.group, sides)


def torch_dyn_quant(d: Data) -> Call:
    """torch's W4A8 kernel: int8 activations per token. On x86 it is plain C++, about a second per 10^9 products."""
    n, k = d.codes.shape
    if len(d.x) * n * k > _SLOW and machine() in ("x86_64", "AMD64"):
        raise ValueError("torch has only plain C++ for it on this processor: left out above 10^9 products")
    pairs = (d.codes[:, ::2] | d.codes[:, 1::2] << 4).contiguous()
    packed = torch.ops.aten._dyn_quant_pack_4bit_weight(pairs, d.scales, None, d.group, k, n)
    return lambda: torch.ops.aten._dyn_quant_matmul_4bit(d.x, packed, d.group, k, n)


def openvino(precision: str, quantized: bool) -> Callable[[Data], Call]:
    """OpenVINO's compressed weights, with or without dynamic quantization of activations per group."""

    def prepare(d: Data) -> Call:
        ov, op = _library("openvino"), _library("openvino.opset13")
        n, k = d.codes.shape
        groups = d.codes.reshape(n, k // d.group, d.group).numpy()
        pairs = groups.reshape(-1, 2)
        # OpenVINO reads these arrays in place: they live as long as `call`.
        kept = (pairs[:, 0] | pairs[:, 1] << 4, d.scales.numpy().astype(np.float16)[..., None], d.x.numpy())
        codes = op.constant(ov.Tensor(kept[0], ov.Shape(list(groups.shape)), ov.Type.u4))
        shifted = op.subtract(op.convert(codes, "f16"), op.constant(np.float16(8)))
        scaled = op.multiply(shifted, op.constant(kept[1]))
        weight = op.convert(op.reshape(scaled, op.constant([n, k]), False), "f32")
        x = op.parameter([-1, k], ov.Type.f32)
        model = ov.Model([op.matmul(x, weight, False, True)], [x])
        options = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": d.threads,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": d.group if quantized else 0,
            "PERFORMANCE_HINT": "LATENCY",
        }
        request = ov.Core().compile_model(model, "CPU", options).create_infer_request()
        request.set_input_tensor(ov.Tensor(kept[2], shared_memory=True))

        def call() -> torch.Tensor:
            request.infer()
            return torch.from_numpy(request.get_output_tensor().data.reshape(len(kept[2]), n))

        return call

    return prepare


def _vllm() -> tuple[Any, Callable[[torch.Tensor], torch.Tensor]]:
    """vLLM's operators, and its packing of codes [K, N] into int32 words along N."""
    _library("vllm._C")
    folder = "vllm.model_executor.layers.quantization.utils.quant_utils"
    pack, kind = _library(folder).pack_quantized_values_into_int32, _library("vllm.scalar_type").scalar_types.uint4

    def packed(codes: torch.Tensor) -> torch.Tensor:
        words: torch.Tensor = pack(codes.int().contiguous(), kind, 1)
        return words.contiguous()

    return _library("vllm._custom_ops"), packed


def vllm_wna16(d: Data) -> Call:
    """vLLM's W4A16 kernel for CPUs, packed as its CPUWNA16LinearKernel packs."""
    ops, pack = _vllm()
    k = d.codes.shape[1]
    words = pack(d.codes.T)
    weight = words.view(k, -1, 2).permute(1, 0, 2).reshape(-1, k * 2).contiguous()
    scales, x = d.scales.T.bfloat16().contiguous(), d.x.bfloat16()
    hint = "amx" if torch.cpu._is_amx_tile_supported() else "vec"
    return lambda: ops.cpu_gemm_wna16(x, weight, scales, None, None, 8, hint)


def vllm_w4a8(d: Data) -> Call:
    """vLLM's W4A8 kernel, which it uses where there are AMX tiles."""
    ops, pack = _vllm()
    if not torch.cpu._is_amx_tile_supported():
        raise RuntimeError("vLLM runs it on processors with AMX tiles only")

    def awq_words(t: torch.Tensor) -> torch.Tensor:
        rows, columns = t.shape
        ordered = t.view(rows, columns // 8, 8)[:, :, (0, 2, 4, 6, 1, 3, 5, 7)].reshape(rows, columns)
        return pack(ordered)

    scales, x = d.scales.T.bfloat16().contiguous(), d.x.bfloat16()
    zeros = torch.full(scales.shape, 8, dtype=torch.int32)
    algorithm = ops.CPUQuantAlgo.AWQ
    packed = ops.convert_weight_packed_scale_zp(awq_words(d.codes.T), awq_words(zeros), scales, algorithm)
    return lambda: ops.int4_scaled_mm_cpu(x, *packed[:2], packed[2], None)


def ark(compute: str) -> Callable[[Data], Call]:
    """AutoRound's kernel library (ARK), computing in int8, bf16 or fp32."""

    def prepare(d: Data) -> Call:
        library = _library("auto_round_kernel")
        n, k = d.codes.shape
        codes = (d.codes.to(torch.int8) - 8).T.contiguous()
        zeros = torch.zeros(k // d.group, n, dtype=torch.int8)
        scales = d.scales.T.contiguous()
        kind = (compute, "int4", "fp32", False)
        packed = library.repack_quantized_weight(codes, scales, zeros, d.group, *kind)
        x, bias = d.x.contiguous(), torch.zeros(n)
        return lambda: library.woqgemm(x, packed, bias, n, k, d.group, *kind)

    return prepare


def llama_cpp(d: Data) -> Call:
    """llama.cpp's Q4_0 product with activations quantized to Q8_0: int8 per 32 values."""
    if d.group % 32:
        raise ValueError(f"Q4_0 has groups of 32, not {d.group}")
    multiply = _beside("ggml").prepare(d.codes.numpy(), d.scales.numpy(), d.x.numpy(), d.group, d.threads)
    return lambda: torch.from_numpy(multiply())


PEERS = (
    Peer("torch bf16", "w16a16", torch_bf16),
    Peer("torch fp32", "w16a16", torch_fp32),
    Peer("torch _int_mm", "w8a8", torch_int_mm),
    Peer("torch int4pack", "w4a16", torch_int4pack),
    Peer("torch dyn_quant", "w4a8", torch_dyn_quant),
    Peer("openvino a8", "w4a8", openvino("f32", True)),
    Peer("openvino bf16", "w4a16", openvino("bf16", False)),
    Peer("ark int8", "w4a8", ark("int8")),
    Peer("ark bf16", "w4a16", ark("bf16")),
    Peer("llama.cpp q4_0", "w4a8", llama_cpp),
    Peer("vllm wna16", "w4a16", vllm_wna16),
    Peer("vllm w4a8", "w4a8", vllm_w4a8),
)


def prepared(d: Data) -> tuple[dict[str, Call], dict[str, str]]:
    """(calls, reasons) of every peer: those that ran once on this case, and why the others did not.

    Experts are multiplied one after the other.
    """
    calls: dict[str, Call] = {}
    reasons: dict[str, str] = {}
    for peer in PEERS:
        try:
            call = peer.prepare(d) if d.counts is None else _one_by_one(peer, d)
            call()
        except Exception as e:
            reasons[peer.name] = _first_line(e)
        else:
            calls[peer.name] = call
    return calls, reasons


def _one_by_one(peer: Peer, d: Data) -> Call:
    """The experts in a loop: what is left to a caller whose library has no grouped product."""
    calls = [peer.prepare(part) for part in d.experts()]
    return lambda: torch.cat([call() for call in calls])


def _library(name: str) -> Any:
    return import_module(name)


def _beside(name: str) -> Any:
    """A file of this folder, also where this folder is no package."""
    spec = util.spec_from_file_location(f"transload_bench_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _first_line(e: Exception) -> str:
    return f"{type(e).__name__}: {e}".splitlines()[0][:160]
