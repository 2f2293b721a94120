"""The stored side of an ONNX model: its graph, and initializers inside the file or in external data.

The protobuf is parsed whole, which the format limits to 2 GiB; external data is read one tensor at a time. Nothing is
executed. Source: ONNX 1.23 `onnx.proto`, TensorProto.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transload import bits
from transload.errors import FormatError
from transload.formats.base import Json
from transload.formats.onnx_graph import Linear, find_linears, find_tables
from transload.headers import TensorInfo, read_json
from transload.headers.info import shown

MAX_MODEL = 2**31 - 1  # bytes; protobuf's own limit

# TensorProto.DataType to this library's names. U4 and I4 are two values a byte, low first, over the flattened tensor.
_NAMES = {
    1: "F32", 2: "U8", 3: "I8", 4: "U16", 5: "I16", 6: "I32", 7: "I64", 9: "BOOL", 10: "F16", 11: "F64", 12: "U32",
    13: "U64", 16: "BF16", 17: "F8_E4M3", 21: "U4", 22: "I4",
}  # fmt: skip
_TORCH = {
    "F32": torch.float32, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "I32": torch.int32, "I64": torch.int64, "BOOL": torch.bool, "F16": torch.float16, "F64": torch.float64,
    "U32": torch.uint32, "U64": torch.uint64, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip

DATA_TYPES = {_TORCH[name]: code for code, name in _NAMES.items() if name in _TORCH}  # TensorProto.DataType by dtype


class OnnxSource:
    """One .onnx file. `graph` is its GraphProto; infos are its initializers."""

    container = "onnx"

    def __init__(self, path: Path) -> None:
        """Raises FormatError for files that are no ONNX model and initializers that contradict themselves."""
        self.path = path
        self.graph: Any = _load(path).graph
        _check_names(path, self.graph)
        self._stored: dict[str, Any] = {}
        self.infos: Mapping[str, TensorInfo] = {}
        found: dict[str, TensorInfo] = {}
        for tensor in self.graph.initializer:
            if tensor.name in found:
                raise FormatError(f"{path}: initializer {shown(tensor.name)} occurs twice")
            found[tensor.name] = _info(path, tensor)
            self._stored[tensor.name] = tensor
        self.infos = found
        self.config: Json = self.json("config.json") or {}

    @cached_property
    def linears(self) -> dict[str, Linear]:
        """The quantized linears of the graph by module name. Raises FormatError."""
        return find_linears(self.path, self.graph, self.infos)

    @cached_property
    def tables(self) -> set[str]:
        """Initializers that are no weights: rotary tables, and other names for bytes that a weight has already."""
        return find_tables(self.graph, self.infos)

    def read(self, name: str) -> Tensor:
        """One initializer, whole; U4 as uint8 and I4 as int8, one value an element. Raises FormatError."""
        info = self.infos.get(name)
        if info is None:
            raise FormatError(f"{self.path}: no initializer {shown(name)}")
        data = self._bytes(info)
        if info.dtype in ("U4", "I4") and data:
            values = bits.unpack(torch.frombuffer(data, dtype=torch.uint8), 4, prod(info.shape)).reshape(info.shape)
            return values if info.dtype == "U4" else ((values + 8) & 15).to(torch.int8) - 8
        if not data:
            return torch.empty(info.shape, dtype=_TORCH.get(info.dtype, torch.uint8))
        return torch.frombuffer(data, dtype=_TORCH[info.dtype]).reshape(info.shape)

    def json(self, name: str) -> Json | None:
        """A JSON object beside the model, None where there is none."""
        file = self.path.parent / name
        return read_json(file) if file.is_file() else None

    def _bytes(self, info: TensorInfo) -> bytearray:
        tensor = self._stored[info.name]
        if _is_external(tensor):
            return _read_external(info)
        if tensor.raw_data:
            return bytearray(tensor.raw_data)
        return bytearray(_typed_bytes(self.path, tensor, info))


def _load(path: Path) -> Any:
    import onnx

    try:
        size = path.stat().st_size
        if size > MAX_MODEL:
            raise FormatError(
                f"{path}: {size} bytes; an ONNX file has at most {MAX_MODEL}, with the rest in external data"
            )
        return onnx.load_model_from_string(path.read_bytes())
    except OSError as e:
        raise FormatError(f"{path}: cannot be read: {e.strerror or e}") from e
    except FormatError:
        raise
    except Exception as e:  # protobuf raises classes of its own, which differ between its implementations
        raise FormatError(f"{path}: is no ONNX model: {shown(str(e))}") from e


def _check_names(path: Path, graph: Any) -> None:
    """Protobuf hands out bytes where a string is not UTF-8."""
    names = [text for node in graph.node for text in (node.name, node.op_type, *node.input, *node.output)]
    names += [attribute.name for node in graph.node for attribute in node.attribute]
    for tensor in graph.initializer:
        names += [tensor.name, *(text for entry in tensor.external_data for text in (entry.key, entry.value))]
    for name in names:
        if not isinstance(name, str):
            raise FormatError(f"{path}: the name {shown(name)} is not UTF-8")


def _info(path: Path, tensor: Any) -> TensorInfo:
    where = f"{path}: initializer {shown(tensor.name)}"
    shape = tuple(tensor.dims)
    if tensor.data_type not in _NAMES:
        raise FormatError(f"{where} has data type {tensor.data_type}; known are {', '.join(_NAMES.values())}")
    if any(n < 0 for n in shape) or len(shape) > 64:
        raise FormatError(f"{where} has shape {shown(shape)}")
    dtype = _NAMES[tensor.data_type]
    nbytes = -(-prod(shape) // 2) if dtype in ("U4", "I4") else prod(shape) * _TORCH[dtype].itemsize
    if _is_external(tensor):
        return _external_info(path, tensor, dtype, shape, nbytes)
    if tensor.raw_data and len(tensor.raw_data) != nbytes:
        raise FormatError(
            f"{where} has {len(tensor.raw_data)} bytes, but {dtype} of shape {shown(shape)} needs {nbytes}"
        )
    return TensorInfo(tensor.name, dtype, shape, path, 0, nbytes)


def _is_external(tensor: Any) -> bool:
    return bool(tensor.data_location == 1)  # TensorProto.EXTERNAL


def _external_info(path: Path, tensor: Any, dtype: str, shape: tuple[int, ...], nbytes: int) -> TensorInfo:
    """Where external data lies; it must be a file inside the model's folder."""
    where = f"{path}: initializer {shown(tensor.name)}"
    entries = {e.key: e.value for e in tensor.external_data}
    location = entries.get("location", "")
    folder = path.parent.resolve()
    try:
        file = (folder / location).resolve()
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", nbytes))
        inside = bool(location) and file.is_relative_to(folder) and file.is_file()
        size = file.stat().st_size if inside else 0
    except (ValueError, OSError) as e:
        raise FormatError(f"{where}: external data {shown(entries)}: {e}") from e
    if not inside:
        raise FormatError(f"{where}: external data {shown(location)} is no file inside {folder}")
    if length != nbytes or offset < 0 or offset + nbytes > size:
        raise FormatError(
            f"{where}: {dtype} of shape {shown(shape)} needs {nbytes} bytes, external data says {length} at {offset} "
            f"of a file of {size}"
        )
    return TensorInfo(tensor.name, dtype, shape, file, offset, offset + nbytes)


def _read_external(info: TensorInfo) -> bytearray:
    data = bytearray(info.nbytes)
    try:
        with info.file.open("rb") as f:
            f.seek(info.start)
            filled = f.readinto(data)
    except OSError as e:
        raise FormatError(f"{info.file}: initializer {shown(info.name)} cannot be read: {e.strerror or e}") from e
    if filled != info.nbytes:
        raise FormatError(f"{info.file}: initializer {shown(info.name)} ends early")
    return data


def _typed_bytes(path: Path, tensor: Any, info: TensorInfo) -> bytes:
    """The bytes of an initializer whose values are in protobuf fields instead of raw_data."""
    import onnx.numpy_helper

    if info.nbytes == 0:
        return b""
    try:
        array = np.ascontiguousarray(onnx.numpy_helper.to_array(tensor))
    except Exception as e:  # a wrong count of values surfaces as whatever numpy raises
        raise FormatError(f"{path}: initializer {shown(info.name)} cannot be read: {shown(str(e))}") from e
    if info.dtype in ("U4", "I4"):
        values = torch.from_numpy(array.astype(np.int8).reshape(-1)) & 15
        return bits.pack(values.to(torch.uint8), 4).numpy().tobytes()
    if array.nbytes != info.nbytes:
        raise FormatError(f"{path}: initializer {shown(info.name)} has {array.nbytes} bytes, expected {info.nbytes}")
    return array.tobytes()
