"""Whole models through transformers on the CUDA kernels: dense, tied, and mixture of experts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from gpu_under_test import GPU, INTERPRETED

from transload_cpu import backend as cpu

pytest.importorskip("gguf", reason="gguf is not installed; reading checkpoints needs it")

import transload
from transload import hal
from transload.runtime import TransloadConfig
from transload.testing import nmse

sys.path.insert(0, str(Path(__file__).parents[2] / "runtime"))
from tiny_models import make


@pytest.fixture(autouse=True)
def only_this_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device name "cuda" means the backend under test; nothing needs to be installed."""
    found = {"cpu": cpu, "cuda": GPU.backend}
    monkeypatch.setattr(hal, "backends", lambda: found)


@pytest.mark.parametrize(
    ("name", "scheme", "error"),
    [("qwen2-tied", "w4a16", 1e-4), ("qwen3-moe", "w4a16", 1e-4), ("glm4-moe", "w4a8", 1e-3)],
)
def test_a_model_gives_the_logits_of_the_cpu(name: str, scheme: str, error: float, tmp_path: Path) -> None:
    make(name, tmp_path)
    ids = torch.tensor([[3, 1, 41, 5]])
    logits = {}
    for device in ("cpu", "cuda"):
        asked = TransloadConfig(group_size=32, device=device, scheme=scheme if device == "cuda" else "w4a16")
        model = transload.load(tmp_path, quantize=asked, dtype=torch.float32, device=device)
        with torch.no_grad():
            logits[device] = model(ids.to(model.device)).logits.float().cpu()
    kernels = {module.kernel.name for module in model.modules() if hasattr(module, "kernel")}
    assert kernels == {"triton-a8" if scheme == "w4a8" else "triton-a16"}
    assert 0 < nmse(logits["cuda"], logits["cpu"]) < error


def test_a_model_with_experts_is_compiled_as_one_graph(tmp_path: Path) -> None:
    make("qwen3-moe", tmp_path)
    asked = TransloadConfig(group_size=32, device="cuda", scheme="w4a8")
    model = transload.load(tmp_path, quantize=asked, dtype=torch.float32, device="cuda")
    ids = torch.tensor([[3, 1, 41, 5]], device=model.device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager" if INTERPRETED else "inductor")
    with torch.no_grad():
        assert nmse(compiled(ids, use_cache=False).logits.cpu(), model(ids, use_cache=False).logits.cpu()) < 1e-9
    torch._dynamo.reset()
