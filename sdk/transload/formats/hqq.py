"""HQQ, read only: its own layers as hqq and transformers save them to safetensors, with float zero points.

    m.W_q    uint8 (3 bits: int32)   the weight regrouped to R rows of C columns, rows packed together, first ones high
    m.scale, m.zero                  one for every row (axis 1) or column (axis 0) of that, float
    m.shape, m.nbits, m.group_size, m.axis, m.packing    small tensors: [N, K], numbers, and a string of bytes

axis 1 regroups to [N*K/g, g], whose rows are groups along K; axis 0 to [g, N*K/g], which gives every k a scale of its
own. w = (q - zero) * scale. Packing of 4 bits: row r shares bytes with row r + R/2, row r in the high nibble. Source:
hqq 0.2.8 `core/quantize.py` and `core/bitpack.py`, checked against its files in tests/golden.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import ClassVar

import torch
from torch import Tensor

from transload import bits
from transload.errors import FormatError, Unsupported
from transload.formats import stored
from transload.formats.base import Entry, Format, Source, naming
from transload.headers.info import shown
from transload.quant import PER_CHANNEL, QTensor, QuantSpec, Zero

_LANES = {"8bit_u8": (8, 1), "4bit_u8": (4, 2), "2bit_u8": (2, 4), "3bit_32": (3, 10)}  # bits of a field, fields
_BITS = {8: "8bit_u8", 6: "8bit_u8", 5: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8"}
_SETTINGS = (
    "nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype", "view_as_float", "quant_scale",
    "quant_zero", "compute_dtype", "offload_meta", "channel_wise", "optimize", "round_zero", "stores_quant_config",
    "encoded_state_dict",
)  # fmt: skip
_SMALL = 64  # elements of a setting that is still read


@dataclass(frozen=True, slots=True)
class _Layer:
    """The settings of one layer, checked."""

    bits: int
    size: int  # values that share a scale
    n: int
    k: int
    axis: int

    @property
    def rows(self) -> int:
        return self.size if self.axis == 0 else self.n * self.k // self.size

    @property
    def run(self) -> int:
        """Neighbours along K that always share a scale; blocks of axis 1 may straddle rows, as in bitsandbytes."""
        return gcd(self.k, self.size) if self.axis == 1 else 1

    @property
    def groups(self) -> int:
        return self.n * self.k // self.size


class Hqq(Format):
    """HQQ layers with float scales and zeros."""

    name: ClassVar[str] = "hqq"

    def detects(self, source: Source) -> bool:
        """True for quant_method hqq, or modules with a W_q and no method at all."""
        return stored.method(source) == self.name or (not stored.method(source) and bool(stored.modules(source, "W_q")))

    def entries(self, source: Source) -> dict[str, Entry]:
        """Modules with a W_q, by the settings stored beside them."""
        return stored.with_floats(source, [_entry(source, m) for m in stored.modules(source, "W_q")])

    def decode(self, source: Source, entry: Entry) -> QTensor:
        """Codes, and the scale and float zero of every group along K."""
        assert entry.spec is not None
        module, layer = entry.name, _layer(source, entry.name)
        scales, zeros = (_along_k(source.read(f"{module}.{part}").reshape(-1), layer) for part in ("scale", "zero"))
        with naming(source, entry):
            codes = _unpack(source.read(f"{module}.W_q"), layer).reshape(layer.n, layer.k)
            return QTensor(entry.spec, codes, scales, zeros)


def _along_k(side: Tensor, layer: _Layer) -> Tensor:
    """One value a group as one value a run of K: [N, K / run]."""
    spread = side.repeat_interleave(layer.size // layer.run) if layer.axis == 1 else side.repeat(layer.size)
    return spread.reshape(layer.n, layer.k // layer.run)


def _entry(source: Source, module: str) -> Entry:
    layer = _layer(source, module)
    width, fields = _LANES[_BITS[layer.bits]]
    word = 4 if width == 3 else 1
    columns = layer.n * layer.k // layer.rows
    expected = -(-layer.rows // fields) * columns * word
    packed = source.infos[f"{module}.W_q"]
    if packed.nbytes != expected:
        raise FormatError(
            f"{packed.file}: tensor {shown(packed.name)} has {packed.nbytes} bytes, expected {expected} for "
            f"{layer.bits} bits, N={layer.n}, K={layer.k}, group_size={layer.size}"
        )
    scale = source.infos.get(f"{module}.scale")
    shape = (layer.groups, 1) if layer.axis == 1 else (1, layer.groups)
    scale = stored.need(source, f"{module}.scale", stored.FLOATS, shape, "for float scales")
    stored.need(source, f"{module}.zero", (scale.dtype,), shape, "for float zeros")
    size = PER_CHANNEL if layer.run == layer.k else layer.run
    spec = QuantSpec(layer.bits, size, zero=Zero.FLOATS, scale_dtype=stored.SCALE_DTYPES[scale.dtype])
    parts = ("W_q", "scale", "zero", *_SETTINGS)
    return stored.entry(source, module, spec, (layer.n, layer.k), (f"{module}.{part}" for part in parts))


def _layer(source: Source, module: str) -> _Layer:
    where = f"{source.path}: module {shown(module)}"
    if _setting(source, module, "quant_scale", [0]) != [0] or _setting(source, module, "quant_zero", [0]) != [0]:
        raise Unsupported(f"{where}: HQQ with quantized scales or zeros is not read")
    shape, nbits = _setting(source, module, "shape"), _setting(source, module, "nbits")
    axis = _setting(source, module, "axis")
    if len(shape) != 2 or len(nbits) != 1 or nbits[0] not in _BITS or axis not in ([0], [1]):
        raise FormatError(f"{where}: shape {shape}, nbits {nbits} and axis {axis} are no HQQ layer of 2 to 8 bits")
    (n, k), b = shape, int(nbits[0])
    if not (0 < n < 1 << 31 and 0 < k < 1 << 31):
        raise FormatError(f"{where}: shape {shape} is no [N, K]")
    size = _setting(source, module, "group_size", [k if axis == [1] else n])
    if len(size) != 1 or size[0] < 1 or n * k % size[0]:
        raise FormatError(f"{where}: group_size {size} does not divide N*K={n * k}")
    packing = bytes(int(v) & 255 for v in _setting(source, module, "packing", list(_BITS[b].encode())))
    if packing.decode("latin-1") != _BITS[b]:
        raise Unsupported(f"{where}: HQQ packing {shown(packing.decode('latin-1'), 40)} of {b} bits is not read")
    return _Layer(b, int(size[0]), int(n), int(k), int(axis[0]))


def _setting(source: Source, module: str, name: str, default: list[int] | None = None) -> list[int]:
    """The values of a small stored tensor; `default` where there is none. Raises FormatError."""
    info = source.infos.get(f"{module}.{name}")
    if info is None:
        if default is None:
            raise FormatError(f"{source.path}: tensor {shown(f'{module}.{name}')} is missing")
        return default
    values = source.read(info.name).reshape(-1) if info.nbytes <= 8 * _SMALL else None
    if values is None or values.is_floating_point() or values.is_complex():
        raise FormatError(
            f"{info.file}: tensor {shown(info.name)} is {info.dtype} {info.shape}, expected a few integers"
        )
    return [int(v) for v in values]


def _unpack(packed: Tensor, layer: _Layer) -> Tensor:
    """Codes of all rows: uint8 [R, C]. Fields of a word are rows a stride apart, the first one highest."""
    width, fields = _LANES[_BITS[layer.bits]]
    columns = layer.n * layer.k // layer.rows
    words = packed.reshape(-1).view(torch.uint8)
    words = words.view(torch.int32) if width == 3 else words
    lanes = bits.unpack(words.reshape(-1, columns, 1), width, fields).flip(-1)
    return lanes.permute(2, 0, 1).reshape(-1, columns)[: layer.rows]
