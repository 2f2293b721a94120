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

import re
from collections.abc import Iterable, Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from transload import bits
from transload.errors import CannotHold, FormatError, Unsupported
from transload.formats import stored
from transload.formats.base import Entry, Format, Json, Source, naming
from transload.formats.limits import integer_limits, weights_only
from transload.formats.rules import commonest, exceptions
from transload.headers.info import shown
from transload.quant import QTensor, QuantSpec, Zero

BITS = (2, 3, 4, 8)
_FILES = ("quantize_config.json", "gptq_config.json")


class _Scheme(NamedTuple):
    bits: int
    group_size: int
    symmetric: bool
    act_order: bool


class Gptq(Format):
    """GPTQ version 1, the default of every tool."""

    name: ClassVar[str] = "gptq"
    offset: ClassVar[int] = 1  # what is subtracted from stored zero points

    def detects(self, source: Source) -> bool:
        """True for quant_method gptq (or a quantize_config.json beside qweights) of this version."""
        return (
            source.container == "safetensors"
            and _is_gptq(source)
            and (_version(source) == "gptq_v2") == (self.offset == 0)
        )

    def entries(self, source: Source) -> dict[str, Entry]:
        """Modules with a qweight, their scheme from the configuration and its `dynamic` overrides."""
        scheme_of = _Schemes(source)
        return stored.with_floats(
            source, [gptq_entry(source, m, scheme_of(m)) for m in stored.modules(source, "qweight")]
        )

    def decode(self, source: Source, entry: Entry) -> QTensor:
        """Codes, scales and zero points, unpacked."""
        return gptq_decode(source, entry, self.offset)

    def cannot_hold(self, spec: QuantSpec, shape: tuple[int, ...]) -> str | None:
        """2, 3, 4 or 8 bits, integer zero points, 16-bit scales and activations; any shape."""
        dtypes = (torch.float16, torch.bfloat16)
        return integer_limits(spec, shape, BITS, (Zero.MIDPOINT, Zero.CODES), dtypes) or weights_only(spec)

    def encode(self, name: str, w: QTensor) -> dict[str, Tensor]:
        """qweight, qzeros, scales and g_idx of one module."""
        b = w.spec.bits
        if w.g_idx is not None and not w.spec.act_order:
            raise CannotHold(f"{name}: has a g_idx, but its spec does not say act-order")
        zeros = w.zeros if w.zeros is not None else torch.full_like(w.scales, w.spec.midpoint, dtype=torch.uint8)
        return {
            f"{name}.qweight": bits.pack(w.codes, b, torch.int32).T.contiguous(),
            f"{name}.qzeros": _shifted(bits.pack(zeros.T.contiguous(), b, torch.int32), b, w.n, -self.offset),
            f"{name}.scales": w.scales.T.contiguous(),
            f"{name}.g_idx": w.group_of_k().to(torch.int32),
        }

    def finish(self, specs: Mapping[str, QuantSpec], floats: Mapping[str, tuple[int, ...]]) -> dict[str, Json]:
        """The quantization_config: the commonest scheme, and a `dynamic` rule for everything that differs."""
        schemes = {m: _Scheme(s.bits, s.group_size, s.zero is Zero.MIDPOINT, s.act_order) for m, s in specs.items()}
        base = commonest(schemes) if schemes else _Scheme(4, 128, True, False)
        fates: dict[str, _Scheme | None] = {**schemes, **{m: None for m in floats if m != "lm_head"}}
        config: Json = {
            "quant_method": "gptq",
            "checkpoint_format": self.name,
            "bits": base.bits,
            "group_size": base.group_size,
            "sym": base.symmetric,
            "desc_act": base.act_order,
            "lm_head": "lm_head" in specs,
            "pack_dtype": "int32",
        }
        rules = {_rule(pattern, fate): _overrides(fate) for pattern, fate in exceptions(fates, base)}
        if rules:
            config["dynamic"] = rules
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
    spec = QuantSpec(b, group_size, zero=zero, scale_dtype=stored.SCALE_DTYPES[scales.dtype], act_order=act_order)
    stored.need(source, scales.name, stored.FLOATS, (spec.groups(k), n), why)
    stored.need(source, f"{module}.qzeros", ("I32",), (spec.groups(k), bits.packed_len(n, b, torch.int32)), why)
    if act_order:
        stored.need(source, f"{module}.g_idx", ("I32",), (k,), "for act-order")
    names = (f"{module}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx"))
    return stored.entry(source, module, spec, (n, k), names)


def gptq_decode(source: Source, entry: Entry, offset: int) -> QTensor:
    """The weight of an entry made by `gptq_entry`; offset is 1 where zero points are stored minus one, else 0."""
    assert entry.spec is not None
    spec, (n, k), module = entry.spec, entry.shape, entry.name
    codes = bits.unpack(source.read(f"{module}.qweight").T.contiguous(), spec.bits, k)
    words = source.read(f"{module}.qzeros")
    with naming(source, entry):
        zeros = bits.unpack(_shifted(words, spec.bits, n, offset), spec.bits, n).T.contiguous()
        if spec.zero is Zero.MIDPOINT:
            _check_symmetric(zeros, words, spec.midpoint)
        scales = source.read(f"{module}.scales").T.contiguous()
        g_idx = _g_idx(source, entry, spec, k)
        return QTensor(spec, codes, scales, zeros if spec.zero is Zero.CODES else None, g_idx=g_idx)


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


def _g_idx(source: Source, entry: Entry, spec: QuantSpec, k: int) -> Tensor | None:
    name = f"{entry.name}.g_idx"
    if name not in source.infos:
        return None
    g_idx = source.read(name)
    size = k if spec.group_size == -1 else spec.group_size
    trivial = torch.arange(k, dtype=torch.int32) // size
    if spec.act_order:
        return g_idx
    if not torch.equal(g_idx, trivial):
        raise FormatError("desc_act is false, but g_idx is not k // group_size; set desc_act to true to use it")
    return None


def _is_gptq(source: Source) -> bool:
    method = stored.method(source)
    bare = not method and "quantization_config" not in source.config and source.json(_FILES[0]) is not None
    return method == "gptq" or (bare and bool(stored.modules(source, "qweight")) and _has_bits(source))


def _has_bits(source: Source) -> bool:
    config = stored.quantization_config(source, *_FILES)
    return "bits" in config and "version" not in config  # AWQ's file of the same name has a version


def _version(source: Source) -> str:
    config = stored.quantization_config(source, *_FILES)
    found = stored.text(source, config, "checkpoint_format") or stored.text(source, config, "format") or "gptq"
    if found not in ("gptq", "gptq_v2"):
        raise Unsupported(f"{source.path}: GPTQ checkpoint_format {shown(found, 40)} is not read; gptq and gptq_v2 are")
    return found


class _Schemes:
    """The scheme of a module: the configuration's, with the first matching `dynamic` rule laid over it."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.config = stored.quantization_config(source, *_FILES)
        self.rules = list(_dynamic(source, self.config))

    def __call__(self, module: str) -> _Scheme:
        config: Mapping[str, object] = self.config
        for pattern, overrides in self.rules:
            if pattern.match(module):
                if overrides is None:
                    name = shown(f"{module}.qweight")
                    raise FormatError(f"{self.source.path}: tensor {name} is stored, but a dynamic rule skips it")
                config = {**config, **overrides}
                break
        source = self.source
        return _Scheme(
            stored.choice(source, config, "bits", BITS),
            stored.group_size(source, config),
            stored.flag(source, config, "sym", True),
            stored.flag(source, config, "desc_act"),
        )


def _dynamic(source: Source, config: Json) -> Iterable[tuple[re.Pattern[str], Mapping[str, object] | None]]:
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise FormatError(f"{source.path}: quantization_config: dynamic is no object of rules")
    for key, overrides in dynamic.items():
        skip, pattern = key.startswith("-:"), re.sub(r"^[-+]:", "", key)
        if not isinstance(overrides, dict) and not skip:
            raise FormatError(f"{source.path}: quantization_config: dynamic rule {shown(key, 80)} has no overrides")
        try:
            yield re.compile(pattern), None if skip else overrides
        except (re.error, RecursionError, OverflowError) as e:
            raise FormatError(f"{source.path}: quantization_config: dynamic rule {shown(key, 80)}: {e}") from e


def _rule(pattern: str, fate: _Scheme | None) -> str:
    return ("-:" if fate is None else "+:") + pattern


def _overrides(fate: _Scheme | None) -> Json:
    if fate is None:
        return {}
    return {"bits": fate.bits, "group_size": fate.group_size, "sym": fate.symmetric, "desc_act": fate.act_order}
