"""What becomes of every entry of a checkpoint in another format; `planning` makes the plan, a job carries it out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from math import prod

import torch

from transload.checkpoint import Checkpoint
from transload.formats.base import Entry, Format
from transload.porting.schemes import Schemes
from transload.porting.target import Target
from transload.quant import ActSpec, QuantSpec
from transload.source import DTYPE_NAMES

DTYPES: Mapping[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}
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
    """One module or tensor of the target. spec is None for floats; expert is its place in a stack of the source.

    rounded: the scheme that numbers are rounded to; spec is the form that it has in the target.
    """

    name: str
    action: Action
    spec: QuantSpec | None
    tensors: Layout
    expert: int | None = None
    rounded: QuantSpec | None = None

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
    """What the caller allows. requantize: schemes for modules that the target cannot take, or (everything) for all.

    everything is for every linear, float ones too. floats: dtype of quantized tensors that the target keeps in float;
    float32 holds them exactly. act: activations to multiply with, instead of the source's own; None keeps those.
    """

    requantize: Schemes | None = None
    everything: bool = False
    floats: torch.dtype = torch.float32
    act: tuple[ActSpec | None] | None = None


@dataclass(slots=True)
class PortPlan:
    """Every step, in the source's order. refusals: module -> the reason, empty when the port can run.

    left_out: tensors of the source that the target has no use for, see `porting.calibrated`.
    """

    target: Target
    options: Options
    steps: list[Step] = field(default_factory=list)
    refusals: dict[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

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
