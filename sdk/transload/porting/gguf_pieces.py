"""The tensors of a plan as pieces of a GGUF file, and the file's own tensors that they make up."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from transload.errors import CannotHold
from transload.formats.gguf_blocks import BLOCKS
from transload.formats.gguf_encode import TYPES
from transload.models.gguf_places import Place
from transload.porting.plan import Output

_FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of a plan in the file. kind is its ggml type; dtype and shape are those of the bytes as written."""

    place: Place
    kind: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.dtype.itemsize * prod(self.shape)

    @property
    def values(self) -> tuple[int, ...]:
        """The shape counted in values, as headers have it."""
        if self.kind not in BLOCKS:
            return self.shape
        block = BLOCKS[self.kind]
        return (*self.shape[:-1], self.shape[-1] // block.nbytes * block.elems)

    def stored(self, tensor: Tensor) -> Tensor:
        """A tensor as the file has it: rows of a head interleaved, a single row as a vector, its dtype."""
        if self.place.heads:
            tensor = tensor[_interleaved(tensor.shape[0], self.place.heads)]
        if self.place.column:
            tensor = tensor.reshape(-1)
        return tensor.to(self.dtype)


@dataclass(frozen=True, slots=True)
class Whole:
    """One tensor of the file."""

    kind: str
    shape: tuple[int, ...]  # in values, torch's order
    nbytes: int


def piece_of(name: str, place: Place, output: Output, dtype: torch.dtype, shape: tuple[int, ...]) -> Piece:
    """The piece that a tensor of an output becomes. Raises CannotHold for dtypes that llama.cpp has no weights of."""
    if output.spec is not None:
        return Piece(place, TYPES[output.spec], dtype, shape)
    if dtype not in _FLOATS:
        raise CannotHold(f"a GGUF file cannot hold {name}: weights are {', '.join(_FLOATS.values())}, not {dtype}")
    dtype = torch.float32 if place.single else dtype
    return Piece(place, _FLOATS[dtype], dtype, shape[1:] if place.column else shape)


def wholes_of(pieces: Iterable[Piece]) -> dict[str, Whole]:
    """The tensors of the file, in the order in which their first piece comes.

    Raises CannotHold when the experts of a stack differ, or some are missing.
    """
    groups: dict[str, list[Piece]] = {}
    for piece in pieces:
        groups.setdefault(piece.place.name, []).append(piece)
    return {name: _whole(name, group) for name, group in groups.items()}


def _whole(name: str, group: list[Piece]) -> Whole:
    first = group[0]
    if first.place.expert is None:
        if len(group) > 1:
            raise CannotHold(f"a GGUF file cannot hold {len(group)} tensors in the one place {name}")
        return Whole(first.kind, first.values, first.nbytes)
    kinds = {(p.kind, p.values) for p in group}
    if len(kinds) > 1:
        found = ", ".join(sorted(f"{kind} {shape}" for kind, shape in kinds))
        raise CannotHold(f"the experts of a GGUF file are one tensor {name}, and here they differ: {found}")
    numbers = {p.place.expert for p in group}
    if numbers != set(range(len(group))):
        raise CannotHold(
            f"{name}: {len(group)} experts with numbers up to {max(n or 0 for n in numbers)}: some are missing"
        )
    return Whole(first.kind, (len(group), *first.values), len(group) * first.nbytes)


def _interleaved(rows: int, heads: int) -> Tensor:
    """Order in which llama.cpp stores rows: of every head the first of both halves, the second of both, ..."""
    if rows % (2 * heads):
        raise CannotHold(f"{rows} rows do not divide into {heads} heads of two halves")
    return torch.arange(rows).reshape(heads, 2, rows // heads // 2).transpose(1, 2).flatten()
