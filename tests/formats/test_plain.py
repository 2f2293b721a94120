"""Plain checkpoints: what is stored is read; as a target it is the dequantized weight, rounded once."""

from __future__ import annotations

import pytest
import torch
from memory_source import MemorySource, random_weight

from transload.errors import ConfigError, FormatError
from transload.formats import FORMATS, find_format
from transload.formats.plain import Plain, declared_quantization
from transload.quant import QuantSpec, Zero


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_a_target_name_gives_its_dtype(name: str, dtype: torch.dtype) -> None:
    w = random_weight(QuantSpec(4, 32, zero=Zero.MINS, scale_dtype=torch.float16), 3, 64)
    found = find_format(name)
    assert found.cannot_hold(w.spec, (3, 64)) is None
    ((stored, weight),) = found.encode("m", w).items()
    assert stored == "m.weight"
    assert torch.equal(weight, w.dequantize(torch.float32).to(dtype))


def test_every_format_is_found_by_its_name() -> None:
    assert all(find_format(f.name) is f for f in FORMATS)
    assert len({f.name for f in FORMATS}) == len(FORMATS)
    with pytest.raises(ConfigError, match=r"no format 'int3'; there are .*transload.*plain, bf16, fp16, fp32"):
        find_format("int3")


def test_plain_is_asked_last() -> None:
    assert isinstance(FORMATS[-1], Plain)


def test_buffers_of_integers_are_not_taken_for_packed_weights() -> None:
    buffers = {
        "position_ids": torch.zeros(1, 512, dtype=torch.int32),
        "relative_position_index": torch.zeros(9, 9, dtype=torch.int64),
        "mask": torch.zeros(4, 4, dtype=torch.bool),
    }
    entries = Plain().entries(MemorySource(buffers, {}))
    assert {e.dtype for e in entries.values()} == {"I32", "I64", "BOOL"}


def test_nothing_is_decoded_from_plain() -> None:
    source = MemorySource({"a.weight": torch.ones(2, 2)}, {})
    with pytest.raises(FormatError, match=r"'a\.weight' is not quantized"):
        Plain().decode(source, Plain().entries(source)["a.weight"])


@pytest.mark.parametrize(
    ("config", "files", "method"),
    [
        ({}, {}, None),
        ({"quantization_config": None}, {}, None),
        ({"quantization_config": {"quant_method": "awq"}}, {}, "awq"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, {}, "awq"),
        ({}, {"quantize_config.json": {"bits": 4}}, "quantize_config.json"),
    ],
)
def test_declared_quantization(
    config: dict[str, object], files: dict[str, dict[str, object]], method: str | None
) -> None:
    assert declared_quantization(MemorySource({}, config, files)) == method
