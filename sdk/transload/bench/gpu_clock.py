"""Time on a GPU: replays of CUDA graphs, so that the processor's own time between launches is not measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from transload.hal import Device, Kernel

COPY_BYTES, SIDE = 1 << 30, 8192  # what bandwidth and matmul rate are measured with
TINY_BYTES, TINY_SIDE = 1 << 20, 64


@dataclass(frozen=True, slots=True)
class Machine:
    """Where the benchmark runs. dry_run: every step on host tensors, each call once; its times say nothing."""

    device: Device
    at: torch.device
    kernels: tuple[Kernel, ...]
    dry_run: bool = False
    replays: int = 20

    def microseconds(self, calls: Sequence[Callable[[], Tensor]]) -> tuple[float, str]:
        """(median time of one call in microseconds, a note).

        The calls run one after the other in every replay of one graph. Where they cannot be captured, they are timed
        as they are, and the note says so.
        """
        if self.dry_run:
            start = time.perf_counter()
            calls[0]()
            return (time.perf_counter() - start) * 1e6, ""
        for call in calls:  # compilation, tuning and the allocator's first steps
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for call in calls:
                    call()
        except Exception as e:  # a stranger's layer may do anything in a capture
            torch.cuda.synchronize()
            return self._median(lambda: [call() for call in calls], len(calls)), f"not in a graph: {_first_line(e)}"
        return self._median(graph.replay, len(calls)), ""

    def _median(self, run: Callable[[], object], calls: int) -> float:
        run()
        times = []
        for _ in range(self.replays):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1000 / calls)
        return float(median(times))

    def rates(self) -> tuple[float, float]:
        """(copy bandwidth in GB/s, read plus written; bfloat16 matmul rate in TFLOP/s)."""
        size, side = (TINY_BYTES, TINY_SIDE) if self.dry_run else (COPY_BYTES, SIDE)
        source = torch.empty(size, dtype=torch.uint8, device=self.at)
        target = torch.empty_like(source)
        a, b = (torch.randn(side, side, device=self.at).bfloat16() for _ in range(2))
        copy, _ = self.microseconds([lambda: target.copy_(source)])
        product, _ = self.microseconds([lambda: a @ b])
        return 2 * size / copy / 1e3, 2 * side**3 / product / 1e6


def _first_line(e: Exception) -> str:
    return f"{type(e).__name__}: {e}".splitlines()[0][:160]
