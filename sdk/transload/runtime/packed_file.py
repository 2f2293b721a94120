"""The file that packed weights are kept in: safetensors, mapped when it is read.

Every tensor is a row of bytes (U8), filled up to a multiple of 64, and the data begins at a multiple of 64: mapped
weights are then aligned as allocated ones are. `__metadata__` says what they are:

    {"kind": "transload packed weights", "version": "1", "binding": hex, "index": JSON}
    index: {parameter: [{"layout", "spec", "n", "k", "experts", "tensors": {name: [dtype, shape, XXH3]}}, ...]}

Tensor `name` of part i of a parameter is stored as `parameter|i|name`.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from transload.errors import FormatError
from transload.formats.neutral import scheme_from_json, scheme_to_json
from transload.headers import TensorInfo, read_safetensors_header
from transload.headers.info import shown
from transload.headers.jsonfile import parse_json
from transload.runtime.below import KeptWeight
from transload.runtime.kept import KeptPart

KIND, VERSION = "transload packed weights", "1"
_ALIGNED = 64
_DTYPES = {
    str(d).removeprefix("torch."): d for d in (torch.uint8, torch.int32, torch.float16, torch.bfloat16, torch.float32)
}
_FIELDS = {"layout", "spec", "n", "k", "experts", "tensors"}


def read(path: Path, binding: str) -> dict[str, KeptWeight]:
    """Every kept weight by parameter, its tensors mapped from the file: private pages, shared until someone writes.

    Raises FormatError when the file is damaged in any byte, or was not made for `binding`.
    """
    infos, metadata = read_safetensors_header(path)
    if metadata.get("kind") != KIND or metadata.get("version") != VERSION:
        raise FormatError(f"{path}: holds no packed weights of this version")
    if metadata.get("binding") != binding:
        raise FormatError(f"{path}: belongs to another checkpoint, another state of it, or another Transload")
    index = parse_json(metadata.get("index", "").encode(), f"{path}: index")
    if not isinstance(index, dict):
        raise FormatError(f"{path}: the index is {shown(index)}, expected an object")
    reader = _Reader(path, infos)
    return {name: reader.weight(name, parts) for name, parts in index.items()}


def write(path: Path, binding: str, weights: Mapping[str, KeptWeight]) -> None:
    """Writes a file and puts it in its place when it is complete and on the disk. Raises OSError."""
    index: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for parameter, weight in weights.items():
        index[parameter] = [_described(part) for part in weight.parts]
        for i, part in enumerate(weight.parts):
            tensors |= {f"{parameter}|{i}|{name}": t for name, t in part.tensors.items()}
    metadata = {"kind": KIND, "version": VERSION, "binding": binding, "index": json.dumps(index)}
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(_header(tensors, metadata))
            for t in tensors.values():
                file.write(_bytes(t))
                file.write(bytes(-t.nbytes % _ALIGNED))
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def _described(part: KeptPart) -> dict[str, Any]:
    tensors = {
        name: [str(t.dtype).removeprefix("torch."), list(t.shape), _digest(t)] for name, t in part.tensors.items()
    }
    sizes = {"n": part.n, "k": part.k, "experts": part.experts}
    return {"layout": part.layout, "spec": scheme_to_json(part.spec), **sizes, "tensors": tensors}


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name, t in tensors.items():
        size = t.nbytes + -t.nbytes % _ALIGNED
        entries[name] = {"dtype": "U8", "shape": [size], "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNED)
    return len(text).to_bytes(8, "little") + text


class _Reader:
    """The mapped file, and the tensors in it."""

    def __init__(self, path: Path, infos: Mapping[str, TensorInfo]) -> None:
        self._path, self._infos = path, infos
        size = max((info.end for info in infos.values()), default=0)
        try:
            self._whole = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        except RuntimeError as e:
            raise FormatError(f"{path}: cannot be mapped: {str(e).splitlines()[0]}") from e

    def weight(self, parameter: str, parts: object) -> KeptWeight:
        """The weight of a parameter. Raises FormatError naming it."""
        where = f"{self._path}: {shown(parameter)}"
        if not isinstance(parts, list) or not parts:
            raise FormatError(f"{where}: is {shown(parts)}, expected a list of parts")
        found = tuple(self._part(where, f"{parameter}|{i}|", part) for i, part in enumerate(parts))
        if len({(part.k, part.experts) for part in found}) > 1:
            raise FormatError(f"{where}: its parts are of different widths")
        return KeptWeight(found)

    def _part(self, where: str, prefix: str, part: object) -> KeptPart:
        if not isinstance(part, dict) or part.keys() != _FIELDS or not isinstance(part["tensors"], dict):
            raise FormatError(f"{where}: a part is {shown(part)}, expected {', '.join(sorted(_FIELDS))}")
        n, k, experts, layout = (part[name] for name in ("n", "k", "experts", "layout"))
        sizes = [n, k] if experts is None else [n, k, experts]
        if (
            any(type(size) is not int or size < 1 for size in sizes)
            or prod(sizes) >= 1 << 60
            or type(layout) is not str
        ):
            raise FormatError(f"{where}: sizes {shown(sizes)} in layout {shown(layout)}")
        spec, _ = scheme_from_json(where, part["spec"])
        tensors = {name: self._tensor(where, prefix + name, about) for name, about in part["tensors"].items()}
        return KeptPart(spec, n, k, experts, layout, tensors)

    def _tensor(self, where: str, name: str, about: object) -> Tensor:
        match about:
            case [str(dtype), list(shape), str(digest)] if dtype in _DTYPES and all(type(s) is int for s in shape):
                info, nbytes = self._infos.get(name), prod(shape) * _DTYPES[dtype].itemsize
            case _:
                raise FormatError(f"{where}: a tensor is {shown(about)}, expected [dtype, shape, XXH3]")
        if info is None or min(shape, default=0) < 0 or info.nbytes != nbytes + -nbytes % _ALIGNED:
            raise FormatError(f"{where}: {shown(name)} is missing or has another size than {dtype} {shape}")
        row = self._whole[info.start : info.start + nbytes]
        if _digest(row) != digest:
            raise FormatError(f"{where}: {shown(name)} is damaged: its bytes are not those that were written")
        return row.view(_DTYPES[dtype]).reshape(shape)


def _bytes(t: Tensor) -> Any:
    return t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _digest(t: Tensor) -> str:
    return xxhash.xxh3_128(_bytes(t)).hexdigest()
