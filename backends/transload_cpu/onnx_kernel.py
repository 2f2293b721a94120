"""Multiplication through ONNX Runtime's MatMulNBits: W4A16 in float32, W4A8 with int8 activations per block."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

import torch
from torch import Tensor

from transload import reference
from transload.errors import ConfigError
from transload.hal import Device, Kernel, Packed, Problem
from transload.quant import Grid, QTensor
from transload_cpu.onnx_layout import BLOCKS, block_size, lay_out
from transload_cpu.onnx_probe import missing, no_int8
from transload_cpu.onnx_session import Session, return_freed_memory
from transload_cpu.storage import pack_tight, take_rows, unpack_tight

# A larger weight is cut along N: building a session needs up to 16 bytes a code for a moment.
CODES_PER_SESSION = 5 << 20
X_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class OnnxKernel(Kernel):
    """One session per weight, built on first use and kept as long as the weight.

    x in bfloat16 or float16 is computed in float32 and the result rounded once.
    """

    name: ClassVar[str] = "onnx"

    def __init__(self) -> None:
        self._weights: dict[int, _Known] = {}
        self._building = threading.Lock()

    def refuses(self, p: Problem, device: Device) -> str | None:
        """None for integer codes whose groups are made of whole blocks of 16 to 256."""
        spec = p.spec
        if spec.grid is not Grid.INT:
            return f"MatMulNBits takes integer codes, not {spec.grid.value}"
        if p.x_dtype not in X_DTYPES:
            return f"x must be float32, bfloat16 or float16, not {p.x_dtype}"
        if spec.act and spec.act.static:
            return "static activation scales belong to the engine; MatMulNBits quantizes dynamically"
        if spec.act and p.spec.act_order:
            return "act-order with int8 activations: MatMulNBits would group the sorted features, not the original ones"
        if p.k and block_size(p.k, spec) is None:
            if spec.act:
                return f"MatMulNBits quantizes x per block of {BLOCKS}, and the block must divide the weight's group"
            return f"group_size {spec.group_size} is not made of blocks of {BLOCKS}"
        if (reason := missing()) is not None:
            return reason
        if spec.act and p.k and (block := block_size(p.k, spec)):
            return no_int8(4 if spec.bits <= 4 else 8, block)
        return None

    def pack(self, w: QTensor) -> Packed:
        """Codes at their own width, everything else as it is; the session derives its inputs from them."""
        return pack_tight(self.name, w)

    def unpack(self, p: Packed) -> QTensor:
        """The exact inverse of `pack`."""
        return unpack_tight(p)

    def rows(self, p: Packed, index: Tensor) -> QTensor:
        """Output rows `index` (int64 [R]); only these are unpacked."""
        return take_rows(p, index)

    def matmul(self, x: Tensor, w: Packed, bias: Tensor | None = None) -> Tensor:
        """x [M, K] times w.T plus bias [N]: [M, N] in x's dtype."""
        _check(x, w)
        return _multiply(x, self._sessions(w), w, bias)

    def grouped_matmul(self, x: Tensor, w: Packed, counts: Tensor, bias: Tensor | None = None) -> Tensor:
        """Rows sorted by expert, counts int64 [E] rows each: [M, N] in x's dtype. Experts without rows cost nothing."""
        _check(x, w)
        y, start = x.new_empty(x.shape[0], w.n), 0
        for e, count in enumerate(reference.rows_of_experts(counts, len(x), w.experts)):
            if count:
                part = x[start : start + count]
                y[start : start + count] = _multiply(part, self._sessions(w, e), w, None if bias is None else bias[e])
            start += count
        return y

    def _sessions(self, w: Packed, expert: int = 0) -> list[Session]:
        """The sessions of a weight (of one expert), built on first use.

        A weight is known by its tensor of codes and that tensor's version, which torch counts up when it is written to
        (load_state_dict does): then the sessions are built again.
        """
        codes = w.tensors["codes"]
        key, version = id(codes), 0 if codes.is_inference() else codes._version
        known = self._weights.get(key)
        if known is not None and known.version == version and (found := known.sessions.get(expert)):
            return found
        with self._building:
            known = self._weights.get(key)
            if known is None or known.version != version:
                forget = weakref.ref(codes, lambda _: self._weights.pop(key, None))
                known = self._weights[key] = _Known(forget, version, {})
            if expert not in known.sessions:
                known.sessions[expert] = _build(w, expert)
                return_freed_memory()
            return known.sessions[expert]


@dataclass(frozen=True, slots=True)
class _Known:
    """What has been built for a weight, by expert. forget drops it when the weight's codes die."""

    forget: weakref.ref[Tensor]
    version: int
    sessions: dict[int, list[Session]]


def _build(w: Packed, expert: int) -> list[Session]:
    step = max(CODES_PER_SESSION // max(w.k, 1), 1)
    which = None if w.experts is None else expert
    cuts = range(0, w.n, step)
    return [Session(lay_out(take_rows(w, slice(n, n + step), which)), w.spec.act is not None) for n in cuts]


def _check(x: Tensor, w: Packed) -> None:
    """x is handed over as an address, so its shape and place are checked here."""
    if x.dim() != 2 or x.shape[1] != w.k or x.device.type != "cpu":
        raise ConfigError(f"x is {tuple(x.shape)} on {x.device}, expected [M, {w.k}] on the CPU")


def _multiply(x: Tensor, sessions: list[Session], w: Packed, bias: Tensor | None) -> Tensor:
    if x.shape[0] == 0:
        return x.new_empty(0, w.n)
    x32 = x.float().contiguous()
    y = sessions[0].run(x32) if len(sessions) == 1 else torch.cat([s.run(x32) for s in sessions], dim=1)
    if w.spec.act and not isfinite(x32.sum().item()):
        # Quantizing to int8 hides NaN and infinity; they must stay visible in their rows. A sum finds them quickly.
        y.masked_fill_(~x32.isfinite().all(1, keepdim=True), torch.nan)
    if bias is not None:
        y += bias
    return y.to(x.dtype)
