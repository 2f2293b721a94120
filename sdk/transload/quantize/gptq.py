"""GPTQ: quantize inputs one after another, and let those still to come make up for the error.

Frantar et al. 2022, algorithm 1. For inputs in quantization order let H = R R^T with R upper triangular; then the U of
the paper, H^-1 = U^T U, is R^-1. Written backwards (the first input last) R is an ordinary Cholesky factor L and U its
inverse, so everything here runs from the last row to the first and needs one factorization and one triangular
inversion, both in place: K x K floats and a few panels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from transload.errors import ConfigError
from transload.quant import PER_CHANNEL, QTensor, QuantSpec
from transload.quantize.rtn import as_qtensor, codes_of, grouped, scales_of, searched_scales, values_of

_BLOCK = 128  # inputs between two updates of everything
_PANEL = 512  # columns of a factorization step
_LARGEST_DAMPING = 1.0


@dataclass(frozen=True, slots=True)
class Factor:
    """The prepared Hessian of one input.

    order: int64 [K], inputs from the last quantized to the first. inverse: float [K, K], lower triangular, U backwards.
    damping: what was added to the diagonal, in units of its mean.
    """

    order: Tensor
    inverse: Tensor
    damping: float


def group_aware_order(diagonal: Tensor, group_size: int) -> Tensor:
    """Inputs from the least to the most important, whole groups staying together: int64 [K].

    Groups are ordered by their sum, inputs inside a group by their own value, so that group k // group_size of the
    stored weight is still one run and no g_idx is needed. diagonal: [K].
    """
    k = len(diagonal)
    if group_size == PER_CHANNEL or group_size >= k:
        return torch.argsort(diagonal, stable=True)
    groups = diagonal.reshape(-1, group_size)
    inside = torch.argsort(groups, dim=1, stable=True)
    between = torch.argsort(groups.sum(1), stable=True)
    return (inside + torch.arange(len(groups), device=inside.device).unsqueeze(1) * group_size)[between].flatten()


def factor(
    gram: Tensor, group_size: int, damping: float = 0.01, act_order: bool = True, consume: bool = False
) -> Factor:
    """Prepares a Hessian X^T X [K, K] of any scale.

    consume: `gram` is not needed any more, and its memory becomes the factor's; else it is not changed. damping is
    raised tenfold, up to 1, while the matrix is not positive definite. Raises ConfigError when that does not help, and
    for NaN, infinity or a matrix of zeros.
    """
    diagonal = gram.diagonal()
    mean = float(diagonal.mean())
    if not mean > 0 or mean == float("inf"):
        raise ConfigError(f"the Hessian's mean diagonal is {mean:g}: the inputs were all zero, or not finite")
    k = len(diagonal)
    order = group_aware_order(diagonal, group_size) if act_order else torch.arange(k - 1, -1, -1, device=gram.device)
    matrix = gram if consume else gram.clone()
    _reorder(matrix, order)
    matrix.div_(mean)
    corners = [square.clone() for square in _corners(matrix)]
    while True:
        matrix.diagonal().add_(damping)
        if _cholesky(matrix):
            return Factor(order, _invert(matrix), damping)
        if damping >= _LARGEST_DAMPING:
            raise ConfigError(f"the Hessian is not positive definite, even with {damping:g} of its diagonal added")
        damping = min(max(damping, 1e-4) * 10, _LARGEST_DAMPING)
        _mirror(matrix, corners)


def gptq(weight: Tensor, spec: QuantSpec, prepared: Factor, search: bool = True) -> QTensor:
    """Quantizes a weight [N, K] against a prepared Hessian.

    search: choose each group's scale by the error that GPTQ will be charged for it, instead of its largest magnitude.
    Raises ConfigError for schemes that are not integers, ValueError for weights that are not finite.
    """
    n, k = weight.shape
    size = k if spec.group_size == PER_CHANNEL else spec.group_size
    groups = grouped(weight[:1], spec).shape[1]
    order, inverse = prepared.order, prepared.inverse
    rows = _by_input(weight, order)
    codes = torch.empty(k, n, dtype=torch.uint8, device=rows.device)
    scales = torch.empty(groups, n, device=rows.device)
    zeros = torch.empty_like(scales)
    charge = inverse.diagonal().square().reciprocal() if search else None
    block = size * max(1, _BLOCK // size) if size < _BLOCK else _BLOCK
    scale, zero = scales[0], None
    for stop in range(k, 0, -block):
        start = max(stop - block, 0)
        errors = torch.empty(stop - start, n, device=rows.device)
        for j in range(stop - 1, start - 1, -1):
            if (j + 1) % size == 0:  # the first input of a group: its scale is chosen from the weights as they are now
                members = slice(j + 1 - size, j + 1)
                scale, zero = _scales(rows[members], spec, None if charge is None else charge[members])
                group = int(order[j]) // size
                scales[group] = scale
                zeros[group] = 0 if zero is None else zero
            w = rows[j].unsqueeze(-1)
            code = codes_of(w, scale, zero, spec)
            codes[j] = code[:, 0].to(torch.uint8)
            error = (w - values_of(code, scale, zero, spec))[:, 0] / inverse[j, j]
            errors[j - start] = error
            if j > start:
                rows[start:j].addr_(inverse[j, start:j], error, alpha=-1)
        if start:
            rows[:start].addmm_(inverse[start:stop, :start].T, errors, alpha=-1)
    del rows
    back = torch.argsort(order)
    return as_qtensor(codes[back].T, scales.T, None if zero is None else zeros.T, spec)


def _by_input(weight: Tensor, order: Tensor) -> Tensor:
    """A weight [N, K] as float32 [K, N] in quantization order, so that an input's weights lie together; in panels,
    because at this moment memory is fullest."""
    n, k = weight.shape
    rows = torch.empty(k, n, device=weight.device)
    for start in range(0, k, _PANEL):
        rows[start : start + _PANEL] = weight[:, order[start : start + _PANEL]].T
    if not all(bool(torch.isfinite(part).all()) for part in torch.split(rows, _PANEL)):
        raise ValueError("the weight contains NaN or infinity")
    return rows


def _scales(members: Tensor, spec: QuantSpec, charge: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Scale and zero [N] of one group, members [S, N]."""
    x = members.T.unsqueeze(1)
    if charge is None:
        scales, zeros = scales_of(x, spec)
    else:
        scales, zeros = searched_scales(x, spec, charge.unsqueeze(0))
    return scales[:, 0], None if zeros is None else zeros[:, 0]


def _reorder(a: Tensor, order: Tensor) -> None:
    """a[order][:, order], in place: with a panel more of memory instead of another matrix."""
    for start in range(0, len(a), _PANEL):
        a[:, start : start + _PANEL] = a[:, start : start + _PANEL][order]
    for start in range(0, len(a), _PANEL):
        a[start : start + _PANEL] = a[start : start + _PANEL][:, order]


def _corners(a: Tensor) -> list[Tensor]:
    """The squares on the diagonal."""
    return [a[start : start + _PANEL, start : start + _PANEL] for start in range(0, len(a), _PANEL)]


def _mirror(a: Tensor, corners: Sequence[Tensor]) -> None:
    """Makes a matrix symmetric again whose lower triangle and squares on the diagonal were overwritten."""
    for start, (square, corner) in zip(range(0, len(a), _PANEL), zip(_corners(a), corners, strict=True), strict=True):
        square.copy_(corner)
        a[start + _PANEL :, start : start + _PANEL] = a[start : start + _PANEL, start + _PANEL :].T


def _cholesky(a: Tensor) -> bool:
    """Replaces the lower triangle of a symmetric matrix by its Cholesky factor. False when there is none."""
    n = len(a)
    for start in range(0, n, _PANEL):
        stop = min(start + _PANEL, n)
        corner, info = torch.linalg.cholesky_ex(a[start:stop, start:stop])
        if int(info) or not bool(torch.isfinite(corner).all()):
            return False
        a[start:stop, start:stop] = corner
        if stop == n:
            break
        panel = torch.linalg.solve_triangular(corner.T, a[stop:, start:stop], upper=True, left=False)
        a[stop:, start:stop] = panel
        for column in range(stop, n, _PANEL):
            width = min(_PANEL, n - column)
            left = panel[column - stop :]
            a[column:, column : column + width].addmm_(left, left[:width].T, alpha=-1)
    return True


def _invert(a: Tensor) -> Tensor:
    """Replaces a lower triangular matrix (anything above the diagonal is ignored) by its inverse; returns it."""
    a.tril_()
    n = len(a)
    for start in reversed(range(0, n, _PANEL)):
        stop = min(start + _PANEL, n)
        eye = torch.eye(stop - start, dtype=a.dtype, device=a.device)
        corner = torch.linalg.solve_triangular(a[start:stop, start:stop], eye, upper=False)
        if stop < n:
            panel = a[stop:, start:stop] @ corner
            for row in range(stop, n, _PANEL):
                end = min(row + _PANEL, n)
                a[row:end, start:stop] = a[row:end, stop:end] @ panel[: end - stop]
            a[stop:, start:stop].neg_()
        a[start:stop, start:stop] = corner
    return a
