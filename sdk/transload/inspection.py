"""What a checkpoint is: the scheme of every module, bytes, and who can run it or why not. Reads headers only."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from transload import hal
from transload.checkpoint import Checkpoint
from transload.checkpoint import open as open_checkpoint
from transload.engines import ENGINES, Engine, Layer
from transload.errors import NoKernel
from transload.formats.base import Entry

_LAYER_NUMBER = re.compile(r"\.\d+(?=\.|$)")
_EXPERT = re.compile(r"\.experts(\.|$)")


@dataclass(frozen=True, slots=True)
class Group:
    """Modules of the same role, scheme and shape: one row of the table."""

    role: str  # the module's name with numbers as *: model.layers.*.mlp.up_proj
    scheme: str  # a spec in words, or a float dtype
    shape: tuple[int, ...]
    count: int
    stored_bytes: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether one backend or engine runs the checkpoint, and how; reasons are given by role."""

    name: str
    runs: bool
    executed: tuple[str, ...] = ()  # the schemes that really run
    notes: tuple[str, ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)  # role -> why not


@dataclass(frozen=True, slots=True)
class Inspection:
    """The answer of `transload inspect`."""

    path: str
    format: str
    architecture: str
    parameters: int
    stored_bytes: int
    groups: tuple[Group, ...]
    backends: tuple[Verdict, ...]
    engines: tuple[Verdict, ...]
    notes: tuple[str, ...] = ()  # what no module shows: activations, caches, another layout that exists


def inspect(path: str | Path) -> Inspection:
    """Describes a checkpoint from its headers: nothing is decoded.

    Raises FormatError when the files contradict themselves.
    """
    checkpoint = open_checkpoint(path)
    quantized = {name: e for name, e in checkpoint.entries.items() if e.spec is not None}
    return Inspection(
        path=str(path),
        format=checkpoint.format.name,
        architecture=_architecture(checkpoint),
        parameters=sum(_count(e.shape) for e in checkpoint.entries.values()),
        stored_bytes=sum(e.stored_bytes for e in checkpoint.entries.values()),
        groups=_groups(checkpoint.entries),
        backends=tuple(_backend_verdict(b, quantized) for _, b in sorted(hal.backends().items())),
        engines=tuple(_engine_verdict(e, checkpoint.format.name, quantized) for e in ENGINES),
        notes=tuple(checkpoint.notes()),
    )


def role_of(name: str) -> str:
    """A module's or tensor's name with its numbers as *."""
    return _LAYER_NUMBER.sub(".*", name)


def _architecture(checkpoint: Checkpoint) -> str:
    names = checkpoint.config.get("architectures")
    known = names[0] if isinstance(names, list) and names else checkpoint.config.get("model_type")
    return str(known or "unknown")


def _count(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _groups(entries: Mapping[str, Entry]) -> tuple[Group, ...]:
    rows: dict[tuple[str, str, tuple[int, ...]], list[Entry]] = {}
    for entry in entries.values():
        scheme = str(entry.spec) if entry.spec else entry.dtype
        rows.setdefault((role_of(entry.name), scheme, entry.shape), []).append(entry)
    return tuple(Group(*key, len(found), sum(e.stored_bytes for e in found)) for key, found in rows.items())


def _backend_verdict(backend: hal.Backend, quantized: Mapping[str, Entry]) -> Verdict:
    missing = backend.unavailable()
    if missing is not None:
        return Verdict(backend.name, False, reasons={"*": missing})
    device = backend.devices()[0]
    executed: dict[str, None] = {}
    reasons: dict[str, str] = {}
    for entry in quantized.values():
        assert entry.spec is not None
        experts = entry.shape[0] if len(entry.shape) == 3 else None
        problem = hal.Problem(entry.shape[-2], entry.shape[-1], entry.spec, experts=experts)
        try:
            executed[hal.choose(backend, problem, device).kernel.executed(problem)] = None
        except NoKernel as e:
            reasons.setdefault(role_of(entry.name), str(e))
    return Verdict(backend.name, not reasons, tuple(executed), (), reasons)


def _engine_verdict(engine: Engine, format: str, quantized: Mapping[str, Entry]) -> Verdict:
    executed: dict[str, None] = {}
    notes: dict[str, None] = {}
    reasons: dict[str, str] = {}
    for entry in quantized.values():
        assert entry.spec is not None
        covered = engine.covers(format, Layer(entry.spec, experts=bool(_EXPERT.search(entry.name))))
        if isinstance(covered, str):
            reasons.setdefault(role_of(entry.name), covered)
            continue
        executed[covered.executed.format(bits=entry.spec.bits)] = None
        if covered.note:
            notes[covered.note] = None
    return Verdict(engine.label, not reasons, tuple(executed), tuple(notes), reasons)
