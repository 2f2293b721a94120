"""The cache of one sequence and its addresses on the native side, for as long as nobody changes it."""

from __future__ import annotations

from typing import cast

from transformers import DynamicCache

from transload.hal import DecoderStep
from transload.runtime.decoding.cache import GrowingLayer


class Sequence:
    """The cache of one sequence, as the step last saw it."""

    def __init__(self, cache: DynamicCache, step: DecoderStep) -> None:
        layers = cast(list[GrowingLayer], list(cache.layers))
        keys, values = [layer.key_room for layer in layers], [layer.value_room for layer in layers]
        self._step, self._layers = step, layers
        self._rooms = [(room, room.reserve(0)) for room in (*keys, *values)]
        self.bound = step.bind([room.reserve(0)[0] for room in keys], [room.reserve(0)[0] for room in values])
        self._capacity = self._rooms[0][1].shape[2]

    def fits(self, cache: DynamicCache, step: DecoderStep, length: int, more: int) -> bool:
        """Whether nothing was replaced since, all layers hold `length` tokens, and `more` have room."""
        if self._step is not step or length + more > self._capacity or cache.layers != self._layers:
            return False
        return all(room.buffer is buffer and room.length == length for room, buffer in self._rooms)

    def grown(self, tokens: int) -> None:
        """Counts the tokens that the step has added."""
        for room, _ in self._rooms:
            room.length += tokens
