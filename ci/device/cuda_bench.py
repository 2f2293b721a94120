"""Measures the CUDA kernels beside their competitors in one run and checks the targets.

Time: the median over CUDA-graph replays, each rotating through copies of the weight that together exceed the L2 cache
several times. Rates are relative to the copy bandwidth and the bf16 matmul rate measured in the same run. Every number
stands beside the error against float64 of the same weights. Output: bench.json, bench.csv, bench.txt, bench.png.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from cuda_peers import Peer, Refused, peers
from cuda_report import report
from cuda_shapes import DENSE, EXPERTS, ROWS, TINY_DENSE, TINY_EXPERTS, TINY_ROWS, TOKENS, Shape
from torch import Tensor

from transload.hal import Device, Kernel, Packed, Problem
from transload.quant import ActSpec, QTensor, QuantSpec, stack_experts
from transload.reference import quantize_rtn
from transload_cuda.backend import CudaBackend
from transload_cuda.triton_kernel import TritonA16, TritonKernel

SPEC = QuantSpec(4, 128, scale_dtype=torch.bfloat16)
ROTATE_BYTES = 512 << 20  # several times any L2 cache
REPLAYS = 20


@dataclass(frozen=True)
class Row:
    """One measurement. error: relative norm against float64, None where the peer quantized for itself."""

    shape: str
    n: int
    k: int
    experts: int
    m: int
    peer: str
    scheme: str
    us: float | None
    error: float | None
    note: str = ""


class Machine:
    """Where the benchmark runs: a GPU, or the interpreter for a dry run."""

    def __init__(self, interpret: bool) -> None:
        self.interpret = interpret
        backend = CudaBackend()
        if interpret:
            self.device = Device("cuda", 0, "Triton interpreter", "sm_90", 1 << 34, 1 << 34)
            self.at = torch.device("cpu")
            self.kernels = tuple(k for k in backend.kernels if isinstance(k, TritonKernel))
        else:
            reason = backend.unavailable()
            if reason:
                sys.exit(f"cuda_bench: {reason}")
            self.device = backend.devices()[0]
            self.at = backend.torch_device(self.device)
            self.kernels = tuple(backend.kernels)

    def microseconds(self, calls: list[Callable[[], Tensor]]) -> float:
        """Median time of one call, over replays of a graph that makes them all."""
        if self.interpret:
            start = time.perf_counter()
            calls[0]()
            return (time.perf_counter() - start) * 1e6
        for call in calls:  # compilation and the allocator's first steps
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()
        times = []
        for _ in range(REPLAYS):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1000 / len(calls))
        return median(times)

    def rates(self) -> dict[str, float]:
        """Copy bandwidth in GB/s (read plus written) and bf16 matmul rate in TFLOP/s."""
        size, side = (1 << 20, 64) if self.interpret else (1 << 30, 8192)
        source = torch.empty(size, dtype=torch.uint8, device=self.at)
        target = torch.empty_like(source)
        copy = self.microseconds([lambda: target.copy_(source)])
        a = torch.randn(side, side, device=self.at).bfloat16()
        b = torch.randn(side, side, device=self.at).bfloat16()
        product = self.microseconds([lambda: a @ b])
        return {"copy_gb_s": 2 * size / copy / 1e3, "bf16_tflop_s": 2 * side**3 / product / 1e6}


def weight_of(shape: Shape, at: torch.device) -> QTensor:
    """A random weight, quantized on the device; experts one by one, because float copies of all would not fit."""
    parts = [
        quantize_rtn(torch.randn(shape.n, shape.k, device=at).mul_(0.02), SPEC) for _ in range(max(1, shape.experts))
    ]
    return stack_experts(parts) if shape.experts else parts[0]


def measure_dense(shape: Shape, rows: tuple[int, ...], competitors: tuple[Peer, ...], on: Machine) -> list[Row]:
    """Every competitor on every number of rows."""
    w = weight_of(shape, on.at)
    exact = w.dequantize(torch.float32).double()
    copies = 1 if on.interpret else max(1, ROTATE_BYTES // (shape.weights // 2))
    found = []
    for peer in competitors:
        try:
            products = [peer.make(w, on.at) for _ in range(min(copies, 4 if peer.scheme == "W16A16" else copies))]
        except Exception as e:  # a competitor may fail in any way
            note = str(e) if isinstance(e, Refused) else f"{type(e).__name__}: {e}"
            found.append(Row(shape.name, shape.n, shape.k, 0, 0, peer.name, peer.scheme, None, None, note[:200]))
            continue
        for m in rows:
            x = torch.randn(m, shape.k, device=on.at).bfloat16()
            found.append(_row(shape, m, peer.name, peer.scheme, x, products, None if peer.own else exact, on))
    return found


def _row(shape: Shape, m: int, name: str, scheme: str, x: Tensor, products: list[Callable[[Tensor], Tensor]],
         exact: Tensor | None, on: Machine) -> Row:  # fmt: skip
    plain = (shape.name, shape.n, shape.k, shape.experts, m, name, scheme)
    try:
        error = None
        if exact is not None:
            truth = x.double() @ exact.T
            error = float((products[0](x).double() - truth).norm() / truth.norm())
        us = on.microseconds([lambda p=p: p(x) for p in products])  # type: ignore[misc]
    except Exception as e:
        return Row(*plain, None, None, f"{type(e).__name__}: {e}"[:200])
    return Row(*plain, us, error)


def measure_experts(shape: Shape, tokens: tuple[int, ...], on: Machine) -> list[Row]:
    """Our grouped kernels against a loop over the experts in bf16."""
    w = weight_of(shape, on.at)
    weights = torch.stack([w.expert(e).dequantize(torch.float32).to(torch.bfloat16) for e in range(shape.experts)])
    found = []
    for t in tokens:
        chosen = torch.stack([torch.randperm(shape.experts)[: shape.top_k] for _ in range(t)]).flatten()
        counts = torch.bincount(chosen, minlength=shape.experts)
        m = len(chosen)
        x = torch.randn(m, shape.k, device=on.at).bfloat16()
        parts = counts.tolist()
        ends = counts.cumsum(0).tolist()
        spans = [(e, end - part, end) for e, (part, end) in enumerate(zip(parts, ends, strict=True)) if part]

        def loop(x: Tensor, spans: list[tuple[int, int, int]] = spans) -> Tensor:
            return torch.cat([x[a:b] @ weights[e].T for e, a, b in spans])

        truth = torch.cat([x[a:b].double() @ w.expert(e).dequantize().double().T for e, a, b in spans])
        found.append(_grouped_row(shape, m, "loop over experts bf16", "W16A16", x, loop, truth, on))
        there = counts.to(on.at)
        for kernel in on.kernels:
            act = _act(kernel)
            if kernel.refuses(Problem.of(w.with_act(act), torch.bfloat16), on.device):
                continue
            packed = kernel.place(kernel.pack(w.with_act(act)), on.at)

            def grouped(x: Tensor, kernel: Kernel = kernel, packed: Packed = packed, there: Tensor = there) -> Tensor:
                return kernel.grouped_matmul(x, packed, there)

            name, scheme = f"transload {kernel.name}", "W4A8" if act else "W4A16"
            found.append(_grouped_row(shape, m, name, scheme, x, grouped, truth, on))
    return found


def _grouped_row(shape: Shape, m: int, name: str, scheme: str, x: Tensor, product: Callable[[Tensor], Tensor],
                 truth: Tensor, on: Machine) -> Row:  # fmt: skip
    plain = (shape.name, shape.n, shape.k, shape.experts, m, name, scheme)
    try:
        error = float((product(x).double() - truth).norm() / truth.norm())
        return Row(*plain, on.microseconds([lambda: product(x)]), error)
    except Exception as e:
        return Row(*plain, None, None, f"{type(e).__name__}: {e}"[:200])


def _act(kernel: Kernel) -> ActSpec | None:
    return ActSpec() if kernel.name.endswith("a8") else None


def tune(shapes: tuple[Shape, ...], rows: tuple[int, ...], on: Machine) -> None:
    """Searches configurations for our kernels; findings go to the user's cache file."""
    from transload_cuda.tune import tune as search

    for shape in shapes:
        w = weight_of(shape, on.at)
        packed = TritonA16().place(TritonA16().pack(w), on.at)
        for m in rows:
            x = torch.randn(m, shape.k, device=on.at).bfloat16()
            print("tuned", shape.name, m, search(x, packed), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--interpret", action="store_true", help="tiny shapes on CPU tensors, no true times")
    parser.add_argument("--tune", action="store_true", help="search configurations first")
    parser.add_argument("--rows", type=int, nargs="*", help="rows instead of the usual ones")
    options = parser.parse_args()
    on = Machine(options.interpret)
    torch.manual_seed(0)
    dense, experts = (TINY_DENSE, TINY_EXPERTS) if options.interpret else (DENSE, EXPERTS)
    rows = tuple(options.rows or (TINY_ROWS if options.interpret else ROWS))
    if options.tune:
        tune(dense, rows, on)
    rates = on.rates()
    found: list[Row] = []
    for shape in dense:
        found += measure_dense(shape, rows, peers(on.kernels, on.device), on)
    for shape in experts:
        found += measure_experts(shape, (2,) if options.interpret else TOKENS, on)
    versions = {"torch": torch.__version__, "device": on.device.model, "dry_run": on.interpret, **rates}
    options.out.mkdir(parents=True, exist_ok=True)
    document = {"machine": versions, "rows": [asdict(row) for row in found]}
    (options.out / "bench.json").write_text(json.dumps(document, indent=1))
    print(report(document, options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
