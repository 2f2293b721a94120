"""What becomes of every entry of a checkpoint in another format, decided from headers alone.

Nothing is read and nothing is written here. Refusals are collected, so that the caller can show all of them at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from math import prod

import torch

from transload.checkpoint import Checkpoint
from transload.formats.base import Entry, Format
from transload.formats.plain import Plain
from transload.models.roles import kept_in_float
from transload.porting.fused import agree
from transload.porting.target import Target
from transload.quant import ActSpec, QTensor, QuantSpec, Zero
from transload.rewrite import exact_forms
from transload.source import DTYPE_NAMES

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_PER_EXPERT = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
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


@dataclass(frozen=True, slots=True)
class Options:
    """What the caller allows. requantize: a scheme for modules that the target cannot take, or (everything) for all.

    floats: dtype of quantized tensors that the target keeps in float; float32 holds them exactly. act: activations
    to multiply with, instead of the source's own; None keeps those.
    """

    requantize: QuantSpec | None = None
    everything: bool = False
    floats: torch.dtype = torch.float32
    act: tuple[ActSpec | None] | None = None


@dataclass(slots=True)
class PortPlan:
    """Every step, in the source's order. refusals: module -> the reason, empty when the port can run."""

    target: Target
    options: Options
    steps: list[Step] = field(default_factory=list)
    refusals: dict[str, str] = field(default_factory=dict)

    @property
    def format(self) -> Format:
        """What the target is written in."""
        return self.target.format

    def outputs(self) -> Iterator[Output]:
        """Every module and tensor of the target."""
        for step in self.steps:
            yield from step.outputs

    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Every stored tensor of the target."""
        return {name: where for output in self.outputs() for name, where in output.tensors.items()}


def plan_port(source: Checkpoint, target: Target, options: Options) -> PortPlan:
    """Decides every step; modules that cannot go are in `refusals`."""
    plan, place = PortPlan(target, options), Placer(target, options)
    for entry in source.entries.values():
        pieces = list(pieces_of(entry, source))
        if entry.spec is None:
            outputs = [_copied(name, shape, entry.dtype, expert) for name, shape, expert in pieces]
        else:
            spec = entry.spec if options.act is None else replace(entry.spec, act=options.act[0])
            outputs = [place(name, spec, shape, expert) for name, shape, expert in pieces]
        plan.steps.append(Step(entry, tuple(outputs)))
    if target.fuses:
        agree(plan, place)
    plan.refusals = place.refusals
    return plan


def pieces_of(entry: Entry, source: Checkpoint) -> Iterator[tuple[str, tuple[int, ...], int | None]]:
    """Name, shape and index of what an entry is on disk: itself, or the experts of a stack one by one.

    A stack with gate and up in one (gpt-oss) stays as it is: its experts have no names of their own.
    """
    head, dot, last = entry.name.removesuffix(".weight").rpartition(".experts.")
    weight = entry.spec is not None or entry.name.endswith(".weight")
    if len(entry.shape) != 3 or not dot or not weight or last not in _PER_EXPERT or _fused_stack(head, source):
        yield entry.name, entry.shape, None
        return
    suffix = ".weight" if entry.spec is None else ""
    for e in range(entry.shape[0]):
        yield f"{head}.experts.{e}.{last}{suffix}", entry.shape[1:], e


def _fused_stack(head: str, source: Checkpoint) -> bool:
    name = f"{head}.experts.gate_up_proj"
    return name in source.entries or f"{name}.weight" in source.entries


def _copied(name: str, shape: tuple[int, ...], dtype: str, expert: int | None) -> Output:
    return Output(name, Action.COPY, None, {name: (_DTYPES[dtype], shape)}, expert)


class Placer:
    """Decides one quantized module at a time; equal schemes and shapes are looked at once."""

    def __init__(self, target: Target, options: Options) -> None:
        self.target, self.options = target, options
        self.refusals: dict[str, str] = {}
        self._answers: dict[tuple[QuantSpec, tuple[int, ...], bool], str | None] = {}
        self._layouts: dict[tuple[QuantSpec, tuple[int, ...], str], Layout] = {}

    def __call__(self, name: str, spec: QuantSpec, shape: tuple[int, ...], expert: int | None) -> Output:
        """Where a module goes: as it is, in an exact form, as floats, or requantized."""
        kept = kept_in_float(name)
        if isinstance(self.target.format, Plain) or (kept == "embedding" and not self.target.format.embeddings):
            return self._dequantized(name, shape, expert)
        exact = None if self.options.everything else self._taken(name, spec, shape)
        if exact is not None:
            return self.in_form(name, exact, shape, expert)
        if kept is not None:  # heads and routers suffer most from rounding, and every target has floats
            return self._dequantized(name, shape, expert)
        return self.requantized(name, spec, shape, expert)

    def in_form(self, name: str, spec: QuantSpec, shape: tuple[int, ...], expert: int | None) -> Output:
        """The same numbers under a scheme that the target takes."""
        return Output(name, Action.REPACK, spec, self._layout(name, spec, shape), expert)

    def requantized(
        self, name: str, spec: QuantSpec, shape: tuple[int, ...], expert: int | None, why: str = ""
    ) -> Output:
        """Other numbers where the caller allows them, else a refusal. The scheme's own exact forms will do as well."""
        other = self.options.requantize
        if other is None:
            self.refusals[name] = why or self._reason(name, spec, shape)
            return Output(name, Action.REPACK, spec, {}, expert)
        form = self._taken(name, other, shape)
        if form is None:
            self.refusals[name] = f"{other} instead of {spec}: {self._reason(name, other, shape)}"
            return Output(name, Action.REQUANTIZE, other, {}, expert)
        return Output(name, Action.REQUANTIZE, form, self._layout(name, form, shape), expert)

    def refuses(self, name: str, spec: QuantSpec, shape: tuple[int, ...]) -> str | None:
        """The target's answer for a scheme and shape."""
        key = (spec, shape, ".experts." in name)
        if key not in self._answers:
            self._answers[key] = self.target.refuses(name, spec, shape)
        return self._answers[key]

    def _taken(self, name: str, spec: QuantSpec, shape: tuple[int, ...]) -> QuantSpec | None:
        """The nearest exact form of a scheme that the target takes."""
        forms = exact_forms(spec, self.target.format.group_size)
        return next((form for form in forms if self.refuses(name, form, shape) is None), None)

    def _reason(self, name: str, spec: QuantSpec, shape: tuple[int, ...]) -> str:
        """Why no form of a scheme is taken: the engine's reason where the format would hold one."""
        forms = list(exact_forms(spec, self.target.format.group_size))
        held = [form for form in forms if self.target.format.cannot_hold(form, shape) is None]
        return self.refuses(name, held[0] if held else forms[0], shape) or ""

    def _dequantized(self, name: str, shape: tuple[int, ...], expert: int | None) -> Output:
        plain = self.target.format
        dtype = plain.dtype if isinstance(plain, Plain) else self.options.floats
        return Output(name, Action.DEQUANTIZE, None, {f"{name}.weight": (dtype, shape)}, expert)

    def _layout(self, name: str, spec: QuantSpec, shape: tuple[int, ...]) -> Layout:
        last = name.rpartition(".")[2]  # msModelSlim's scale_bias has another shape for down_proj and the like
        key = (spec, shape, last)
        if key not in self._layouts:
            self._layouts[key] = _encoded(self.target.format, spec, shape, last)
        return {name + part: where for part, where in self._layouts[key].items()}


def _encoded(format: Format, spec: QuantSpec, shape: tuple[int, ...], name: str) -> Layout:
    """The tensors that `encode` gives, names after the module's, found by encoding zeros.

    Tensors without data would do, but their first use in torch imports its compiler, which takes seconds.
    """
    side = (*shape[:-1], spec.groups(shape[-1]))
    zero_dtype = {Zero.CODES: torch.uint8, Zero.FLOATS: spec.scale_dtype}.get(spec.zero)
    zeros = QTensor(
        spec,
        torch.zeros(shape, dtype=torch.uint8),
        torch.ones(side, dtype=spec.scale_dtype),
        None if zero_dtype is None else torch.zeros(side, dtype=zero_dtype),
        torch.zeros(side, dtype=spec.scale_dtype) if spec.zero is Zero.MINS else None,
        torch.zeros(shape[-1], dtype=torch.int32) if spec.act_order else None,
    )
    tensors = format.encode(name, zeros)
    return {full.removeprefix(name): (t.dtype, tuple(t.shape)) for full, t in tensors.items()}
