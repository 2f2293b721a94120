"""msModelSlim: the checkpoints of Huawei's quantizer, which vllm-ascend loads with `--quantization ascend`.

quant_model_description.json gives every stored tensor a type; the tensors of one linear share it. N = out, K = in:

    W8A8_DYNAMIC  weight int8 [N, K]                  weight_scale, weight_offset f32 [N, 1]
    W4A8_DYNAMIC  weight int8 [N/2, K] packed along N weight_scale, weight_offset f32 [N, 1]  scale_bias f32 [N, 1 | 16]
      per group   the same, and weight_scale_second f32, weight_offset_second int64 [N, K/g]: scale = first * second
    W4A16         weight int8 [N/2, K], or [N, K/2] per channel        weight_scale, weight_offset f32 [N, K/g]
    W8A16         weight int8 [N, K]                                   weight_scale, weight_offset f32 [N, K/g]
    W8A8          weight int8 [N, K]  input_scale, input_offset [1]  quant_bias int32 [N]  deq_scale [N]     (read only)

w = (q - weight_offset) * scale. Files of the older saver have no `version` and keep one 4-bit code per byte. Per group
W4A8 loads in vllm-ascend 0.23 and no later. Source: msModelSlim 26.1 `modelslim_v1/save/ascendv1.py` and
`llm_ptq_tools/save/complex_quantifier.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from transload.errors import CannotHold, FormatError, Unsupported
from transload.formats import msmodelslim_layouts as layouts
from transload.formats import stored
from transload.formats.base import Entry, Format, Json, Source, naming
from transload.formats.limits import divided, integer_limits, positional
from transload.headers import TensorInfo
from transload.headers.info import shown
from transload.quant import PER_CHANNEL, ActSpec, QTensor, QuantSpec, Zero

DESCRIPTION = "quant_model_description.json"
VERSION = "1.0.0"
_TYPES = ("W8A8_DYNAMIC", "W4A8_DYNAMIC", "W4A16", "W8A16", "W8A8", "W8A8_MIX")
_LEGACY = tuple(f"quant_model_description_{t.lower()}.json" for t in _TYPES)
_PARTS = (
    "weight", "weight_scale", "weight_offset", "weight_scale_second", "weight_offset_second", "scale_bias",
    "input_scale", "input_offset", "quant_bias", "deq_scale",
)  # fmt: skip


class MsModelSlim(Format):
    """msModelSlim's ascendV1 files, and the older layouts of its first saver for reading."""

    name: ClassVar[str] = "msmodelslim"

    def detects(self, source: Source) -> bool:
        """True where there is a description file and config.json names no other method."""
        return stored.method(source) in ("", "ascend") and _description(source) is not None

    def entries(self, source: Source) -> dict[str, Entry]:
        """Every tensor by the type that the description gives it."""
        types = _types(source)
        modules = {m: types[f"{m}.weight"] for m in stored.modules(source, "weight") if _quantized(types, m)}
        zero = _zero_of_weight_only(source, modules)
        found = [_entry(source, m, kind, zero) for m, kind in modules.items()]
        entries = stored.with_floats(source, found)
        for e in entries.values():
            if e.spec is None and e.dtype == "I8" and len(e.shape) > 1:
                raise FormatError(
                    f"{source.path}: tensor {shown(e.name)} is I8, but {DESCRIPTION} does not say how to read it"
                )
        return entries

    def decode(self, source: Source, entry: Entry) -> QTensor:
        """Codes, scales and zero points; stored offsets and scale_bias are checked against them."""
        assert entry.spec is not None
        parts = {name.rpartition(".")[2]: source.read(name) for name in entry.tensors}
        with naming(source, entry):
            scales = _scales(parts)
            codes = _codes(parts["weight"], entry.spec, entry.shape)
            zeros = _zeros(parts, entry.spec)
            w = QTensor(entry.spec, codes, scales, zeros)
            if "scale_bias" in parts:
                layouts.check_scale_bias(parts["scale_bias"], w.dequantize(), w.scales)
            if "quant_bias" in parts and f"{entry.name}.bias" not in source.infos:
                _check_no_bias(parts)
        return w

    def cannot_hold(self, spec: QuantSpec, shape: tuple[int, ...]) -> str | None:
        """4 or 8 bits with float32 scales. Dynamic int8 activations ask for symmetric weights."""
        zeros = (Zero.MIDPOINT,) if spec.act else (Zero.MIDPOINT, Zero.CODES)
        reason = (
            integer_limits(spec, shape, (4, 8), zeros, (torch.float32,)) or positional(spec) or divided(spec, shape[1])
        )
        return reason or _activation_limits(spec) or _alignment(spec, *shape)

    def encode(self, name: str, w: QTensor) -> dict[str, Tensor]:
        """The tensors that the table at the top of this file lists for the weight's type."""
        scales = w.scales
        offsets = torch.zeros_like(scales) if w.zeros is None else w.zeros.float() - w.spec.midpoint
        parts = {"weight": _packed(w), "weight_scale": scales, "weight_offset": offsets}
        if _type(w.spec) == "W4A8_DYNAMIC":
            if w.spec.group_size != PER_CHANNEL:
                # Any two factors with this product would do; one of them is 1, so that nothing is rounded.
                ones = torch.ones_like(scales[:, :1])
                parts |= {"weight_scale": ones, "weight_offset": torch.zeros_like(ones), "weight_scale_second": scales}
                parts["weight_offset_second"] = torch.zeros_like(scales, dtype=torch.int64)
            parts["scale_bias"] = layouts.scale_bias(name, w.dequantize())
        return {f"{name}.{part}": t for part, t in parts.items()}

    def finish(self, specs: Mapping[str, QuantSpec], floats: Mapping[str, tuple[int, ...]]) -> dict[str, Json]:
        """Nothing but the check that one `group_size` describes all modules; `describe` writes the file."""
        _group_size(specs)
        return {}

    def describe(self, specs: Mapping[str, QuantSpec], carried: Sequence[str]) -> dict[str, Json]:
        """quant_model_description.json: the type of every stored tensor, FLOAT for those that are not quantized.

        Raises CannotHold when modules need different values of its one `group_size`.
        """
        types: Json = {f"{m}.{part}": _type(spec) for m, spec in specs.items() for part in _written(spec)}
        types |= dict.fromkeys(carried, "FLOAT")
        found = {_type(spec) for spec in specs.values()}
        meta: Json = {
            "version": VERSION,
            # The tool names the widest type it knows of, and W4A8_DYNAMIC only where there is no other.
            "model_quant_type": next((t for t in (*_TYPES[2:4], *_TYPES[:2]) if t in found), "FLOAT"),
            "metadata": {},
            "group_size": _group_size(specs),
            "optional": {},
        }
        return {DESCRIPTION: types | meta}


def _description(source: Source) -> Json | None:
    return next((found for file in (DESCRIPTION, *_LEGACY) if (found := source.json(file)) is not None), None)


def _types(source: Source) -> Json:
    description = _description(source)
    assert description is not None
    return description


def _quantized(types: Json, module: str) -> bool:
    return types.get(f"{module}.weight", "FLOAT") != "FLOAT"


def _entry(source: Source, module: str, kind: object, zero: Zero) -> Entry:
    """The entry of one module: its shape from the scales, its packing from the shape of the weight."""
    if kind not in _TYPES:
        raise Unsupported(f"{source.path}: module {shown(module)} is {shown(kind, 40)}; read are {', '.join(_TYPES)}")
    weight = stored.nonempty(stored.need(source, f"{module}.weight", ("I8",), (None, None)))
    width = 4 if str(kind).startswith("W4") else 8
    scales, n, groups = _scale_shape(source, module, weight.shape[0])
    k = _in_features(source, module, width, weight.shape, n, groups)
    if k % groups:
        raise FormatError(f"{scales.file}: tensor {shown(scales.name)} has {groups} groups, which do not divide K={k}")
    size = PER_CHANNEL if groups == 1 else k // groups
    _check_group_size(source, module, str(kind), size)
    act = None if str(kind).endswith("A16") else ActSpec(static=kind == "W8A8")
    computed = scales.name.endswith((".weight_scale_second", ".deq_scale"))  # from two tensors, in float32
    dtype = torch.float32 if computed else stored.SCALE_DTYPES[scales.dtype]
    spec = QuantSpec(width, size, zero=Zero.MIDPOINT if act else zero, scale_dtype=dtype, act=act)
    _check_sides(source, module, n, k, groups)
    return stored.entry(source, module, spec, (n, k), (f"{module}.{part}" for part in _PARTS))


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


def _in_features(source: Source, module: str, width: int, shape: tuple[int, ...], n: int, groups: int) -> int:
    rows, columns = shape
    if width == 4 and 2 * rows == n:
        return columns
    if rows == n:
        by_pairs = width == 4 and groups == 1 and _packs_pairs_of_k(source, module)
        return 2 * columns if by_pairs else columns
    where = f"{source.infos[f'{module}.weight'].file}: tensor {shown(f'{module}.weight')}"
    raise FormatError(f"{where} has {rows} rows, which do not hold the {n} outputs of its scales")


def _packs_pairs_of_k(source: Source, module: str) -> bool:
    """True for W4A16 per channel of the newer saver; the older one keeps one code per byte."""
    types = _types(source)
    return types.get(f"{module}.weight") == "W4A16" and "version" in types


def _check_group_size(source: Source, module: str, kind: str, size: int) -> None:
    declared = _types(source).get("group_size", 0)
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


def _zero_of_weight_only(source: Source, modules: Mapping[str, object]) -> Zero:
    """Whether weight-only modules are symmetric, from the offsets of the smallest: the tool has one setting for all."""
    offsets = [source.infos.get(f"{m}.weight_offset") for m, kind in modules.items() if kind in ("W4A16", "W8A16")]
    smallest = min((i for i in offsets if i is not None), key=lambda i: i.nbytes, default=None)
    if smallest is None or stored.all_equal(source.read(smallest.name), 0):
        return Zero.MIDPOINT
    return Zero.CODES


def _codes(weight: Tensor, spec: QuantSpec, shape: tuple[int, ...]) -> Tensor:
    if spec.bits == 8 or weight.shape == shape:
        return layouts.from_bytes(weight, spec.bits)
    return layouts.unpack_rows(weight) if 2 * weight.shape[0] == shape[0] else layouts.unpack_columns(weight)


def _scales(parts: Mapping[str, Tensor]) -> Tensor:
    if "weight_scale_second" in parts:
        return parts["weight_scale_second"].float() * parts["weight_scale"].float()
    if "weight_scale" in parts:
        return parts["weight_scale"]
    dequant = _dequant_scale(parts["deq_scale"])
    return (dequant / parts["input_scale"].float()).unsqueeze(-1)


def _dequant_scale(stored_scale: Tensor) -> Tensor:
    """deq_scale as floats: int64 ones hold the bits of a float32."""
    if stored_scale.dtype != torch.int64:
        return stored_scale.float()
    low = stored_scale.to(torch.int32)
    if not torch.equal(low.long(), stored_scale):
        raise FormatError("deq_scale holds integers that are no float32 bit patterns")
    return low.view(torch.float32)


def _zeros(parts: Mapping[str, Tensor], spec: QuantSpec) -> Tensor | None:
    """Zero points from weight_offset, which is the signed code of zero. Raises FormatError for what no code can be."""
    if "weight_offset_second" in parts and not stored.all_equal(parts["weight_offset_second"], 0):
        raise FormatError("weight_offset_second is not zero: asymmetric W4A8 is not read")
    offset = parts.get("weight_offset")
    if spec.zero is Zero.MIDPOINT:
        if offset is not None and not stored.all_equal(offset, 0):
            raise FormatError("weight_offset is not zero, but the other modules of its kind are symmetric")
        return None
    zeros = (torch.zeros_like(parts["weight_scale"]) if offset is None else offset).float() + spec.midpoint
    inside = (zeros == zeros.round()) & (zeros >= 0) & (zeros < 2 * spec.midpoint)
    if not bool(inside.all()):
        raise FormatError(
            f"weight_offset holds {float(zeros[~inside][0]) - spec.midpoint:g}, which is no {spec.bits}-bit code"
        )
    return zeros.to(torch.uint8)


def _check_no_bias(parts: Mapping[str, Tensor]) -> None:
    """Static W8A8 folds the layer's bias into quant_bias; dropping it with the activations' scales would lose it."""
    correction = parts["weight"].double().sum(1) * parts["input_offset"].double()
    bias = (parts["quant_bias"].double() + correction).abs()
    if bool((bias > 2 + 1e-6 * correction.abs()).any()):
        raise FormatError("quant_bias holds the layer's bias, and no bias tensor repeats it")


def _activation_limits(spec: QuantSpec) -> str | None:
    act = spec.act
    if act is None:
        return None
    if act.static or act.group_size != PER_CHANNEL:
        return f"it writes activations quantized dynamically per token, not {act}"
    if spec.bits == 8 and spec.group_size != PER_CHANNEL:
        return f"its W8A8 has one scale per output, not groups of {spec.group_size}"
    return None


def _alignment(spec: QuantSpec, n: int, k: int) -> str | None:
    if spec.bits == 8:
        return None
    if spec.act is None and spec.group_size == PER_CHANNEL:
        return f"it packs pairs along K, but K={k} is odd" if k % 2 else None
    if n % 2:
        return f"it packs pairs of outputs, but N={n} is odd"
    return f"its scale_bias needs K in 16 parts, but K={k}" if spec.act and k % layouts.CHUNKS else None


def _packed(w: QTensor) -> Tensor:
    if w.spec.bits == 8:
        return layouts.to_bytes(w.codes)
    per_channel = w.spec.act is None and w.spec.group_size == PER_CHANNEL
    return layouts.pack_columns(w.codes) if per_channel else layouts.pack_rows(w.codes)


def _type(spec: QuantSpec) -> str:
    return f"W{spec.bits}A16" if spec.act is None else f"W{spec.bits}A8_DYNAMIC"


def _written(spec: QuantSpec) -> tuple[str, ...]:
    """The tensors that `encode` writes for a spec."""
    if _type(spec) != "W4A8_DYNAMIC":
        return _PARTS[:3]
    return _PARTS[:6] if spec.group_size != PER_CHANNEL else (*_PARTS[:3], "scale_bias")


def _group_size(specs: Mapping[str, QuantSpec]) -> int:
    """The description's group_size: 0 for per-channel W4A8. Raises CannotHold when modules disagree."""
    sizes: dict[int, str] = {}
    for module, spec in specs.items():
        if spec.group_size != PER_CHANNEL or _type(spec) == "W4A8_DYNAMIC":
            sizes.setdefault(max(spec.group_size, 0), module)
    if len(sizes) > 1:
        found = ", ".join(f"{size or 'per channel'} ({module})" for size, module in sorted(sizes.items()))
        raise CannotHold(f"'msmodelslim' has one group size for all 4-bit modules, found {found}")
    return next(iter(sizes), 0)
