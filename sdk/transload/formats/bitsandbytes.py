"""bitsandbytes: NF4 and FP4, with and without double quantization, and LLM.int8 (read only).

    m.weight            uint8 [N*K/2, 1]   codes over the flattened weight, high nibble first: codes 3, 12 -> byte 0x3c
    m.weight.absmax     float32 [blocks]   the scale of every `blocksize` neighbours of the flattened weight
    m.weight.quant_map  float32 [16]       the codebook
    m.weight.quant_state.bitsandbytes__nf4 uint8: JSON with quant_type, blocksize, dtype, shape

Double quantization stores absmax as codes of an 8-bit codebook: scale = nested_quant_map[absmax] * nested_absmax[block
// 256] + nested_offset. Where blocksize does not divide K, blocks straddle rows; every run of gcd(K, blocksize)
neighbours then still lies in one block and in one row, so such a weight reads exactly as smaller groups.

LLM.int8: m.weight int8 [N, K], m.SCB float32 [N], w = q * SCB / 127. Source: bitsandbytes 0.50.2 `functional.py` and
`nn/modules.py`, checked against its files in tests/golden.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from typing import ClassVar

import torch
from torch import Tensor

from transload import bits
from transload.errors import FormatError
from transload.formats import stored
from transload.formats.base import Entry, Format, Json, Source, naming
from transload.formats.limits import listed, positional, shape_limits, weights_only
from transload.formats.rules import commonest
from transload.headers.info import shown
from transload.headers.jsonfile import parse_json
from transload.quant import PER_CHANNEL, Grid, QTensor, QuantSpec, Zero

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_GRIDS = {"nf4": Grid.NF4, "fp4": Grid.FP4}
_STATE = "weight.quant_state.bitsandbytes__"
_MAX_STATE = 65536  # bytes of JSON; real ones have under 300
_NESTED_BLOCK = 256


class BitsAndBytes(Format):
    """bitsandbytes 4-bit, and LLM.int8 for reading. Written without double quantization, which rounds scales."""

    name: ClassVar[str] = "bitsandbytes"

    def detects(self, source: Source) -> bool:
        """True for quant_method bitsandbytes."""
        return stored.method(source) == self.name

    def entries(self, source: Source) -> dict[str, Entry]:
        """4-bit modules by their quant_state, 8-bit ones by their SCB."""
        found = [_int8_entry(source, m) for m in stored.modules(source, "SCB")]
        for kind in _GRIDS:
            found += [_entry(source, m, _state(source, m, kind)) for m in stored.modules(source, _STATE + kind)]
        entries = stored.with_floats(source, found)
        for e in entries.values():
            if e.spec is None and e.dtype in ("U8", "I8") and e.name.endswith(".weight"):
                raise FormatError(f"{source.path}: tensor {shown(e.name)} is {e.dtype} and has no quant_state or SCB")
        return entries

    def decode(self, source: Source, entry: Entry) -> QTensor:
        """Codes by row, and the scale of every run of them."""
        assert entry.spec is not None
        with naming(source, entry):
            return _decode_int8(source, entry) if entry.spec.bits == 8 else _decode_4bit(source, entry)

    def cannot_hold(self, spec: QuantSpec, shape: tuple[int, ...]) -> str | None:
        """NF4 and FP4 with float32 scales, where blocks of the library divide both groups and K.

        Its blocks run on from row to row. Its quantizer and its kernels disagree about a K that they do not divide, so
        a group is written as several smaller blocks instead.
        """
        if spec.grid not in _GRIDS.values():
            return f"it writes codes of nf4 or fp4, not {spec.grid.value}"
        reason = shape_limits(spec, shape, (torch.float32,)) or weights_only(spec) or positional(spec)
        if reason is None and _blocksize(spec, shape[1]) is None:
            groups = "one scale per row" if spec.group_size == PER_CHANNEL else f"groups of {spec.group_size}"
            return f"its blocks have {listed(BLOCKSIZES)} values, and none divides {groups} of K={shape[1]}"
        return reason

    def encode(self, name: str, w: QTensor) -> dict[str, Tensor]:
        """weight, absmax, quant_map and quant_state of one module."""
        return {**_codes_and_map(name, w), **_absmax_and_state(name, w, _scales(w), {})}

    def finish(self, specs: Mapping[str, QuantSpec], floats: Mapping[str, tuple[int, ...]]) -> dict[str, Json]:
        """The quantization_config as transformers writes it."""
        grid = commonest({m: s.grid for m, s in specs.items()}) if specs else Grid.NF4
        return {"config.json": {"quantization_config": _config(grid, list(floats))}}


def encode_double(name: str, w: QTensor) -> dict[str, Tensor]:
    """The tensors of one module with double quantization, as bitsandbytes makes them from float scales.

    This rounds the scales to 8 bits, so what `decode` reads back is another weight: whoever asks reports the error.
    """
    scales = _scales(w)
    offset = scales.mean()
    centred = torch.nn.functional.pad(scales - offset, (0, -len(scales) % _NESTED_BLOCK)).reshape(-1, _NESTED_BLOCK)
    absmax, codebook = centred.abs().amax(1), dynamic_map()
    ratio = centred / absmax.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)
    codes = (ratio.unsqueeze(-1) - codebook).abs().argmin(-1).to(torch.uint8)
    nested: Json = {"nested_blocksize": _NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": float(offset)}
    return {
        **_codes_and_map(name, w),
        **_absmax_and_state(name, w, codes.flatten()[: len(scales)].clone(), nested),
        f"{name}.weight.nested_absmax": absmax,
        f"{name}.weight.nested_quant_map": codebook,
    }


def dynamic_map() -> Tensor:
    """bitsandbytes' signed 8-bit codebook for scales: float32 [256], sorted.

    For i = 0 .. 6, the 2**i middles between equally spaced points of [0.1, 1], times 10**(i - 6), with both signs; then
    0 and 1. Source: bitsandbytes 0.50.2 `functional.create_dynamic_map`.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        middles = (10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += middles + [-m for m in middles]
    return torch.tensor(sorted(values))


@dataclass(frozen=True, slots=True)
class _State:
    """The JSON of a quant_state, checked. nested is None without double quantization, else (blocksize, offset)."""

    grid: Grid
    blocksize: int
    n: int
    k: int
    nested: tuple[int, float] | None

    @property
    def blocks(self) -> int:
        return -(-self.n * self.k // self.blocksize)

    @property
    def group_size(self) -> int:
        """The longest run inside a row whose values always share a block, -1 for whole rows."""
        size = gcd(self.k, self.blocksize)
        return PER_CHANNEL if size == self.k < self.blocksize else size


def _state(source: Source, module: str, kind: str) -> _State:
    info = stored.need(source, f"{module}.{_STATE}{kind}", ("U8",), (None,))
    where = f"{info.file}: tensor {shown(info.name)}"
    if info.nbytes > _MAX_STATE:
        raise FormatError(f"{where} has {info.nbytes} bytes, too many for a quant_state")
    value = parse_json(source.read(info.name).numpy().tobytes(), where)
    value = value if isinstance(value, dict) else {}
    shape = value.get("shape")
    n, k = map(_size, shape) if isinstance(shape, list) and len(shape) == 2 else (0, 0)
    blocksize = _size(value.get("blocksize"))
    if not (n and k and blocksize) or value.get("quant_type") != kind:
        raise FormatError(f"{where} is {shown(value)}, expected quant_type {kind}, a blocksize and a shape [N, K]")
    nested = _nested(value, where) if "nested_blocksize" in value else None
    return _State(_GRIDS[kind], blocksize, n, k, nested)


def _nested(value: Json, where: str) -> tuple[int, float]:
    """Blocksize and offset of double quantization."""
    size, offset = _size(value["nested_blocksize"]), value.get("nested_offset")
    if not size or isinstance(offset, bool) or not isinstance(offset, (int, float)):
        raise FormatError(f"{where} is {shown(value)}, expected a nested_blocksize and a nested_offset")
    return size, float(offset)


def _size(value: object) -> int:
    """A positive integer as it is, 0 for anything else."""
    return value if type(value) is int and 0 < value < 1 << 31 else 0


def _entry(source: Source, module: str, state: _State) -> Entry:
    # bnb_4bit_quant_storage may give the bytes any dtype, so the number of bytes is what is checked.
    weight = source.infos.get(f"{module}.weight")
    if weight is None:
        raise FormatError(f"{source.path}: tensor {shown(f'{module}.weight')} is missing")
    if weight.nbytes != -(-state.n * state.k // 2):
        raise FormatError(
            f"{weight.file}: tensor {shown(weight.name)} has {weight.nbytes} bytes, but quant_state says "
            f"[{state.n}, {state.k}] in 4 bits"
        )
    why = f"for N={state.n}, K={state.k}, blocksize={state.blocksize}"
    stored.need(source, f"{module}.weight.quant_map", ("F32",), (16,))
    names = ["weight", "weight.absmax", "weight.quant_map", f"{_STATE}{state.grid.value}"]
    if state.nested is None:
        stored.need(source, f"{module}.weight.absmax", ("F32",), (state.blocks,), why)
    else:
        stored.need(source, f"{module}.weight.absmax", ("U8",), (state.blocks,), why)
        stored.need(source, f"{module}.weight.nested_absmax", ("F32",), (-(-state.blocks // state.nested[0]),), why)
        stored.need(source, f"{module}.weight.nested_quant_map", ("F32",), (256,))
        names += ["weight.nested_absmax", "weight.nested_quant_map"]
    spec = QuantSpec(4, state.group_size, state.grid, Zero.NONE)
    return stored.entry(source, module, spec, (state.n, state.k), (f"{module}.{name}" for name in names))


def _decode_4bit(source: Source, entry: Entry) -> QTensor:
    assert entry.spec is not None
    (n, k), spec, module = entry.shape, entry.spec, entry.name
    state = _state(source, module, spec.grid.value)
    book = source.read(f"{module}.weight.quant_map")
    if not torch.equal(book, spec.grid.values(4)):
        raise FormatError(f"quant_map is not {spec.grid.value}'s codebook")
    data = source.read(f"{module}.weight").reshape(-1).view(torch.uint8)
    codes = bits.unpack(_swapped(data), 4, n * k).reshape(n, k)
    size = gcd(k, state.blocksize)
    scales = _absmax(source, module, state).repeat_interleave(state.blocksize // size)[: n * k // size]
    return QTensor(spec, codes, scales.reshape(n, k // size))


def _absmax(source: Source, module: str, state: _State) -> Tensor:
    absmax = source.read(f"{module}.weight.absmax")
    if state.nested is None:
        return absmax
    size, offset = state.nested
    book, outer = (source.read(f"{module}.weight.{p}") for p in ("nested_quant_map", "nested_absmax"))
    return book[absmax.int()] * outer.repeat_interleave(size)[: len(absmax)] + offset


def _int8_entry(source: Source, module: str) -> Entry:
    n, k = stored.nonempty(stored.need(source, f"{module}.weight", ("I8",), (None, None), "for LLM.int8")).shape
    stored.need(source, f"{module}.SCB", ("F32",), (n,))
    names = (f"{module}.{part}" for part in ("weight", "SCB", "weight_format"))
    return stored.entry(source, module, QuantSpec(8, PER_CHANNEL), (n, k), names)


def _decode_int8(source: Source, entry: Entry) -> QTensor:
    assert entry.spec is not None
    layout = f"{entry.name}.weight_format"
    if layout in source.infos and not stored.all_equal(source.read(layout), 0):
        raise FormatError("weight_format is not 0 (row): tiled layouts are not read")
    codes = (source.read(f"{entry.name}.weight").to(torch.int16) + 128).to(torch.uint8)
    return QTensor(entry.spec, codes, (source.read(f"{entry.name}.SCB") / 127).unsqueeze(-1))


def _blocksize(spec: QuantSpec, k: int) -> int | None:
    """The largest block of which both a group and a row are made, None where there is none."""
    run = k if spec.group_size == PER_CHANNEL else gcd(k, spec.group_size)
    return next((size for size in reversed(BLOCKSIZES) if run % size == 0), None)


def _scales(w: QTensor) -> Tensor:
    """The scale of every block, in the flattened weight's order."""
    size = _blocksize(w.spec, w.k)
    assert size is not None
    return w.scales[:, w.group_of_k()[::size]].flatten()


def _codes_and_map(name: str, w: QTensor) -> dict[str, Tensor]:
    return {
        f"{name}.weight": _swapped(bits.pack(w.codes.reshape(-1), 4)).unsqueeze(1),
        f"{name}.weight.quant_map": w.spec.grid.values(4) + 0.0,  # the library stores FP4's -0 as 0
    }


def _swapped(data: Tensor) -> Tensor:
    """Bytes with their nibbles exchanged: the library puts the first code high, `bits` puts it low."""
    return bits.join(bits.split(data, 4)[::-1], 4)


def _absmax_and_state(name: str, w: QTensor, absmax: Tensor, nested: Json) -> dict[str, Tensor]:
    state: Json = {
        "quant_type": w.spec.grid.value,
        "blocksize": _blocksize(w.spec, w.k),
        "dtype": "bfloat16",  # what engines dequantize to; a weight here has no dtype of its own
        "shape": [w.n, w.k],
        **nested,
    }
    data = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    return {f"{name}.weight.absmax": absmax, f"{name}.{_STATE}{w.spec.grid.value}": data}


def _config(grid: Grid, skipped: list[str]) -> Json:
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": grid.value,
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": skipped,
    }
