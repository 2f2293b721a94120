"""Reading the quantized modules that make up one parameter."""

from __future__ import annotations

from collections.abc import Callable

from transload.errors import ConfigError, Unsupported
from transload.quant import QTensor, fuse_rows, stack_experts
from transload.runtime.trace import Piece, Recipe


def assemble(name: str, recipe: Recipe, decode: Callable[[str], QTensor]) -> QTensor:
    """The weight of parameter `name` from its recipe, numbers untouched.

    decode: the quantized module of a name; a stack of experts is decoded once, everything else when its turn comes.
    Raises Unsupported when parts of one parameter are of different schemes.
    """
    cache: dict[str, QTensor] = {}

    def part(piece: Piece) -> QTensor:
        if piece.source not in cache:
            if piece.expert is None:
                cache.clear()
            cache[piece.source] = decode(piece.source)
        w = cache[piece.source]
        w = w if piece.expert is None else w.expert(piece.expert)
        return w if (piece.start, piece.stop) == (0, w.n) else w.rows(piece.start, piece.stop)

    try:
        if not recipe.stacked:
            return _joined([part(piece) for piece in recipe.runs[0]])
        return stack_experts([_joined([part(piece) for piece in run]) for run in recipe.runs])
    except ConfigError as e:
        raise Unsupported(f"{name}: its parts are quantized differently and cannot run as one: {e}") from e


def _joined(parts: list[QTensor]) -> QTensor:
    return parts[0] if len(parts) == 1 else fuse_rows(parts)
