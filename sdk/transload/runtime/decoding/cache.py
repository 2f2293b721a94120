"""Keys and values in buffers with room to grow, behind transformers' own cache: nothing is joined anew per token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

_LEAST_ROOM = 256  # tokens; a buffer that is full grows by this, or by a quarter


class Room:
    """A tensor [B, H, length, D] as the front of a larger buffer [B, H, capacity, D]."""

    __slots__ = ("buffer", "length")

    def __init__(self) -> None:
        self.buffer: Tensor | None = None
        self.length = 0

    def view(self) -> Tensor | None:
        """The tokens that are there."""
        return None if self.buffer is None else self.buffer[:, :, : self.length]

    def assign(self, t: Tensor | None) -> None:
        """Takes a tensor: a shorter view of the buffer only changes the length, anything else takes its place."""
        if t is not None and self.buffer is not None and _is_front(t, self.buffer):
            self.length = t.shape[2]
            return
        self.buffer = None if t is None else t.contiguous()
        self.length = 0 if t is None else t.shape[2]

    def append(self, states: Tensor) -> Tensor:
        """Adds tokens [B, H, T, D] and returns all of them."""
        if self.buffer is None:
            self.buffer = states[:, :, :0]
        if states.requires_grad or states.shape[:2] != self.buffer.shape[:2] or states.dtype != self.buffer.dtype:
            self.assign(torch.cat([self.buffer[:, :, : self.length], states], dim=2))  # or torch's own error
        else:
            self.reserve(states.shape[2])
            self.buffer[:, :, self.length : self.length + states.shape[2]] = states
            self.length += states.shape[2]
        return self.buffer[:, :, : self.length]

    def reserve(self, tokens: int, least: int = 0) -> Tensor:
        """The buffer with room for more tokens, moved to a larger one where there is not enough.

        least: a capacity that it has then, at least.
        """
        assert self.buffer is not None
        needed = self.length + tokens
        # Outside inference mode torch refuses to write to a tensor that was made inside.
        locked = self.buffer.is_inference() and not torch.is_inference_mode_enabled()
        if max(needed, least) > self.buffer.shape[2] or locked or not self.buffer.is_contiguous():
            b, h, _, d = self.buffer.shape
            capacity = least if least >= needed else needed + max(_LEAST_ROOM, needed // 4)
            larger = self.buffer.new_empty(b, h, capacity, d)
            larger[:, :, : self.length] = self.buffer[:, :, : self.length]
            self.buffer = larger
        return self.buffer


def _is_front(t: Tensor, buffer: Tensor) -> bool:
    """Whether t is buffer[:, :, :n]."""
    return (
        t.dim() == 4
        and t.data_ptr() == buffer.data_ptr()
        and t.dtype == buffer.dtype
        and t.stride() == buffer.stride()
        and t.shape[2] <= buffer.shape[2]
        and (t.shape[0], t.shape[1], t.shape[3]) == (buffer.shape[0], buffer.shape[1], buffer.shape[3])
    )


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """One layer of a DynamicCache. `keys` and `values` are views: cropping, reordering and repeating work as ever."""

    def __init__(self) -> None:
        self.key_room, self.value_room = Room(), Room()
        super().__init__()

    @classmethod
    def taking_over(cls, layer: DynamicLayer) -> GrowingLayer:
        """A layer with the tokens of another."""
        new = cls()
        if layer.is_initialized and layer.keys is not None and layer.keys.dim() == 4:
            new.lazy_initialization(layer.keys, layer.values)
            new.keys, new.values = layer.keys, layer.values
        return new

    @property
    def keys(self) -> Tensor | None:
        """[B, H, T, D]."""
        return self.key_room.view()

    @keys.setter
    def keys(self, t: Tensor | None) -> None:
        self.key_room.assign(t)

    @property
    def values(self) -> Tensor | None:
        """[B, H, T, D]."""
        return self.value_room.view()

    @values.setter
    def values(self, t: Tensor | None) -> None:
        self.value_room.assign(t)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Remembers dtype and device; an empty buffer of the right shape stands for no tokens."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds tokens [B, H, T, D] and returns all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self.key_room.append(key_states), self.value_room.append(value_states)

    def get_seq_length(self) -> int:
        """Tokens in the layer."""
        return self.key_room.length


def _is_whole(layer: Any) -> bool:
    """Whether a layer has every token; one with a sliding window has, before it drops the first."""
    if type(layer) is DynamicSlidingWindowLayer:
        tokens = layer.keys.shape[-2] if layer.is_initialized and layer.keys.dim() == 4 else 0
        return not getattr(layer, "record_past", False) and layer.cumulative_length == tokens
    return type(layer) in (DynamicLayer, GrowingLayer)


def even(rooms: list[Room]) -> None:
    """Gives all rooms the capacity of the largest, as one call for all layers expects it."""
    capacity = max(room.reserve(0).shape[2] for room in rooms)
    for room in rooms:
        room.reserve(0, capacity)


def make_growing(cache: DynamicCache, layers: int) -> bool:
    """Puts growing layers in the place of a cache's plain ones; False, and no change, where it has any other kind.

    They keep all tokens, also of layers with a sliding window; masks and the step leave out those that are not seen.
    """
    if type(cache) is not DynamicCache or cache.offloading or len(cache.layers) > layers:
        return False
    if not all(_is_whole(layer) for layer in cache.layers):
        return False
    for i, layer in enumerate(cache.layers):
        if type(layer) is not GrowingLayer:
            cache.layers[i] = GrowingLayer.taking_over(layer)
    cache.layers.extend(GrowingLayer() for _ in range(layers - len(cache.layers)))
    return True
