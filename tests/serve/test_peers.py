"""Nodes see each other appear, fail and vanish; strangers change nothing."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import pytest

from transload.serve.health import free_port
from transload.serve.peers import Peers


class Notes:
    """What a node noticed, and a way to wait for it."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, str]] = []
        self._more = threading.Condition()

    def __call__(self, node: str, state: str, text: str) -> None:
        with self._more:
            self.seen.append((node, state, text))
            self._more.notify_all()

    def wait(self, node: str, state: str, seconds: float = 15) -> str:
        with self._more:
            ok = self._more.wait_for(lambda: any(s[:2] == (node, state) for s in self.seen), seconds)
            assert ok, f"{node} {state} not in {self.seen}"
            return next(s[2] for s in reversed(self.seen) if s[:2] == (node, state))


Pair = tuple[Peers, Notes, Callable[[], tuple[Peers, Notes]], int]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A head that knows worker "b", a way to make that worker, and the port."""
    with ExitStack() as stack:
        port, notes = free_port(), Notes()
        head = stack.enter_context(closing(Peers("a", frozenset({"b"}), 0, notes)))
        head.listen("127.0.0.1", port)

        def worker() -> tuple[Peers, Notes]:
            own = Notes()
            made = stack.enter_context(closing(Peers("b", frozenset({"a"}), 0, own)))
            made.connect("127.0.0.1", port)
            return made, own

        yield head, notes, worker, port


def test_states_go_both_ways_at_once(pair: Pair) -> None:
    head, notes, make, _ = pair
    worker, own = make()
    notes.wait("b", "starting")
    own.wait("a", "starting")
    worker.say("failed", "out of memory\x1b[31m")
    assert notes.wait("b", "failed") == "out of memory [31m"
    head.say("ready")
    own.wait("a", "ready")
    assert head.states() == {"b": "failed"}


def test_a_node_that_ends_is_gone_and_may_come_back(pair: Pair) -> None:
    _, notes, make, _ = pair
    first, _ = make()
    notes.wait("b", "starting")
    first.close()
    assert "ended" in notes.wait("b", "gone")
    notes.seen.clear()
    make()
    notes.wait("b", "starting")


def test_a_node_that_comes_before_the_head_waits_for_it() -> None:
    port, notes, own = free_port(), Notes(), Notes()
    with (
        closing(Peers("b", frozenset({"a"}), 0, own)) as worker,
        closing(Peers("a", frozenset({"b"}), 0, notes)) as head,
    ):
        worker.connect("127.0.0.1", port)
        time.sleep(0.1)
        head.listen("127.0.0.1", port)
        notes.wait("b", "starting")


def _speak(port: int, data: bytes) -> socket.socket:
    s = socket.create_connection(("127.0.0.1", port), timeout=5)
    s.sendall(data)
    return s


def _line(**said: object) -> bytes:
    return json.dumps({"node": "b", "instance": 0, "state": "ready", "text": "", **said}).encode() + b"\n"


def test_a_node_that_falls_silent_is_gone() -> None:
    port, notes = free_port(), Notes()
    with closing(Peers("a", frozenset({"b"}), 0, notes, silence=0.5)) as head:
        head.listen("127.0.0.1", port)
        with _speak(port, _line()):
            assert "silent for 0.5 seconds" in notes.wait("b", "gone")


@pytest.mark.parametrize(
    "data",
    [b"GET / HTTP/1.1\r\n\r\n", b"x" * 5000, b"[]\n", b"{}\n", _line(node="c"), _line(instance=1), _line(state="king"),
     _line(instance="x"), b"\xff\xfe\n"],
    ids=["http", "long", "list", "empty", "stranger", "instance", "state", "type", "bytes"],
)  # fmt: skip
def test_strangers_are_not_heard(pair: Pair, data: bytes) -> None:
    _, notes, make, port = pair
    with _speak(port, data):
        make()
        notes.wait("b", "starting")
    assert {s[0] for s in notes.seen} == {"b"}
    assert {s[1] for s in notes.seen} == {"starting"}


def test_a_port_in_use_is_an_error(pair: Pair) -> None:
    port = pair[3]
    with closing(Peers("x", frozenset(), 0, Notes())) as other, pytest.raises(OSError, match="in use"):
        other.listen("127.0.0.1", port)
