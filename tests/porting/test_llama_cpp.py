"""llama.cpp loads the files that ports write, and computes what transformers computes.

They run where TRANSLOAD_LLAMA_CPP names a python that has xllamacpp (ci/llama_cpp makes one).
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_model import CASES, Case, build

import transload
from transload.models.gguf_places import WRITTEN

# A tiny model's likeliest token is often half a character, which llama.cpp's server answers with nothing: ask again.
TEXTS = ["The quick brown fox", "def f(x):", "It's 12345", "lazy dog", "你好，世界", "return s", "jumps over", "1 + 2"]
COUNT = 4
# llama.cpp wants heads that fill the width in ChatGLM, as all of its models have them.
_SQUARE = {"attention.key_length": 16, "attention.value_length": 16, "rope.dimension_count": 8}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip

# Runs in llama.cpp's python: the likeliest tokens and their log probabilities, model by model.
SCRIPT = """
import json, sys
import xllamacpp

texts, count = json.loads(sys.argv[1]), int(sys.argv[2])
for path in sys.argv[3:]:
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = path, 128, 1, False
    params.cpuparams.n_threads = 1
    server = xllamacpp.Server(params)
    for i, text in enumerate(texts):
        ask = {"prompt": text, "max_tokens": 1, "temperature": 0, "logprobs": count, "cache_prompt": False}
        answer = server.handle_completions(ask)
        if answer["choices"][0]["logprobs"]:
            break
    found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    print(json.dumps([i, answer["usage"]["prompt_tokens"], found]), flush=True)
    del server
"""


def cases() -> list[tuple[str, Case, str]]:
    """Name, architecture and what the file is made of."""
    found = []
    for case in CASES:
        if case.model_type in WRITTEN:
            if case.arch == "chatglm":
                case = replace(case, config=case.config | {"head_dim": 16}, keys=case.keys | _SQUARE)
            found.append((case.arch, case, "fp32"))
    llama = next(c for c in CASES if c.arch == "llama")
    return [*found, ("llama3", llama, "fp32"), ("llama-blocks", llama, "transload")]


def likeliest(folder: Path, text: str, count: int) -> tuple[int, dict[int, float]]:
    """Prompt length and the best next tokens by transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits[0, -1]
    values, tokens = logits.log_softmax(-1).topk(count)
    return ids.shape[1], dict(zip(tokens.tolist(), values.tolist(), strict=True))


def made(name: str, case: Case, to: str, folder: Path) -> tuple[Path, Path]:
    """A GGUF file that a port wrote, and a float folder with the same numbers."""
    folder.mkdir()
    build(case, folder / "a.gguf")
    transload.port(folder / "a.gguf", folder / "fp32", "fp32")
    if name == "llama3":
        config = json.loads((folder / "fp32" / "config.json").read_text()) | {"rope_scaling": _LLAMA3}
        (folder / "fp32" / "config.json").write_text(json.dumps(config))
    if to != "fp32":
        transload.port(folder / "a.gguf", folder / to, to)
    transload.port(folder / to, folder / "b.gguf", "llama.cpp")
    return folder / "b.gguf", folder / "fp32"


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """What llama.cpp says about every file, and the float folder beside it; one process for all."""
    python = os.environ.get("TRANSLOAD_LLAMA_CPP")
    if not python:
        pytest.skip("no llama.cpp: set TRANSLOAD_LLAMA_CPP to a python with xllamacpp (ci/llama_cpp makes one)")
    root = tmp_path_factory.mktemp("llama_cpp")
    files = {name: made(name, case, to, root / name) for name, case, to in cases()}
    command = [python, "-c", SCRIPT, json.dumps(TEXTS), str(COUNT), *(str(file) for file, _ in files.values())]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    return {name: (line, folder) for (name, (_, folder)), line in zip(files.items(), lines, strict=True)}


@pytest.mark.parametrize("name", [name for name, _, _ in cases()])
def test_llama_cpp_computes_what_transformers_computes(name: str, answers: dict[str, tuple[Any, Path]]) -> None:
    (text, length, found), folder = answers[name]
    meant_length, meant = likeliest(folder, TEXTS[text], 20)
    assert length == meant_length  # the tokenizer cuts the text into as many tokens
    assert len(found) == COUNT
    # llama.cpp multiplies blocks with activations of 8 bits, which moves a logarithm by a few hundredths.
    tolerance = 0.1 if name.endswith("blocks") else 2e-3
    for entry in found:
        assert entry["logprob"] == pytest.approx(meant.get(entry["id"], 0.0), abs=tolerance)
