"""Schemes as the checkpoint's headers show them: which tensors a module has, their dtypes and shapes.

Headers beat the config: a module is what lies in the file. Shapes are held against the config's dimensions, so that a
config of another model, or a half-written checkpoint, is found before anything is planned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transload.errors import FormatError
from transload.headers import TensorInfo
from transload.models.info import ModelInfo
from transload.plan.modules import Module, layer_modules
from transload.plan.schemes import (
    BF16,
    FP8_CHANNEL,
    FP32,
    MXFP4,
    NVFP4,
    Scheme,
    blocks,
    fp8_block,
    integer,
    integer_act,
)

_FLOATS = {"BF16": BF16, "F16": BF16, "F32": FP32}
# GGUF block types: values in a block, bytes of a block (ggml-common.h).
_GGUF = {
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34), "Q2_K": (256, 84),
    "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210), "IQ4_NL": (32, 18),
    "IQ4_XS": (256, 136), "MXFP4": (32, 17),
}  # fmt: skip
_SUFFIXES = (
    "weight", "qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_zero_point",
    "weight_shape", "weight_g_idx", "weight_scale_inv", "weight_offset", "weight_scale_second", "weight_offset_second",
    "scale_bias", "weight_global_scale", "weight_scale_2", "bias", "input_scale", "e_score_correction_bias",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Stored:
    """What headers say: module name -> scheme, and bytes of tensors that no module of the model explains."""

    schemes: Mapping[str, Scheme]
    other_bytes: int
    other: tuple[str, ...]


def read_stored(headers: Mapping[str, TensorInfo], info: ModelInfo, description: Mapping[str, object]) -> Stored:
    """Schemes of all modules in the headers. description is quant_model_description.json, empty when there is none.

    Raises FormatError naming the tensor whose shape contradicts the config, or the module that is missing.
    """
    modules = _by_module(headers)
    schemes = {}
    ordered = (info.quantization or {}).get("desc_act") is True  # files have a g_idx without it as well
    inputs = {
        f"{info.names.layers}.{i}.{m.name}".replace("{e}", "0"): m.k
        for i in range(info.layers)
        for m in layer_modules(info, i)
    }
    for name, tensors in modules.items():
        scheme = _scheme(name, tensors, description, inputs.get(name))
        if scheme is not None and ordered and "g_idx" in tensors and scheme.grouped:
            scheme = integer(scheme.bits, scheme.group, scheme.zeros > 0, act_order=True)
        if scheme is not None:
            schemes[name] = scheme
    _check(info, modules)
    other = [t for t in headers.values() if _unexplained(t.name, info)]
    return Stored(schemes, sum(t.nbytes for t in other), tuple(t.name for t in other[:3]))


def gguf_scheme(dtype: str) -> Scheme:
    """The scheme of a GGUF type. Raises FormatError for types that are not known."""
    if dtype in _FLOATS:
        return _FLOATS[dtype]
    if dtype not in _GGUF:
        raise FormatError(f"GGUF type {dtype} is not known to the planner; known are {', '.join(_GGUF)}")
    return blocks(dtype, *_GGUF[dtype])


def _by_module(headers: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    out: dict[str, dict[str, TensorInfo]] = {}
    for name, tensor in headers.items():
        module, _, suffix = name.rpartition(".")
        if suffix in _SUFFIXES:
            out.setdefault(module, {})[suffix] = tensor
    return out


def _scheme(name: str, t: Mapping[str, TensorInfo], description: Mapping[str, object], k: int | None) -> Scheme | None:
    if "qweight" in t and "scales" in t:
        return _packed(t)
    if "weight_packed" in t:
        return _compressed(t, k)
    weight = t.get("weight")
    if weight is None:
        return None
    if weight.dtype in _FLOATS:
        return _FLOATS[weight.dtype]
    if weight.dtype.startswith("F8"):
        return _fp8(t)
    if weight.dtype == "I8":
        return _int8(name, t, description)
    return blocks("nf4", 64, 36) if weight.dtype == "U8" else None


def _packed(t: Mapping[str, TensorInfo]) -> Scheme:
    """GPTQ packs along K ([K / 8, N] for 4 bits), AWQ along N; both scales are [G, N]."""
    words, scales = t["qweight"].shape, t["scales"].shape
    if words[-1] == scales[-1]:
        zeros = t.get("qzeros")
        bits = 32 * zeros.shape[-1] // scales[-1] if zeros is not None and scales[-1] else 4
        k = words[0] * 32 // max(bits, 1)
        return integer(bits, _group(k, scales[0]))
    return integer(4, _group(words[0], scales[0]), asymmetric=True)


def _compressed(t: Mapping[str, TensorInfo], k: int | None) -> Scheme:
    """k: inputs by the config, None for modules that it does not describe."""
    packed, scale = t["weight_packed"], t.get("weight_scale")
    if scale is None:
        raise FormatError(f"{packed.file}: {packed.name} has no weight_scale beside it")
    if packed.dtype == "U8":
        return NVFP4 if scale.dtype.startswith("F8_E4M3") else MXFP4
    k = packed.shape[-1] * 8 if k is None else k
    fitting = [b for b in (4, 8, 2, 3, 5, 6, 7) if packed.shape[-1] in (-(-k * b // 32), -(-k // (32 // b)))]
    if not fitting:
        raise FormatError(
            f"{packed.file}: {packed.name} has {packed.shape[-1]} words a row, which are {k} inputs of the config at "
            "no width from 2 to 8 bits"
        )
    return integer(fitting[0], _group(k, scale.shape[-1]), "weight_zero_point" in t, "weight_g_idx" in t)


def _fp8(t: Mapping[str, TensorInfo]) -> Scheme:
    scale, weight = t.get("weight_scale_inv") or t.get("weight_scale"), t["weight"]
    if scale is None or len(scale.shape) < 2 or scale.shape[-1] <= 1:
        return FP8_CHANNEL
    return fp8_block(-(-weight.shape[0] // scale.shape[0]), -(-weight.shape[1] // scale.shape[1]))


def _int8(name: str, t: Mapping[str, TensorInfo], description: Mapping[str, object]) -> Scheme:
    kind = str(description.get(f"{name}.weight", ""))
    bits = 4 if kind.startswith("W4") or "scale_bias" in t or "weight_scale_second" in t else 8
    second = t.get("weight_scale_second")
    group = _group(t["weight"].shape[-1], second.shape[-1]) if second is not None else -1
    return integer(bits, group) if kind.endswith("A16") else integer_act(bits, group)


def _group(k: int, groups: int) -> int:
    return -1 if groups <= 1 else -(-k // groups)


def _check(info: ModelInfo, modules: Mapping[str, Mapping[str, TensorInfo]]) -> None:
    """Compares every module of every layer with the config; layers that lie in the file have all of their modules.

    Modules that a checkpoint may store fused (experts in one tensor, qkv in one) are asked for only where one of their
    kind lies beside them under the config's names.
    """
    for i in range(info.layers):
        prefix = f"{info.names.layers}.{i}."
        asked = [m for m in layer_modules(info, i) if m.name and m.k > 1]
        found = {m.name: modules.get(prefix + m.name.replace("{e}", "0")) for m in asked}
        for module in asked:
            if (tensors := found[module.name]) is not None:
                _check_shape(module, tensors)
            elif any(found[m.name] is not None for m in asked if _siblings(m, module)):
                name = prefix + module.name.replace("{e}", "0")
                raise FormatError(f"{name} is missing from the checkpoint, which has its neighbours; is it complete?")


def _siblings(a: Module, b: Module) -> bool:
    """Modules of one parent (self_attn, mlp), none of which is a router."""
    return a.quantizable and b.quantizable and a.name.rpartition(".")[0] == b.name.rpartition(".")[0]


def _check_shape(module: Module, t: Mapping[str, TensorInfo]) -> None:
    """The values that a stored tensor holds: N x K of the config, whatever the packing."""
    for suffix, read in _EXTENTS.items():
        stored = t.get(suffix)
        if stored is None or len(stored.shape) != 2 or (suffix == "weight" and stored.dtype == "U8"):
            continue
        holds = read(stored.shape, t)
        if holds is not None and holds != (module.n, module.k):
            shape = tuple(stored.shape)
            means = "" if holds == shape else f", which holds {holds}"
            raise FormatError(
                f"{stored.file}: {stored.name} is {shape}{means}, the config says ({module.n}, {module.k})"
            )


def _packed_words(shape: Sequence[int], t: Mapping[str, TensorInfo]) -> tuple[int, int] | None:
    """(N, K) of GPTQ's [K x bits / 32, N] or AWQ's [K, N x 4 / 32] words, told apart as `_packed` does."""
    scales = t.get("scales")
    if scales is None or len(scales.shape) != 2:
        return None
    if shape[-1] == scales.shape[-1]:
        bits = _packed(t).bits
        return shape[-1], shape[0] * 32 // bits
    return shape[-1] * 8, shape[0]


def _compressed_words(shape: Sequence[int], t: Mapping[str, TensorInfo]) -> tuple[int, int] | None:
    """(N, K) of two FP4 codes a byte. Words of 32 bits hold any width, which `_compressed` tells by K."""
    return (shape[0], shape[1] * 2) if t["weight_packed"].dtype == "U8" else None


def _plain(shape: Sequence[int], t: Mapping[str, TensorInfo]) -> tuple[int, int] | None:
    """(N, K) of a weight with a number an element; msModelSlim packs two rows of int4 into one of int8."""
    return None if t["weight"].dtype == "I8" and "scale_bias" in t else (shape[0], shape[1])


_EXTENTS = {"weight": _plain, "qweight": _packed_words, "weight_packed": _compressed_words}


def _unexplained(name: str, info: ModelInfo) -> bool:
    """True for tensors outside the language model's own names, when no vision tower accounts for them."""
    roots = (info.names.layers, info.names.embed, info.names.norm, info.names.head)
    if any(name.startswith(root) for root in roots) or info.vision is not None:
        return False
    return not name.startswith(("model.layers.", "mtp.", "blk.", "token_embd", "output"))
