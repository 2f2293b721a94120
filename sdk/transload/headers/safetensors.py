"""The header of a safetensors file, read strictly.

    u64 little-endian H | H bytes of JSON, padded with spaces | data
    {"name": {"dtype": "BF16", "shape": [N, K], "data_offsets": [start, end]}, ..., "__metadata__": {"k": "v"}}

Offsets count from the end of the header; sorted, the tensors fill the data from its first byte to its last without
holes or overlap. Source: the format section of the safetensors README, 0.8; the limit of 100 MB is its own. Parsed, a
header takes some ten times its size in memory, a hostile one thirty times.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from math import prod
from operator import attrgetter
from pathlib import Path
from typing import BinaryIO

from transload.errors import FormatError
from transload.headers.info import TensorInfo, shown
from transload.headers.jsonfile import parse_json

MAX_HEADER = 100_000_000
_MAX_DIMS = 64  # as many as torch holds
_INT = {int}
_FIELDS = {"dtype", "shape", "data_offsets"}

# Bits of one element, as in safetensors 0.8. F4 and F6 are packed: the shape counts elements, not bytes.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip


def read_safetensors_header(path: str | Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors of a safetensors file, in the header's order, and its metadata.

    Raises FormatError naming file and tensor when anything contradicts the format or lies outside the file.
    """
    path = Path(path)
    try:
        with path.open("rb") as f:
            size = os.fstat(f.fileno()).st_size
            header = _header_bytes(path, f, size)
    except OSError as e:
        raise FormatError(f"{path}: cannot be read: {e.strerror or e}") from e
    value = parse_json(header, f"{path}: header", unique=False)
    if not isinstance(value, dict):
        raise FormatError(f"{path}: the header is a JSON {type(value).__name__}, expected an object")
    metadata = _metadata(path, value.pop("__metadata__", None))
    data_start = 8 + len(header)
    infos = {name: _tensor(path, name, entry, data_start, size) for name, entry in value.items()}
    if not _each_named_once(header, len(value)):
        parse_json(header, f"{path}: header")  # slower, and raises naming a key that occurs twice
    _check_contiguous(path, infos.values(), data_start, size)
    return infos, metadata


def _header_bytes(path: Path, f: BinaryIO, size: int) -> bytes:
    """The JSON part, after checking its length against the limit and the file, so that no more is ever read."""
    if size < 8:
        raise FormatError(f"{path}: {size} bytes, too short for a safetensors file")
    length = int.from_bytes(f.read(8), "little")
    if length > MAX_HEADER:
        raise FormatError(
            f"{path}: claims a header of {length} bytes, the format allows {MAX_HEADER}: not a safetensors file"
        )
    if 8 + length > size:
        raise FormatError(f"{path}: claims a header of {length} bytes, but the file has {size} bytes: truncated")
    header = f.read(length)
    if len(header) < length:
        raise FormatError(f"{path}: truncated inside the header")
    if not header.startswith(b"{"):
        raise FormatError(f"{path}: the header starts with {header[:1]!r}, expected '{{': not a safetensors file")
    return header


def _each_named_once(header: bytes, count: int) -> bool:
    """True when counting alone shows that none of `count` tensors occurs twice in the header.

    Without escapes every key stands there as it is, so a tensor given twice would give its field names twice.
    """
    return b"\\" not in header and all(header.count(b'"%s"' % field.encode()) == count for field in _FIELDS)


def _metadata(path: Path, value: object) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise FormatError(f"{path}: __metadata__ is {shown(value)}, expected an object of strings")
    return value


def _tensor(path: Path, name: str, entry: object, data_start: int, size: int) -> TensorInfo:
    problem = _problem(name, entry, data_start, size)
    if problem is not None:
        raise FormatError(f"{path}: tensor {shown(name)}: {problem}")
    assert isinstance(entry, dict)
    start, end = entry["data_offsets"]
    return TensorInfo(name, entry["dtype"], tuple(entry["shape"]), path, data_start + start, data_start + end)


def _problem(name: str, entry: object, data_start: int, size: int) -> str | None:
    """What is wrong with one entry of the header, None for nothing. Folders have 100 000 of them: it is kept fast."""
    if not name.isascii() and any("\ud800" <= c <= "\udfff" for c in name):
        return "the name is not valid Unicode"
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        return f"is {shown(entry)}, expected an object with dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or dtype not in DTYPE_BITS:
        return f"unknown dtype {shown(dtype)}; known are {', '.join(DTYPE_BITS)}"
    if not _is_sizes(shape) or len(shape) > _MAX_DIMS:
        return f"shape {shown(shape)}, expected at most {_MAX_DIMS} integers from 0 to 2**63 - 1"
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"data_offsets {shown(offsets)}, expected [start, end] with 0 <= start <= end"
    bits = prod(shape) * DTYPE_BITS[dtype]
    if bits % 8:
        return f"{dtype} of shape {shown(shape)} does not fill whole bytes"
    nbytes = offsets[1] - offsets[0]
    if nbytes != bits // 8:
        return f"has {nbytes} bytes, but {dtype} of shape {shown(shape)} needs {bits // 8}"
    if data_start + offsets[1] > size:
        return f"ends at byte {data_start + offsets[1]}, but the file has {size} bytes: truncated"
    return None


def _is_sizes(value: object) -> bool:
    """A list of integers 0 .. 2**63 - 1. JSON's true and false are no integers, although Python's are."""
    return (
        type(value) is list and {*map(type, value)} <= _INT and (not value or 0 <= min(value) <= max(value) < 1 << 63)
    )


def _check_contiguous(path: Path, infos: Iterable[TensorInfo], data_start: int, size: int) -> None:
    position, previous = data_start, "the header"
    for info in sorted(infos, key=attrgetter("start", "end")):
        name, gap = info.name, info.start - position
        if gap < 0:
            raise FormatError(f"{path}: tensor {shown(name)} overlaps {shown(previous)} by {-gap} bytes")
        if gap > 0:
            raise FormatError(f"{path}: {gap} bytes between {shown(previous)} and {shown(name)} belong to no tensor")
        position, previous = info.end, name
    if position != size:
        raise FormatError(f"{path}: {size - position} bytes after {shown(previous)} belong to no tensor")
