"""`transload bench matmul --device cuda` for a machine where transload is not installed, and the search before it.

Writes bench.txt, bench.csv, bench.jsonl, bench.md and, where matplotlib is, bench.png; with --tune only measured.txt,
whose entries go into transload_cuda/measured.py. --interpret walks through the same steps on host tensors.
"""

from __future__ import annotations

import argparse
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch

from transload.bench import gpu, gpu_cli, gpu_shapes
from transload.bench.gpu_clock import Machine
from transload.bench.gpu_peers import ours
from transload.hal import Device
from transload_cuda import configs
from transload_cuda.backend import CudaBackend
from transload_cuda.jit import launch
from transload_cuda.triton_kernel import TritonKernel
from transload_cuda.tune import tune


def machine(interpret: bool) -> Machine:
    """The first GPU; or Triton's interpreter, whose times say nothing."""
    backend = CudaBackend()
    if interpret:
        device = Device("cuda", 0, "Triton interpreter", "sm_90", 1 << 34, 1 << 34)
        kernels = tuple(k for k in backend.kernels if isinstance(k, TritonKernel))
        return Machine(device, torch.device("cpu"), kernels, dry_run=True)
    reason = backend.unavailable()
    if reason:
        sys.exit(f"cuda_bench: {reason}")
    device = backend.devices()[0]
    return Machine(device, backend.torch_device(device), tuple(backend.kernels))


def search(plan: gpu.Plan, on: Machine, out: Path) -> None:
    """Searches configurations of our kernels until the time is over; measured.txt holds them as measured.py would."""
    end = time.monotonic() + 60 * (plan.minutes or float("inf"))
    found: set[str] = set()
    for shape in plan.shapes:
        w = gpu.weight_of(shape, on.at)
        for own in ours([k for k in on.kernels if isinstance(k, TritonKernel)], on.device, w):
            packed = own.packed(w, on.at)
            for rows in plan.tokens if shape.experts else plan.rows:
                x, counts = operands(shape, rows, on)
                asked = launch.ask(x, packed.spec, packed.n, counts)
                if asked.key in found:
                    continue
                if time.monotonic() > end:
                    print("left out, no time:", shape.name, own.name, rows, flush=True)
                    continue
                found.add(asked.key)
                if on.dry_run:
                    configs.remember(on.device.model, asked.key, configs.default(asked))
                else:
                    print(shape.name, own.name, rows, tune(x, packed, counts), flush=True)
                (out / "measured.txt").write_text(configs.as_measured(on.device.model))


def operands(shape: gpu_shapes.Shape, rows: int, on: Machine) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x, and how many of its rows each expert has: as even as can be."""
    m = rows * max(1, shape.top_k)
    x = torch.randn(m, shape.k, device=on.at).bfloat16()
    if not shape.experts:
        return x, None
    return x, (torch.arange(shape.experts, device=on.at) < m % shape.experts).long() + m // shape.experts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--interpret", action="store_true", help="tiny shapes on host tensors, no true times")
    parser.add_argument("--tune", action="store_true", help="search configurations instead")
    parser.add_argument("--rows", type=int, nargs="*", help="rows, and tokens of experts, instead of the usual ones")
    parser.add_argument("--minutes", type=float, help="begin nothing new after so long")
    options = parser.parse_args()
    on, out = machine(options.interpret), options.out
    out.mkdir(parents=True, exist_ok=True)
    plan = gpu_cli.plan(None, options.rows, None, None, True, options.minutes)
    if on.dry_run:
        plan = gpu.Plan(gpu_shapes.TINY, gpu_shapes.TINY_ROWS, (2,), minutes=options.minutes)
    if options.tune:
        search(plan, on, out)
        return 0
    plot = out / "bench.png" if find_spec("matplotlib") else None
    files = gpu_cli.Files(out / "bench.csv", out / "bench.jsonl", out / "bench.md", plot)
    with (out / "bench.txt").open("w") as text:

        def say(line: str) -> None:
            print(line, flush=True)
            print(line, file=text, flush=True)

        gpu_cli.measure(plan, on, files, say)
    return 0


if __name__ == "__main__":
    sys.exit(main())
