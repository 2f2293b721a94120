"""Real models from real GGUF files: the same words as float weights, and the memory that a run may take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

import transload
from transload.runtime import Generation, generate, report, tokenizer
from transload.runtime.generation import encode

MODELS = os.environ.get("TRANSLOAD_TEST_MODELS")
QWEN = "qwen2.5-coder-0.5b-instruct.gguf"
SMOL = "SmolLM2-135M-Instruct.Q4_1.gguf"

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(not MODELS, reason="TRANSLOAD_TEST_MODELS names no folder of models (see ci/models.py)"),
]

PROMPTS = (
    ("Write a Python function that checks whether a number is prime.", True),
    ("What is the capital of France, and what is it known for?", True),
    ("用中文解释什么是快速排序。", True),
    ("Explain the difference between a list and a tuple in Python.", True),
    ("def fibonacci(n):", False),
    ("Translate to German: The weather is beautiful today.", True),
)
NEAR_TIE = 1e-3  # of logits: below it the order of summation decides which token wins


@pytest.fixture(scope="module", params=[QWEN, SMOL])
def path(request: pytest.FixtureRequest) -> Path:
    file = Path(MODELS or "") / request.param
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    return file


@pytest.fixture(scope="module")
def exact(path: Path) -> PreTrainedModel:
    """transformers' own model on its own dequantized weights, float32."""
    newer = hasattr(transformers, "GgufConfig")  # keeps GGUF blocks unless told; before, floats were the only way
    recipe = {"quantization_config": transformers.GgufConfig(dequantize=True)} if newer else {}
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32, **recipe).eval()


@pytest.fixture(scope="module")
def ours(path: Path) -> PreTrainedModel:
    return transload.load(path, device="cpu", scheme="w4a16")


def gap_where_they_part(
    model: PreTrainedModel, words: object, prompt: str, chat: bool, answers: list[Generation]
) -> float:
    """The distance of the two best logits at the first token that differs."""
    shared = 0
    for a, b in zip(answers[0].tokens, answers[1].tokens, strict=False):
        if a != b:
            break
        shared += 1
    ids = torch.cat([encode(words, prompt, chat), torch.tensor([answers[0].tokens[:shared]], dtype=torch.int64)], dim=1)
    with torch.no_grad():
        best = model(ids).logits[0, -1].float().topk(2).values
    return float(best[0] - best[1])


def test_greedy_words_are_those_of_the_dequantized_weights(
    path: Path, ours: PreTrainedModel, exact: PreTrainedModel
) -> None:
    words = tokenizer(path)
    for prompt, chat in PROMPTS:
        answers = [generate(m, prompt, 60, chat=chat, tokenizer=words) for m in (ours, exact)]
        if answers[0].tokens != answers[1].tokens:
            gap = gap_where_they_part(exact, words, prompt, chat, answers)
            assert gap < NEAR_TIE, f"{prompt!r}: {answers[0].text!r} is not {answers[1].text!r}"


def test_int8_activations_stay_fluent(path: Path) -> None:
    model = transload.load(path, device="cpu", scheme="w4a8")
    assert {m.executed[-2:] for m in report(model).modules if m.kind == "linear"} == {"A8"}
    assert "4" in generate(model, "What is 2+2?", 40).text


# VmHWM is this process's own peak; ru_maxrss would begin with that of the process that started it.
RUN = """
import sys
from transload.cli import app
try:
    app(["run", sys.argv[1], "--prompt", "What is the capital of France?", "--max-new-tokens", "20", "--json"])
except SystemExit as e:
    assert not e.code
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")), file=sys.stderr)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak memory of a process is read from /proc")
def test_a_run_stays_below_thirteen_tenths_of_the_file_and_a_gigabyte(path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", RUN, str(path)], capture_output=True, text=True, check=True)
    assert "Paris" in json.loads(done.stdout)["text"]
    peak = int(done.stderr.split()[-1]) * 1024
    assert peak < 1.3 * path.stat().st_size + 1e9
