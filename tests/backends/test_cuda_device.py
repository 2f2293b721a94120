"""Finding NVIDIA GPUs, with a false nvidia-smi and a false torch.cuda: what is missing is said in one sentence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from transload_cuda import device
from transload_cuda.backend import backend

MIB = 1 << 20
TWO = "GPU-aa11, NVIDIA H200, 143771, 143240\nGPU-bb22, NVIDIA H200, 143771, 1024\n"


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the whole PATH; `say` puts an nvidia-smi there."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def say(folder: Path, text: str, code: int = 0) -> None:
    (folder / "answer").write_text(text)
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nwhile IFS= read -r line; do echo \"$line\"; done < '{folder}/answer'\nexit {code}\n")
    tool.chmod(0o755)


def torch_is(monkeypatch: pytest.MonkeyPatch, build: str | None, count: int = 0, error: str = "") -> None:
    """torch as a CPU build (None) or a CUDA build that sees `count` GPUs."""
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    def init() -> None:
        if error:
            raise RuntimeError(error)

    monkeypatch.setattr(torch.cuda, "init", init)


def test_without_a_driver_that_is_the_reason(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_is(monkeypatch, None)
    reason = backend.unavailable()
    assert reason is not None
    assert "no NVIDIA driver" in reason
    assert "--gpus all" in reason
    assert backend.devices() == ()


def test_a_cpu_build_of_torch_is_the_reason_when_there_are_gpus(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    say(smi, TWO)
    torch_is(monkeypatch, None)
    reason = str(backend.unavailable())
    assert reason.startswith("2 x NVIDIA H200 here, but torch")
    assert "not a CUDA build" in reason


@pytest.mark.parametrize("value", ["", "-1"])
def test_gpus_hidden_by_the_environment_are_named(value: str, smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    say(smi, TWO)
    torch_is(monkeypatch, "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert f"CUDA_VISIBLE_DEVICES={value!r} hides them" in str(backend.unavailable())


def test_torchs_own_error_is_shown(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    say(smi, TWO)
    torch_is(monkeypatch, "13.0", error="The NVIDIA driver on your system is too old (found version 12020).\nmore")
    reason = str(backend.unavailable())
    assert reason.endswith("The NVIDIA driver on your system is too old (found version 12020).")
    torch_is(monkeypatch, "13.0")
    assert "sees no device" in str(backend.unavailable())


@pytest.mark.parametrize(("text", "code"), [("", 0), (TWO, 9), ("No devices were found\n", 6)])
def test_a_driver_without_gpus_is_the_reason(text: str, code: int, smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    say(smi, text, code)
    torch_is(monkeypatch, None)
    assert "lists no GPU" in str(backend.unavailable())


def test_devices_are_in_torchs_order_with_the_drivers_free_memory(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    say(smi, TWO)
    torch_is(monkeypatch, "13.0", count=2)
    facts = {
        0: SimpleNamespace(name="NVIDIA H200", uuid="bb22", major=9, minor=0, total_memory=140 << 30),
        1: SimpleNamespace(name="NVIDIA H200", uuid="aa11", major=9, minor=0, total_memory=140 << 30),
    }
    monkeypatch.setattr(torch.cuda, "get_device_properties", facts.__getitem__)
    first, second = backend.devices()
    assert (first.backend, first.index, first.model, first.arch) == ("cuda", 0, "NVIDIA H200", "sm_90")
    assert (first.memory, first.free, second.free) == (140 << 30, 1024 * MIB, 143240 * MIB)
    assert str(backend.torch_device(second)) == "cuda:1"
    assert backend.unavailable() is None


def test_torch_is_asked_for_free_memory_where_the_driver_does_not_say(
    smi: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(smi, "GPU-aa11, NVIDIA GB10, [N/A], [N/A]\n")
    torch_is(monkeypatch, "13.0", count=1)
    facts = SimpleNamespace(name="NVIDIA GB10", uuid="aa11", major=12, minor=1, total_memory=120 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (7 << 30, 120 << 30))
    (only,) = backend.devices()
    assert (only.arch, only.free) == ("sm_121", 7 << 30)


def test_lines_of_another_shape_are_passed_over() -> None:
    assert device.parse("\nwarning: something\n" + TWO + "a,b\n") == device.parse(TWO)


def test_serving_is_vllm() -> None:
    assert backend.serving.engine == "vllm"
    assert backend.serving.visible_devices == "CUDA_VISIBLE_DEVICES"
    assert {"gptq", "awq", "compressed-tensors"} <= set(backend.serving.formats)
    assert not {"gguf", "bitsandbytes"} & set(backend.serving.formats)


def test_importing_the_backend_starts_nothing() -> None:
    code = "import sys, torch, transload_cuda; print(torch.cuda.is_initialized(), 'triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
