"""AutoRound, read only: GPTQ's or AWQ's tensors under a configuration of its own.

    packing_format           tensors
    auto_round:auto_gptq     GPTQ's, zero points minus one
    auto_round, *:gptqmodel  GPTQ's, zero points as they are
    auto_round:auto_awq      AWQ gemm's

`extra_config` lays a scheme of its own over single layers, by full name, by the end of it, or by regular expression.
There is rarely a g_idx. Source: AutoRound 0.16.1 `export/export_to_autoround`, checked against its files in
tests/golden.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar

from transload.errors import FormatError, Unsupported
from transload.formats import stored
from transload.formats.awq import awq_decode, awq_entry
from transload.formats.base import Entry, Format, Json, Source
from transload.formats.gptq import gptq_decode, gptq_entry
from transload.formats.gptq_config import BITS
from transload.headers.info import shown
from transload.quant import QTensor

_METHODS = ("auto-round", "intel/auto-round", "auto_round")
_REGEX = frozenset("*+?^$()[]{}|\\")


class AutoRound(Format):
    """What AutoRound exports under its own name."""

    name: ClassVar[str] = "auto-round"

    def detects(self, source: Source) -> bool:
        """True for AutoRound's quant_method."""
        return stored.method(source) in _METHODS

    def entries(self, source: Source) -> dict[str, Entry]:
        """Modules with a qweight, their scheme from the configuration and its extra_config."""
        _check_readable(source)
        awq = _packing(source) == "awq"
        found = []
        for module in stored.modules(source, "qweight"):
            config = _layer_config(source, module)
            size = stored.group_size(source, config, default=128)
            if awq:
                if stored.integer(source, config, "bits", 4) != 4:
                    raise FormatError(f"{source.path}: module {shown(module)}: AWQ's layout holds 4 bits only")
                found.append(awq_entry(source, module, size))
            else:
                scheme = (
                    stored.choice(source, config, "bits", BITS),
                    size,
                    stored.flag(source, config, "sym", True),
                    False,
                )
                found.append(gptq_entry(source, module, scheme))
        return stored.with_floats(source, found)

    def decode(self, source: Source, entry: Entry) -> QTensor:
        """Codes, scales and zero points, unpacked."""
        packing = _packing(source)
        return (
            awq_decode(source, entry) if packing == "awq" else gptq_decode(source, entry, 1 if packing == "gptq" else 0)
        )


def _packing(source: Source) -> str:
    """The layout: awq, gptq (zero points minus one) or gptq_v2."""
    value = stored.text(source, stored.quantization_config(source), "packing_format", "auto_round").lower()
    if "awq" in value:
        return "awq"
    return "gptq" if "gptq" in value and "gptqmodel" not in value else "gptq_v2"


def _check_readable(source: Source) -> None:
    config = stored.quantization_config(source)
    packing = stored.text(source, config, "packing_format", "auto_round").lower()
    kind = stored.text(source, config, "data_type", "int").lower()
    if "fp8" in packing or "llm_compressor" in packing or not kind.startswith("int"):
        raise Unsupported(
            f"{source.path}: AutoRound packing_format {shown(packing, 40)} of data_type {shown(kind, 40)} is not read; "
            "auto_gptq, gptqmodel, auto_round and auto_awq of integers are"
        )
    if isinstance(config.get("act_bits"), int) and config["act_bits"] != 16:
        raise Unsupported(f"{source.path}: AutoRound with {config['act_bits']}-bit activations is not read")


def _layer_config(source: Source, module: str) -> Mapping[str, object]:
    """The configuration of one layer: the model's, with the first matching extra_config laid over it."""
    config: Json = stored.quantization_config(source)
    extra = config.get("extra_config") or {}
    if not isinstance(extra, dict):
        raise FormatError(f"{source.path}: quantization_config: extra_config is no object of layers")
    found = extra.get(module)
    if found is None:
        found = next((value for key, value in extra.items() if _matches(source, key, module)), {})
    if not isinstance(found, dict):
        raise FormatError(f"{source.path}: quantization_config: extra_config of {shown(module)} is {shown(found, 60)}")
    return {**config, **{key: value for key, value in found.items() if value is not None}}


def _matches(source: Source, key: str, module: str) -> bool:
    if not _REGEX & set(key):
        return module.endswith(f".{key}")
    try:
        return re.search(key, module) is not None
    except (re.error, RecursionError, OverflowError) as e:
        raise FormatError(f"{source.path}: quantization_config: extra_config {shown(key, 80)}: {e}") from e
