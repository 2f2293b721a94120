"""Real GGUF files: dequantized numbers against transformers, exact moves, refusals and what requantizing costs.

They run where TRANSLOAD_TEST_MODELS names a folder with the files (ci/models.py fetches them).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import transload
from transload.errors import CannotHold

pytestmark = pytest.mark.model
QWEN, SMOL = "qwen2.5-coder-0.5b-instruct.gguf", "SmolLM2-135M-Instruct.Q4_1.gguf"


def model(file: str) -> Path:
    folder = os.environ.get("TRANSLOAD_TEST_MODELS")
    if not folder or not (Path(folder) / file).is_file():
        pytest.skip(f"no {file}: set TRANSLOAD_TEST_MODELS to a folder that has it")
    return Path(folder) / file


@pytest.mark.parametrize("file", [SMOL, QWEN])
def test_every_dequantized_tensor_is_transformers(file: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = model(file)
    assert transload.port(source, tmp_path / "fp32", "fp32").exact
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=file, dtype=torch.float32)
    theirs = loaded.state_dict()
    ours = transload.open(tmp_path / "fp32")
    tied = {"lm_head.weight"} if ours.config["tie_word_embeddings"] else set()
    assert set(ours.entries) == theirs.keys() - tied
    for name, entry in ours.entries.items():
        assert torch.equal(ours.read(entry), theirs[name]), name


def test_qwens_blocks_move_exactly_where_the_format_has_a_place_for_them(tmp_path: Path) -> None:
    source = model(QWEN)
    with pytest.raises(CannotHold, match=r"cannot take 12 of 170 .*no float minimum per group \(12 x .*down_proj"):
        transload.port(source, tmp_path / "ct", "compressed-tensors")
    report = transload.port(source, tmp_path / "ct", "compressed-tensors", requantize="int8-g32")
    moved = {(m.source, m.target, m.action) for m in report.modules}
    assert moved == {
        ("int5 g32 sym fp16", "int8 g32 sym fp16", "repack"),
        ("int8 g32 sym fp16", "int8 g32 sym fp16", "repack"),
        ("int6 g16 sym fp32", "int8 g16 sym fp32", "repack"),
        ("int5 g32 sym fp16", "float32", "dequantize"),
        ("int4 g32 mins fp32", "int8 g32 sym fp16", "requantize"),
    }
    changed = [m for m in report.modules if m.difference is not None]
    assert len(changed) == 12
    assert all(m.difference is not None and m.difference.sqnr_db > 43 for m in changed)
    differing = {d.name for d in transload.verify(source, tmp_path / "ct").differing}
    assert differing == {f"{m.name}.weight" for m in changed}


def test_smollms_blocks_with_minimums_are_refused_and_requantized_on_request(tmp_path: Path) -> None:
    source = model(SMOL)
    with pytest.raises(CannotHold, match=r"cannot take 210 of 211 .*--requantize int8-g32"):
        transload.port(source, tmp_path / "ct", "compressed-tensors")
    report = transload.port(source, tmp_path / "ct", "compressed-tensors", requantize="int8-g32", floats="bf16")
    requantized = [m for m in report.modules if m.action == "requantize"]
    assert len(requantized) == 210
    assert min(m.difference.sqnr_db for m in requantized if m.difference) > 40
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= set(report.files)
