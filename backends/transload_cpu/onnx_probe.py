"""What the installed ONNX Runtime really does on this processor, found out by doing it once.

Where MLAS has no int8 kernel for a processor, MatMulNBits computes with float activations instead and says nothing.
One tiny product per width and block tells: it must be the reference's, integer sums and all.
"""

from __future__ import annotations

from functools import cache

import torch

from transload import reference
from transload.errors import BackendError
from transload.quant import ActSpec, QTensor, QuantSpec
from transload_cpu.onnx_layout import lay_out
from transload_cpu.onnx_session import Session


@cache
def missing() -> str | None:
    """None when ONNX Runtime can be used here; otherwise why not, and the remedy."""
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        return "onnxruntime is not installed; run: pip install onnxruntime"
    return None


@cache
def no_int8(bits: int, block: int) -> str | None:
    """None when codes of `bits` (4 or 8) bits in blocks of `block` are multiplied with int8 activations as specified.

    x and codes reach their ends in places, where kernels that add pairs of products in 16 bits would saturate.
    """
    spec = QuantSpec(bits, block, act=ActSpec(group_size=block))
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(1 << bits, (16, 2 * block), generator=random, dtype=torch.uint8)
    codes[0], codes[1] = (1 << bits) - 1, 0
    w = QTensor(spec, codes, torch.rand(16, 2, generator=random) + 0.5)
    x = torch.randn(3, 2 * block, generator=random)
    x[0] = 1
    try:
        y = Session(lay_out(w), int8_activations=True).run(x)
    except BackendError as e:
        return str(e)
    truth = reference.matmul(x, w).double()
    error = float(((y - truth) ** 2).sum() / (truth**2).sum())
    if error < 1e-9:
        return None
    return (
        f"onnxruntime does not multiply {bits}-bit codes in blocks of {block} with int8 activations on this processor"
    )
