"""Runs one case on one kernel and says what happened, as data: used by pytest, and by anything that is not pytest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from transload import reference
from transload.errors import Unsupported
from transload.hal import Backend, Device, Kernel, Packed
from transload.quant import QTensor
from transload.testing.cases import Case, Operands

GUARD = 3  # rows and columns around x that hold NaN: a kernel that reads or writes beside x shows


@dataclass(frozen=True, slots=True)
class Result:
    """What one kernel did with one case. Exactly one of refused, failed and nmse is set (layout_only sets none)."""

    kernel: str
    case: str
    refused: str | None = None  # the kernel's own sentence
    failed: str | None = None  # what was wrong
    nmse: float | None = None  # error against the reference of the same scheme

    @property
    def passed(self) -> bool:
        """True when the kernel took the case and did it right."""
        return self.refused is None and self.failed is None


class _Wrong(Exception):
    """A finding; becomes Result.failed."""


def run_case(backend: Backend, device: Device, kernel: Kernel, case: Case, layout_only: bool = False) -> Result:
    """Packs, unpacks and multiplies, and compares with transload.reference.

    Checked: unpack(pack(w)) == w, before and after use; w and x are not written to; the executed scheme is the
    requested one; y's shape and dtype; the error, for contiguous x and for x inside a larger tensor; that NaN and
    infinity stay in their rows. layout_only leaves the multiplication out: for a machine that has no such device.
    """
    refused = kernel.refuses(case.problem, device)
    if refused is not None:
        return Result(kernel.name, case.id, refused=refused)
    try:
        data, truth = _prepared(case)
        packed = _checked_pack(kernel, data.weight)
        error = None if layout_only else _checked_matmul(backend, device, kernel, case, data, truth, packed)
    except _Wrong as wrong:
        return Result(kernel.name, case.id, failed=str(wrong))
    return Result(kernel.name, case.id, nmse=error)


def nmse(y: Tensor, truth: Tensor) -> float:
    """Mean square error over the mean square of the truth; 0 for two empty or two zero tensors."""
    error, power = ((y.double() - truth.double()) ** 2).sum(), (truth.double() ** 2).sum()
    return float(error / power) if power else float(error)


def _checked_pack(kernel: Kernel, w: QTensor) -> Packed:
    given = _copy(w)
    packed = kernel.pack(given)
    if not given.equal(w):
        raise _Wrong("pack changed the weight that it was given")
    if (packed.kernel, packed.spec, packed.n, packed.k, packed.experts) != (kernel.name, w.spec, w.n, w.k, w.experts):
        raise _Wrong(f"the packed weight says {packed.kernel}, {packed.spec}, N={packed.n}, K={packed.k}")
    _check_unpack(kernel, packed, w, "unpack(pack(w))")
    if kernel.layout is not None:
        kernel.verify(packed)  # FormatError where a kernel does not recognize its own layout
    if w.experts is None:
        index = torch.tensor([w.n - 1, 0])
        try:
            found = kernel.rows(packed, index)
        except Unsupported:
            return packed
        if not found.equal(_taken(w, index)):
            raise _Wrong("rows(pack(w), index) differs from w's rows")
    return packed


def _check_unpack(kernel: Kernel, packed: Packed, w: QTensor, what: str) -> None:
    back = kernel.unpack(packed)
    if not back.equal(w):
        parts = [name for name in ("codes", "scales", "zeros", "mins", "g_idx") if not _same(back, w, name)]
        raise _Wrong(f"{what} differs from w in {', '.join(parts) or 'its spec'}")


def _checked_matmul(
    backend: Backend, device: Device, kernel: Kernel, case: Case, data: Operands, truth: Tensor, packed: Packed
) -> float:
    executed = kernel.executed(case.problem)
    if executed != case.spec.scheme:
        raise _Wrong(f"{case.spec.scheme} was asked for, {executed} is executed")
    to = backend.torch_device(device)
    placed = kernel.place(packed, to)
    worst = 0.0
    for x in _layouts(data.x, to):
        y = _multiply(kernel, x, placed, data, to)
        worst = max(worst, _compared(y, truth, case))
    _check_unpack(kernel, packed, data.weight, "after matmul, unpack(pack(w))")
    return worst


def _layouts(x: Tensor, to: torch.device) -> Iterator[Tensor]:
    """x as one piece of memory, then as a window of a larger tensor full of NaN; neither may be changed."""
    whole = x.to(to, copy=True)
    yield whole
    if not _identical(whole.cpu(), x):
        raise _Wrong("x was written to")
    around = torch.full((x.shape[0] + 2 * GUARD, x.shape[1] + 2 * GUARD), torch.nan, dtype=x.dtype)
    around[GUARD : GUARD + x.shape[0], GUARD : GUARD + x.shape[1]] = x
    there = around.to(to, copy=True)
    yield there[GUARD : GUARD + x.shape[0], GUARD : GUARD + x.shape[1]]
    if not _identical(there.cpu(), around):
        raise _Wrong("a non-contiguous x, or memory around it, was written to")


def _multiply(kernel: Kernel, x: Tensor, w: Packed, data: Operands, to: torch.device) -> Tensor:
    bias = None if data.bias is None else data.bias.to(to, copy=True)
    if data.counts is None:
        return kernel.matmul(x, w, bias)
    return kernel.grouped_matmul(x, w, data.counts.to(to, copy=True), bias)


@lru_cache(maxsize=2)  # the kernels of a backend take turns on the same case
def _prepared(case: Case) -> tuple[Operands, Tensor]:
    """A case's data and what the reference makes of it."""
    data = case.operands()
    if data.counts is None:
        return data, reference.matmul(data.x, data.weight, data.bias)
    return data, reference.grouped_matmul(data.x, data.weight, data.counts, data.bias)


def _compared(y: Tensor, truth: Tensor, case: Case) -> float:
    if y.dtype != case.x_dtype or tuple(y.shape) != (case.m, case.n):
        raise _Wrong(f"y is {y.dtype} {tuple(y.shape)}, expected {case.x_dtype} {(case.m, case.n)}")
    y = y.cpu()
    if case.broken:
        if bool(y[:2].isfinite().any()):
            raise _Wrong("NaN or infinity in x did not reach its row of y")
        y, truth = y[2:], truth[2:]
    if not bool(y.isfinite().all()):
        raise _Wrong("y has NaN or infinity where x has none")
    error = nmse(y, truth)
    if error > case.tolerance:
        raise _Wrong(f"normalised mean square error {error:.2e}, allowed {case.tolerance:.0e}")
    return error


def _copy(w: QTensor) -> QTensor:
    sides = {name: getattr(w, name) for name in ("codes", "scales", "zeros", "mins", "g_idx")}
    return replace(w, **{name: t.clone() for name, t in sides.items() if t is not None})


def _taken(w: QTensor, index: Tensor) -> QTensor:
    sides = {name: getattr(w, name) for name in ("codes", "scales", "zeros", "mins")}
    return replace(w, **{name: t[index] for name, t in sides.items() if t is not None})


def _same(a: QTensor, b: QTensor, name: str) -> bool:
    mine, theirs = getattr(a, name), getattr(b, name)
    return mine is theirs if mine is None or theirs is None else torch.equal(mine, theirs)


def _identical(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit as far as values show: NaN equals NaN."""
    return bool(((a == b) | (a.isnan() & b.isnan())).all())
