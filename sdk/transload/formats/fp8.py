"""FP8 checkpoints, read only: the block-scaled weights of DeepSeek, GLM and Qwen, others per channel or tensor.

    m.weight            float8_e4m3fn [N, K]
    m.weight_scale_inv  [ceil(N/128), ceil(K/128)]  for weight_block_size [128, 128]; w = fp8 * scale, despite the name
    m.weight_scale      [], [1], [N] or [N, 1]      the same without blocks

A scale of a block is repeated for its rows, so that the weight reads as groups along K. Activations are quantized by
the engine as it likes and are no part of the numbers. Source: transformers 5.23 `integrations/finegrained_fp8.py`,
vLLM 0.32 `quantization/fp8.py`.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from transload.errors import FormatError
from transload.formats import stored
from transload.formats.base import Entry, Format, Json, Source, naming
from transload.headers import TensorInfo
from transload.headers.info import shown
from transload.quant import PER_CHANNEL, Grid, QTensor, QuantSpec, Zero

_METHODS = ("fp8", "fbgemm_fp8", "modelopt", "finegrained_fp8")
_SCALES = ("weight_scale_inv", "weight_scale")
_DTYPES = (*stored.FLOATS, "F8_E8M0")


class Fp8(Format):
    """float8_e4m3fn weights with float scales per block, channel or tensor."""

    name: ClassVar[str] = "fp8"

    def detects(self, source: Source) -> bool:
        """True for a method of this family whose weights are float8."""
        if stored.method(source, "hf_quant_config.json") not in ("", *_METHODS):
            return False
        declared = stored.method(source) in _METHODS or source.json("hf_quant_config.json") is not None
        return declared and any(_is_fp8(source, m) for m in stored.modules(source, "weight"))

    def entries(self, source: Source) -> dict[str, Entry]:
        """Modules with a float8 weight, their scales from the tensors beside it."""
        block = _block_size(source)
        found = [_entry(source, m, block) for m in stored.modules(source, "weight") if _is_fp8(source, m)]
        entries = stored.with_floats(source, found)
        for e in entries.values():
            if e.spec is None and e.dtype.startswith("F8_") and len(e.shape) > 1:
                raise FormatError(
                    f"{source.path}: tensor {shown(e.name)} is {e.dtype}, and no scale says what it means"
                )
        return entries

    def decode(self, source: Source, entry: Entry) -> QTensor:
        """Codes are the bytes of the weight; scales are spread to [N, G]."""
        assert entry.spec is not None
        (n, k), spec, module = entry.shape, entry.spec, entry.name
        scale = source.read(_scale_info(source, module).name).to(spec.scale_dtype)
        with naming(source, entry):
            codes = source.read(f"{module}.weight").view(torch.uint8)
            if bool(((codes & 127) == 127).any()):
                raise FormatError("weight contains NaN")
            return QTensor(spec, codes, _spread(scale, n, spec.groups(k), _block_size(source)))


def _is_fp8(source: Source, module: str) -> bool:
    info = source.infos[f"{module}.weight"]
    return info.dtype == "F8_E4M3" and len(info.shape) == 2


def _entry(source: Source, module: str, block: tuple[int, int] | None) -> Entry:
    n, k = stored.nonempty(source.infos[f"{module}.weight"]).shape
    scale = _scale_info(source, module)
    dtype = torch.float32 if scale.dtype == "F8_E8M0" else stored.SCALE_DTYPES[scale.dtype]
    spec = QuantSpec(8, PER_CHANNEL, Grid.E4M3, Zero.NONE, dtype)
    if scale.shape not in ((), (1,), (n,), (n, 1), (1, 1)):
        if block is None:
            raise FormatError(
                f"{scale.file}: tensor {shown(scale.name)} has shape {scale.shape}, expected one scale, or one for "
                f"each of {n} rows: no weight_block_size says that there are blocks"
            )
        expected = (-(-n // block[0]), -(-k // block[1]))
        stored.need(source, scale.name, _DTYPES, expected, f"for N={n}, K={k} in blocks of {block[0]}x{block[1]}")
        spec = QuantSpec(8, PER_CHANNEL if block[1] >= k else block[1], Grid.E4M3, Zero.NONE, dtype)
    names = (f"{module}.{part}" for part in ("weight", *_SCALES, "input_scale"))
    return stored.entry(source, module, spec, (n, k), names)


def _scale_info(source: Source, module: str) -> TensorInfo:
    for part in _SCALES:
        info = source.infos.get(f"{module}.{part}")
        if info is not None and info.dtype in _DTYPES:
            return info
    raise FormatError(
        f"{source.path}: module {shown(module)} has float8 weights, but neither weight_scale_inv nor weight_scale"
    )


def _spread(scale: Tensor, n: int, groups: int, block: tuple[int, int] | None) -> Tensor:
    """One scale, one a row, or one a block, as [N, G]."""
    if scale.numel() in (1, n) and groups == 1:
        return scale.reshape(-1, 1).expand(n, 1).contiguous()
    assert block is not None
    return scale.repeat_interleave(block[0], dim=0)[:n].contiguous()


def _block_size(source: Source) -> tuple[int, int] | None:
    """Rows and columns of a block, None where scales are per channel or tensor."""
    config: Json = stored.quantization_config(source, "hf_quant_config.json")
    value = config.get("weight_block_size")
    if value is None:
        return None
    if isinstance(value, list) and len(value) == 2 and all(type(v) is int and 0 < v < 1 << 20 for v in value):
        return value[0], value[1]
    raise FormatError(
        f"{source.path}: quantization_config: weight_block_size is {shown(value, 60)}, expected two sizes"
    )
