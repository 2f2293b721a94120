"""The stored side of a checkpoint: tensors read one at a time from safetensors files or a GGUF file.

A read copies the tensor's bytes into fresh memory and nothing else stays: mapping the files instead would leave every
page that was touched in the process until the map is closed, and a file cut short meanwhile would kill the process
where a read gives an error.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from transload.errors import FormatError, Unsupported
from transload.formats.base import Json, Source
from transload.formats.onnx_source import OnnxSource
from transload.headers import (
    GgufHeader,
    TensorInfo,
    checkpoint_files,
    is_gguf,
    read_gguf_header,
    read_headers,
    read_json,
)
from transload.headers.info import shown

_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in _DTYPES.items()}
_GGUF_PLAIN = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8")


class SafetensorsSource:
    """A .safetensors file or a folder of them; JSON files are looked for beside the weights."""

    container = "safetensors"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = path if path.is_dir() else path.parent
        self.infos: Mapping[str, TensorInfo] = read_headers(path)
        self.config: Json = self.json("config.json") or {}

    def read(self, name: str) -> Tensor:
        """One stored tensor, whole, in memory of its own. F4 comes as torch.float4_e2m1fn_x2, two values an element.

        Raises FormatError when there is no such tensor or its bytes cannot be read, Unsupported when torch lacks the
        dtype.
        """
        info = _find(self.infos, name, self.path)
        if info.dtype == "F4" and info.shape and info.shape[-1] % 2 == 0:
            return _read(info, torch.float4_e2m1fn_x2, (*info.shape[:-1], info.shape[-1] // 2))
        if info.dtype not in _DTYPES:
            raise Unsupported(f"{info.file}: tensor {shown(name)}: torch cannot hold {info.dtype} {info.shape}")
        return _read(info, _DTYPES[info.dtype], info.shape)

    def read_expert(self, name: str, index: int) -> Tensor:
        """One expert of a stored stack [E, ...], without reading the others. Raises FormatError like `read`."""
        info = _expert(_find(self.infos, name, self.path), index)
        if info.dtype not in _DTYPES:
            raise Unsupported(f"{info.file}: tensor {shown(name)}: torch cannot hold {info.dtype} {info.shape}")
        return _read(info, _DTYPES[info.dtype], info.shape)

    def json(self, name: str) -> Json | None:
        """A JSON object beside the weights, None where there is none."""
        file = self.folder / name
        return read_json(file) if file.is_file() else None


class GgufSource:
    """A GGUF file. `header.metadata` has what other checkpoints keep in JSON files; config is empty."""

    container = "gguf"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header: GgufHeader = read_gguf_header(path)
        self.infos: Mapping[str, TensorInfo] = self.header.tensors
        self.config: Json = {}

    def read(self, name: str) -> Tensor:
        """One stored tensor under its GGUF name, in memory of its own.

        Floats and integers come as such, in torch's order; block types as uint8 [..., N, bytes per row].
        Raises FormatError when there is no such tensor or its bytes cannot be read.
        """
        return _read_gguf(_find(self.infos, name, self.path))

    def read_expert(self, name: str, index: int) -> Tensor:
        """One expert of a stored stack [E, N, K], without reading the others. Raises FormatError like `read`."""
        return _read_gguf(_expert(_find(self.infos, name, self.path), index))

    def json(self, name: str) -> Json | None:
        """None: a GGUF file stands alone."""
        return None


def open_source(path: str | Path) -> Source:
    """The stored tensors at a path: a .safetensors, .gguf or .onnx file, or a folder with one of the first two.

    A folder that has model.onnx and no safetensors is that model.

    Only headers, graphs and config.json are read. Raises FormatError as `headers.read_headers` does.
    """
    path = Path(path)
    if path.suffix == ".onnx" and path.is_file():
        return OnnxSource(path)
    if (path / "model.onnx").is_file() and not any(path.glob("*.safetensors")):
        return OnnxSource(path / "model.onnx")
    files = checkpoint_files(path)
    return GgufSource(files[0]) if is_gguf(files[0]) else SafetensorsSource(path)


def _find(infos: Mapping[str, TensorInfo], name: str, path: Path) -> TensorInfo:
    if name not in infos:
        raise FormatError(f"{path}: no tensor {shown(name)}")
    return infos[name]


def _expert(info: TensorInfo, index: int) -> TensorInfo:
    """Where one expert of a stack lies."""
    if len(info.shape) < 3 or not 0 <= index < info.shape[0]:
        raise FormatError(f"{info.file}: tensor {shown(info.name)} {info.shape} has no expert {index}")
    size = info.nbytes // info.shape[0]
    start = info.start + index * size
    return replace(info, shape=info.shape[1:], start=start, end=start + size)


def _read_gguf(info: TensorInfo) -> Tensor:
    if info.dtype in _GGUF_PLAIN:
        return _read(info, _DTYPES[info.dtype], info.shape)
    rows = torch.Size(info.shape[:-1]).numel()
    return _read(info, torch.uint8, (*info.shape[:-1], info.nbytes // max(rows, 1)))


def _read(info: TensorInfo, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    if not info.nbytes:
        return tensor
    buffer = tensor.reshape(-1).view(torch.uint8).numpy().data
    try:
        with info.file.open("rb", buffering=0) as f:
            f.seek(info.start)
            filled = 0
            while filled < info.nbytes:  # one call may return less, and never more than 2 GiB
                count = f.readinto(buffer[filled:])
                if not count:
                    break
                filled += count
            size = os.fstat(f.fileno()).st_size
    except OSError as e:
        raise FormatError(f"{info.file}: tensor {shown(info.name)} cannot be read: {e.strerror or e}") from e
    if filled < info.nbytes:
        raise FormatError(f"{info.file}: tensor {shown(info.name)} ends at byte {info.end}, the file has {size} bytes")
    return tensor
