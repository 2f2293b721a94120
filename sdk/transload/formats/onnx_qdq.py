"""The standard ONNX form of a quantized linear: DequantizeLinear over (u)int4 or (u)int8, then MatMul.

    codes   (u)int4 or (u)int8 [K, N], 4-bit ones two a byte, low first, over the flattened tensor
    scales  float32 [K / block, N] with block_size, or [N] for one scale per output
    zeros   like the codes, of the scales' shape; absent for signed codes

Any runtime of opset 21 computes it; onnxruntime makes MatMulNBits of it when it loads the model. `onnx.Onnx` reads it.
Source: ONNX 1.23 `Operators.md`, DequantizeLinear-21, checked by running onnxruntime in the tests.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from transload import bits
from transload.formats.base import Source
from transload.formats.limits import integer_limits, weights_only
from transload.formats.onnx import Onnx
from transload.quant import PER_CHANNEL, QTensor, QuantSpec, Zero


class OnnxQdq(Onnx):
    """The writer; `Onnx` is what reads and detects it."""

    name: ClassVar[str] = "onnx-qdq"
    embeddings: ClassVar[bool] = False

    def detects(self, source: Source) -> bool:
        """False: Onnx reads both forms."""
        return False

    def cannot_hold(self, spec: QuantSpec, shape: tuple[int, ...]) -> str | None:
        """4 or 8 bits with integer zero points or none, float32 scales, whole groups along K."""
        reason = integer_limits(spec, shape, (4, 8), (Zero.MIDPOINT, Zero.CODES), (torch.float32,)) or weights_only(
            spec
        )
        if reason is None and spec.act_order:
            return "DequantizeLinear has no g_idx"
        if reason is None and spec.group_size != PER_CHANNEL and shape[-1] % spec.group_size:
            return f"its blocks of {spec.group_size} do not divide {shape[-1]} inputs"
        if reason is None and spec.bits == 4 and (shape[-1] * shape[-2] % 2 or shape[-2] * spec.groups(shape[-1]) % 2):
            return f"an odd number of 4-bit codes or zero points does not fill its bytes (shape {shape})"
        return reason

    def encode(self, name: str, w: QTensor) -> dict[str, Tensor]:
        """The initializers of one DequantizeLinear."""
        signed = w.spec.zero is Zero.MIDPOINT
        flip = w.spec.midpoint if signed else 0  # code - 8 in two's complement is the code with its top bit turned
        parts = {"codes": _stored(w.codes.T ^ flip, w.spec.bits), "scales": _sides(w.scales, w.spec)}
        if w.zeros is not None:
            parts["zeros"] = _stored(_sides(w.zeros, w.spec), w.spec.bits)
        return {f"{name}.{part}": t for part, t in parts.items()}


def _stored(values: Tensor, width: int) -> Tensor:
    """uint8 values as they lie in the file: [..] for 8 bits, [count / 2] for 4."""
    values = values.contiguous()
    return values if width == 8 else bits.pack(values.reshape(-1), 4)


def _sides(t: Tensor, spec: QuantSpec) -> Tensor:
    """[N, G] as [G, N], or [N] for one group per row."""
    return t.reshape(-1) if spec.group_size == PER_CHANNEL else t.T.contiguous()
