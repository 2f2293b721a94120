"""Timing turn by turn: every round measures every contender once, so that a slow minute slows all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal, Protocol

from torch import Tensor

CALLS_AT_MOST = 2000
PAUSE = 0.02  # seconds: idle threads of libgomp spin for about 10 ms, and would run into the next one's turn

# cpu is the processor time of all threads: on a busy machine, it leaves out the time in which others ran.
Clock = Literal["wall", "cpu"]
CLOCKS: dict[Clock, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


class Contender(Protocol):
    """Something that computes one case: a kernel, a library here, or one in another environment."""

    name: str

    def seconds(self, calls: int) -> float:
        """Time of that many calls."""

    def output(self) -> Tensor:
        """The product [M, N], for the error."""


@dataclass(slots=True)
class Local:
    """A contender in this process."""

    name: str
    call: Callable[[], Tensor]
    clock: Clock = "wall"

    def seconds(self, calls: int) -> float:
        """Time of that many calls."""
        now = CLOCKS[self.clock]
        start = now()
        for _ in range(calls):
            self.call()
        return now() - start

    def output(self) -> Tensor:
        """The product [M, N]."""
        return self.call()


def interleaved(contenders: Sequence[Contender], rounds: int, budget: float) -> dict[str, list[float]]:
    """Seconds per call of every contender in every round, `budget` seconds a turn."""
    calls = {}
    for c in contenders:
        c.seconds(1)
        calls[c.name] = max(1, min(CALLS_AT_MOST, int(budget / max(c.seconds(1), 1e-7))))
    times: dict[str, list[float]] = {c.name: [] for c in contenders}
    for turn in range(rounds):
        # Odd rounds go backwards: nobody always runs after the same neighbour.
        for c in contenders if turn % 2 == 0 else reversed(contenders):
            time.sleep(PAUSE)
            c.seconds(1)
            times[c.name].append(c.seconds(calls[c.name]) / calls[c.name])
    return times


def ratio(times: Sequence[float], ours: Sequence[float]) -> float:
    """How many times faster `ours` is: the median over rounds of the quotient within a round."""
    return median(t / o for t, o in zip(times, ours, strict=True))
