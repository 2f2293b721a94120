"""transload.serve: an engine inside a `with` block, and what it does when the engine misbehaves."""

from __future__ import annotations

import json
import logging
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import transload
from transload.errors import BackendError, ConfigError
from transload.serve.events import Event
from transload.serve.health import healthy
from transload.serve.service import Service

Behave = Callable[..., None]


def ask(service: Service, text: str = "hi") -> str:
    """The answer to one chat."""
    body = json.dumps({"model": service.model, "messages": [{"role": "user", "content": text}]}).encode()
    request = urllib.request.Request(service.base_url + "/chat/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return str(json.load(answer)["choices"][0]["message"]["content"])


def await_running(base_url: str, count: int) -> None:
    """Until the engine works on so many requests at once."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with urllib.request.urlopen(base_url.removesuffix("/v1") + "/load", timeout=10) as answer:
            if json.load(answer)["server_load"] >= count:
                return
        time.sleep(0.02)
    pytest.fail(f"not {count} requests at once")


def make(checkpoint: Path, tmp_path: Path, heard: list[Event] | None = None, **given: object) -> Service:
    options = {"context": 1024, "logs": tmp_path / "logs", "drain": 10.0, **given}
    return transload.serve(checkpoint, on_event=None if heard is None else heard.append, **options)  # type: ignore[operator]


@pytest.mark.usefixtures("engine")
def test_a_service_answers_inside_its_block_and_is_gone_after(
    checkpoint: Path, tmp_path: Path, behave: Behave, start_log: str, caplog: pytest.LogCaptureFixture
) -> None:
    behave(log=start_log)
    caplog.set_level(logging.INFO, "transload.serve")
    heard: list[Event] = []
    with make(checkpoint, tmp_path, heard) as service:
        assert service.model == "tiny-qwen2"
        assert ask(service) == "echo: hi"
        assert service.kv_tokens == 87296
        url = service.base_url.removesuffix("/v1") + "/health"
        assert healthy(url, 5)
    assert not healthy(url, 1)
    kinds = [e.kind for e in heard]
    assert [k for k in dict.fromkeys(kinds) if k in ("starting", "ready", "draining", "stopped")] == [
        "starting", "ready", "draining", "stopped",
    ]  # fmt: skip
    assert "drift" in kinds  # the log's cache is not this model's
    assert any("ready after" in r.message for r in caplog.records)
    assert "KV cache size" in service.logs[0].read_text()


@pytest.mark.usefixtures("engine")
def test_a_cache_as_planned_is_confirmed_and_another_one_reported(
    checkpoint: Path, tmp_path: Path, behave: Behave
) -> None:
    planned = make(checkpoint, tmp_path)._starts[0].kv_tokens
    assert planned == 16 * 1024
    for tokens, kind in ((planned, "cache"), (planned // 2, "drift")):
        behave(log=f"Model loading took 1.5 GiB memory\nGPU KV cache size: {tokens:,} tokens")
        heard: list[Event] = []
        with make(checkpoint, tmp_path, heard):
            pass
        event = next(e for e in heard if e.kind in ("cache", "drift"))
        assert event.kind == kind
        assert event.data["planned"] == planned
        assert (f"plan calibrate {tmp_path}/logs/engine-0.log --platform cpu" in event.text) == (kind == "drift")


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("drains", [True, False], ids=["by the engine", "by waiting"])
def test_stopping_loses_no_running_request(
    checkpoint: Path, tmp_path: Path, behave: Behave, make_engine: Callable[..., Path], drains: bool
) -> None:
    behave(seconds=3.0)
    python = make_engine("0.32.1", drains=drains)
    with ThreadPoolExecutor(8) as pool:
        with make(checkpoint, tmp_path, engine_python=python) as service:
            assert ("--shutdown-timeout" in service._starts[0].argv) == drains
            answers = [pool.submit(ask, service, str(i)) for i in range(8)]
            time.sleep(0.4)  # all of them run, none is done
        assert [a.result() for a in answers] == [f"echo: {i}" for i in range(8)]


@pytest.mark.usefixtures("engine")
def test_an_engine_that_does_not_drain_is_ended_when_asked_twice(
    checkpoint: Path, tmp_path: Path, behave: Behave
) -> None:
    behave(hang=True)
    service = make(checkpoint, tmp_path).start().wait_ready(30)
    service.ask_to_stop()
    assert service.wait(0.5) is None
    service.ask_to_stop()
    assert service.wait(15) == 0


@pytest.mark.usefixtures("engine")
def test_a_failed_start_says_what_to_do(checkpoint: Path, tmp_path: Path, behave: Behave) -> None:
    behave(fail="ERROR 11-22 07:00:00 [x.py:1] torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.")
    heard: list[Event] = []
    words = r"device memory ran out \(2.00 GiB\). Next: .*log: .*engine-0.log"
    with pytest.raises(BackendError, match=words), make(checkpoint, tmp_path, heard):
        pytest.fail("the block must not run")
    failed = next(e for e in heard if e.kind == "failed")
    assert failed.data["failure"] == "out-of-memory"
    assert json.loads(failed.to_json())["next_step"]


@pytest.mark.usefixtures("engine")
def test_an_engine_that_never_answers_is_given_up(checkpoint: Path, tmp_path: Path, behave: Behave) -> None:
    behave(deaf=True)
    with (
        pytest.raises(BackendError, match="did not become healthy in time"),
        make(checkpoint, tmp_path, start_timeout=1.5),
    ):
        pytest.fail("the block must not run")


@pytest.mark.usefixtures("engine")
def test_restarts_until_it_works(checkpoint: Path, tmp_path: Path, behave: Behave, quick: None) -> None:
    behave(fail="OSError: [Errno 98] Address already in use", fail_times=2)
    heard: list[Event] = []
    with make(checkpoint, tmp_path, heard, restarts=3) as service:
        assert ask(service) == "echo: hi"
    assert [e.kind for e in heard if e.kind in ("failed", "restarting", "ready")] == [
        "failed", "restarting", "failed", "restarting", "ready",
    ]  # fmt: skip
    delays = [e.data["delay"] for e in heard if e.kind == "restarting"]
    assert delays == [0.1, 0.2]


@pytest.mark.usefixtures("engine")
def test_restarts_end(checkpoint: Path, tmp_path: Path, behave: Behave, quick: None) -> None:
    behave(fail="boom")
    with pytest.raises(BackendError, match="ended with code 1"), make(checkpoint, tmp_path, restarts=2):
        pytest.fail("the block must not run")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restarts without long delays."""
    from transload.serve.run import Settings

    def settings(**given: float) -> Settings:
        return Settings(first_delay=0.1, **given)  # type: ignore[arg-type]

    monkeypatch.setattr("transload.serve.service.Settings", settings)


@pytest.mark.usefixtures("engine")
def test_services_side_by_side_from_several_threads(checkpoint: Path, tmp_path: Path, behave: Behave) -> None:
    behave()
    together = threading.Barrier(2)

    def run(name: str) -> str:
        with make(checkpoint, tmp_path, logs=tmp_path / name) as service:
            together.wait(60)
            return ask(service, name)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, ("one", "two"))) == ["echo: one", "echo: two"]


@pytest.mark.usefixtures("engine")
def test_a_listener_that_fails_stops_nothing(
    checkpoint: Path, tmp_path: Path, behave: Behave, caplog: pytest.LogCaptureFixture
) -> None:
    behave(log="Starting to load model")

    def listener(event: Event) -> None:
        raise ValueError(event.kind)

    with transload.serve(checkpoint, context=1024, logs=tmp_path / "logs", on_event=listener) as service:  # type: ignore[operator]
        assert ask(service) == "echo: hi"
    assert "on_event failed for 'stage'" in caplog.text


@pytest.mark.usefixtures("engine")
def test_a_service_is_started_once(checkpoint: Path, tmp_path: Path, behave: Behave) -> None:
    behave()
    with make(checkpoint, tmp_path) as service, pytest.raises(ConfigError, match="started before"):
        service.start()
