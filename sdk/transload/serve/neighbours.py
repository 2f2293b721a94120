"""The other nodes of one engine process, and what their states mean for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from transload.serve.events import Kind
from transload.serve.failures import Failure
from transload.serve.peers import Peers, State
from transload.serve.starting import Start

Tell = Callable[..., None]  # (kind, text, **data)
_NEWS = 3.0  # seconds for the news of another node's failure to arrive after its connection broke
_WORDS = {"starting": "has joined", "ready": "is ready", "leaving": "is being stopped"}
_BLAMED = ("peer-lost", "peer-timeout", "unknown")  # failures that another node may have caused


class Neighbours:
    """Empty for an engine on one node. `trouble` is why the engine cannot go on, as soon as another node says so."""

    def __init__(self, start: Start, tell: Tell) -> None:
        self._begin, self._tell = start, tell
        self._peers: Peers | None = None
        self.trouble: Failure | None = None
        self.head_left = threading.Event()

    def join(self, port: int) -> None:
        """Starts to listen, or to connect to the head's port. Does nothing for one node, or port 0."""
        command = self._begin.command
        if not self._begin.peers or not port:
            return
        port += command.instance
        peers = Peers(command.node, frozenset(self._begin.peers), command.instance, self._noticed)
        if self._begin.head:
            try:
                peers.listen(command.address, port)
            except OSError as error:
                where = f"{command.address}:{port} ({error.strerror})"
                self._tell("notice", f"cannot listen on {where}: failures of other nodes will show late")
                return
        else:
            peers.connect(command.head_address, port)
        self._peers = peers

    def begin(self) -> None:
        """A new life of the engine: what happened before does not count."""
        self.trouble = None
        self.head_left.clear()
        self.say("starting")

    def say(self, state: State, text: str = "") -> None:
        """Tells the others."""
        if self._peers is not None:
            self._peers.say(state, text)

    @property
    def seen(self) -> bool:
        """True when another node was ever heard."""
        return self._peers is not None and bool(self._peers.states())

    def blame(self, failure: Failure) -> Failure:
        """The failure of another node where there is one: it came first."""
        if failure.name in _BLAMED and self.seen:
            deadline = time.monotonic() + _NEWS
            while self.trouble is None and time.monotonic() < deadline:
                time.sleep(0.1)
        return self.trouble or failure

    def await_return(self, asked_to_stop: threading.Event) -> None:
        """Waits, before a restart, for nodes that were here: without them the engine would wait in vain."""
        told = False
        while self._peers is not None and not asked_to_stop.is_set():
            missing = [n for n, state in self._peers.states().items() if state in ("gone", "failed", "leaving")]
            if not missing:
                return
            if not told:
                self._tell("notice", f"waiting for {', '.join(missing)} to come back")
                told = True
            asked_to_stop.wait(0.2)

    def close(self) -> None:
        """Ends the connections."""
        if self._peers is not None:
            self._peers.close()

    def _noticed(self, node: str, state: State, text: str) -> None:
        address = self._begin.peers.get(node, "")
        who = f"node {node}" + (f" ({address})" if address not in ("", node) else "")
        what = f"{who} {_WORDS.get(state) or (f'failed: {text}' if state == 'failed' else f'is gone: {text}')}"
        kind: Kind = "peer"
        self._tell(kind, what, node=node, state=state)
        if state in ("failed", "gone"):
            self.head_left.set()
        if self.trouble is None and (state in ("failed", "gone") or (state == "leaving" and self._begin.head)):
            self.trouble = Failure(
                f"peer-{state}",
                f"{what}; the engine spans it and cannot answer without it",
                ""
                if state == "leaving"
                else f"see its log, and start it again there: transload launch DIR --node {node}",
            )
