"""ONNX Runtime sessions that multiply with one weight, bound to torch's memory.

A session owns its weight in the layout that ONNX Runtime prefers: the model's initializers are handed over inside the
serialized model and are freed by ONNX Runtime once it has made its own packed copy.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from transload.errors import BackendError
from transload_cpu.onnx_layout import Layout

INT8_ACTIVATIONS = 4  # MatMulNBits' accuracy_level: 4 quantizes x to int8 per block, 0 computes in x's own float32
FLOAT = 1  # onnx.TensorProto.FLOAT
UINT8 = 2  # onnx.TensorProto.UINT8
MOST_THREADS = 8  # of one session
OPSET, IR_VERSION = 21, 10  # of ONNX 1.16, which every supported ONNX Runtime reads


class Session:
    """y = x @ w.T for one Layout. Threads may share it: nothing is kept between calls."""

    def __init__(self, layout: Layout, int8_activations: bool) -> None:
        session = _open(_model(layout, int8_activations))
        import onnxruntime as ort

        # The public wrappers look the device up and check for WebGPU on every call, 6 us of 14; decoding makes hundreds
        # of calls a token, so the session below them is called directly.
        self._session = session._sess
        self._state = ort.capi.onnxruntime_pybind11_state
        self._device = ort.OrtDevice.make("cpu", 0)._get_c_device()
        self._n, self._k, self._columns = layout.n, layout.k, layout.columns

    def run(self, x: Tensor) -> Tensor:
        """x: float32 [M, K], contiguous, on the CPU. Returns float32 [M, N]."""
        m = x.shape[0]
        if self._columns is not None:
            x = torch.nn.functional.pad(x, (0, 1)).index_select(1, self._columns)
        y = torch.empty(m, self._n)
        binding = self._state.SessionIOBinding(self._session)
        binding.bind_input("x", self._device, FLOAT, (m, self._k), x.data_ptr())
        binding.bind_output("y", self._device, FLOAT, (m, self._n), y.data_ptr())
        try:
            self._session.run_with_iobinding(binding, None)
        except Exception as e:
            raise BackendError(f"onnxruntime failed on x [{m}, {self._k}]: {e}") from e
        return y


def return_freed_memory() -> None:
    """Gives what malloc holds free back to the system, where the C library has such a call (glibc).

    Building a session needs several short-lived copies of its weight. Between the long-lived ones that ONNX Runtime
    keeps, glibc does not return their pages: 40 weights of 4 million codes held 670 MB, with this call 275 MB.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, or Windows, where there is no "None" library
        return None


def _open(model: bytes) -> Any:
    """An InferenceSession with threads of its own, or in the pool that the application has made for all sessions.

    A pool for all sessions is the application's to make (onnxruntime.set_global_thread_pool_sizes): once there is one,
    every session of the process that does not name it fails. Own threads sleep between calls instead of spinning,
    because hundreds of sessions take turns; and there are at most MOST_THREADS, because each keeps them.
    """
    import onnxruntime as ort

    threads = min(torch.get_num_threads(), MOST_THREADS)
    try:
        try:
            return ort.InferenceSession(model, _options(ort, threads), ["CPUExecutionProvider"], enable_fallback=0)
        except RuntimeError as e:
            if "global thread pool" not in str(e):
                raise
        return ort.InferenceSession(model, _options(ort, None), ["CPUExecutionProvider"], enable_fallback=0)
    except Exception as e:
        raise BackendError(f"onnxruntime {ort.__version__} refused a MatMulNBits session: {e}") from e


def _options(ort: Any, threads: int | None) -> Any:
    """Session options with `threads` own threads; None for the application's pool."""
    options = ort.SessionOptions()
    options.enable_cpu_mem_arena = False  # the arena grows by powers of two; torch owns x and y anyway
    if threads is None:
        options.use_per_session_threads = False
    else:
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _model(layout: Layout, int8_activations: bool) -> bytes:
    """A model of one MatMulNBits, and the sums behind it where the layout needs them."""
    from onnx import helper

    tensors = {"codes": layout.codes, "scales": layout.scales}
    if layout.zeros is not None:
        tensors["zeros"] = layout.zeros
    inputs = ["x", *tensors]
    groups = 0 if layout.offsets is None else layout.offsets.shape[0]
    pieces = [layout.n] * layout.parts + ([groups] if groups else [])
    plain = len(pieces) == 1
    nodes = [
        helper.make_node(
            "MatMulNBits",
            inputs,
            ["y" if plain else "rows"],
            domain="com.microsoft",
            K=layout.k,
            N=sum(pieces),
            bits=layout.bits,
            block_size=layout.block,
            accuracy_level=INT8_ACTIVATIONS if int8_activations else 0,
        )
    ]
    if not plain:
        names = [f"part{i}" for i in range(len(pieces))]
        nodes.append(helper.make_node("Split", ["rows", "pieces"], names, axis=1))
        total = names[0]
        if layout.parts == 2:
            total = "total" if groups else "y"
            nodes.append(helper.make_node("Add", names[:2], [total]))
        if layout.offsets is not None:
            tensors["offsets"] = layout.offsets
            nodes.append(helper.make_node("Gemm", [names[-1], "offsets", total], ["y"]))
    initializers = [_tensor(name, t) for name, t in tensors.items()]
    if not plain:
        initializers.append(helper.make_tensor("pieces", 7, [len(pieces)], pieces))  # 7: int64
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", FLOAT, ["M", layout.k])],
        [helper.make_tensor_value_info("y", FLOAT, ["M", layout.n])],
        initializers,
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    model: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION).SerializeToString()
    return model


def _tensor(name: str, t: Tensor) -> Any:
    from onnx import TensorProto

    proto = TensorProto(name=name, data_type=UINT8 if t.dtype == torch.uint8 else FLOAT, dims=t.shape)
    proto.raw_data = t.contiguous().numpy().tobytes()
    return proto
