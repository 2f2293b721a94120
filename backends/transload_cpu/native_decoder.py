"""A decoder's layers as one native call per token (native/decoder.h): no Python between the products."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from transload.errors import ConfigError, TransloadError
from transload.hal import Decoder, DecoderLinear, DecoderStep, Packed
from transload.quant import PER_CHANNEL
from transload_cpu import native_library as native
from transload_cpu.native_library import DTYPES, check

CACHE_DTYPES = (torch.float32, torch.bfloat16)
_FLOATS = (torch.float32, torch.bfloat16)  # of weights that were left as they are
_NORMS = ("attention_norm", "q_norm", "k_norm", "after_attention", "mlp_norm", "after_mlp")


def decoder(d: Decoder, isa: int) -> DecoderStep | str:
    """The decoder prepared for an instruction set, or the reason why it cannot be."""
    try:
        return NativeDecoder(d, isa)
    except TransloadError as e:
        return str(e)


@dataclass(frozen=True, slots=True, eq=False)
class BoundCache:
    """Addresses of a sequence's keys and values, layer by layer, and the tensors that they belong to."""

    keys: ctypes.Array[ctypes.c_void_p]
    values: ctypes.Array[ctypes.c_void_p]
    capacity: int
    dtype: torch.dtype
    tensors: tuple[Tensor, ...]


class NativeDecoder(DecoderStep):
    """Several threads may run steps at once, each on a cache of its own."""

    def __init__(self, d: Decoder, isa: int) -> None:
        """Raises ConfigError for weights of other kernels and shapes that do not fit, BackendError out of memory."""
        self._kept: list[Tensor] = []  # what the native side points to
        self._shape = (d.kv_heads, d.head_dim)
        self._hidden, self._half = d.hidden, d.rotary // 2
        layers = (native.DecoderLayer * len(d.layers))()
        linears: list[native.Linear] = []
        for layer, out in zip(d.layers, layers, strict=True):
            for name in _NORMS:
                setattr(out, name, self._floats(getattr(layer, name)))
            out.window = layer.window or 0
            members = {"qkv": layer.qkv, "out": layer.out, "gate_up": layer.mlp.gate_up, "down": layer.mlp.down}
            for name, linear in members.items():
                parts = list(self._parts(linear, name))
                setattr(out, name, len(parts))
                linears += parts
        shape = native.DecoderShape(
            len(d.layers), d.hidden, d.heads, d.kv_heads, d.head_dim, d.rotary,
            d.eps, d.scaling, int(d.interleaved), isa, self._floats(d.norm),
        )  # fmt: skip
        self._library, self._handle = native.load(), ctypes.c_void_p()
        table = (native.Linear * len(linears))(*linears)
        status = self._library.tl_decoder_new(shape, layers, table, len(linears), ctypes.byref(self._handle))
        check(status, "decoder")

    def __del__(self) -> None:
        """Gives the native side's memory back."""
        if getattr(self, "_handle", None):
            self._library.tl_decoder_free(self._handle)

    def bind(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> BoundCache:
        """See DecoderStep. Raises ConfigError for tensors of other shapes or dtypes, or that are not contiguous."""
        tensors = (*keys, *values)
        first = tensors[0]
        for t in tensors:
            fits = (t.shape[0], t.shape[2]) == self._shape and t.shape[1] == first.shape[1]
            if not fits or t.dtype != first.dtype or t.dtype not in CACHE_DTYPES or not t.is_contiguous():
                raise ConfigError(f"native decoder: a cache of {t.dtype} {tuple(t.shape)}, heads and dim {self._shape}")
        pointers = ctypes.c_void_p * len(keys)
        return BoundCache(
            pointers(*(t.data_ptr() for t in keys)),
            pointers(*(t.data_ptr() for t in values)),
            first.shape[1],
            first.dtype,
            tensors,
        )

    def run(self, x: Tensor, cos: Tensor, sin: Tensor, cache: object, length: int) -> Tensor:
        """See DecoderStep."""
        assert isinstance(cache, BoundCache)  # of our own `bind`
        y = torch.empty(self._hidden)
        self._check(1, x, cos, sin)
        token = native.DecoderToken(
            x.data_ptr(), cos.data_ptr(), sin.data_ptr(),
            ctypes.addressof(cache.keys), ctypes.addressof(cache.values), cache.capacity, length,
            y.data_ptr(), DTYPES[cache.dtype], torch.get_num_threads(),
        )  # fmt: skip
        check(self._library.tl_decoder_step(self._handle, ctypes.byref(token)), "decoder step")
        return y

    def run_many(self, x: Tensor, cos: Tensor, sin: Tensor, cache: object, length: int) -> Tensor:
        """See DecoderStep."""
        assert isinstance(cache, BoundCache)  # of our own `bind`
        y = torch.empty(len(x), self._hidden)
        self._check(len(x), x, cos, sin)
        prompt = native.DecoderPrompt(
            x.data_ptr(), cos.data_ptr(), sin.data_ptr(),
            ctypes.addressof(cache.keys), ctypes.addressof(cache.values), cache.capacity, length, len(x),
            y.data_ptr(), DTYPES[cache.dtype], torch.get_num_threads(),
        )  # fmt: skip
        check(self._library.tl_decoder_prompt_run(self._handle, ctypes.byref(prompt)), "decoder prompt")
        return y

    def _check(self, tokens: int, x: Tensor, cos: Tensor, sin: Tensor) -> None:
        for t, width in ((x, self._hidden), (cos, self._half), (sin, self._half)):
            if t.dtype is not torch.float32 or t.numel() != tokens * width or not t.is_contiguous():
                found = f"{t.dtype} {tuple(t.shape)}"
                raise ConfigError(f"native decoder: {found}, expected contiguous float32 [{tokens}, {width}]")

    def _floats(self, t: Tensor | None) -> int | None:
        """The address of a float32 copy (or of `t` itself) that lives as long as this object."""
        if t is None:
            return None
        self._kept.append(t.detach().to("cpu", torch.float32).contiguous())
        return self._kept[-1].data_ptr()

    def _parts(self, linear: DecoderLinear, name: str) -> Iterator[native.Linear]:
        for weight, bias in linear.parts:
            if isinstance(weight, Packed):
                packed = weight.tensors.get("packed")
                if packed is None or packed.device.type != "cpu" or not weight.kernel.startswith("native-"):
                    raise ConfigError(f"{name} is multiplied by kernel '{weight.kernel}'")
                self._kept.append(packed)
                act = weight.spec.act
                bits, group = (16, PER_CHANNEL) if act is None else (8, act.group_size)
                address, size, n, k, dtype = packed.data_ptr(), packed.numel(), weight.n, weight.k, 0
            else:
                if weight.dtype not in _FLOATS or weight.device.type != "cpu":
                    raise ConfigError(f"{name} has {weight.dtype} weights on {weight.device}")
                floats = weight.detach().contiguous()
                self._kept.append(floats)
                (n, k), bits, group, dtype = floats.shape, 0, 0, DTYPES[floats.dtype]
                address, size = floats.data_ptr(), floats.nbytes
            yield native.Linear(address, size, n, k, self._floats(bias), group, bits, dtype)
