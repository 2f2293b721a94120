"""The header of a GGUF file (versions 2 and 3, little-endian), walked over a memory map.

    "GGUF" | u32 version | u64 tensors T | u64 pairs P
    P x (string key | u32 type | value)            string = u64 length | UTF-8;  array = u32 type | u64 count | values
    T x (string name | u32 dims | u64 per dim | u32 ggml type | u64 offset)        the fastest dim comes first
    padding to general.alignment | tensor data

Types and block sizes come from the gguf package; the walk is our own, because every count is checked against the
bytes that are left before it is believed, and vocabularies are stepped over, not decoded. Layout: ggml's docs/gguf.md.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from pathlib import Path

from transload.errors import FormatError
from transload.headers.cursor import Cursor
from transload.headers.ggufvalues import decode_value, element_type, skip_value, value_count
from transload.headers.info import TensorInfo, shown

MAGIC = b"GGUF"
_MAX_DIMS = 4
_MIN_PAIR, _MIN_TENSOR = 8 + 4 + 1, 8 + 4 + 4 + 8  # bytes of the smallest pair and tensor record


class GgufMetadata(Mapping[str, object]):
    """The metadata of a GGUF file; a value is decoded when it is asked for, not before.

    Numbers come as int, float or bool, strings as str, arrays as lists.
    """

    def __init__(self, path: Path, data: mmap.mmap, places: dict[str, tuple[int, int]]) -> None:
        self._path, self._data, self._places = path, data, places

    def __getitem__(self, key: str) -> object:
        kind, position = self._places[key]
        return decode_value(self._cursor(key, position), kind)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def count(self, key: str) -> int:
        """The number of elements of an array (the size of a vocabulary), without decoding it.

        Raises KeyError for an absent key and FormatError when the value is no array.
        """
        kind, position = self._places[key]
        return value_count(self._cursor(key, position), kind)

    def types(self, key: str) -> tuple[int, int | None]:
        """Type number of a value, and of an array's elements (gguf.GGUFValueType), to write the same value again."""
        kind, position = self._places[key]
        return kind, element_type(self._cursor(key, position), kind)

    def _cursor(self, key: str, position: int) -> Cursor:
        return Cursor(self._data, position, f"{self._path}: metadata {shown(key)}")


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a GGUF file says before its data. alignment and data_start are bytes and belong to the file at `path`."""

    path: Path
    version: int
    metadata: GgufMetadata
    tensors: dict[str, TensorInfo]
    alignment: int
    data_start: int


def read_gguf_header(path: str | Path) -> GgufHeader:
    """Metadata and tensors of a GGUF file; shapes in torch's order, dtypes by ggml's name (Q4_K, F32).

    Of a split model give the first part: the tensors of all parts are returned, each with its own file.
    Raises FormatError naming file and tensor when anything contradicts the format or lies outside the file.
    """
    header = _read_one(Path(path))
    count = _split(header)[1]
    return header if count <= 1 else replace(header, tensors=_joined(header, count))


def _read_one(path: Path) -> GgufHeader:
    data = _map(path)
    cursor = Cursor(data, 4, str(path))
    version = _version(path, cursor)
    tensor_count, pair_count = cursor.u64("the number of tensors"), cursor.u64("the number of metadata pairs")
    cursor.room(pair_count, _MIN_PAIR, "metadata pairs")
    metadata = GgufMetadata(path, data, _pairs(path, cursor, pair_count))
    cursor.room(tensor_count, _MIN_TENSOR, "tensors")
    records = [_record(path, cursor) for _ in range(tensor_count)]
    alignment = _alignment(path, metadata)
    data_start = -(-cursor.position // alignment) * alignment
    tensors = _place(path, records, data_start, alignment, len(data))
    return GgufHeader(path, version, metadata, tensors, alignment, data_start)


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as f:
            start = f.read(24)
            if not start.startswith(MAGIC):
                raise FormatError(f"{path}: starts with {start[:4]!r}, expected {MAGIC!r}: not a GGUF file")
            if len(start) < 24:
                raise FormatError(f"{path}: {len(start)} bytes, too short for a GGUF file: truncated")
            return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as e:
        raise FormatError(f"{path}: cannot be read: {e.strerror or e}") from e


def _version(path: Path, cursor: Cursor) -> int:
    version = cursor.u32("the version")
    if version in (2, 3):
        return version
    if version & 0xFFFF == 0 and version:
        raise FormatError(
            f"{path}: a big-endian GGUF file; convert it with gguf's gguf_convert_endian to little-endian"
        )
    raise FormatError(f"{path}: GGUF version {version}; versions 2 and 3 are read")


def _pairs(path: Path, cursor: Cursor, count: int) -> dict[str, tuple[int, int]]:
    """Type and byte position of every metadata value."""
    places: dict[str, tuple[int, int]] = {}
    for _ in range(count):
        cursor.where = str(path)
        key = cursor.string("a metadata key")
        cursor.where = f"{path}: metadata {shown(key)}"
        if key in places:
            raise FormatError(f"{cursor.where}: occurs twice")
        kind = cursor.u32("the value's type")
        places[key] = (kind, cursor.position)
        skip_value(cursor, kind)
    cursor.where = str(path)
    return places


def _alignment(path: Path, metadata: GgufMetadata) -> int:
    value = metadata.get("general.alignment", 32)
    if type(value) is not int or value < 8 or value > 1 << 24 or value & (value - 1):
        raise FormatError(f"{path}: general.alignment is {shown(value)}, expected a power of two from 8 to 2**24")
    return value


def _record(path: Path, cursor: Cursor) -> tuple[str, str, tuple[int, ...], int, int]:
    """One tensor record: name, dtype, shape in torch's order, offset, bytes."""
    cursor.where = str(path)
    name = cursor.string("a tensor's name")
    cursor.where = where = f"{path}: tensor {shown(name)}"
    dims = cursor.u32("the number of dimensions")
    if dims > _MAX_DIMS:
        raise FormatError(f"{where}: {dims} dimensions, GGUF has at most {_MAX_DIMS}")
    ne = tuple(cursor.u64("a dimension") for _ in range(dims))
    kind, offset = cursor.u32("the tensor's type"), cursor.u64("the tensor's offset")
    types = _ggml_types()
    if kind not in types:
        raise FormatError(f"{where}: unknown ggml type {kind}")
    dtype, block, block_bytes = types[kind]
    if max(ne, default=0) >= 1 << 63:
        raise FormatError(f"{where}: a dimension of {max(ne)}, the limit is 2**63 - 1")
    if (ne[0] if ne else 1) % block:
        raise FormatError(f"{where}: rows of {ne[0] if ne else 1} values, but {dtype} comes in blocks of {block}")
    return name, dtype, ne[::-1], offset, prod(ne) // block * block_bytes


def _place(
    path: Path,
    records: list[tuple[str, str, tuple[int, ...], int, int]],
    data_start: int,
    alignment: int,
    size: int,
) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for name, dtype, shape, offset, nbytes in records:
        where, start = f"{path}: tensor {shown(name)}", data_start + offset
        if name in tensors:
            raise FormatError(f"{where}: occurs twice")
        if offset % alignment:
            raise FormatError(f"{where}: offset {offset} is not a multiple of the alignment {alignment}")
        if start + nbytes > size:
            raise FormatError(f"{where}: ends at byte {start + nbytes}, but the file has {size} bytes: truncated")
        tensors[name] = TensorInfo(name, dtype, shape, path, start, start + nbytes)
    position, previous = data_start, ""
    for info in sorted(tensors.values(), key=lambda i: (i.start, i.end)):
        if info.start < position:
            raise FormatError(f"{path}: tensor {shown(info.name)} overlaps {shown(previous)}")
        position, previous = info.end, info.name
    return tensors


def _split(header: GgufHeader) -> tuple[int, int]:
    """The number of this part, from 0, and the number of parts; (0, 1) for a whole model."""
    number, count = header.metadata.get("split.no", 0), header.metadata.get("split.count", 1)
    if type(number) is not int or type(count) is not int or not 0 <= number < max(count, 1) <= 99_999:
        raise FormatError(f"{header.path}: part {shown(number)} of {shown(count)}, counted from 0, cannot be")
    return number, count


def _joined(first: GgufHeader, count: int) -> dict[str, TensorInfo]:
    """The tensors of all parts of a split model, which lie side by side and are named x-00001-of-0000n.gguf."""
    name, path = split_name(first.path), first.path
    number = _split(first)[0]
    if name is None or name[1:] != (number + 1, count):
        raise FormatError(
            f"{path}: is part {number + 1} of {count}, its name should end so: -00001-of-{count:05d}.gguf"
        )
    parts = [path.with_name(f"{name[0]}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)]
    if number:
        raise FormatError(f"{path}: is part {number + 1} of {count}; give the first, {parts[0].name}")
    tensors = dict(first.tensors)
    for i, part in enumerate(parts[1:], 1):
        header = _read_one(part)
        if _split(header) != (i, count):
            raise FormatError(f"{part}: says that it is part {_split(header)[0] + 1} of {_split(header)[1]}")
        for twice in tensors.keys() & header.tensors.keys():
            raise FormatError(f"{part}: tensor {shown(twice)} is also in {tensors[twice].file.name}")
        tensors |= header.tensors
    return tensors


def split_name(path: Path) -> tuple[str, int, int] | None:
    """Name, number from 1 and count of a split model's part (x-00001-of-00003.gguf), None for other files."""
    match = re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.gguf", path.name)
    return None if match is None else (match[1], int(match[2]), int(match[3]))


@cache
def _ggml_types() -> dict[int, tuple[str, int, int]]:
    """Name, values per block and bytes per block of every ggml type that the gguf package knows."""
    from gguf.constants import GGML_QUANT_SIZES  # imports numpy: only for GGUF files

    return {int(t): (t.name, block, nbytes) for t, (block, nbytes) in GGML_QUANT_SIZES.items()}
