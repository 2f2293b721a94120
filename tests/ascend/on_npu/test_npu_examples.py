"""The examples, as a user runs them, on a tiny GPTQ checkpoint of a mixture of experts."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from npu_under_test import NPU
from tiny_moe import make

import transload
from transload import hal
from transload.runtime import TransloadConfig

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture(scope="module")
def gptq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    make("qwen3-moe", folder / "float")
    config = TransloadConfig(bits=4, group_size=32)
    transload.load(folder / "float", device="cpu", quantize=config).save_pretrained(folder / "quantized")
    for file in (folder / "float").glob("token*"):
        (folder / "quantized" / file.name).write_bytes(file.read_bytes())
    transload.port(folder / "quantized", folder / "gptq", to="gptq")
    return folder / "gptq"


def _example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_gptq_checkpoint_runs_with_its_own_numbers(
    gptq: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(hal.backends(), "ascend", NPU.backend)  # type: ignore[arg-type]
    _example("ascend_run").main([str(gptq), "--tokens", "4"])
    shown = capsys.readouterr().out
    assert "kernel ascend-w4a16, runs W4A16" in shown
    assert "kernel ascend-grouped-w4a16, runs W4A16" in shown


def test_a_gptq_checkpoint_moves_to_vllm_ascend_only_when_asked_to_change(
    gptq: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port = _example("ascend_port").main
    assert port([str(gptq), str(tmp_path / "out")]) == 1
    assert "int8-channel-a8" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert port([str(gptq), str(tmp_path / "out"), "--requantize", "int8-channel-a8"]) == 0
    assert "changed" in capsys.readouterr().out
    assert (tmp_path / "out" / "quant_model_description.json").exists()
