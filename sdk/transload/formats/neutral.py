"""Transload's own format: a QTensor as it is, for numbers that no other format holds.

    <module>.codes   U8 [..., N, ceil(K * bits / 8)]   each row packed LSB-first
    <module>.scales  F16 | BF16 | F32 [..., N, G]
    <module>.zeros   U8, or the dtype of scales [..., N, G]      <module>.mins   dtype of scales [..., N, G]
    <module>.g_idx   I32 [K]                                     <module>.shape  U8 (0, ..., N, K), no data

Packing loses K where a row does not fill its last byte, so `.shape` says it, in its header alone. Quantization_config
in config.json holds one scheme for most modules and names the modules of every other scheme:

    {"quant_method": "transload", "version": 1, "schemes": [{"bits": 4, "group_size": 32, "grid": "int", "zero": "mins",
     "scale_dtype": "float16"}, {"bits": 8, ..., "act_order": true, "act": {...}, "modules": ["lm_head"]}]}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from transload import bits
from transload.errors import ConfigError, FormatError
from transload.formats.base import Entry, Format, Json, Source, naming
from transload.formats.plain import declared_quantization, float_entry
from transload.formats.stored import expert as read_expert
from transload.headers import TensorInfo
from transload.headers.info import shown
from transload.quant import SCALE_DTYPES, ActSpec, Grid, QTensor, QuantSpec, Zero

VERSION = 1
# For whoever looks into config.json after transformers warned of an unknown method: it goes on without the weights.
NEEDS = "import transload.runtime before from_pretrained, or transload.load"
_PARTS = ("codes", "scales", "zeros", "mins", "g_idx", "shape")
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in SCALE_DTYPES}
_STORED = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


class Neutral(Format):
    """Any QTensor, exactly."""

    name: ClassVar[str] = "transload"
    embeddings: ClassVar[bool] = True

    def detects(self, source: Source) -> bool:
        """True when quantization_config names this format."""
        return source.container == "safetensors" and declared_quantization(source) == self.name

    def entries(self, source: Source) -> dict[str, Entry]:
        """Quantized modules where there are codes, float entries for the rest.

        Raises FormatError when config.json and the stored tensors contradict each other.
        """
        modules = [name.removesuffix(".codes") for name in source.infos if name.endswith(".codes")]
        specs = _specs(source, modules)
        found = {module: _entry(source, module, specs[module]) for module in modules}
        taken = {name for entry in found.values() for name in entry.tensors}
        floats = {name: float_entry(info) for name, info in source.infos.items() if name not in taken}
        return found | floats

    def decode(self, source: Source, entry: Entry) -> QTensor:
        """The exact numbers of a quantized entry."""
        assert entry.spec is not None
        with naming(source, entry):
            stored = {name.rpartition(".")[2]: name for name in entry.tensors}
            parts = {part: source.read(name) for part, name in stored.items() if part != "shape"}
            codes = bits.unpack(parts.pop("codes"), entry.spec.bits, entry.shape[-1])
            return QTensor(entry.spec, codes, **parts)

    def experts(self, source: Source, entry: Entry) -> Iterator[QTensor | Tensor]:
        """The experts of a stack, each read from its own place."""
        if entry.spec is None or entry.spec.act_order:
            yield from super().experts(source, entry)
            return
        stored = {name.rpartition(".")[2]: name for name in entry.tensors if not name.endswith(".shape")}
        for e in range(entry.shape[0]):
            with naming(source, entry):
                parts = {part: read_expert(source, name, e) for part, name in stored.items()}
                codes = bits.unpack(parts.pop("codes"), entry.spec.bits, entry.shape[-1])
                w = QTensor(entry.spec, codes, **parts)
            yield w

    def cannot_hold(self, spec: QuantSpec, shape: tuple[int, ...]) -> str | None:
        """None: every QTensor fits."""
        return None

    def encode(self, name: str, w: QTensor) -> dict[str, Tensor]:
        """The tensors drawn at the top of this file."""
        parts = {
            "codes": bits.pack(w.codes, w.spec.bits), "scales": w.scales, "zeros": w.zeros, "mins": w.mins,
            "g_idx": w.g_idx, "shape": torch.empty(0, *w.codes.shape, dtype=torch.uint8, device=w.codes.device),
        }  # fmt: skip
        return {f"{name}.{part}": t for part, t in parts.items() if t is not None}

    def finish(self, specs: Mapping[str, QuantSpec], floats: Mapping[str, tuple[int, ...]]) -> dict[str, Json]:
        """quantization_config; the scheme of most modules comes first and names none."""
        groups: dict[QuantSpec, list[str]] = {}
        for module, spec in specs.items():
            groups.setdefault(spec, []).append(module)
        ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
        schemes = [scheme_to_json(spec) | ({"modules": names} if i else {}) for i, (spec, names) in enumerate(ordered)]
        quantization: Json = {"quant_method": self.name, "needs": NEEDS, "version": VERSION, "schemes": schemes}
        return {"config.json": {"quantization_config": quantization}}


def _entry(source: Source, module: str, spec: QuantSpec) -> Entry:
    """The entry of one module, its stored shapes and dtypes checked against the spec."""
    stored = {part: source.infos[f"{module}.{part}"] for part in _PARTS if f"{module}.{part}" in source.infos}
    codes, marker = stored["codes"], stored.get("shape")
    where = f"{codes.file}: {shown(module)}"
    if marker is None or len(marker.shape) not in (3, 4) or marker.shape[0] != 0:
        raise FormatError(f"{where}: shape is {marker.shape if marker else 'missing'}, expected (0, ..., N, K)")
    *lead, k = shape = marker.shape[1:]
    side = (_STORED[spec.scale_dtype], (*lead, spec.groups(k)))
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        "codes": ("U8", (*lead, bits.packed_len(k, spec.bits))), "scales": side, "shape": ("U8", marker.shape),
    }  # fmt: skip
    if spec.zero in (Zero.CODES, Zero.FLOATS):
        expected["zeros"] = ("U8", side[1]) if spec.zero is Zero.CODES else side
    if spec.zero is Zero.MINS:
        expected["mins"] = side
    if spec.act_order:
        expected["g_idx"] = ("I32", (k,))
    _check(where, spec, stored, expected)
    size = sum(info.nbytes for info in stored.values())
    return Entry(module, spec, shape, tuple(info.name for info in stored.values()), size)


def _check(
    where: str,
    spec: QuantSpec,
    stored: Mapping[str, TensorInfo],
    expected: Mapping[str, tuple[str, tuple[int, ...]]],
) -> None:
    for part in _PARTS:
        info = stored.get(part)
        found = (info.dtype, info.shape) if info else None
        if found != expected.get(part):
            wanted = "{} {}".format(*expected[part]) if part in expected else "nothing"
            what = f"{found[0]} {found[1]}" if found else "missing"
            raise FormatError(f"{where}: {part} is {what}, expected {wanted} for {spec}")


def _specs(source: Source, modules: list[str]) -> dict[str, QuantSpec]:
    """The spec of every module that has codes."""
    where = f"{source.path}: quantization_config"
    declared = source.config.get("quantization_config")
    if not isinstance(declared, dict) or declared.get("version") != VERSION:
        raise FormatError(f"{where}: {shown(declared)}, expected version {VERSION} of 'transload'")
    schemes = declared.get("schemes")
    if not isinstance(schemes, list) or (modules and not schemes):
        raise FormatError(f"{where}: schemes is {shown(schemes)}, expected a list")
    named: dict[str, QuantSpec] = {}
    rest: QuantSpec | None = None
    for scheme in schemes:
        spec, names = scheme_from_json(where, scheme)
        if names is None and rest is not None:
            raise FormatError(f"{where}: two schemes name no modules")
        rest = spec if names is None else rest
        for name in names or ():
            if named.setdefault(name, spec) != spec:
                raise FormatError(f"{where}: {shown(name)} has two schemes")
    absent = named.keys() - set(modules)
    if absent:
        raise FormatError(f"{where}: names {shown(min(absent))}, which has no stored codes")
    if rest is None and len(named) < len(modules):
        raise FormatError(f"{where}: no scheme for {shown(next(m for m in modules if m not in named))}")
    return {module: named.get(module, rest) or named[module] for module in modules}


def scheme_to_json(spec: QuantSpec) -> Json:
    """A spec as plain data, drawn at the top of this file."""
    value: Json = {
        "bits": spec.bits,
        "group_size": spec.group_size,
        "grid": spec.grid.value,
        "zero": spec.zero.value,
        "scale_dtype": str(spec.scale_dtype).removeprefix("torch."),
    }
    if spec.act_order:
        value["act_order"] = True
    if spec.act is not None:
        value["act"] = {"bits": spec.act.bits, "group_size": spec.act.group_size, "static": spec.act.static}
    return value


def scheme_from_json(where: str, scheme: object) -> tuple[QuantSpec, list[str] | None]:
    """A spec and the modules that it names; None stands for all others. Raises FormatError for anything unknown."""
    if not isinstance(scheme, dict):
        raise FormatError(f"{where}: a scheme is {shown(scheme)}, expected an object")
    fields = dict(scheme)
    names = fields.pop("modules", None)
    if names is not None and not (isinstance(names, list) and all(isinstance(n, str) for n in names)):
        raise FormatError(f"{where}: modules is {shown(names)}, expected a list of names")
    try:
        act = fields.pop("act", None)
        spec = QuantSpec(
            bits=_integer(fields.pop("bits")),
            group_size=_integer(fields.pop("group_size")),
            grid=Grid(fields.pop("grid")),
            zero=Zero(fields.pop("zero")),
            scale_dtype=_DTYPES[fields.pop("scale_dtype")],
            act=None if act is None else _act(act),
            act_order=_boolean(fields.pop("act_order", False)),
        )
    except KeyError as e:
        raise FormatError(f"{where}: a scheme lacks {e} or has an unknown value there: {shown(scheme)}") from e
    except (ConfigError, TypeError, ValueError) as e:
        raise FormatError(f"{where}: {e} in {shown(scheme)}") from e
    if fields:
        raise FormatError(f"{where}: unknown field {shown(next(iter(fields)))} in a scheme")
    return spec, names


def _act(value: object) -> ActSpec:
    if not isinstance(value, dict) or value.keys() != {"bits", "group_size", "static"}:
        raise ValueError(f"act is {shown(value)}, expected bits, group_size and static")
    return ActSpec(_integer(value["bits"]), _integer(value["group_size"]), _boolean(value["static"]))


def _integer(value: object) -> int:
    if type(value) is not int:
        raise ValueError(f"{shown(value)} is no integer")
    return value


def _boolean(value: object) -> bool:
    if type(value) is not bool:
        raise ValueError(f"{shown(value)} is neither true nor false")
    return value
