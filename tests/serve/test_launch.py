"""`transload serve` and `transload launch` as processes, with fake engines: two nodes are two loopback addresses."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from transload.errors import ConfigError
from transload.launch import Site
from transload.launch.checkpoint import fingerprint
from transload.launch.render import render
from transload.launch.write import write
from transload.plan.planner import plan as make_plan
from transload.plan.result import Plan
from transload.serve.health import free_port
from transload.serve.prepare import Wishes, launch_starts

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is an address on Linux only")
Behave = Callable[..., None]
LOAD_TEST = Path(__file__).parents[2] / "examples" / "load_test.py"


def spread(checkpoint: Path) -> Plan:
    """A plan of one engine over two nodes. The planner keeps TP inside a node, so its second rank is moved."""
    cpus = [{"type": "CPU", "memory": 4 << 30, "count": 2}]
    plan = make_plan(str(checkpoint), {"nodes": [{"name": "n0", "devices": cpus}]}, {"context": 1024}, tp=2)
    ranks = (plan.ranks[0], plan.ranks[1].model_copy(update={"node": "n1", "device": 0}))
    return plan.model_copy(update={"ranks": ranks})


class Node:
    """A `transload` command that runs, with the events that it printed as JSON."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "transload", arguments[0], "--json", *arguments[1:]],
            stdout=subprocess.PIPE,
            text=True,
        )
        self.events: list[dict[str, object]] = []
        self._more = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._more:
                self.events.append(json.loads(line))
                self._more.notify_all()

    def wait(self, kind: str, seconds: float = 60, **given: object) -> dict[str, object]:
        """The first event of a kind, with such fields, that was not waited for before."""

        def found() -> dict[str, object] | None:
            wanted = {"event": kind, **given}
            return next((e for e in self.events if wanted.items() <= e.items()), None)

        with self._more:
            assert self._more.wait_for(lambda: found() is not None, seconds), f"no {kind} {given} in {self.events}"
            event = found()
            assert event is not None
            self.events.remove(event)
            return event

    def engine_pid(self) -> int:
        return int(str(self.wait("starting")["pid"]))

    def end(self) -> None:
        self.process.kill()
        self.process.wait(10)
        if self.process.stdout is not None:
            self.process.stdout.close()


@pytest.fixture
def run() -> Iterator[Callable[..., Node]]:
    """run(arguments...) -> a Node that is ended with the test."""
    nodes: list[Node] = []

    def start(*arguments: object) -> Node:
        nodes.append(Node(*map(str, arguments)))
        return nodes[-1]

    yield start
    for node in nodes:
        node.end()


@pytest.fixture
def rendered(checkpoint: Path, tmp_path: Path) -> Path:
    """A rendered plan of one engine over two nodes."""
    plan = spread(checkpoint)
    site = Site(
        addresses={"n0": "127.0.0.1", "n1": "127.0.0.2"}, port=free_port(), host="127.0.0.1", master_port=free_port(),
        interfaces={"n0": "lo", "n1": "lo"},
    )  # fmt: skip
    prints = {str(checkpoint): fingerprint(checkpoint)}
    out = tmp_path / "launch"
    write(render(plan, str(checkpoint), None, site, ["shell"], prints).files, out, False)
    return out


def chat(url: object) -> int:
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}]}).encode()
    request = urllib.request.Request(f"{url}/chat/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return int(answer.status)


@pytest.mark.usefixtures("engine")
def test_serve_answers_and_ends_well_on_sigterm(
    checkpoint: Path, tmp_path: Path, behave: Behave, run: Callable[..., Node], start_log: str
) -> None:
    behave(log=start_log)
    port = free_port()
    node = run("serve", checkpoint, "--port", port, "--context", "1k", "--logs", tmp_path / "logs")
    ready = node.wait("ready")
    assert ready["url"] == f"http://127.0.0.1:{port}/v1"
    assert chat(ready["url"]) == 200
    node.process.send_signal(signal.SIGTERM)
    node.wait("draining")
    node.wait("stopped", code=0)
    assert node.process.wait(20) == 0


@pytest.mark.usefixtures("engine")
def test_serve_fails_with_exit_code_1(
    checkpoint: Path, tmp_path: Path, behave: Behave, run: Callable[..., Node]
) -> None:
    behave()
    node = run("serve", checkpoint, "--port", free_port(), "--context", "1k", "--logs", tmp_path, "--", "--error")
    assert node.wait("failed")["failure"] == "bad-argument"
    assert node.process.wait(20) == 1


@pytest.mark.usefixtures("engine")
def test_a_dry_run_prints_the_command(checkpoint: Path, tmp_path: Path) -> None:
    options = ["--port", str(free_port()), "--context", "1k", "--logs", str(tmp_path), "--dry-run"]
    done = subprocess.run(
        [sys.executable, "-m", "transload", "serve", str(checkpoint), *options],
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"vllm serve {checkpoint}" in done.stdout
    assert "--kv-cache-memory-bytes" in done.stdout


@pytest.mark.usefixtures("engine")
def test_no_request_is_lost_when_the_server_is_stopped_under_load(
    checkpoint: Path, tmp_path: Path, behave: Behave, run: Callable[..., Node]
) -> None:
    pytest.importorskip("httpx")
    behave(seconds=0.5)
    port = free_port()
    node = run("serve", checkpoint, "--port", port, "--context", "1k", "--logs", tmp_path / "logs")
    url = str(node.wait("ready")["url"])
    options = ["--chats", "16", "--seconds", "4", "--stop-pid", str(node.process.pid)]
    done = subprocess.run([sys.executable, str(LOAD_TEST), url, *options], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    answered, lost, refused = map(int, re.findall(r"(\d+) (?:answered|lost|refused)", done.stdout))
    assert answered >= 16
    assert lost == 0
    assert refused > 0
    assert node.process.wait(20) == 0


@pytest.mark.usefixtures("engine")
def test_a_killed_node_is_reported_and_a_restart_serves_again(
    rendered: Path, tmp_path: Path, behave: Behave, run: Callable[..., Node]
) -> None:
    behave()
    watch = free_port()

    def launch(k: int, *more: object) -> Node:
        return run("launch", rendered, "--node", k, "--watch-port", watch, "--logs", tmp_path / f"logs{k}", *more)

    head, worker = launch(0, "--restarts", 3), launch(1)
    first = head.engine_pid()
    engine = worker.engine_pid()
    assert chat(head.wait("ready")["url"]) == 200
    worker.wait("ready")
    head.wait("peer", state="ready")  # only a node that was heard can be missed
    worker.process.kill()
    with suppress(ProcessLookupError):
        os.killpg(engine, signal.SIGKILL)
    began = time.monotonic()
    failed = head.wait("failed", 30)
    assert time.monotonic() - began < 30
    assert failed["failure"] == "peer-gone"
    assert "node n1 (127.0.0.2) is gone" in str(failed["text"])
    assert "transload launch DIR --node n1" in str(failed["next_step"])
    head.wait("notice")  # it waits for n1
    launch(1)
    assert head.engine_pid() != first
    assert chat(head.wait("ready")["url"]) == 200


@pytest.mark.usefixtures("engine")
def test_a_failure_on_one_node_is_told_on_the_other(
    rendered: Path, tmp_path: Path, behave: Behave, run: Callable[..., Node]
) -> None:
    behave()
    watch = free_port()
    head = run("launch", rendered, "--node", "n0", "--watch-port", watch, "--logs", tmp_path / "0")
    head.wait("ready")
    behave(fail="RuntimeError: NPU out of memory. Tried to allocate 784.00 MiB (NPU 3; 60.96 GiB total capacity")
    worker = run("launch", rendered, "--node", "1", "--watch-port", watch, "--logs", tmp_path / "1")
    assert worker.wait("failed")["failure"] == "out-of-memory"
    failed = head.wait("failed")
    assert failed["failure"] == "peer-failed"
    assert "node n1 (127.0.0.2) failed: device memory ran out (784.00 MiB)" in str(failed["text"])
    assert head.process.wait(20) == 1


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("stopped", ["all", "the worker"])
def test_a_stop_lets_the_head_finish_first(
    rendered: Path, tmp_path: Path, behave: Behave, run: Callable[..., Node], stopped: str
) -> None:
    behave(seconds=4.0)
    watch = free_port()
    head, worker = (
        run("launch", rendered, "--node", k, "--watch-port", watch, "--drain", 10, "--logs", tmp_path / f"{k}")
        for k in range(2)
    )
    url = head.wait("ready")["url"]
    worker.wait("ready")
    answers: list[int] = []
    request = threading.Thread(target=lambda: answers.append(chat(url)))
    request.start()
    while True:  # until the request runs
        with urllib.request.urlopen(str(url).removesuffix("/v1") + "/load", timeout=10) as answer:
            if json.load(answer)["server_load"]:
                break
    for node in (worker, head) if stopped == "all" else (worker,):
        node.process.send_signal(signal.SIGTERM)
    request.join(20)
    assert answers == [200]
    assert worker.process.wait(20) == 0
    assert head.process.wait(20) == (0 if stopped == "all" else 1)


def starts(folder: Path, tmp_path: Path, node: int | str = 0) -> None:
    launch_starts(folder, node, Wishes(), tmp_path / "logs")


@pytest.mark.usefixtures("engine")
def test_a_launch_is_refused_before_anything_starts(rendered: Path, checkpoint: Path, tmp_path: Path) -> None:
    starts(rendered, tmp_path)
    with pytest.raises(ConfigError, match=r"node 2: the plan has 2 nodes: 0 \(n0\), 1 \(n1\)"):
        starts(rendered, tmp_path, 2)
    with pytest.raises(ConfigError, match=r"launch\.json"):
        starts(tmp_path / "nothing", tmp_path)
    data = bytearray((checkpoint / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (checkpoint / "model.safetensors").write_bytes(data)
    with pytest.raises(ConfigError, match=r"changed since \(its hash differs\)"):
        starts(rendered, tmp_path)
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "config.json").unlink()
    checkpoint.rmdir()
    with pytest.raises(ConfigError, match="the plan's checkpoint is not on this node"):
        starts(rendered, tmp_path)
    manifest = json.loads((rendered / "launch.json").read_text())
    manifest["processes"] = []
    (rendered / "launch.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=r"launch\.json has other instances than plan\.json"):
        starts(rendered, tmp_path)


@pytest.mark.usefixtures("engine")
def test_an_address_of_another_machine_is_noticed(checkpoint: Path, tmp_path: Path) -> None:
    site = Site(addresses={"n0": "192.0.2.1", "n1": "192.0.2.2"}, port=free_port())
    write(render(spread(checkpoint), str(checkpoint), None, site, ["shell"], {}).files, tmp_path / "far", False)
    with pytest.raises(ConfigError, match=r"no interface of this machine .* has the address 192.0.2.1 of node n0"):
        starts(tmp_path / "far", tmp_path)
