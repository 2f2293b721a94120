"""Float checkpoints: nothing to decode. As a target it is the dequantized model in one float dtype."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from transload.errors import FormatError
from transload.formats.base import Entry, Format, Source
from transload.headers import TensorInfo
from transload.headers.info import shown
from transload.quant import QTensor, QuantSpec

# Files that say how weights are quantized where config.json does not.
_QUANT_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json", "quant_model_description.json")
_PACKED = ("U8", "I8", "I16", "I32", "U32", "F4", "F6_E2M3", "F6_E3M2", "F8_E4M3", "F8_E5M2")


class Plain(Format):
    """F32, F16 and BF16 checkpoints in safetensors.

    dtype: what `encode` rounds dequantized weights to. A float32 target holds every product of this library exactly as
    `QTensor.dequantize` computes it; float16 and bfloat16 round, which the caller reports.
    """

    name: ClassVar[str] = "plain"

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype = dtype

    def detects(self, source: Source) -> bool:
        """True when nothing declares a quantization."""
        return source.container == "safetensors" and declared_quantization(source) is None

    def entries(self, source: Source) -> dict[str, Entry]:
        """Every stored tensor as a float entry. Raises FormatError for weights that look packed."""
        for info in source.infos.values():
            if _looks_packed(info):
                raise FormatError(
                    f"{info.file}: tensor {shown(info.name)} is {info.dtype} {info.shape}, which looks quantized, "
                    "but no quantization_config says how: is config.json missing?"
                )
        return {name: float_entry(info) for name, info in source.infos.items()}

    def decode(self, source: Source, entry: Entry) -> QTensor:
        """Never possible: float checkpoints have no quantized entries."""
        raise FormatError(f"{source.path}: {shown(entry.name)} is not quantized")

    def cannot_hold(self, spec: QuantSpec, shape: tuple[int, ...]) -> str | None:
        """None: any weight can be dequantized."""
        return None

    def encode(self, name: str, w: QTensor) -> dict[str, Tensor]:
        """`<name>.weight`, dequantized in float32 and rounded once to `dtype`: [..., N, K]."""
        return {f"{name}.weight": w.dequantize(torch.float32).to(self.dtype)}


def float_entry(info: TensorInfo) -> Entry:
    """The entry of a tensor that is stored as it is."""
    return Entry(info.name, None, info.shape, (info.name,), info.nbytes, info.dtype)


def declared_quantization(source: Source) -> str | None:
    """The quantization method that the checkpoint's JSON declares, None where nothing does.

    Looks in config.json (also in text_config, where vision-language models keep it), then at the files with which
    older tools described their layout; a description without a method is named by its file.
    """
    text_config = source.config.get("text_config")
    for config in (source.config, text_config if isinstance(text_config, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            declared = config.get(key)
            if isinstance(declared, dict):
                return str(declared.get("quant_method") or declared.get("quant_type") or key)
    return next((file for file in _QUANT_FILES if source.json(file) is not None), None)


def _looks_packed(info: TensorInfo) -> bool:
    """Small integers or narrow floats in a real matrix: position tables are int64, or have one row."""
    return info.dtype in _PACKED and len(info.shape) >= 2 and min(info.shape[-2:]) > 1
