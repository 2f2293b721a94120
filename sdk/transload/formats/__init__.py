"""One file a checkpoint format. The only place that knows a format's private names."""

from __future__ import annotations

import torch

from transload.errors import ConfigError
from transload.formats.autoround import AutoRound
from transload.formats.awq import Awq, AwqGemv, AwqGemvFast
from transload.formats.base import Entry, Format, Json, Source
from transload.formats.bitsandbytes import BitsAndBytes
from transload.formats.compressed_tensors import CompressedTensors
from transload.formats.fp8 import Fp8
from transload.formats.gguf import Gguf
from transload.formats.gptq import Gptq, GptqV2
from transload.formats.hqq import Hqq
from transload.formats.msmodelslim import MsModelSlim
from transload.formats.mx import GptOss, ModelOpt
from transload.formats.neutral import Neutral
from transload.formats.onnx import Onnx
from transload.formats.onnx_qdq import OnnxQdq
from transload.formats.plain import Plain

# The order of detection: formats that say their name first, plain last because it is what declares nothing.
FORMATS: tuple[Format, ...] = (
    Gguf(),
    Onnx(),
    Neutral(),
    CompressedTensors(),
    Gptq(),
    GptqV2(),
    Awq(),
    AwqGemv(),
    AwqGemvFast(),
    AutoRound(),
    BitsAndBytes(),
    Hqq(),
    ModelOpt(),
    Fp8(),
    GptOss(),
    MsModelSlim(),
    Plain(),
)

_PLAIN_TARGETS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# A second way to write what another format reads.
_WRITERS: tuple[Format, ...] = (OnnxQdq(),)


def find_format(name: str) -> Format:
    """The format of a name, to write or to ask: one of FORMATS, "onnx-qdq", or "bf16", "fp16", "fp32" for plain floats.

    Raises ConfigError listing the names.
    """
    if name in _PLAIN_TARGETS:
        return Plain(_PLAIN_TARGETS[name])
    for known in (*_WRITERS, *FORMATS):
        if known.name == name:
            return known
    names = ", ".join([f.name for f in (*_WRITERS, *FORMATS)] + list(_PLAIN_TARGETS))
    raise ConfigError(f"no format '{name}'; there are {names}")


__all__ = ["FORMATS", "Entry", "Format", "Json", "Source", "find_format"]
