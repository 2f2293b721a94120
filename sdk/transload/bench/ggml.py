"""llama.cpp's own product, called in ggml through ctypes: Q4_0 weights in the buffer that llama.cpp chooses for them.

Runs alone in another environment like peers.py. A symmetric 4-bit weight with groups of a multiple of 32 is exactly a
Q4_0 tensor: per 32 inputs a float16 scale and 16 bytes, byte j = code j | code 16 + j << 4.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt

F32, Q4_0 = 0, 2  # enum ggml_type
ARENA = 16 << 20  # bytes for the descriptions of a handful of tensors and a graph


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


_SIGNATURES = {
    "ggml_init": (c_void_p, (_InitParams,)),
    "ggml_new_tensor_2d": (c_void_p, (c_void_p, c_int, c_int64, c_int64)),
    "ggml_mul_mat": (c_void_p, (c_void_p, c_void_p, c_void_p)),
    "ggml_new_graph": (c_void_p, (c_void_p,)),
    "ggml_build_forward_expand": (None, (c_void_p, c_void_p)),
    "ggml_backend_cpu_init": (c_void_p, ()),
    "ggml_backend_cpu_set_n_threads": (None, (c_void_p, c_int)),
    "ggml_backend_cpu_buffer_type": (c_void_p, ()),
    "ggml_backend_get_device": (c_void_p, (c_void_p,)),
    "ggml_backend_dev_backend_reg": (c_void_p, (c_void_p,)),
    "ggml_backend_reg_get_proc_address": (c_void_p, (c_void_p, c_char_p)),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, (c_void_p, c_void_p)),
    "ggml_backend_tensor_set": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_tensor_get": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_graph_compute": (c_int, (c_void_p, c_void_p)),
}

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


def q4_0(codes: Bytes, scales: Floats, group: int) -> Bytes:
    """Q4_0 blocks of 18 bytes: [N, K / 32, 18] from codes [N, K] with midpoint 8 and scales [N, K / group]."""
    n, k = codes.shape
    blocks = codes.reshape(n, k // 32, 32)
    out = np.empty((n, k // 32, 18), np.uint8)
    d = np.repeat(scales.astype(np.float16), group // 32, axis=1)
    out[..., :2] = d.view(np.uint8).reshape(n, k // 32, 2)
    out[..., 2:] = blocks[..., :16] | blocks[..., 16:] << 4
    return out


def prepare(codes: Bytes, scales: Floats, x: Floats, group: int, threads: int) -> Callable[[], Floats]:
    """The product x [M, K] @ w.T as a call returning float32 [M, N]. Raises ModuleNotFoundError without llama_cpp."""
    (n, k), m = codes.shape, len(x)
    call = _Library()
    weights, values = _arena(call), _arena(call)
    w = call("ggml_new_tensor_2d", weights, Q4_0, k, n)
    a = call("ggml_new_tensor_2d", values, F32, k, m)
    y = call("ggml_mul_mat", values, w, a)
    graph = call("ggml_new_graph", values)
    call("ggml_build_forward_expand", graph, y)
    backend = call("ggml_backend_cpu_init")
    call("ggml_backend_cpu_set_n_threads", backend, threads)
    plain = call("ggml_backend_cpu_buffer_type")
    packed = next(_packing_buffers(call, backend), plain)
    if not call("ggml_backend_alloc_ctx_tensors_from_buft", weights, packed):
        raise MemoryError("ggml could not allocate the weight")
    call("ggml_backend_alloc_ctx_tensors_from_buft", values, plain)
    blocks, rows = q4_0(codes, scales, group), np.ascontiguousarray(x)
    call("ggml_backend_tensor_set", w, blocks.ctypes.data, 0, blocks.nbytes)
    call("ggml_backend_tensor_set", a, rows.ctypes.data, 0, rows.nbytes)
    out = np.empty((m, n), np.float32)

    def multiply() -> Floats:
        if call("ggml_backend_graph_compute", backend, graph):
            raise RuntimeError("ggml could not compute the product")
        call("ggml_backend_tensor_get", y, out.ctypes.data, 0, out.nbytes)
        return out

    return multiply


class _Library:
    """ggml's functions by name, whichever of llama_cpp's libraries they are in."""

    def __init__(self) -> None:
        spec = find_spec("llama_cpp")
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError("No module named 'llama_cpp'")
        folder = Path(spec.origin).parent / "lib"
        self._functions = {}
        libraries = [ctypes.CDLL(str(folder / f"lib{name}.so")) for name in ("ggml-base", "ggml-cpu", "ggml")]
        for name, (result, arguments) in _SIGNATURES.items():
            function = next(getattr(lib, name) for lib in libraries if hasattr(lib, name))
            function.restype, function.argtypes = result, arguments
            self._functions[name] = function

    def __call__(self, name: str, *arguments: object) -> int:
        return int(self._functions[name](*arguments) or 0)


def _arena(call: _Library) -> int:
    return call("ggml_init", _InitParams(ARENA, None, True))


def _packing_buffers(call: _Library, backend: int) -> Iterator[int]:
    """The CPU backend's extra buffer types (AMX, repacked rows), best first."""
    device = call("ggml_backend_get_device", backend)
    registry = call("ggml_backend_dev_backend_reg", device)
    address = call("ggml_backend_reg_get_proc_address", registry, b"ggml_backend_dev_get_extra_bufts")
    if not address:
        return
    found = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)(device)
    index = 0
    while found[index]:
        yield int(found[index])
        index += 1
