"""What becomes of every entry of a checkpoint in another format, decided from headers alone.

Nothing is read and nothing is written here. Refusals are collected, so that the caller can show all of them at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from math import prod

import torch

from transload.checkpoint import Checkpoint
from transload.errors import CannotHold
from transload.formats.base import Entry, Format
from transload.formats.plain import Plain
from transload.models.roles import kept_in_float
from transload.quant import QTensor, QuantSpec, Zero
from transload.rewrite import exact_forms
from transload.source import DTYPE_NAMES

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # stored tensors: dtype and shape by full name


class Action(Enum):
    """What happens to the numbers of one module."""

    COPY = "copy"  # a float tensor, as it is
    REPACK = "repack"  # the same numbers in another layout
    DEQUANTIZE = "dequantize"  # written as floats
    REQUANTIZE = "requantize"  # other numbers, because the caller asked for them


@dataclass(frozen=True, slots=True)
class Output:
    """One module or tensor of the target. spec is None for floats; expert is its place in a stack of the source."""

    name: str
    action: Action
    spec: QuantSpec | None
    tensors: Layout
    expert: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in the target."""
        return sum(dtype.itemsize * prod(shape) for dtype, shape in self.tensors.values())


@dataclass(frozen=True, slots=True)
class Step:
    """One entry of the source and the outputs made of it: one, or one per expert of a stack."""

    entry: Entry
    outputs: tuple[Output, ...]


@dataclass(slots=True)
class PortPlan:
    """Every step, in the source's order. refusals: module -> the reason, empty when the port can run."""

    format: Format
    requantize: QuantSpec | None
    floats: torch.dtype
    steps: list[Step] = field(default_factory=list)
    refusals: dict[str, str] = field(default_factory=dict)

    def outputs(self) -> Iterator[Output]:
        """Every module and tensor of the target."""
        for step in self.steps:
            yield from step.outputs

    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Every stored tensor of the target."""
        return {name: where for output in self.outputs() for name, where in output.tensors.items()}


def plan_port(
    source: Checkpoint,
    format: Format,
    requantize: QuantSpec | None = None,
    everything: bool = False,
    floats: torch.dtype = torch.float32,
) -> PortPlan:
    """Decides every step. requantize: for modules that the format cannot hold, or for all quantized ones.

    floats: dtype of quantized tensors that the target keeps in float (embeddings); float32 holds them exactly.
    """
    plan = PortPlan(format, requantize, floats)
    for entry in source.entries.values():
        pieces = list(_pieces(entry))
        if entry.spec is None:
            outputs = [_copied(name, shape, entry.dtype, expert) for name, shape, expert in pieces]
        else:
            outputs = [
                _placed(plan, name, entry.spec, shape, expert, everything and requantize is not None)
                for name, shape, expert in pieces
            ]
        plan.steps.append(Step(entry, tuple(outputs)))
    return plan


def refused(plan: PortPlan, target: str) -> CannotHold:
    """The error that lists every refusal of a plan, modules grouped by reason and role."""
    grouped: dict[str, dict[str, int]] = {}
    for name, reason in plan.refusals.items():
        roles = grouped.setdefault(reason, {})
        role = ".".join("*" if part.isdecimal() else part for part in name.split("."))
        roles[role] = roles.get(role, 0) + 1
    lines = [
        f"{reason} ({', '.join(f'{count} x {role}' for role, count in r.items())})" for reason, r in grouped.items()
    ]
    quantized = sum(1 for output in plan.outputs() if output.action is not Action.COPY)
    ways = "requantize, which changes numbers and reports the error (--requantize int8-g32), or another target"
    if plan.requantize is not None:
        ways = "another scheme to requantize to, or another target"
    return CannotHold(
        f"'{target}' cannot hold {len(plan.refusals)} of {quantized} quantized modules: {'; '.join(lines)}. "
        f"What would work: {ways} (transload holds everything, fp32 dequantizes)"
    )


def _pieces(entry: Entry) -> Iterator[tuple[str, tuple[int, ...], int | None]]:
    """Name, shape and index of what an entry is on disk: itself, or the experts of a stack one by one."""
    head, dot, last = entry.name.removesuffix(".weight").rpartition(".experts.")
    weight = entry.spec is not None or entry.name.endswith(".weight")
    if len(entry.shape) != 3 or not dot or "." in last or not weight:
        yield entry.name, entry.shape, None
        return
    suffix = ".weight" if entry.spec is None else ""
    for e in range(entry.shape[0]):
        yield f"{head}.experts.{e}.{last}{suffix}", entry.shape[1:], e


def _copied(name: str, shape: tuple[int, ...], dtype: str, expert: int | None) -> Output:
    return Output(name, Action.COPY, None, {name: (_DTYPES[dtype], shape)}, expert)


def _placed(
    plan: PortPlan, name: str, spec: QuantSpec, shape: tuple[int, ...], expert: int | None, everything: bool
) -> Output:
    """Where a quantized module goes: as it is, in an exact form, as floats, or requantized."""
    kept = kept_in_float(name)
    if isinstance(plan.format, Plain) or (kept == "embedding" and plan.format.name != "transload"):
        return _dequantized(plan, name, shape, expert)
    exact = next((form for form in exact_forms(spec) if plan.format.cannot_hold(form, shape) is None), None)
    if exact is not None and not everything:
        return Output(name, Action.REPACK, exact, _layout(plan.format, name, exact, shape), expert)
    if plan.requantize is None:
        plan.refusals[name] = plan.format.cannot_hold(spec, shape) or ""
        return Output(name, Action.REPACK, spec, {}, expert)
    if kept is not None:  # heads and routers suffer most, and every target has floats
        return _dequantized(plan, name, shape, expert)
    reason = plan.format.cannot_hold(plan.requantize, shape)
    if reason is not None:
        plan.refusals[name] = f"{plan.requantize} instead of {spec}: {reason}"
        return Output(name, Action.REQUANTIZE, plan.requantize, {}, expert)
    return Output(name, Action.REQUANTIZE, plan.requantize, _layout(plan.format, name, plan.requantize, shape), expert)


def _dequantized(plan: PortPlan, name: str, shape: tuple[int, ...], expert: int | None) -> Output:
    dtype = plan.format.dtype if isinstance(plan.format, Plain) else plan.floats
    return Output(name, Action.DEQUANTIZE, None, {f"{name}.weight": (dtype, shape)}, expert)


def _layout(format: Format, name: str, spec: QuantSpec, shape: tuple[int, ...]) -> Layout:
    """The tensors that `encode` will give, found by encoding a weight without data."""
    side = (*shape[:-1], spec.groups(shape[-1]))
    zero_dtype = {Zero.CODES: torch.uint8, Zero.FLOATS: spec.scale_dtype}.get(spec.zero)
    empty = QTensor(
        spec,
        torch.empty(shape, dtype=torch.uint8, device="meta"),
        torch.empty(side, dtype=spec.scale_dtype, device="meta"),
        None if zero_dtype is None else torch.empty(side, dtype=zero_dtype, device="meta"),
        torch.empty(side, dtype=spec.scale_dtype, device="meta") if spec.zero is Zero.MINS else None,
        torch.zeros(shape[-1], dtype=torch.int32) if spec.act_order else None,
    )
    return {full: (t.dtype, tuple(t.shape)) for full, t in format.encode(name, empty).items()}
