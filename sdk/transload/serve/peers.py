"""Nodes of one engine watch each other: over one TCP connection from every other node to the head.

An engine over several nodes does not notice a dead node before the next request, and a node that fails while loading
leaves the others waiting for half an hour. So every `transload launch` tells the others, each two seconds and whenever
it changes, in which state its part is. Only these short JSON lines are exchanged; nothing is executed or obeyed.
"""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal, get_args

State = Literal["starting", "ready", "leaving", "failed", "gone"]
EVERY, SILENCE = 2.0, 10.0  # seconds between lines; without one for this long, a node counts as gone
_AGAIN = 0.25  # seconds between attempts to reach the head: a node that was never heard is not missed
_LONGEST, _MOST = 2048, 64  # bytes a line; connections to a head
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")

Noticed = Callable[[str, State, str], None]  # (node, state, what it said)


@dataclass
class _Saying:
    """What this node tells; `changed` wakes the threads that send it."""

    node: str
    instance: int
    state: State = "starting"
    text: str = ""
    changed: threading.Condition = field(default_factory=threading.Condition)
    over: bool = False

    def line(self) -> bytes:
        said = {"node": self.node, "instance": self.instance, "state": self.state, "text": self.text[:400]}
        return json.dumps(said).encode()[: _LONGEST - 1] + b"\n"


class Peers:
    """The other nodes of an instance, as one node sees them: the head listens, the others connect to it.

    others: names of the nodes that may speak. noticed: called, from threads of this object, with every change of a
    node's state; "gone" when its connection ended or it was silent for `silence` seconds.
    """

    def __init__(
        self, node: str, others: frozenset[str], instance: int, noticed: Noticed, silence: float = SILENCE
    ) -> None:
        self._mine = _Saying(node, instance)
        self._others, self._noticed, self._silence = others, noticed, silence
        self._states: dict[str, State] = {}
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()

    def listen(self, host: str, port: int) -> None:
        """Makes this node the head. Raises OSError when it cannot listen there."""
        server = socket.create_server((host, port), family=_family(host), backlog=_MOST)
        self._keep(server)
        threading.Thread(target=self._accept, args=(server,), name="peers", daemon=True).start()

    def connect(self, address: str, port: int) -> None:
        """Connects to the head, again and again until `close`."""
        threading.Thread(target=self._dial, args=(address, port), name="peers", daemon=True).start()

    def say(self, state: State, text: str = "") -> None:
        """Tells all others at once."""
        with self._mine.changed:
            self._mine.state, self._mine.text = state, text
            self._mine.changed.notify_all()

    def states(self) -> Mapping[str, State]:
        """The last known state of every node that was ever seen."""
        with self._lock:
            return dict(self._states)

    def close(self) -> None:
        """Ends all connections; what was said last is sent first."""
        with self._mine.changed:
            self._mine.over = True
            self._mine.changed.notify_all()
        time.sleep(0.05)
        with self._lock:
            sockets = list(self._sockets)
        for s in sockets:
            with suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)
            s.close()

    def _keep(self, s: socket.socket) -> None:
        with self._lock:
            self._sockets.add(s)

    def _accept(self, server: socket.socket) -> None:
        while not self._mine.over:
            try:
                s, _ = server.accept()
            except OSError:
                return
            with self._lock:
                full = len(self._sockets) > _MOST
            if full or self._mine.over:
                s.close()
                continue
            self._keep(s)
            threading.Thread(target=self._talk, args=(s,), name="peer", daemon=True).start()

    def _dial(self, address: str, port: int) -> None:
        while not self._mine.over:
            try:
                s = socket.create_connection((address, port), timeout=self._silence)
                if s.getsockname() == s.getpeername():  # TCP may connect to itself where nobody listens yet
                    s.close()
                    raise ConnectionRefusedError
            except OSError:
                with self._mine.changed:
                    self._mine.changed.wait(_AGAIN)
                continue
            self._keep(s)
            self._talk(s)

    def _talk(self, s: socket.socket) -> None:
        """Until the other side ends."""
        threading.Thread(target=self._send, args=(s,), name="peer sender", daemon=True).start()
        seen, why = None, "its connection ended"
        try:
            s.settimeout(self._silence)
            for node, instance, state, text in _lines(s):
                if instance != self._mine.instance or node not in self._others:
                    break
                seen = node
                self._note(node, state, text)
        except TimeoutError:
            why = f"it has been silent for {self._silence:g} seconds"
        except (OSError, ValueError, KeyError, TypeError):
            pass
        with self._lock:
            self._sockets.discard(s)
        s.close()
        if seen is not None and not self._mine.over:
            self._note(seen, "gone", why)

    def _note(self, node: str, state: State, text: str) -> None:
        with self._lock:
            if self._states.get(node) == state:
                return
            self._states[node] = state
        self._noticed(node, state, text)

    def _send(self, s: socket.socket) -> None:
        with suppress(OSError):
            while True:
                with self._mine.changed:
                    line, over = self._mine.line(), self._mine.over
                s.sendall(line)
                if over:
                    return
                with self._mine.changed:
                    if line == self._mine.line() and not self._mine.over:
                        self._mine.changed.wait(EVERY)


def _lines(s: socket.socket) -> Iterator[tuple[str, int, State, str]]:
    """(node, instance, state, text) of every line. Raises ValueError, KeyError or TypeError for anything else."""
    rest = b""
    while chunk := s.recv(_LONGEST):
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > _LONGEST:
            raise ValueError("a line is too long")
        for line in lines:
            said = json.loads(line)
            if said["state"] not in get_args(State):
                raise ValueError("not a state")
            yield str(said["node"]), int(said["instance"]), said["state"], _plain(str(said["text"])[:400])


def _plain(text: str) -> str:
    """Text from another machine without control characters, which could drive a terminal."""
    return _CONTROL.sub(" ", text)


def _family(host: str) -> socket.AddressFamily:
    return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
