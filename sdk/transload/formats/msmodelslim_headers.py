"""What msModelSlim's headers and description say: the type, shape and packing of every linear.

Scales tell N and the groups, the shape of the weight tells how codes are packed; the description gives the type.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from transload.errors import FormatError, Unsupported
from transload.formats import msmodelslim_layouts as layouts
from transload.formats import stored
from transload.formats.base import Entry, Json, Source
from transload.headers import TensorInfo
from transload.headers.info import shown
from transload.quant import PER_CHANNEL, ActSpec, QuantSpec, Zero

DESCRIPTION = "quant_model_description.json"
VERSION = "1.0.0"
TYPES = ("W8A8_DYNAMIC", "W4A8_DYNAMIC", "W4A16", "W8A16", "W8A8", "W8A8_MIX")
_LEGACY = tuple(f"quant_model_description_{t.lower()}.json" for t in TYPES)
PARTS = (
    "weight", "weight_scale", "weight_offset", "weight_scale_second", "weight_offset_second", "scale_bias",
    "input_scale", "input_offset", "quant_bias", "deq_scale",
)  # fmt: skip


def description(source: Source) -> Json | None:
    """The description file, also under the names that the first saver gave it; None where there is none."""
    return next((found for file in (DESCRIPTION, *_LEGACY) if (found := source.json(file)) is not None), None)


def is_quantized(types: Json, module: str) -> bool:
    """True when the description gives a module's weight another type than FLOAT."""
    return types.get(f"{module}.weight", "FLOAT") != "FLOAT"


def entry_of(source: Source, module: str, types: Json, zero: Zero) -> Entry:
    """The entry of one module: its shape from the scales, its packing from the shape of the weight.

    types: the description. zero: of weight-only modules, see `zero_of_weight_only`.
    """
    kind = types[f"{module}.weight"]
    if kind not in TYPES:
        raise Unsupported(f"{source.path}: module {shown(module)} is {shown(kind, 40)}; read are {', '.join(TYPES)}")
    weight = stored.nonempty(stored.need(source, f"{module}.weight", ("I8",), (None, None)))
    width = 4 if str(kind).startswith("W4") else 8
    scales, n, groups = _scale_shape(source, module, weight.shape[0])
    pairs_of_k = kind == "W4A16" and groups == 1 and "version" in types  # the first saver kept one code per byte
    k = _in_features(weight, n, width, pairs_of_k)
    if k % groups:
        raise FormatError(f"{scales.file}: tensor {shown(scales.name)} has {groups} groups, which do not divide K={k}")
    size = PER_CHANNEL if groups == 1 else k // groups
    _check_group_size(source, module, types, size)
    act = None if str(kind).endswith("A16") else ActSpec(static=kind == "W8A8")
    computed = scales.name.endswith((".weight_scale_second", ".deq_scale"))  # from two tensors, in float32
    dtype = torch.float32 if computed else stored.SCALE_DTYPES[scales.dtype]
    spec = QuantSpec(width, size, zero=Zero.MIDPOINT if act else zero, scale_dtype=dtype, act=act)
    _check_sides(source, module, n, k, groups)
    return stored.entry(source, module, spec, (n, k), (f"{module}.{part}" for part in PARTS))


def _scale_shape(source: Source, module: str, rows: int) -> tuple[TensorInfo, int, int]:
    """The tensor that says N and G: the second scale, else the scale, else deq_scale of static W8A8."""
    if f"{module}.weight_scale" not in source.infos:
        stored.need(source, f"{module}.input_scale", stored.FLOATS, (1,))
        info = stored.need(source, f"{module}.deq_scale", ("F32", "I64"), (rows,))
        return info, rows, 1
    first = stored.need(source, f"{module}.weight_scale", stored.FLOATS, (None, None))
    second = f"{module}.weight_scale_second"
    if second not in source.infos:
        stored.nonempty(first)
        return first, first.shape[0], first.shape[1]
    stored.need(source, first.name, stored.FLOATS, (None, 1))
    info = stored.nonempty(stored.need(source, second, (first.dtype,), (first.shape[0], None)))
    return info, info.shape[0], info.shape[1]


def _in_features(weight: TensorInfo, n: int, width: int, pairs_of_k: bool) -> int:
    rows, columns = weight.shape
    if width == 4 and 2 * rows == n:
        return columns
    if rows == n:
        return 2 * columns if pairs_of_k else columns
    where = f"{weight.file}: tensor {shown(weight.name)}"
    raise FormatError(f"{where} has {rows} rows, which do not hold the {n} outputs of its scales")


def _check_group_size(source: Source, module: str, types: Json, size: int) -> None:
    declared, kind = types.get("group_size", 0), types[f"{module}.weight"]
    if size == PER_CHANNEL or kind not in ("W4A8_DYNAMIC", "W4A16") or declared in (0, size):
        return
    raise FormatError(
        f"{source.path}: module {shown(module)} has groups of {size}, but {DESCRIPTION} says {shown(declared, 40)}"
    )


def _check_sides(source: Source, module: str, n: int, k: int, groups: int) -> None:
    """The small tensors that are there have the shapes that they must."""
    second = f"{module}.weight_scale_second" in source.infos
    shapes: dict[str, tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]] = {
        "weight_offset": (stored.FLOATS, ((n, 1 if second else groups),)),
        "weight_offset_second": (("I64", "I32", *stored.FLOATS), ((n, groups),)),
        "scale_bias": (stored.FLOATS, ((n, 1), (n, layouts.CHUNKS), (n, k))),
        "input_offset": (stored.FLOATS, ((1,),)),
        "quant_bias": (("I32",), ((n,),)),
    }
    for part, (dtypes, allowed) in shapes.items():
        info = source.infos.get(f"{module}.{part}")
        if info is not None and info.shape not in allowed:
            stored.need(source, info.name, dtypes, allowed[0], f"for N={n}, K={k}")
        elif info is not None:
            stored.need(source, info.name, dtypes, info.shape)
    if f"{module}.scale_bias" in source.infos and source.infos[f"{module}.scale_bias"].shape[1] == 16 and k % 16:
        raise FormatError(f"{source.path}: module {shown(module)}: scale_bias has 16 parts, which do not divide K={k}")


def zero_of_weight_only(source: Source, modules: Sequence[str], types: Json) -> Zero:
    """Whether weight-only modules are symmetric, from the offsets of the smallest: the tool has one setting for all."""
    weight_only = [m for m in modules if types[f"{m}.weight"] in ("W4A16", "W8A16")]
    offsets = [source.infos.get(f"{m}.weight_offset") for m in weight_only]
    smallest = min((i for i in offsets if i is not None), key=lambda i: i.nbytes, default=None)
    if smallest is None or stored.all_equal(source.read(smallest.name), 0):
        return Zero.MIDPOINT
    return Zero.CODES
