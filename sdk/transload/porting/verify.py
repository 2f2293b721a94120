"""`verify`: whether two checkpoints hold the same numbers, module by module, whatever their formats."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from torch import Tensor

from transload.checkpoint import Checkpoint
from transload.checkpoint import open as open_checkpoint
from transload.quant import QTensor
from transload.requantize import Difference, difference

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Differing:
    """A module whose numbers differ; difference is None where the shapes do already."""

    name: str
    left: str
    right: str
    difference: Difference | None


@dataclass(frozen=True, slots=True)
class Verification:
    """The answer of `verify`. only_left and only_right are module and tensor names without a counterpart."""

    left: str
    right: str
    compared: int
    differing: tuple[Differing, ...]
    only_left: tuple[str, ...]
    only_right: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """True when both have the same modules with the same numbers."""
        return not (self.differing or self.only_left or self.only_right)

    def to_json(self) -> dict[str, object]:
        """Plain types for `json.dumps`."""
        return asdict(self) | {"equal": self.equal}

    def __str__(self) -> str:
        if self.equal:
            return f"{self.left} and {self.right}: {self.compared} modules and tensors, all numbers equal"
        lines = [
            f"{self.left} and {self.right}: {self.compared} modules and tensors compared, {len(self.differing)} differ"
        ]
        lines += [f"  {d.name}: {d.left} and {d.right}, {d.difference or 'shapes differ'}" for d in self.differing]
        lines += [f"  {name}: only in {self.left}" for name in self.only_left]
        lines += [f"  {name}: only in {self.right}" for name in self.only_right]
        return "\n".join(lines)


def verify(left: str | Path, right: str | Path, progress: Progress | None = None) -> Verification:
    """Compares every module of two checkpoints by the float32 values that their numbers mean.

    A quantized module is equal to a float one, and to one of another scheme, when all values are. Stacked experts are
    compared with single ones. Raises FormatError when a checkpoint is broken.
    """
    a, b = open_checkpoint(left), open_checkpoint(right)
    if a.config.get("model_type") != b.config.get("model_type"):  # one of them may be in another layout
        a, b = open_checkpoint(left, "native"), open_checkpoint(right, "native")
    mine, theirs = places(a), places(b)
    read_left, read_right = Reader(a), Reader(b)
    total = sum(entry.stored_bytes for entry in a.entries.values())
    done, differing = 0, []
    common = [name for name in mine if name in theirs]
    for name in common:
        if progress:
            progress(done, total, name)
        found = _compare(name, read_left(mine[name]), read_right(theirs[name]))
        if found is not None:
            differing.append(found)
        entry = a.entries[mine[name][0]]
        done += entry.stored_bytes // (entry.shape[0] if mine[name][1] is not None else 1)
    if progress:
        progress(total, total, "done")
    return Verification(
        str(left),
        str(right),
        len(common),
        tuple(differing),
        tuple(name for name in mine if name not in theirs),
        tuple(name for name in theirs if name not in mine),
    )


Place = tuple[str, "int | None"]  # entry name, index in a stack of experts


def places(checkpoint: Checkpoint) -> dict[str, Place]:
    """Where every weight is, under the name of its single form: quantized modules get a ".weight" here."""
    return dict(_names(checkpoint))


def _names(checkpoint: Checkpoint) -> Iterator[tuple[str, Place]]:
    for entry in checkpoint.entries.values():
        name = entry.name if entry.spec is None else f"{entry.name}.weight"
        head, dot, last = name.rpartition(".experts.")
        if len(entry.shape) == 3 and dot and last.count(".") == 1:
            yield from ((f"{head}.experts.{e}.{last}", (entry.name, e)) for e in range(entry.shape[0]))
        else:
            yield name, (entry.name, None)


def _compare(name: str, x: QTensor | Tensor, y: QTensor | Tensor) -> Differing | None:
    if _shape(x) != _shape(y):
        return Differing(name, f"{_kind(x)} {_shape(x)}", f"{_kind(y)} {_shape(y)}", None)
    if isinstance(x, QTensor) and isinstance(y, QTensor) and x.equal(y):
        return None
    apart = difference(_rows(x), _rows(y))
    return Differing(name, _kind(x), _kind(y), apart) if apart.rms_error else None


class Reader:
    """Reads values by place. Experts of a stack are asked for in order, so each is read once and alone."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._stack = ""
        self._next = 0
        self._experts: Iterator[QTensor | Tensor] = iter(())

    def __call__(self, place: Place) -> QTensor | Tensor:
        """The module or tensor at a place."""
        name, expert = place
        if expert is None:
            return self._checkpoint[name]
        if name != self._stack or expert < self._next:
            self._experts = self._checkpoint.experts(self._checkpoint.entries[name])
            self._stack, self._next = name, 0
        value = next(islice(self._experts, expert - self._next, None))
        self._next = expert + 1
        return value


def _rows(value: QTensor | Tensor) -> QTensor | Tensor:
    return value.reshape(1, -1) if isinstance(value, Tensor) and value.dim() < 2 else value


def _shape(value: QTensor | Tensor) -> tuple[int, ...]:
    return tuple(value.codes.shape if isinstance(value, QTensor) else value.shape)


def _kind(value: QTensor | Tensor) -> str:
    return str(value.spec) if isinstance(value, QTensor) else str(value.dtype).removeprefix("torch.")
