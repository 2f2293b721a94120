"""What this machine can do at most: bytes read per second and multiplications per second, measured like a kernel."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from transload.bench.timing import CLOCKS, Clock

READ_BYTES = 512 << 20  # beyond every cache


@dataclass(frozen=True, slots=True)
class Limits:
    """read: bytes per second. int8 and bf16: operations per second of torch's own (oneDNN's) dense products."""

    read: float
    int8: float
    bf16: float


def measure(threads: int, clock: Clock = "wall") -> Limits:
    """The best of several tries with that many threads. torch sums 512 MB, and multiplies 2048 x 2048 matrices."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        read, now = read_rate(threads, clock), CLOCKS[clock]
        a, b = (torch.randint(-127, 127, (2048, 2048), dtype=torch.int8) for _ in range(2))
        c, d = a.to(torch.bfloat16), b.to(torch.bfloat16)
        operations = 2 * 2048**3
        return Limits(
            read, operations / _best(lambda: torch._int_mm(a, b), 5, now), operations / _best(lambda: c @ d, 5, now)
        )
    finally:
        torch.set_num_threads(before)


def read_rate(threads: int, clock: Clock = "wall") -> float:
    """Bytes per second: the best of several sums over 512 MB with that many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        memory = torch.ones(READ_BYTES // 4, dtype=torch.float32)
        return READ_BYTES / _best(memory.sum, 7, CLOCKS[clock])
    finally:
        torch.set_num_threads(before)


def _best(call: Callable[[], object], tries: int, now: Callable[[], float] = time.perf_counter) -> float:
    call()
    times = []
    for _ in range(tries):
        start = now()
        call()
        times.append(now() - start)
    return min(times)
