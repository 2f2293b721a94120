"""Transload on NVIDIA GPUs."""

from transload_cuda.backend import backend

__all__ = ["backend"]
