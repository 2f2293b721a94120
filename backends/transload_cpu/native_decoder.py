"""A decoder's layers as one native call per token (native/decoder.h): no Python between the products."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from transload.errors import ConfigError, TransloadError
from transload.hal import Decoder, DecoderStep
from transload_cpu import native_library as native
from transload_cpu.native_decoder_tables import Tables
from transload_cpu.native_library import DTYPES, check

_PROMPT = 1024  # tokens of one call: between calls Python looks for Ctrl-C
CACHE_DTYPES = (torch.float32, torch.bfloat16)


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
        tables = Tables(d, isa)
        self._kept = tables.kept  # what the native side points to
        self._shape = (d.kv_heads, d.head_dim)
        self._hidden, self._half = d.hidden, d.rotary // 2
        self._library, self._handle = native.load(), ctypes.c_void_p()
        status = self._library.tl_decoder_new(
            tables.shape, tables.layers, tables.linears, len(tables.linears), ctypes.byref(self._handle)
        )
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
        self._check(len(x), x, cos, sin)
        if not 0 < len(x) <= cache.capacity - length or length < 0:
            found = f"{len(x)} tokens behind {length}"
            raise ConfigError(f"native decoder: {found} contradict a cache with room for {cache.capacity}")
        y = torch.empty(len(x), self._hidden)
        for first in range(0, len(x), _PROMPT):
            part = slice(first, first + _PROMPT)
            prompt = native.DecoderPrompt(
                x[part].data_ptr(), cos[part].data_ptr(), sin[part].data_ptr(),
                ctypes.addressof(cache.keys), ctypes.addressof(cache.values), cache.capacity, length + first,
                len(x[part]), y[part].data_ptr(), DTYPES[cache.dtype], torch.get_num_threads(),
            )  # fmt: skip
            check(self._library.tl_decoder_prompt_run(self._handle, ctypes.byref(prompt)), "decoder prompt")
        return y

    def _check(self, tokens: int, x: Tensor, cos: Tensor, sin: Tensor) -> None:
        for t, width in ((x, self._hidden), (cos, self._half), (sin, self._half)):
            if t.dtype is not torch.float32 or t.numel() != tokens * width or not t.is_contiguous():
                found = f"{t.dtype} {tuple(t.shape)}"
                raise ConfigError(f"native decoder: {found}, expected contiguous float32 [{tokens}, {width}]")
