"""A checkpoint seen under other names: entries are cut from and joined of stored rows, numbers untouched.

>>> checkpoint = transload.open("glm-4-9b-chat", layout="native")
>>> checkpoint["model.layers.0.self_attn.k_proj"].n
256

The view is a format like any other, so whatever reads a checkpoint reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from transload.formats.base import Entry, Format, Json, Source
from transload.formats.packed import PackedRows, join_rows
from transload.layouts.parts import Parts
from transload.models.relayout import Frequencies, Relayout, Rows
from transload.quant import QTensor, fuse_rows

_Value = QTensor | PackedRows | Tensor


class Relaid(Format):
    """Reads what another format reads, under other names.

    assets: makes the files that the layout has beside its weights, by name; they take the place of stored ones.
    """

    def __init__(
        self, inner: Format, source: Source, relayout: Relayout, assets: Callable[[], dict[str, bytes]]
    ) -> None:
        self.name = inner.name  # type: ignore[misc]  # of the format that is read: a view has none of its own
        self.container = inner.container  # type: ignore[misc]
        self._inner, self._relayout, self._assets = inner, relayout, assets
        self._stored = inner.entries(source)
        self._parts = Parts(source, inner, self._stored, relayout)
        self._held: tuple[str, str, _Value] | None = None

    def detects(self, source: Source) -> bool:
        """As the format behind it."""
        return self._inner.detects(source)

    def config(self, source: Source) -> Json:
        """config.json of the layout."""
        return dict(self._relayout.config)

    def files(self, source: Source) -> dict[str, bytes]:
        """What the container holds, and the files of the layout, its tokenizer among them."""
        return self._inner.files(source) | self._assets()

    def notes(self, source: Source) -> list[str]:
        """What the layout is and leaves out, and what the format behind it says."""
        gone = [f"{name} is left out: {why}" for name, why in self._parts.dropped.items()]
        return [*self._relayout.notes, *gone, *self._inner.notes(source)]

    def entries(self, source: Source) -> dict[str, Entry]:
        """Every entry under its new name."""
        return dict(self._parts.entries)

    def decode(self, source: Source, entry: Entry) -> QTensor:
        """The rows of a quantized module, cut and joined."""
        parts = [w for w in self._pieces(entry, "codes", lambda e: self._inner.decode(source, e)) if type(w) is QTensor]
        return parts[0] if len(parts) == 1 else fuse_rows(parts)

    def read(self, source: Source, entry: Entry) -> Tensor:
        """The rows of a float tensor, cut and joined."""
        made = self._relayout.made
        if made is not None and entry.name == made.name:
            return frequencies(made)
        parts = [t for t in self._pieces(entry, "floats", lambda e: self._inner.read(source, e)) if type(t) is Tensor]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def packed(self, source: Source, entry: Entry) -> PackedRows | None:
        """The rows of a quantized module with its codes still in words."""
        parts = list(self._pieces(entry, "words", lambda e: self._inner.packed(source, e)))
        rows = [p for p in parts if type(p) is PackedRows]
        if len(rows) < len(self._parts.pieces[entry.name]):
            return None
        return rows[0] if len(rows) == 1 else join_rows(rows)

    def _pieces(self, entry: Entry, kind: str, read: Callable[[Entry], _Value | None]) -> Iterator[_Value]:
        """The pieces of an entry, up to the first that `read` has no answer for.

        A module that is cut is kept until its last rows are taken, so that it is read once.
        """
        for piece in self._parts.pieces[entry.name]:
            held, self._held = self._held, None
            value = (
                held[2] if held is not None and held[:2] == (kind, piece.module) else read(self._stored[piece.module])
            )
            if value is None:
                return
            if piece.stop is not None and piece.stop < _rows(self._stored[piece.module]):
                self._held = (kind, piece.module, value)
            yield _cut(value, piece)


def frequencies(made: Frequencies) -> Tensor:
    """The buffer in its own dtype, every step of it, as ChatGLM's code computes it: [dim / 2]."""
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(made.dtype, torch.float32)
    return 1.0 / (made.base ** (torch.arange(0, made.dim, 2).to(dtype) / made.dim))


def _cut(value: _Value, piece: Rows) -> _Value:
    if piece.stop is None:
        return value
    return value[piece.start : piece.stop] if isinstance(value, Tensor) else value.rows(piece.start, piece.stop)


def _rows(entry: Entry) -> int:
    """Output rows of a linear or an embedding [N, K], numbers of a bias or norm [N]."""
    return entry.shape[-2] if len(entry.shape) > 1 else entry.shape[0]
