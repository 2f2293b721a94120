"""msModelSlim: the checkpoints of Huawei's quantizer, which vllm-ascend loads with `--quantization ascend`.

quant_model_description.json gives every stored tensor a type; the tensors of one linear share it. N = out, K = in:

    W8A8_DYNAMIC  weight int8 [N, K]                  weight_scale, weight_offset f32 [N, 1]
    W4A8_DYNAMIC  weight int8 [N/2, K] packed along N weight_scale, weight_offset f32 [N, 1]  scale_bias f32 [N, 1 | 16]
      per group   the same, and weight_scale_second f32, weight_offset_second int64 [N, K/g]: scale = first * second
    W4A16         weight int8 [N/2, K], or [N, K/2] per channel        weight_scale, weight_offset f32 [N, K/g]
    W8A16         weight int8 [N, K]                                   weight_scale, weight_offset f32 [N, K/g]
    W8A8          weight int8 [N, K]  input_scale, input_offset [1]  quant_bias int32 [N]  deq_scale [N]
                  the older saver, and this one: weight_scale, weight_offset f32 [N, 1] too

w = (q - weight_offset) * scale, and for W8A8 y = (round(x / input_scale + input_offset) @ q.T + quant_bias) * deq_scale
with deq_scale = input_scale * scale, in int64 the bits of a float32 where the model is float16. Files of the older
saver have no `version` and keep one 4-bit code per byte. Per group W4A8 loads in vllm-ascend 0.23 and no later. Source:
msModelSlim 26.1 `modelslim_v1/save/ascendv1.py`, `llm_ptq_tools/save/complex_quantifier.py`, `save/utils/deqscale.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from transload.errors import CannotHold, FormatError
from transload.formats import msmodelslim_layouts as layouts
from transload.formats import stored
from transload.formats.base import Entry, Format, Json, Source, naming
from transload.formats.limits import divided, integer_limits, positional
from transload.formats.msmodelslim_headers import (
    DESCRIPTION,
    PARTS,
    TYPES,
    VERSION,
    description,
    entry_of,
    is_quantized,
    zero_of_weight_only,
)
from transload.headers.info import shown
from transload.quant import PER_CHANNEL, QTensor, QuantSpec, Zero


class MsModelSlim(Format):
    """msModelSlim's ascendV1 files, and the older layouts of its first saver for reading."""

    name: ClassVar[str] = "msmodelslim"

    def detects(self, source: Source) -> bool:
        """True where there is a description file and config.json names no other method."""
        return stored.method(source) in ("", "ascend") and description(source) is not None

    def entries(self, source: Source) -> dict[str, Entry]:
        """Every tensor by the type that the description gives it."""
        types = description(source) or {}
        modules = [m for m in stored.modules(source, "weight") if is_quantized(types, m)]
        zero = zero_of_weight_only(source, modules, types)
        found = [entry_of(source, m, types, zero) for m in modules]
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

    def once_per_file(self, spec: QuantSpec) -> Mapping[str, int]:
        """The description's group_size, 0 for per-channel W4A8; other modules per channel do not look at it."""
        asks = spec.group_size != PER_CHANNEL or _type(spec) == "W4A8_DYNAMIC"
        return {"group size": max(spec.group_size, 0)} if asks else {}

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

    def calibrated(
        self, name: str, scales: Tensor, input_scale: Tensor, bias: Tensor | None, dtype: str
    ) -> dict[str, Tensor]:
        """W8A8's: a symmetric input has offset 0, and the bias is counted in steps of the integer sums."""
        deq = input_scale.float() * scales[:, 0].float()
        steps = torch.zeros_like(deq) if bias is None else (bias.double() / deq.double()).round()
        limits = torch.iinfo(torch.int32)
        parts = {
            "input_scale": input_scale.float(),
            "input_offset": torch.zeros(1),
            "quant_bias": steps.clamp(limits.min, limits.max).to(torch.int32),
            "deq_scale": deq.view(torch.int32).long() if dtype == "float16" else deq,
        }
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
            "model_quant_type": next((t for t in (*TYPES[2:4], *TYPES[:2]) if t in found), "FLOAT"),
            "metadata": {},
            "group_size": _group_size(specs),
            "optional": {},
        }
        return {DESCRIPTION: types | meta}


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
    if act.group_size != PER_CHANNEL:
        return f"it writes activations quantized per token or per tensor, not {act}"
    if act.static and spec.bits != 8:
        return f"its static activations go with weights of 8 bits, not {spec.bits}"
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
    if spec.act is None:
        return f"W{spec.bits}A16"
    return "W8A8" if spec.act.static else f"W{spec.bits}A8_DYNAMIC"


def _written(spec: QuantSpec) -> tuple[str, ...]:
    """The tensors that `encode` and `calibrated` write for a spec."""
    if _type(spec) == "W8A8":
        return (*PARTS[:3], *PARTS[6:])
    if _type(spec) != "W4A8_DYNAMIC":
        return PARTS[:3]
    return PARTS[:6] if spec.group_size != PER_CHANNEL else (*PARTS[:3], "scale_bias")


def _group_size(specs: Mapping[str, QuantSpec]) -> int:
    """The description's group_size: 0 for per-channel W4A8. Raises CannotHold when modules disagree."""
    sizes: dict[int, str] = {}
    for module, spec in specs.items():
        for size in MsModelSlim().once_per_file(spec).values():
            sizes.setdefault(size, module)
    if len(sizes) > 1:
        found = ", ".join(f"{size or 'per channel'} ({module})" for size, module in sorted(sizes.items()))
        raise CannotHold(f"'msmodelslim' has one group size for all 4-bit modules, found {found}")
    return next(iter(sizes), 0)
