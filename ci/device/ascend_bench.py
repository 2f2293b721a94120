"""Times every Ascend kernel on shapes of Qwen3-32B and GLM-4.5-Air, beside a bfloat16 matmul of the same shape."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from npu_under_test import NPU
from torch import Tensor

from transload.hal import Kernel, Packed, Problem
from transload.quant import PER_CHANNEL, ActSpec, QTensor, QuantSpec

BF16 = torch.bfloat16
TOKEN = ActSpec()
WARM, RUNS = (0, 1) if NPU.simulated else (10, 50)  # the simulator shows that everything runs, not how fast


@dataclass(frozen=True)
class Bench:
    """One kernel on one shape; counts gives experts their rows, evenly."""

    kernel: str
    spec: QuantSpec
    m: int
    n: int
    k: int
    experts: int | None = None


def _benches() -> Iterator[Bench]:
    shapes = ((192, 256), (64, 512)) if NPU.simulated else ((51200, 5120), (5120, 25600))
    for m in (1, 16, 512):
        for n, k in shapes:
            yield Bench("ascend-w4a16", QuantSpec(4, 128, scale_dtype=BF16), m, n, k)
            yield Bench("ascend-w4a16-nz", QuantSpec(4, 128, scale_dtype=BF16), m, n, k)
            yield Bench("ascend-w4a16", QuantSpec(4, PER_CHANNEL, scale_dtype=BF16), m, n, k)
            yield Bench("ascend-w4a8", QuantSpec(4, 256, scale_dtype=BF16, act=TOKEN), m, n, k)
            yield Bench("ascend-w8a8", QuantSpec(8, PER_CHANNEL, act=TOKEN), m, n, k)
    experts, n, k = (8, 128, 256) if NPU.simulated else (128, 2816, 4096)
    for m in (64, 4096):
        yield Bench("ascend-grouped-w4a8", QuantSpec(4, PER_CHANNEL, act=TOKEN), m, n, k, experts)
        yield Bench("ascend-grouped-w4a16", QuantSpec(4, 128, scale_dtype=BF16), m, n, k, experts)
        yield Bench("ascend-grouped-w8a8", QuantSpec(8, PER_CHANNEL, scale_dtype=BF16, act=TOKEN), m, n, k, experts)


def table() -> Iterator[str]:
    """Markdown rows: microseconds a call, weight bytes a second, and bfloat16's time for the same product."""
    yield "| kernel | weight | M x N x K | us | weight GB/s | bfloat16 us |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for bench in _benches():
        yield _row(bench)


def _row(b: Bench) -> str:
    kernel = next(k for k in NPU.backend.kernels if k.name == b.kernel)
    experts = f" x {b.experts} experts" if b.experts else ""
    shape = f"{b.m} x {b.n} x {b.k}{experts}"
    reason = kernel.refuses(Problem(b.n, b.k, b.spec, BF16, b.m, b.experts), NPU.device)
    if reason is not None:
        return f"| {b.kernel} | {b.spec} | {shape} | refused: {reason} | | |"
    packed = kernel.place(kernel.pack(_weight(b)), NPU.torch_device)
    x = torch.randn(b.m, b.k, dtype=BF16).to(NPU.torch_device)
    seconds = _median(_call(kernel, packed, x, b))
    if NPU.simulated:
        return f"| {b.kernel} | {b.spec} | {shape} | ran | | |"
    rate = packed.nbytes / seconds / 1e9
    return f"| {b.kernel} | {b.spec} | {shape} | {seconds * 1e6:.0f} | {rate:.0f} | {_plain(x, b)} |"


def _call(kernel: Kernel, packed: Packed, x: Tensor, b: Bench) -> Callable[[], Tensor]:
    if b.experts is None:
        return lambda: kernel.matmul(x, packed)
    counts = torch.full((b.experts,), b.m // b.experts, dtype=torch.int64)
    counts[0] += b.m - int(counts.sum())
    there = counts.to(NPU.torch_device)
    return lambda: kernel.grouped_matmul(x, packed, there)


def _plain(x: Tensor, b: Bench) -> str:
    if b.experts is not None:
        return ""
    weight = torch.randn(b.k, b.n, dtype=BF16).to(NPU.torch_device)
    return f"{_median(lambda: x @ weight) * 1e6:.0f}"


def _weight(b: Bench) -> QTensor:
    lead = (b.experts,) if b.experts else ()
    codes = torch.randint(1 << b.spec.bits, (*lead, b.n, b.k), dtype=torch.uint8)
    return QTensor(b.spec, codes, torch.full((*lead, b.n, b.spec.groups(b.k)), 0.01, dtype=b.spec.scale_dtype))


def _median(call: Callable[[], Tensor]) -> float:
    for _ in range(WARM):
        call()
    times = []
    for _ in range(RUNS):
        _wait()
        began = time.perf_counter()
        call()
        _wait()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _wait() -> None:
    if not NPU.simulated:
        torch.npu.synchronize()  # type: ignore[attr-defined]
