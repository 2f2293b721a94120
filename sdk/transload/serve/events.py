"""What happens to an engine, as values: one Event a step, for people a sentence, for machines a kind and data."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal[
    "starting",  # a process was started: argv, pid, log
    "stage",  # the engine reached a step of its start
    "loading",  # weights or graphs: fraction 0 to 1
    "cache",  # the KV cache is known: kv_tokens
    "drift",  # the engine measured something else than the plan predicted
    "ready",  # the engine answers: url
    "load",  # running and waiting requests, tokens per second
    "peer",  # another node of the same engine appeared, failed or vanished
    "failed",  # an engine stopped by itself: failure, next_step
    "restarting",  # after `delay` seconds
    "draining",  # no new requests; waiting for those that run
    "stopped",  # every process is gone: code
    "notice",  # something worth knowing that is not an error
]


@dataclass(frozen=True, slots=True)
class Event:
    """One step in the life of an engine. engine: the process's name; text: a sentence; at: seconds since the epoch."""

    kind: Kind
    engine: str
    text: str
    data: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    at: float = field(default_factory=time.time)

    def to_json(self) -> str:
        """The event as one line of JSON."""
        head = {"at": round(self.at, 3), "event": self.kind, "engine": self.engine, "text": self.text}
        return json.dumps({**head, **self.data}, ensure_ascii=False)


Listener = Callable[[Event], None]
