"""A decoder in the C types of native/transload_native.h, and the tensors whose addresses they hold."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import torch
from torch import Tensor

from transload.errors import ConfigError
from transload.hal import Decoder, DecoderExperts, DecoderLayer, DecoderLinear, Packed
from transload.quant import PER_CHANNEL
from transload_cpu import native_library as native
from transload_cpu.native_library import DTYPES  # of weights that were left as they are, too

_NORMS = ("attention_norm", "q_norm", "k_norm", "after_attention", "mlp_norm", "after_mlp")


class Tables:
    """Arguments of tl_decoder_new. Raises ConfigError for weights of other kernels."""

    def __init__(self, d: Decoder, isa: int) -> None:
        self.kept: list[Tensor] = []  # what the native side points to
        self._linears: list[native.Linear] = []
        self.layers = (native.DecoderLayer * len(d.layers))()
        for layer, out in zip(d.layers, self.layers, strict=True):
            self._fill(layer, out)
        self.linears = (native.Linear * len(self._linears))(*self._linears)
        self.shape = native.DecoderShape(
            len(d.layers), d.hidden, d.heads, d.kv_heads, d.head_dim, d.rotary,
            d.eps, d.scaling, int(d.interleaved), isa, self._floats(d.norm),
        )  # fmt: skip

    def _fill(self, layer: DecoderLayer, out: native.DecoderLayer) -> None:
        for name in _NORMS:
            setattr(out, name, self._floats(getattr(layer, name)))
        out.window = layer.window or 0
        out.qkv, out.out = self._add(layer.qkv, "qkv"), self._add(layer.out, "out")
        if layer.mlp is not None:
            out.gate_up, out.down = self._add(layer.mlp.gate_up, "gate_up"), self._add(layer.mlp.down, "down")
        if layer.experts is not None:
            out.experts = ctypes.pointer(self._experts(layer.experts))

    def _experts(self, e: DecoderExperts) -> native.Experts:
        first = len(self._linears)
        router = self._add(e.router, "the router")
        experts = sum(part.n for part in self._linears[first:])
        if e.bias is not None and e.bias.shape != (experts,):
            raise ConfigError(f"the router has {experts} outputs and a bias {tuple(e.bias.shape)}")
        return native.Experts(
            experts, e.top_k, e.groups, e.top_groups, self._floats(e.bias), e.scaling, int(e.sigmoid),
            int(e.normalized), router, self._add(e.shared_gate, "the shared gate"),
            self._add(e.each.gate_up, "the experts' gate_up"), self._add(e.each.down, "the experts' down"),
        )  # fmt: skip

    def _floats(self, t: Tensor | None) -> int | None:
        """The address of a float32 copy (or of `t` itself) that lives as long as this object."""
        if t is None:
            return None
        self.kept.append(t.detach().to("cpu", torch.float32).contiguous())
        return self.kept[-1].data_ptr()

    def _add(self, linear: DecoderLinear | None, name: str) -> int:
        """How many parts were added to the linears."""
        parts = [] if linear is None else list(self._parts(linear, name))
        self._linears += parts
        return len(parts)

    def _parts(self, linear: DecoderLinear, name: str) -> Iterator[native.Linear]:
        for weight, bias in linear.parts:
            if isinstance(weight, Packed):
                packed = weight.tensors.get("packed")
                if packed is None or packed.device.type != "cpu" or not weight.kernel.startswith("native-"):
                    raise ConfigError(f"{name} is multiplied by kernel '{weight.kernel}'")
                self.kept.append(packed)
                act = weight.spec.act
                bits, group = (16, PER_CHANNEL) if act is None else (8, act.group_size)
                sizes = (weight.n, weight.k, 1 if weight.experts is None else weight.experts)
                address, nbytes, dtype = packed.data_ptr(), packed.numel(), 0
            else:
                if weight.dtype not in DTYPES or weight.device.type != "cpu":
                    raise ConfigError(f"{name} has {weight.dtype} weights on {weight.device}")
                floats = weight.detach().contiguous()
                self.kept.append(floats)
                sizes = (*floats.shape[-2:], len(floats) if floats.dim() == 3 else 1)
                address, nbytes, bits, group, dtype = floats.data_ptr(), floats.nbytes, 0, 0, DTYPES[floats.dtype]
            yield native.Linear(address, nbytes, *sizes, self._floats(bias), group, bits, dtype)
