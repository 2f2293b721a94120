"""What readers ask of headers and foreign configuration, each failure a FormatError that names file and tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from transload.errors import FormatError
from transload.formats.base import Entry, Json, Source
from transload.formats.plain import float_entry
from transload.headers import TensorInfo
from transload.headers.info import shown
from transload.quant import QuantSpec

SCALE_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
FLOATS = tuple(SCALE_DTYPES)

Shape = tuple["int | None", ...]  # None: any length


def modules(source: Source, suffix: str) -> list[str]:
    """Names of the modules that have a stored tensor `module.suffix`."""
    end = "." + suffix
    return [name.removesuffix(end) for name in source.infos if name.endswith(end) and len(name) > len(end)]


def need(source: Source, name: str, dtypes: tuple[str, ...], shape: Shape, why: str = "") -> TensorInfo:
    """The header of a tensor that must be there with one of `dtypes` and `shape`. Raises FormatError."""
    info = source.infos.get(name)
    if info is None:
        raise FormatError(f"{source.path}: tensor {shown(name)} is missing{why and ' ' + why}")
    where = f"{info.file}: tensor {shown(name)}"
    if info.dtype not in dtypes:
        raise FormatError(f"{where} is {info.dtype}, expected {' or '.join(dtypes)}{why and ' ' + why}")
    if len(info.shape) != len(shape) or any(b not in (None, a) for a, b in zip(info.shape, shape, strict=True)):
        wanted = "(" + ", ".join("*" if n is None else str(n) for n in shape) + ")"
        raise FormatError(f"{where} has shape {info.shape}, expected {wanted}{why and ' ' + why}")
    return info


def nonempty(info: TensorInfo) -> TensorInfo:
    """The same header; FormatError when the tensor has no elements."""
    if 0 in info.shape:
        raise FormatError(f"{info.file}: tensor {shown(info.name)} has shape {info.shape}: no elements")
    return info


def entry(source: Source, name: str, spec: QuantSpec, shape: tuple[int, ...], tensors: Iterable[str]) -> Entry:
    """The Entry of a quantized module, its bytes added up from headers; names that are not stored are left out."""
    kept = tuple(t for t in tensors if t in source.infos)
    return Entry(name, spec, shape, kept, sum(source.infos[t].nbytes for t in kept))


def with_floats(source: Source, quantized: Iterable[Entry], ignore: Iterable[str] = ()) -> dict[str, Entry]:
    """Quantized entries by name, and one float entry for every stored tensor that none of them uses.

    ignore: stored tensors that carry no numbers of the model.
    """
    found = {e.name: e for e in quantized}
    used = {t for e in found.values() for t in e.tensors} | set(ignore)
    for name, info in source.infos.items():
        if name not in used:
            found[name] = float_entry(info)
    return found


def quantization_config(source: Source, *files: str) -> Json:
    """The object `quantization_config` of config.json, also inside text_config; else the first of `files`; else {}."""
    inner = source.config.get("text_config")
    for config in (source.config, inner if isinstance(inner, dict) else {}):
        found = config.get("quantization_config")
        if isinstance(found, dict):
            return found
    for file in files:
        found = source.json(file)
        if found is not None:
            return found
    return {}


def method(source: Source, *files: str) -> str:
    """The quantization method that the configuration names, lower case, "" where there is none."""
    found = quantization_config(source, *files).get("quant_method")
    return found.lower() if isinstance(found, str) else ""


def integer(source: Source, config: Mapping[str, object], key: str, default: int | None = None) -> int:
    """An integer of a quantization configuration. Raises FormatError when it is missing or something else."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 1 << 31:
        raise FormatError(f"{source.path}: quantization_config: {key} is {shown(value, 60)}, expected an integer")
    return value


def flag(source: Source, config: Mapping[str, object], key: str, default: bool = False) -> bool:
    """A boolean of a quantization configuration, `default` where it is missing or null. Raises FormatError."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise FormatError(f"{source.path}: quantization_config: {key} is {shown(value, 60)}, expected true or false")
    return value


def text(source: Source, config: Mapping[str, object], key: str, default: str = "") -> str:
    """A string of a quantization configuration, `default` where it is missing or null. Raises FormatError."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, str):
        raise FormatError(f"{source.path}: quantization_config: {key} is {shown(value, 60)}, expected a string")
    return value


def choice(source: Source, config: Mapping[str, object], key: str, allowed: tuple[int, ...]) -> int:
    """An integer of a quantization configuration that must be one of `allowed`. Raises FormatError."""
    value = integer(source, config, key)
    if value not in allowed:
        known = ", ".join(map(str, allowed))
        raise FormatError(f"{source.path}: quantization_config: {key} is {value}; read are {known}")
    return value


def group_size(
    source: Source, config: Mapping[str, object], key: str = "group_size", default: int | None = None
) -> int:
    """A group size: positive, or -1 for one group per row. Raises FormatError."""
    value = integer(source, config, key, default)
    if value != -1 and value < 1:
        raise FormatError(f"{source.path}: quantization_config: {key} is {value}, expected -1 or a positive integer")
    return value


def expert(source: Source, name: str, index: int) -> Tensor:
    """One expert of a stored stack [E, ...], alone in memory where the source can read it alone."""
    read = getattr(source, "read_expert", None)
    return source.read(name)[index] if read is None else read(name, index)


def all_equal(t: Tensor, value: float) -> bool:
    """True when every element is `value`."""
    return bool((t == value).all())
