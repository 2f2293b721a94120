"""The matmul benchmark on a GPU: our kernels and everybody else's on the same weights, errors against float64.

Every call multiplies with another copy of the weight, and the copies together exceed the L2 cache several times: what
is measured is the memory. Rates stand beside the copy bandwidth and the matmul rate of the same run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from transload.bench.gpu_clock import Machine
from transload.bench.gpu_peers import STRANGERS, TORCH, Peer, Product, ours
from transload.bench.gpu_shapes import Shape
from transload.quant import QTensor, QuantSpec, stack_experts
from transload.reference import quantize_rtn

ROTATE_BYTES = 512 << 20  # several times any L2 cache
LOOP = "loop over experts, torch bf16"


@dataclass(frozen=True, slots=True)
class GpuRow:
    """One measurement. us: None where there is none, and the note says why. error: relative norm against float64.

    gb_s: bytes of codes and scales (or of 16-bit weights) of the experts visited, over time. chosen: what `hal.choose`
    takes for these activations.
    """

    shape: str
    n: int
    k: int
    group: int
    experts: int
    m: int
    peer: str
    scheme: str
    us: float | None = None
    error: float | None = None
    gb_s: float | None = None
    tflop_s: float | None = None
    ours: bool = False
    chosen: bool = False
    note: str = ""

    def measured(self, us: float, error: float | None, note: str = "") -> GpuRow:
        """The row with its numbers."""
        visited = min(self.experts, self.m) or 1
        each = 2 if self.scheme == "W16A16" else 1 if self.scheme == "int8" else 0.5 + 2 / self.group
        rates = self.n * self.k * visited * each / us / 1e3, 2 * self.m * self.n * self.k / us / 1e6
        return replace(self, us=us, error=error, gb_s=rates[0], tflop_s=rates[1], note=note)


@dataclass(frozen=True, slots=True)
class Entrant:
    """Who multiplies one weight, and how: a product for every copy of the weight."""

    row: GpuRow
    products: Sequence[Product]
    compared: bool = True


@dataclass(slots=True)
class Plan:
    """What to measure. minutes: nothing new is begun after them; left_out then says what is missing."""

    shapes: Sequence[Shape]
    rows: Sequence[int]
    tokens: Sequence[int]
    schemes: Sequence[str] = ("W4A16", "W4A8")
    with_peers: bool = True
    minutes: float | None = None
    left_out: list[str] = field(default_factory=list)


def run(plan: Plan, on: Machine) -> Iterator[GpuRow]:
    """Measures ours and torch's of all shapes, then the others: they may tune for minutes before their first result."""
    end = None if plan.minutes is None else time.monotonic() + 60 * plan.minutes
    for strangers in (False, True) if plan.with_peers else (False,):
        for shape in plan.shapes:
            if strangers and shape.experts:
                continue
            if end is not None and time.monotonic() > end:
                plan.left_out.append(f"{shape.name}: {'other libraries' if strangers else 'everything'}")
                continue
            w = weight_of(shape, on.at)
            yield from _experts(shape, w, plan, on) if shape.experts else _dense(shape, w, plan, on, strangers)


def weight_of(shape: Shape, at: torch.device) -> QTensor:
    """A gaussian weight, the same in every round; experts one by one, because floats of all would not fit."""
    random = torch.Generator(at).manual_seed(shape.n * 31 + shape.k)
    spec = QuantSpec(4, shape.group, scale_dtype=torch.bfloat16)

    def one() -> QTensor:
        return quantize_rtn(torch.randn(shape.n, shape.k, device=at, generator=random).mul_(shape.k**-0.5), spec)

    return stack_experts([one() for _ in range(shape.experts)]) if shape.experts else one()


def _dense(shape: Shape, w: QTensor, plan: Plan, on: Machine, strangers: bool) -> Iterator[GpuRow]:
    exact = w.dequantize(torch.float32).double()
    for found in _made(STRANGERS, shape, w, plan, on) if strangers else _known(shape, w, plan, on):
        if isinstance(found, GpuRow):
            yield found
            continue
        for m in plan.rows:
            x = _activations(m, shape.k, on)
            yield _measure(
                replace(found.row, m=m), found.products, x, x.double() @ exact.T if found.compared else None, on
            )


def _known(shape: Shape, w: QTensor, plan: Plan, on: Machine) -> Iterator[Entrant | GpuRow]:
    """torch's products and our kernels."""
    yield from _made(TORCH, shape, w, plan, on)
    for own in ours(on.kernels, on.device, w):
        if own.scheme in plan.schemes:
            packed = [own.packed(w, on.at) for _ in range(_copies(shape, 0.5, on))]
            row = replace(_row(shape, own.name, own.scheme), ours=True, chosen=own.chosen)
            yield Entrant(row, [lambda x, k=own.kernel, p=p: k.matmul(x, p) for p in packed])  # type: ignore[misc]


def _made(peers: Sequence[Peer], shape: Shape, w: QTensor, plan: Plan, on: Machine) -> Iterator[Entrant | GpuRow]:
    """Each peer ready to multiply, or a row that says why it is not."""
    for peer in peers:
        if peer.scheme.startswith("W4") and peer.scheme not in plan.schemes:
            continue
        row = _row(shape, peer.name, peer.scheme)
        copies = _copies(shape, 2 if peer.scheme == "W16A16" else 0.5, on)
        try:
            products = [peer.make(w, on.at) for _ in range(copies)]
        except Exception as e:  # a stranger's library may fail in any way
            yield replace(row, note=_words(e))
        else:
            yield Entrant(row, products, peer.scheme != "int8")


def _experts(shape: Shape, w: QTensor, plan: Plan, on: Machine) -> Iterator[GpuRow]:
    """Our grouped kernels against a loop over the experts that have rows, in bfloat16."""
    dense = torch.stack([w.expert(e).dequantize(torch.float32).bfloat16() for e in range(shape.experts)])
    entrants = [
        (replace(_row(shape, own.name, own.scheme), ours=True, chosen=own.chosen), own.kernel, own.packed(w, on.at))
        for own in ours(on.kernels, on.device, w)
        if own.scheme in plan.schemes
    ]
    for tokens in plan.tokens:
        random = torch.Generator().manual_seed(tokens)
        visited = [torch.randperm(shape.experts, generator=random)[: shape.top_k] for _ in range(tokens)]
        counts = torch.bincount(torch.cat(visited), minlength=shape.experts)
        x, there = _activations(tokens * shape.top_k, shape.k, on), counts.to(on.at)
        parts = [(e, rows) for e, rows in enumerate(torch.split(x, counts.tolist())) if len(rows)]
        truth = torch.cat([rows.double() @ w.expert(e).dequantize().double().T for e, rows in parts])

        def loop(_: Tensor, parts: list[tuple[int, Tensor]] = parts) -> Tensor:
            return torch.cat([rows @ dense[e].T for e, rows in parts])

        yield _measure(replace(_row(shape, LOOP, "W16A16"), m=len(x)), [loop], x, truth, on)
        for row, kernel, packed in entrants:

            def grouped(x: Tensor, kernel: Any = kernel, packed: Any = packed, there: Tensor = there) -> Tensor:
                y: Tensor = kernel.grouped_matmul(x, packed, there)
                return y

            yield _measure(replace(row, m=len(x)), [grouped], x, truth, on)


def _measure(row: GpuRow, products: Sequence[Product], x: Tensor, truth: Tensor | None, on: Machine) -> GpuRow:
    try:
        error = None if truth is None else float((products[0](x).double() - truth).norm() / truth.norm())
        us, note = on.microseconds([lambda p=p: p(x) for p in products])  # type: ignore[misc]
    except Exception as e:
        return replace(row, note=_words(e))
    return row.measured(us, error, note)


def _row(shape: Shape, peer: str, scheme: str) -> GpuRow:
    return GpuRow(shape.name, shape.n, shape.k, shape.group, shape.experts, 0, peer, scheme)


def _activations(m: int, k: int, on: Machine) -> Tensor:
    return torch.randn(m, k, device=on.at, generator=torch.Generator(on.at).manual_seed(m)).bfloat16()


def _copies(shape: Shape, each: float, on: Machine) -> int:
    """Copies of a weight of so many bytes a number: more than the cache holds, and few of what is large."""
    return 1 if on.dry_run else max(2, int(ROTATE_BYTES / (shape.weights * each)))


def _words(e: Exception) -> str:
    return f"{type(e).__name__}: {e}".splitlines()[0][:160]
