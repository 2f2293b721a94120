"""What happens to one module's numbers: nothing, another layout, floats, or another scheme."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from transload.checkpoint import Checkpoint
from transload.formats.base import Format
from transload.formats.packed import PackedRows
from transload.porting.plan import Action, Output, Step
from transload.quant import QTensor
from transload.requantize import Difference, difference, requantize
from transload.rewrite import rewrite

_SLAB = 1 << 22  # values dequantized at a time


Value = QTensor | PackedRows | Tensor


def experts_of(step: Step) -> int:
    """The number of experts in a stack that stays one tensor and is still moved expert by expert; 0 for other steps."""
    entry, output = step.entry, step.outputs[0]
    stays = len(entry.shape) == 3 and ".experts." in entry.name and output.expert is None
    return entry.shape[0] if stays and not (entry.spec is not None and entry.spec.act_order) else 0


def values(source: Checkpoint, step: Step) -> Iterator[QTensor | Tensor]:
    """What the outputs of a step are made of, one in memory at a time."""
    entry = step.entry
    if step.outputs and (step.outputs[0].expert is not None or experts_of(step)):
        yield from source.experts(entry)
    else:
        yield source.read(entry) if entry.spec is None else source.decode(entry)


def packed_values(source: Checkpoint, step: Step) -> Iterator[Value]:
    """The same; a module that keeps its scheme may come with its codes still in words."""
    entry, output = step.entry, step.outputs[0]
    same = entry.spec is not None and output.action is Action.REPACK and output.spec == entry.spec
    whole = output.expert is None and not experts_of(step)
    rows = source.format.packed(source.source, entry) if same and whole else None
    if rows is None:
        yield from values(source, step)
    else:
        yield rows


def encoded(value: Value, output: Output, format: Format) -> dict[str, Tensor]:
    """The stored tensors of an output."""
    if isinstance(value, Tensor):
        return {next(iter(output.tensors)): value}
    if isinstance(value, PackedRows):
        return format.encode_packed(output.name, value) or format.encode(output.name, value.unpacked())
    return format.encode(output.name, value)


def moved(value: Value, output: Output) -> tuple[Value, Difference | None]:
    """A module or tensor in its new form, and how far it moved; None stands for not at all."""
    if output.action is Action.REQUANTIZE and not isinstance(value, PackedRows):
        assert output.spec is not None
        assert output.rounded is not None
        new, apart = requantize(value, replace(output.rounded, scale_dtype=output.spec.scale_dtype))
        return rewrite(new, output.spec), apart
    if isinstance(value, (Tensor, PackedRows)):
        return value, None
    if output.action is Action.DEQUANTIZE:
        return _as_floats(value, next(iter(output.tensors.values()))[0])
    assert output.spec is not None
    return rewrite(value, output.spec), None


def _as_floats(w: QTensor, dtype: torch.dtype) -> tuple[Tensor, Difference | None]:
    """[N, K] made in slabs of rows, so that a large table never exists in float32 beside the result."""
    weight = torch.empty(w.n, w.k, dtype=dtype)
    step = max(1, _SLAB // max(w.k, 1))
    for start in range(0, w.n, step):
        weight[start : start + step] = w.rows(start, min(start + step, w.n)).dequantize()
    if dtype is torch.float32:
        return weight, None
    apart = difference(w, weight)
    return weight, apart if apart.max_error else None


def together(apart: Sequence[Difference | None]) -> Difference | None:
    """How far a stack moved whose experts, all of one size, moved so far each; decibels over those that moved."""
    moved_far = [d for d in apart if d is not None and d.rms_error]
    if not moved_far:
        return None
    errors = sum(d.rms_error**2 for d in moved_far)
    signal = sum(d.rms_error**2 * 10 ** (d.sqnr_db / 10) for d in moved_far)
    return Difference(
        max(d.max_error for d in moved_far),
        math.sqrt(errors / len(apart)),
        10 * math.log10(signal / errors) if signal else -math.inf,
    )
