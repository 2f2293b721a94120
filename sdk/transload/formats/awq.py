"""AWQ: AutoAWQ's gemm and gemv layouts, both ways, and its gemv_fast, read only. Always 4 bits.

gemm packs along N. Word c of row k has output 8c + (0, 2, 4, 6, 1, 3, 5, 7)[i] in nibble i:

    qweight int32 [K, N/8]   qzeros int32 [G, N/8]   scales float [G, N]
    word 0x16265453, nibbles 3 5 4 5 6 2 6 1, outputs 0..7 = 3 6 5 2 4 6 5 1

gemv packs along K in order and pads groups to a width Z of words; gemv_fast interleaves four rows and stores
-scale * zero as a float, which is an offset:

    gemv       qweight int32 [N, K/8]    qzeros int32 [N, Z]       scales float [N, 8Z]   only G columns are used
    gemv_fast  qweight int16 [N/4, K]    qzeros float [8Z, N]      scales float [8Z, N]     w = scale * q + qzeros

Zero points are stored as they are. Source: AutoAWQ 0.2.9 `awq/modules/linear`, checked against tests/golden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from transload import bits
from transload.errors import CannotHold, FormatError, Unsupported
from transload.formats import stored
from transload.formats.base import Entry, Format, Json, Source, naming
from transload.formats.limits import divided, integer_limits, positional, weights_only
from transload.headers.info import shown
from transload.quant import PER_CHANNEL, QTensor, QuantSpec, Zero

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # output of nibble i inside a gemm word
_INVERSE = (0, 4, 1, 5, 2, 6, 3, 7)  # nibble of output i
_PARTS = ("qweight", "qzeros", "scales")
_KERNELS_OF_GEMM = ("gemm", "marlin", "exllama", "ipex")  # versions that name a kernel and store the gemm layout


class Awq(Format):
    """AWQ gemm: the layout of nearly every published AWQ checkpoint."""

    name: ClassVar[str] = "awq"
    versions: ClassVar[tuple[str, ...]] = _KERNELS_OF_GEMM

    def detects(self, source: Source) -> bool:
        """True for quant_method awq in this layout."""
        return stored.method(source) == "awq" and _version(source) in self.versions

    def entries(self, source: Source) -> dict[str, Entry]:
        """Modules with a qweight; bits, group size and symmetry come from the configuration."""
        config = stored.quantization_config(source)
        group_size = _configured_group_size(source, config)
        return stored.with_floats(
            source, [self._entry(source, m, group_size) for m in stored.modules(source, "qweight")]
        )

    def _entry(self, source: Source, module: str, group_size: int) -> Entry:
        return awq_entry(source, module, group_size)

    def decode(self, source: Source, entry: Entry) -> QTensor:
        """Codes, scales and zero points, unpacked."""
        return awq_decode(source, entry)

    def cannot_hold(self, spec: QuantSpec, shape: tuple[int, ...]) -> str | None:
        """4 bits, zero points written out, 16-bit scales and activations, groups that divide K, N a multiple of 8."""
        reason = integer_limits(spec, shape, (4,), (Zero.CODES,), (torch.float16, torch.bfloat16))
        reason = reason or weights_only(spec) or positional(spec) or divided(spec, shape[1])
        return reason or self._alignment(spec, *shape)

    def _alignment(self, spec: QuantSpec, n: int, k: int) -> str | None:
        return f"it packs 8 outputs into a word, but N={n} is not a multiple of 8" if n % 8 else None

    def once_per_file(self, spec: QuantSpec) -> Mapping[str, int]:
        """The group size; bits and zero points are the same for all AWQ modules anyway."""
        return {"group size": spec.group_size}

    def encode(self, name: str, w: QTensor) -> dict[str, Tensor]:
        """qweight, qzeros and scales of one module."""
        return {
            f"{name}.qweight": _pack_outputs(w.codes.T),
            f"{name}.qzeros": _pack_outputs(_zeros(w).T),
            f"{name}.scales": w.scales.T.contiguous(),
        }

    def finish(self, specs: Mapping[str, QuantSpec], floats: Mapping[str, tuple[int, ...]]) -> dict[str, Json]:
        """The quantization_config. Raises CannotHold when modules have different group sizes: AWQ has one for all."""
        sizes = {s.group_size: m for m, s in specs.items()}
        if len(sizes) > 1:
            found = ", ".join(f"{size} ({module})" for size, module in sorted(sizes.items()))
            raise CannotHold(f"'{self.name}' has one group size for all modules, found {found}")
        config: Json = {
            "quant_method": "awq",
            "version": self.versions[0],
            "bits": 4,
            "group_size": next(iter(sizes), 128),
            "zero_point": True,
            # Engines look for these as substrings: full names, so that mlp.gate does not meet an expert's gate_proj.
            "modules_to_not_convert": list(floats),
        }
        return {"config.json": {"quantization_config": config}}


class AwqGemv(Awq):
    """AWQ gemv: codes in order along K."""

    name: ClassVar[str] = "awq_gemv"
    versions: ClassVar[tuple[str, ...]] = ("gemv",)

    def _entry(self, source: Source, module: str, group_size: int) -> Entry:
        qweight = stored.nonempty(stored.need(source, f"{module}.qweight", ("I32",), (None, None)))
        n, k = qweight.shape[0], qweight.shape[1] * 8
        width = _zeros_width(source, module, k, group_size)
        scales = stored.need(
            source, f"{module}.scales", stored.FLOATS, (n, 8 * width), f"for K={k}, group_size={group_size}"
        )
        stored.need(source, f"{module}.qzeros", ("I32",), (n, width), f"for K={k}, group_size={group_size}")
        spec = QuantSpec(4, group_size, zero=Zero.CODES, scale_dtype=stored.SCALE_DTYPES[scales.dtype])
        return _checked(source, module, spec, n, k)

    def decode(self, source: Source, entry: Entry) -> QTensor:
        """Codes, and the meaningful columns of scales and zero points."""
        assert entry.spec is not None
        (_, k), spec, module = entry.shape, entry.spec, entry.name
        groups = spec.groups(k)
        codes = bits.unpack(source.read(f"{module}.qweight"), 4, k)
        zeros = bits.unpack(source.read(f"{module}.qzeros"), 4, groups)
        with naming(source, entry):
            return QTensor(spec, codes, source.read(f"{module}.scales")[:, :groups].contiguous(), zeros)

    def _alignment(self, spec: QuantSpec, n: int, k: int) -> str | None:
        if k % 8:
            return f"it packs 8 inputs into a word, but K={k} is not a multiple of 8"
        size = k if spec.group_size == PER_CHANNEL else spec.group_size
        return None if _multiple(size) else f"its group sizes are 32, 64, and 128 or more, not {size}"

    def encode(self, name: str, w: QTensor) -> dict[str, Tensor]:
        """qweight, qzeros and scales of one module, groups padded to whole words."""
        size = w.k if w.spec.group_size == PER_CHANNEL else w.spec.group_size
        pad = 8 * _width(w.k, size) - w.scales.shape[1]
        return {
            f"{name}.qweight": bits.pack(w.codes, 4, torch.int32),
            f"{name}.qzeros": bits.pack(torch.nn.functional.pad(_zeros(w), (0, pad)), 4, torch.int32),
            f"{name}.scales": torch.nn.functional.pad(w.scales, (0, pad)),
        }


class AwqGemvFast(Awq):
    """AWQ gemv_fast, read only: offsets instead of zero points."""

    name: ClassVar[str] = "awq_gemv_fast"
    versions: ClassVar[tuple[str, ...]] = ("gemv_fast",)

    def _entry(self, source: Source, module: str, group_size: int) -> Entry:
        qweight = stored.nonempty(stored.need(source, f"{module}.qweight", ("I16",), (None, None)))
        n, k = qweight.shape[0] * 4, qweight.shape[1]
        if k % 64:
            raise FormatError(f"{qweight.file}: tensor {shown(qweight.name)} has K={k}, expected a multiple of 64")
        rows = 8 * _zeros_width(source, module, k, group_size)
        why = f"for K={k}, group_size={group_size}"
        scales = stored.need(source, f"{module}.scales", stored.FLOATS, (rows, n), why)
        stored.need(source, f"{module}.qzeros", (scales.dtype,), (rows, n), why)
        spec = QuantSpec(4, group_size, zero=Zero.MINS, scale_dtype=stored.SCALE_DTYPES[scales.dtype])
        return _checked(source, module, spec, n, k)

    def decode(self, source: Source, entry: Entry) -> QTensor:
        """Codes, scales, and the stored -scale * zero as mins."""
        assert entry.spec is not None
        (n, k), spec, module = entry.shape, entry.spec, entry.name
        groups = spec.groups(k)
        stream = bits.unpack(source.read(f"{module}.qweight"), 4, 4 * k)
        blocks = stream.reshape(n // 4, k // 64, 4, 64).transpose(1, 2).reshape(n, k // 32, 32)
        codes = blocks[..., _fast_positions()].reshape(n, k)
        scales, mins = (source.read(f"{module}.{p}")[:groups].T.contiguous() for p in ("scales", "qzeros"))
        with naming(source, entry):
            return QTensor(spec, codes, scales, mins=mins)

    def cannot_hold(self, spec: QuantSpec, shape: tuple[int, ...]) -> str | None:
        """Read only."""
        return Format.cannot_hold(self, spec, shape)


def awq_entry(source: Source, module: str, group_size: int) -> Entry:
    """The entry of one module with AWQ gemm's tensors. Raises FormatError when shapes contradict each other."""
    qweight = stored.nonempty(stored.need(source, f"{module}.qweight", ("I32",), (None, None)))
    k, n = qweight.shape[0], qweight.shape[1] * 8
    why = f"for N={n}, K={k}, group_size={group_size}"
    scales = stored.need(source, f"{module}.scales", stored.FLOATS, (None, n), why)
    spec = QuantSpec(4, group_size, zero=Zero.CODES, scale_dtype=stored.SCALE_DTYPES[scales.dtype])
    stored.need(source, scales.name, stored.FLOATS, (spec.groups(k), n), why)
    stored.need(source, f"{module}.qzeros", ("I32",), (spec.groups(k), n // 8), why)
    return _checked(source, module, spec, n, k)


def awq_decode(source: Source, entry: Entry) -> QTensor:
    """The weight of an entry made by `awq_entry`."""
    assert entry.spec is not None
    (n, _), spec, module = entry.shape, entry.spec, entry.name
    codes = _unpack_outputs(source.read(f"{module}.qweight"), n).T.contiguous()
    zeros = _unpack_outputs(source.read(f"{module}.qzeros"), n).T.contiguous()
    with naming(source, entry):
        return QTensor(spec, codes, source.read(f"{module}.scales").T.contiguous(), zeros)


def _checked(source: Source, module: str, spec: QuantSpec, n: int, k: int) -> Entry:
    if spec.group_size > 0 and k % spec.group_size:
        raise FormatError(
            f"{source.path}: module {shown(module)}: K={k} is not a multiple of group_size {spec.group_size}"
        )
    return stored.entry(source, module, spec, (n, k), (f"{module}.{p}" for p in _PARTS))


def _pack_outputs(codes: Tensor) -> Tensor:
    """uint8 [R, N] -> int32 [R, N/8], outputs interleaved inside each word."""
    return bits.pack(_lanes(codes.contiguous(), _ORDER), 4, torch.int32)


def _unpack_outputs(words: Tensor, n: int) -> Tensor:
    """int32 [R, N/8] -> uint8 [R, N]; inverse of `_pack_outputs`."""
    return _lanes(bits.unpack(words, 4, n), _INVERSE)


def _lanes(codes: Tensor, order: tuple[int, ...]) -> Tensor:
    """Every eight columns in another order. Column by column, which takes a quarter of the time of indexing."""
    out = torch.empty_like(codes)
    for to, source in enumerate(order):
        out[:, to::8] = codes[:, source::8]
    return out


def _zeros(w: QTensor) -> Tensor:
    assert w.zeros is not None  # cannot_hold asks for them
    return w.zeros


def _fast_positions() -> Tensor:
    """Where gemv_fast stores each of 32 neighbouring codes: int64 [32].

    It splits them into four runs of eight, deals pairs from each run in turn (0 1 8 9 16 17 24 25 2 3 ...), then puts
    every eight of those in the order 0 2 4 6 1 3 5 7.
    """
    dealt = torch.arange(32).reshape(4, 4, 2).transpose(0, 1).reshape(4, 8)
    return dealt[:, _ORDER].reshape(32).argsort()


def _multiple(size: int) -> int:
    """Words to which gemv pads its zero points, 0 for group sizes that it does not have."""
    return 1 if size >= 128 else {64: 2, 32: 4}.get(size, 0)


def _width(k: int, size: int) -> int:
    words = -(-(k // size) // 8)
    return -(-words // _multiple(size)) * _multiple(size)


def _zeros_width(source: Source, module: str, k: int, group_size: int) -> int:
    size = k if group_size == PER_CHANNEL else group_size
    if not _multiple(size):
        raise FormatError(f"{source.path}: module {shown(module)}: gemv has no group size {size}")
    return _width(k, size)


def _configured_group_size(source: Source, config: Json) -> int:
    width = "bits" if "bits" in config else "w_bit"
    if stored.integer(source, config, width, 4) != 4:
        raise Unsupported(f"{source.path}: AWQ of {stored.integer(source, config, width)} bits is not read; 4 bits are")
    return stored.group_size(source, config, "group_size" if "group_size" in config else "q_group_size", 128)


def _version(source: Source) -> str:
    found = stored.text(source, stored.quantization_config(source), "version", "gemm").lower()
    if found not in (*_KERNELS_OF_GEMM, "gemv", "gemv_fast"):
        raise Unsupported(f"{source.path}: AWQ version {shown(found, 40)} is not read; gemm, gemv and gemv_fast are")
    return found
