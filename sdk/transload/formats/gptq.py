"""GPTQ, versions 1 and 2: what NVIDIA-side tools (AutoGPTQ, GPTQModel) write, codes packed along K.

    qweight  int32 [ceil(K*b/32), N]    codes low first along K       word 0x37aa7755 = codes 5 5 7 7 10 10 7 3
    qzeros   int32 [G, ceil(N*b/32)]    zero points low first along N
    scales   float [G, N]
    g_idx    int32 [K]                  the group of every k; some writers leave it out when it is k // group_size

Version 1 stores zero points minus one. Its writers subtract on the packed word, so a zero point of 0 borrows from
its neighbour, and a reader has to add to the word, modulo 2**32 (3 bits: on each field, modulo 8). Source: GPTQModel
7.7 `convert_gptq_v1_to_v2_format_module`, checked against its files in tests/golden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from transload import bits
from transload.errors import CannotHold, FormatError
from transload.formats import stored
from transload.formats.base import Entry, Format, Json, Source, naming
from transload.formats.gptq_config import BITS, Schemes, config_of, is_gptq, version
from transload.formats.limits import integer_limits, weights_only
from transload.formats.packed import PackedRows
from transload.headers.info import shown
from transload.quant import PER_CHANNEL, QTensor, QuantSpec, Zero


class Gptq(Format):
    """GPTQ version 1, the default of every tool."""

    name: ClassVar[str] = "gptq"
    offset: ClassVar[int] = 1  # what is subtracted from stored zero points

    def detects(self, source: Source) -> bool:
        """True for quant_method gptq (or a quantize_config.json beside qweights) of this version."""
        return is_gptq(source) and version(source) == self.name

    def entries(self, source: Source) -> dict[str, Entry]:
        """Modules with a qweight, their scheme from the configuration and its `dynamic` overrides."""
        scheme_of = Schemes(source)
        return stored.with_floats(
            source, [gptq_entry(source, m, scheme_of(m)) for m in stored.modules(source, "qweight")]
        )

    def decode(self, source: Source, entry: Entry) -> QTensor:
        """Codes, scales and zero points, unpacked."""
        return gptq_decode(source, entry, self.offset)

    def packed(self, source: Source, entry: Entry) -> PackedRows | None:
        """The words of qweight, transposed."""
        assert entry.spec is not None
        possible = PackedRows.possible(entry.spec, entry.shape[1])
        return gptq_rows(source, entry, self.offset) if possible else None

    def encode_packed(self, name: str, rows: PackedRows) -> dict[str, Tensor] | None:
        """The same words, transposed."""
        return self._tensors(name, rows)

    def cannot_hold(self, spec: QuantSpec, shape: tuple[int, ...]) -> str | None:
        """2, 3, 4 or 8 bits, integer zero points, 16-bit scales and activations; any shape."""
        dtypes = (torch.float16, torch.bfloat16)
        return integer_limits(spec, shape, BITS, (Zero.MIDPOINT, Zero.CODES), dtypes) or weights_only(spec)

    def encode(self, name: str, w: QTensor) -> dict[str, Tensor]:
        """qweight, qzeros, scales and g_idx of one module."""
        if w.g_idx is not None and not w.spec.act_order:
            raise CannotHold(f"{name}: has a g_idx, but its spec does not say act-order")
        words = bits.pack(w.codes, w.spec.bits, torch.int32)
        return self._tensors(name, PackedRows(w.spec, words, w.k, w.scales, w.zeros, w.g_idx))

    def _tensors(self, name: str, rows: PackedRows) -> dict[str, Tensor]:
        b, n, zeros = rows.spec.bits, rows.words.shape[0], rows.zeros
        if zeros is None:
            zeros = torch.full_like(rows.scales, rows.spec.midpoint, dtype=torch.uint8)
        return {
            f"{name}.qweight": rows.words.T.contiguous(),
            f"{name}.qzeros": _shifted(bits.pack(zeros.T.contiguous(), b, torch.int32), b, n, -self.offset),
            f"{name}.scales": rows.scales.T.contiguous(),
            f"{name}.g_idx": rows.group_of_k().to(torch.int32),
        }

    def finish(self, specs: Mapping[str, QuantSpec], floats: Mapping[str, tuple[int, ...]]) -> dict[str, Json]:
        """The quantization_config: the commonest scheme, and a `dynamic` rule for everything that differs."""
        config = config_of(self.name, specs, floats)
        return {"config.json": {"quantization_config": config}, "quantize_config.json": config}


class GptqV2(Gptq):
    """GPTQ version 2: zero points stored as they are."""

    name: ClassVar[str] = "gptq_v2"
    offset: ClassVar[int] = 0


def gptq_entry(source: Source, module: str, scheme: tuple[int, int, bool, bool]) -> Entry:
    """The entry of one module with GPTQ's tensors; scheme is (bits, group_size, symmetric, act_order).

    Raises FormatError when the shapes contradict each other or the scheme.
    """
    b, group_size, symmetric, act_order = scheme
    qweight = stored.nonempty(stored.need(source, f"{module}.qweight", ("I32",), (None, None)))
    words, n = qweight.shape
    k = _in_features(source, module, words, b)
    why = f"for {b} bits, N={n}, K={k}, group_size={group_size}"
    scales = stored.need(source, f"{module}.scales", stored.FLOATS, (None, n), why)
    zero = Zero.MIDPOINT if symmetric else Zero.CODES
    act_order = act_order and _reorders(source, module, k, group_size)
    spec = QuantSpec(b, group_size, zero=zero, scale_dtype=stored.SCALE_DTYPES[scales.dtype], act_order=act_order)
    stored.need(source, scales.name, stored.FLOATS, (spec.groups(k), n), why)
    stored.need(source, f"{module}.qzeros", ("I32",), (spec.groups(k), bits.packed_len(n, b, torch.int32)), why)
    names = (f"{module}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx"))
    return stored.entry(source, module, spec, (n, k), names)


def gptq_decode(source: Source, entry: Entry, offset: int) -> QTensor:
    """The weight of an entry made by `gptq_entry`; offset is 1 where zero points are stored minus one, else 0."""
    with naming(source, entry):
        return gptq_rows(source, entry, offset).unpacked()


def gptq_rows(source: Source, entry: Entry, offset: int) -> PackedRows:
    """The same weight with its codes still in words."""
    assert entry.spec is not None
    spec, (n, k), module = entry.spec, entry.shape, entry.name
    words = source.read(f"{module}.qweight").T.contiguous()
    packed_zeros = source.read(f"{module}.qzeros")
    with naming(source, entry):
        zeros = bits.unpack(_shifted(packed_zeros, spec.bits, n, offset), spec.bits, n).T.contiguous()
        if spec.zero is Zero.MIDPOINT:
            _check_symmetric(zeros, packed_zeros, spec.midpoint)
        scales = source.read(f"{module}.scales").T.contiguous()
        g_idx = _g_idx(source, entry, spec, k)
        return PackedRows(spec, words, k, scales, zeros if spec.zero is Zero.CODES else None, g_idx)


def _in_features(source: Source, module: str, words: int, b: int) -> int:
    """K, which the packed rows round up to a whole word."""
    info = source.infos.get(f"{module}.g_idx")
    if info is None:
        if words * 32 % b:
            name = shown(f"{module}.g_idx")
            raise FormatError(f"{source.path}: tensor {name} is missing: {words} words of {b}-bit codes do not say K")
        return words * 32 // b
    k = stored.nonempty(stored.need(source, info.name, ("I32",), (None,))).shape[0]
    if bits.packed_len(k, b, torch.int32) != words:
        name = shown(f"{module}.qweight")
        raise FormatError(
            f"{info.file}: tensor {name} has {words} rows, but K={k} codes of {b} bits need another number"
        )
    return k


def _shifted(words: Tensor, b: int, n: int, delta: int) -> Tensor:
    """Packed zero points with `delta` (-1, 0, 1) added to each: by word, as the format's writers do; 3 bits by field.

    4 bits, delta -1, zero points 0 7 6 1 8 7 7 9: word 0x97781670 -> 0x8667055f.
    """
    if delta == 0:
        return words
    if b == 3:
        return bits.pack(
            (bits.unpack(words, 3, n).to(torch.int16) + delta).remainder(8).to(torch.uint8), 3, torch.int32
        )
    ones = int(bits.pack(torch.ones(32 // b, dtype=torch.uint8), b, torch.int32))  # one in every field of a word
    wide = words.to(torch.int64) + delta * ones
    return ((wide + 2**31).remainder(2**32) - 2**31).to(torch.int32)


def _check_symmetric(zeros: Tensor, words: Tensor, midpoint: int) -> None:
    """Symmetric files say so twice. Words of all zero bits are accepted: engines ignore them when sym is true."""
    if stored.all_equal(zeros, midpoint) or stored.all_equal(words, 0):
        return
    found = f"{int(zeros.min())}..{int(zeros.max())}"
    raise FormatError(
        f"sym is true, but qzeros hold zero points {found} instead of {midpoint}; set sym to false, or "
        "checkpoint_format to the version that wrote them (gptq, gptq_v2)"
    )


def _reorders(source: Source, module: str, k: int, group_size: int) -> bool:
    """Whether a g_idx really mixes groups: desc_act with static groups leaves them where they are.

    The one tensor that is read before `decode`, because formats without a g_idx take the weight if it does not.
    """
    info = stored.need(source, f"{module}.g_idx", ("I32",), (k,), "for act-order")
    return not torch.equal(source.read(info.name), torch.arange(k, dtype=torch.int32) // group_size)


def _g_idx(source: Source, entry: Entry, spec: QuantSpec, k: int) -> Tensor | None:
    name = f"{entry.name}.g_idx"
    if name not in source.infos:
        return None
    g_idx = source.read(name)
    if spec.act_order:
        return g_idx
    size = k if spec.group_size == PER_CHANNEL else spec.group_size
    if not torch.equal(g_idx, torch.arange(k, dtype=torch.int32) // size):
        raise FormatError("desc_act is false, but g_idx is not k // group_size; set desc_act to true to use it")
    return None
