"""Writes linears as an ONNX model: one MatMulNBits a module, tensors in external data beside the .onnx file.

    <module>.x float [M, K] -> MatMulNBits -> <module>.y float [M, N]

What tests read back and check onnxruntime with; it is no whole language model (decoders are written by
transload.porting). Float tensors travel along as initializers that no node uses.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from transload.errors import CannotHold, OutputExists
from transload.formats.onnx import Onnx
from transload.formats.onnx_source import DATA_TYPES
from transload.headers.info import shown
from transload.quant import QTensor

_ALIGN = 4096  # onnxruntime maps external data whose offset is a multiple of a page


def save(
    path: str | Path,
    modules: Iterable[tuple[str, QTensor]],
    floats: Iterable[tuple[str, Tensor]] = (),
    overwrite: bool = False,
) -> None:
    """Writes a model of MatMulNBits nodes; modules and floats are taken one at a time, so that memory holds only one.

    A module with int8 activations gets accuracy level 4, with which onnxruntime quantizes them per token and block.
    Raises CannotHold naming the module, and OutputExists; nothing appears under the name before it is complete.

    >>> save("linears.onnx", [("lm_head", weight)])
    """
    import onnx
    from onnx import helper

    path = Path(path)
    data = path.with_name(path.name + ".data")
    for file in (path, data):
        if file.exists() and not overwrite:
            raise OutputExists(f"{file}: exists; choose another name or overwrite it")
    nodes, initializers, inputs, outputs = [], [], [], []
    partial = data.with_name(data.name + ".partial")
    try:
        with partial.open("wb") as f:
            for name, w in modules:
                tensors = _encoded(name, w)
                initializers += [_append(f, data.name, full, t) for full, t in tensors.items()]
                nodes.append(_node(name, w, tensors))
                kind = DATA_TYPES[w.spec.scale_dtype]
                inputs.append(helper.make_tensor_value_info(f"{name}.x", kind, ["M", w.k]))
                outputs.append(helper.make_tensor_value_info(f"{name}.y", kind, ["M", w.n]))
            initializers += [_append(f, data.name, name, t) for name, t in floats]
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        graph = helper.make_graph(nodes, "linears", inputs, outputs, initializers)
        model = helper.make_model(graph, opset_imports=opsets, producer_name="transload", ir_version=10)
        os.replace(partial, data)
        _replace_bytes(path, onnx.ModelProto.SerializeToString(model))
    finally:
        partial.unlink(missing_ok=True)


def _encoded(name: str, w: QTensor) -> dict[str, Tensor]:
    reason = Onnx().cannot_hold(w.spec, tuple(w.codes.shape))
    if reason is not None:
        raise CannotHold(f"'onnx' cannot hold {shown(name)} ({w.spec}): {reason}")
    return Onnx().encode(name, w)


def _node(name: str, w: QTensor, tensors: dict[str, Tensor]) -> Any:
    from onnx import helper

    names = [f"{name}.{part}" for part in ("B", "scales", "zero_points", "g_idx")]
    inputs = [f"{name}.x", *(full if full in tensors else "" for full in names)]
    while not inputs[-1]:
        inputs.pop()
    attributes = {"N": w.n, "K": w.k, "bits": w.spec.bits, "block_size": w.spec.group_size}
    return helper.make_node(
        "MatMulNBits",
        inputs,
        [f"{name}.y"],
        name=name,
        domain="com.microsoft",
        accuracy_level=0 if w.spec.act is None else 4,
        **attributes,
    )


def _append(f: BinaryIO, file: str, name: str, t: Tensor) -> Any:
    """Writes one tensor behind the others and returns the initializer that points to it."""
    import onnx

    if t.dtype not in DATA_TYPES:
        raise CannotHold(f"'onnx' cannot hold {shown(name)}: it has no type for {t.dtype}")
    f.write(b"\0" * (-f.tell() % _ALIGN))
    start = f.tell()
    f.write(t.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    found = onnx.TensorProto(name=name, data_type=DATA_TYPES[t.dtype], dims=t.shape, data_location=1)
    for key, value in (("location", file), ("offset", start), ("length", f.tell() - start)):
        found.external_data.add(key=key, value=str(value))
    return found


def _replace_bytes(path: Path, data: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    os.replace(partial, path)
