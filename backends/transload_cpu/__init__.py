"""Transload on the host processor: ONNX Runtime's MatMulNBits, with the reference kernel as the last choice."""

from transload_cpu.backend import backend

__all__ = ["backend"]
