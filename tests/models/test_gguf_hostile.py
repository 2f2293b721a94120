"""Metadata that lies: wrong types and absurd numbers are refused by name, never by a traceback from the depths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf_model import CASES, build
from hypothesis import given, settings
from hypothesis import strategies as st

from transload.errors import TransloadError
from transload.headers import read_gguf_header
from transload.models.gguf_assets import tokenizer_files
from transload.models.gguf_config import generation_config, hf_config
from transload.models.gguf_names import parts

JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**63), st.floats(), st.text(max_size=8),
    st.lists(st.integers(0, 5), max_size=3), st.lists(st.text(max_size=3), max_size=3), st.just([]),
)  # fmt: skip


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("gguf")
    found = {}
    for case in CASES:
        build(case, folder / f"{case.arch}.gguf")
        found[case.arch] = read_gguf_header(folder / f"{case.arch}.gguf")
    return found


@pytest.mark.parametrize("arch", ["llama", "qwen3moe", "chatglm", "glm4moe", "glm-dsa"])
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_configs_and_names_of_wrong_metadata(headers: dict[str, Any], arch: str, data: st.DataObject) -> None:
    header = headers[arch]
    metadata = dict(header.metadata)
    keys = [key for key in metadata if not key.startswith("tokenizer.ggml.t") and key != "tokenizer.ggml.merges"]
    for key in data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=3)):
        metadata[key] = data.draw(JUNK)
    try:
        hf_config(metadata, header.tensors)
        generation_config(metadata)
        for name, info in header.tensors.items():
            parts(metadata, name, info.shape)
    except TransloadError as e:
        message = str(e)
    else:
        return
    assert "\n" not in message


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_tokenizers_of_wrong_metadata(headers: dict[str, Any], data: st.DataObject) -> None:
    metadata = dict(headers["qwen2"].metadata)
    keys = [key for key in metadata if key.startswith("tokenizer.")]
    for key in data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=2)):
        metadata[key] = data.draw(JUNK)
    try:
        tokenizer_files(metadata)
    except TransloadError as e:
        message = str(e)
    else:
        return
    assert len(message) < 600


def test_rotary_factors_of_nonsense_are_named(headers: dict[str, Any], tmp_path: Path) -> None:
    header = headers["llama"]
    for factors in ([0.0, 0.0], [float("nan")] * 4, [1.0, -1.0], [1e30] * 8):
        with pytest.raises(TransloadError, match="rope_freqs"):
            hf_config(header.metadata, header.tensors, factors)
