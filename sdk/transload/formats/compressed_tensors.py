"""compressed-tensors: what llm-compressor writes and vLLM loads. One Linear, names after the module's:

    pack-quantized    weight_packed     int32 [N, ceil(K*b/32)]   code + 2**(b-1), low first along K
                      weight_scale      [N, G]                    float16, bfloat16 or float32
                      weight_zero_point int32 [ceil(N*b/32), G]   zero + 2**(b-1), low first along N; asymmetric only
                      weight_shape      int64 [2] = [N, K]
    int-quantized     weight            int8 [N, K]               signed codes, 4-bit ones too
                      weight_zero_point int8 [N, G]               asymmetric only
    float-quantized   weight            float8_e4m3fn [N, K]
    mxfp4, nvfp4      weight_packed     uint8 [N, K/2]            see formats/mx.py

    word 0x37aa7755 = unsigned codes 5 5 7 7 10 10 7 3 = signed -3 -3 -1 -1 2 2 -1 -5

Signed codes are unsigned ones minus 2**(b-1), so weights and zero points pass without arithmetic. Codes of 3, 5, 6 and
7 bits are a dense stream since release 0.20 and filled words before; both are read and neither is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from transload import bits
from transload.errors import FormatError
from transload.formats import mx, stored
from transload.formats.base import Entry, Format, Json, Source, naming
from transload.formats.compressed_tensors_config import METHOD, Groups, Scheme, config_of, layout_of
from transload.formats.compressed_tensors_config import PACK as PACK_QUANTIZED
from transload.formats.limits import divided, integer_limits, positional, shape_limits
from transload.formats.packed import PackedRows
from transload.headers import TensorInfo
from transload.headers.info import shown
from transload.quant import PER_CHANNEL, Grid, QTensor, QuantSpec, Zero

BITS = (2, 4, 8)
_SCALES = (torch.float16, torch.bfloat16, torch.float32)


class CompressedTensors(Format):
    """pack-quantized, int-quantized and float-quantized, mixed per module as its config groups say."""

    name: ClassVar[str] = METHOD

    def detects(self, source: Source) -> bool:
        """True for quant_method compressed-tensors; older files call the object compression_config."""
        return source.container == "safetensors" and stored.method(source) == METHOD

    def entries(self, source: Source) -> dict[str, Entry]:
        """Modules with packed or narrow weights, their scheme from the config group that targets them."""
        groups, widths = Groups(source), _Widths(source)
        found = []
        for module in stored.modules(source, "weight_packed"):
            if groups(module).type == "float":
                found.append(mx.packed_entry(source, module))
            else:
                found.append(_packed_entry(source, module, groups(module), widths))
        for module in stored.modules(source, "weight_scale"):
            weight = source.infos.get(f"{module}.weight")
            if weight is not None and weight.dtype in ("I8", "F8_E4M3"):
                found.append(_bytes_entry(source, module, groups(module)))
        return stored.with_floats(source, found)

    def decode(self, source: Source, entry: Entry) -> QTensor:
        """Codes, scales and zero points, unpacked. Scales of a whole tensor or block are repeated for its rows."""
        assert entry.spec is not None
        if entry.spec.grid is Grid.E2M1:
            return mx.decode_packed(source, entry)
        module, spec, (n, k) = entry.name, entry.spec, entry.shape
        with naming(source, entry):
            scales = source.read(f"{module}.weight_scale")
            scales = _spread(source, module, scales, n, spec.groups(k))
            if f"{module}.weight" in source.infos:
                weight = source.read(f"{module}.weight")
                if spec.grid is Grid.E4M3:
                    return QTensor(spec, weight.view(torch.uint8), scales)
                return QTensor(spec, _unsigned(weight, spec), scales, _byte_zeros(source, module, spec))
            _check_shape(source, module, (n, k))
            words = source.read(f"{module}.weight_packed")
            filled = _is_filled(tuple(words.shape), k, spec.bits)
            codes = _unpack(words, spec.bits, k, filled)
            zeros = _packed_zeros(source, module, spec, n, filled) if spec.zero is Zero.CODES else None
            g_idx = source.read(f"{module}.weight_g_idx") if spec.act_order else None
            return QTensor(spec, codes, scales, zeros, g_idx=g_idx)

    def packed(self, source: Source, entry: Entry) -> PackedRows | None:
        """The words of weight_packed; not for codes in bytes, floats, or words that whole codes do not fill."""
        assert entry.spec is not None
        module, spec, k = entry.name, entry.spec, entry.shape[1]
        info = source.infos.get(f"{module}.weight_packed")
        if info is None or spec.grid is not Grid.INT or not PackedRows.possible(spec, k):
            return None
        with naming(source, entry):
            _check_shape(source, module, entry.shape)
            scales = _spread(source, module, source.read(f"{module}.weight_scale"), entry.shape[0], spec.groups(k))
            zeros = _packed_zeros(source, module, spec, entry.shape[0], False) if spec.zero is Zero.CODES else None
            g_idx = source.read(f"{module}.weight_g_idx") if spec.act_order else None
            return PackedRows(spec, source.read(info.name), k, scales, zeros, g_idx)

    def encode_packed(self, name: str, rows: PackedRows) -> dict[str, Tensor] | None:
        """The same words."""
        return self._packed_tensors(name, rows) if layout_of(rows.spec) == PACK_QUANTIZED else None

    def cannot_hold(self, spec: QuantSpec, shape: tuple[int, ...]) -> str | None:
        """2, 4 or 8 bits with integer zero points, and FP8 per channel; scales of any float dtype."""
        if spec.grid is Grid.E4M3:
            if spec.group_size != PER_CHANNEL or spec.act is not None:
                return "it stores FP8 weights with one scale per channel and 16-bit activations"
            return shape_limits(spec, shape, _SCALES)
        if spec.zero is Zero.MINS:
            return "it has integer zero points and no float minimum per group"
        if spec.act is not None and spec.act.static and (spec.act.group_size != PER_CHANNEL or spec.bits != 8):
            return "it has one static activation scale per tensor, beside weights of 8 bits"
        allowed = (4, 8) if spec.act else BITS
        reason = integer_limits(spec, shape, allowed, (Zero.MIDPOINT, Zero.CODES), _SCALES)
        return reason or positional(spec) or divided(spec, shape[-1])

    def encode(self, name: str, w: QTensor) -> dict[str, Tensor]:
        """The tensors drawn at the top of this file."""
        if layout_of(w.spec) == PACK_QUANTIZED:
            words = bits.pack(w.codes, w.spec.bits, torch.int32)
            return self._packed_tensors(name, PackedRows(w.spec, words, w.k, w.scales, w.zeros, w.g_idx))
        tensors = {f"{name}.weight_scale": w.scales.contiguous()}
        if w.spec.grid is Grid.E4M3:
            return tensors | {f"{name}.weight": w.codes.view(torch.float8_e4m3fn)}
        if w.zeros is not None:
            tensors[f"{name}.weight_zero_point"] = _signed(w.zeros, w.spec)
        return tensors | {f"{name}.weight": _signed(w.codes, w.spec)}

    def _packed_tensors(self, name: str, rows: PackedRows) -> dict[str, Tensor]:
        tensors = {
            f"{name}.weight_scale": rows.scales.contiguous(),
            f"{name}.weight_packed": rows.words.contiguous(),
            f"{name}.weight_shape": torch.tensor([rows.words.shape[0], rows.k], dtype=torch.int64),
        }
        if rows.zeros is not None:
            packed = bits.pack(rows.zeros.T.contiguous(), rows.spec.bits, torch.int32)
            tensors[f"{name}.weight_zero_point"] = packed.T.contiguous()
        return tensors

    def finish(self, specs: Mapping[str, QuantSpec], floats: Mapping[str, tuple[int, ...]]) -> dict[str, Json]:
        """One config group per scheme: the commonest for the class Linear, the others by expressions."""
        return {"config.json": {"quantization_config": config_of(specs, list(floats))}}


class _Widths:
    """K of a packed module. The packed row rounds it up, so it is read from weight_shape, once per kind of module."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._seen: dict[tuple[object, ...], int] = {}

    def __call__(self, module: str, packed: tuple[int, ...], groups: int, b: int) -> int:
        role = ".".join("*" if part.isdecimal() else part for part in module.split("."))
        key = (role, packed, groups, b)
        if key not in self._seen:
            self._seen[key] = self._read(module, packed, b)
        return self._seen[key]

    def _read(self, module: str, packed: tuple[int, ...], b: int) -> int:
        info = stored.need(self._source, f"{module}.weight_shape", ("I64", "I32"), (2,), "for packed weights")
        n, k = (int(v) for v in self._source.read(info.name))
        if n != packed[0] or not 0 < k <= packed[1] * 32 // b or packed[1] not in _word_counts(k, b):
            raise FormatError(
                f"{info.file}: tensor {shown(info.name)} says [{n}, {k}], which {b}-bit codes in words {packed} are not"
            )
        return k


def _word_counts(k: int, b: int) -> tuple[int, int]:
    """Words of a row of K codes: as a dense stream, and with words filled by whole codes only."""
    return bits.packed_len(k, b, torch.int32), -(-k // (32 // b))


def _packed_entry(source: Source, module: str, scheme: Scheme, widths: _Widths) -> Entry:
    packed = stored.need(source, f"{module}.weight_packed", ("I32",), (None, None), "for packed integers")
    stored.nonempty(packed)
    scale = _scale_info(source, module)
    k = widths(module, packed.shape, scale.shape[-1], scheme.bits)
    n = packed.shape[0]
    spec = _spec(source, module, scheme, n, k)
    if spec.zero is Zero.CODES:
        rows = _word_counts(n, spec.bits)[_is_filled(packed.shape, k, spec.bits)]
        stored.need(source, f"{module}.weight_zero_point", ("I32",), (rows, spec.groups(k)), "for asymmetry")
    if scheme.act_order:
        stored.need(source, f"{module}.weight_g_idx", ("I32",), (k,), "for act-order")
    parts = ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape")
    return stored.entry(source, module, spec, (n, k), (f"{module}.{part}" for part in parts))


def _bytes_entry(source: Source, module: str, scheme: Scheme) -> Entry:
    weight = stored.need(source, f"{module}.weight", ("I8", "F8_E4M3"), (None, None), "for one code per byte")
    n, k = stored.nonempty(weight).shape
    if (weight.dtype == "F8_E4M3") != (scheme.type == "float"):
        raise FormatError(
            f"{weight.file}: tensor {shown(weight.name)} is {weight.dtype}, its config group says {scheme.type}"
        )
    spec = _spec(source, module, scheme, n, k)
    if spec.zero is Zero.CODES:
        stored.need(source, f"{module}.weight_zero_point", ("I8",), (n, spec.groups(k)), "for asymmetry")
    parts = ("weight", "weight_scale", "weight_zero_point")
    return stored.entry(source, module, spec, (n, k), (f"{module}.{part}" for part in parts))


def _spec(source: Source, module: str, scheme: Scheme, n: int, k: int) -> QuantSpec:
    scale = _scale_info(source, module)
    grid = Grid.E4M3 if scheme.type == "float" else Grid.INT
    group = scheme.block[1] if scheme.block else scheme.group_size
    if group >= k:
        group = PER_CHANNEL
    zero = Zero.NONE if grid is Grid.E4M3 else Zero.MIDPOINT if scheme.symmetric else Zero.CODES
    with_bits = 8 if grid is Grid.E4M3 else scheme.bits
    dtype = stored.SCALE_DTYPES[scale.dtype]
    spec = QuantSpec(with_bits, group, grid, zero, dtype, scheme.act, scheme.act_order)
    rows = {"tensor": 1, "block": -(-n // scheme.block[0]) if scheme.block else n}.get(scheme.strategy, n)
    expected = (rows, spec.groups(k))
    found = scale.shape if len(scale.shape) == 2 else (*scale.shape, 1)[:2]
    if found != expected:
        raise FormatError(
            f"{scale.file}: tensor {shown(scale.name)} has shape {scale.shape}, expected {expected} for "
            f"{scheme.strategy} scales, group_size={scheme.group_size}, N={n}, K={k}"
        )
    return spec


def _scale_info(source: Source, module: str) -> TensorInfo:
    name = f"{module}.weight_scale"
    info = source.infos.get(name)
    shape: stored.Shape = (None,) * (len(info.shape) if info is not None and len(info.shape) in (1, 2) else 2)
    return stored.nonempty(stored.need(source, name, stored.FLOATS, shape, "for a quantized weight"))


def _spread(source: Source, module: str, scales: Tensor, n: int, groups: int) -> Tensor:
    """Scales [1], [N, 1], [N, G] or [row blocks, G] as [N, G]."""
    scales = scales.reshape(-1, groups)
    if len(scales) == n:
        return scales
    block = Groups(source)(module).block
    return scales.repeat_interleave(block[0] if block else n, dim=0)[:n].contiguous()


def _check_shape(source: Source, module: str, shape: tuple[int, ...]) -> None:
    found = tuple(int(v) for v in source.read(f"{module}.weight_shape"))
    if found != shape:
        raise FormatError(f"weight_shape says {list(found)}, but modules of its kind have {list(shape)}")


def _is_filled(packed: tuple[int, ...], k: int, b: int) -> bool:
    """True when every word begins with a new code, False for a dense stream. The weight decides for zero points too."""
    return packed[-1] != bits.packed_len(k, b, torch.int32)


def _unpack(words: Tensor, b: int, k: int, filled: bool) -> Tensor:
    """Codes uint8 [N, K] of packed rows."""
    if not filled:
        return bits.unpack(words, b, k)
    lanes = bits.unpack(words, 1, words.shape[-1] * 32).reshape(len(words), -1, 32)[..., : 32 // b * b]
    return bits.unpack(bits.pack(lanes.reshape(len(words), -1), 1), b, k)


def _packed_zeros(source: Source, module: str, spec: QuantSpec, n: int, filled: bool) -> Tensor:
    words = source.read(f"{module}.weight_zero_point").T.contiguous()
    return _unpack(words, spec.bits, n, filled).T.contiguous()


def _byte_zeros(source: Source, module: str, spec: QuantSpec) -> Tensor | None:
    if spec.zero is not Zero.CODES:
        return None
    return _unsigned(source.read(f"{module}.weight_zero_point"), spec)


def _unsigned(signed: Tensor, spec: QuantSpec) -> Tensor:
    """int8 -2**(b-1) .. 2**(b-1) - 1 as uint8 codes. Raises FormatError for values outside."""
    low, high = -spec.midpoint, spec.midpoint - 1
    if spec.bits < 8 and signed.numel() and (int(signed.min()) < low or int(signed.max()) > high):
        raise FormatError(f"values {int(signed.min())}..{int(signed.max())} are no {spec.bits}-bit codes")
    return signed.view(torch.uint8) + spec.midpoint  # uint8 addition wraps


def _signed(codes: Tensor, spec: QuantSpec) -> Tensor:
    return (codes + (256 - spec.midpoint)).view(torch.int8)  # uint8 addition wraps
