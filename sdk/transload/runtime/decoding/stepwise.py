"""A transformers decoder in which the tokens of one sequence take one call of the device's own instead of its layers.

Batches and everything else that the call does not do go through transformers' layers, which share weights and cache
with it. So every option of transformers works, and the ordinary case is fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, MoeModelOutputWithPast

from transload.errors import Unsupported
from transload.hal import Decoder, DecoderStep
from transload.runtime.decoding.angles import Angles
from transload.runtime.decoding.cache import even, make_growing
from transload.runtime.decoding.describe import DTYPES, describe, same
from transload.runtime.decoding.sequence import Sequence
from transload.runtime.embedding import QuantEmbedding

# Keywords that ask for nothing that the step does not do; cache_position is what transformers before 5.3 adds.
_HARMLESS = ("return_dict", "is_causal", "cache_position")
_MOST_ROWS = 2048  # of the embedding, kept as floats


@dataclass(frozen=True, slots=True, eq=False)
class _Prepared:
    """The step of a model, and what it was made from."""

    step: DecoderStep
    decoder: Decoder
    angles: Angles
    kernel: str
    table: list[Tensor]  # of the embedding
    rows: dict[int, Tensor] = field(default_factory=dict)  # embeddings of tokens that came before


class StepwiseModel(nn.Module):
    """Stands in for a decoder (LlamaModel, ...) and has its children under their names.

    reason: None while one sequence takes the step, or why it does not.
    """

    reason: str | None
    _prepared: _Prepared | None
    _sequences: WeakKeyDictionary[DynamicCache, Sequence]
    _changed: bool

    def __init__(self, inner: PreTrainedModel) -> None:
        """Raises Unsupported, with the reason, for a model without such a step."""
        super().__init__()
        if (
            next(inner.parameters(recurse=False), None) is not None
            or next(inner.buffers(recurse=False), None) is not None
        ):
            raise Unsupported(f"{type(inner).__name__} has parameters of its own")
        self.__dict__["inner"] = inner  # not a submodule: the children are ours
        for name, child in inner.named_children():
            self._modules[name] = child
        self.training = inner.training
        self._clear()
        self.prepare()
        if self.reason is not None:
            raise Unsupported(self.reason)

    def prepare(self) -> None:
        """Makes the step anew where the model's tensors are other ones than before; sets `reason`."""
        self._changed = False
        try:
            described, kernel = describe(self.inner)
            table = [*self.inner.embed_tokens.parameters(), *self.inner.embed_tokens.buffers()]
            known = self._prepared
            if known is not None and same(described, known.decoder) and _identical(table, known.table):
                return
            step = kernel.decoder(described)
            if isinstance(step, str):
                raise Unsupported(step)
        except Unsupported as e:
            self._clear()
            self.reason = str(e)
            return
        self._prepared = _Prepared(step, described, Angles(self.inner.rotary_emb), kernel.name, table)
        self.reason = None

    @property
    def kernel(self) -> str:
        """The kernel that multiplies the weights."""
        return "none" if self._prepared is None else self._prepared.kernel

    def _clear(self) -> None:
        self._prepared = None
        self._sequences = WeakKeyDictionary()
        self._changed = False
        self.reason = None

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the model that this stands in for."""
        if use_cache is None:
            use_cache = self.inner.config.use_cache
        if past_key_values is None and use_cache and not self.training:
            past_key_values = DynamicCache(config=self.inner.config)
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        count = 0 if tokens is None or tokens.shape[0] != 1 else tokens.shape[1]  # of one sequence
        if count != 1 and not torch.compiler.is_compiling():
            self.prepare()
        if count > 0 and use_cache and _asks_nothing(kwargs, self.inner.config):
            position = kwargs.get("cache_position") if position_ids is None else position_ids
            state = self._natively(input_ids, inputs_embeds, attention_mask, position, past_key_values)
            if state is not None:
                return self._output(last_hidden_state=state, past_key_values=past_key_values)
        if count > 1 and self._prepared is not None and type(past_key_values) is DynamicCache:
            make_growing(past_key_values, len(self.inner.layers))
        return self.inner(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

    @property
    def _output(self) -> Any:
        """The kind of output that models with and without experts give."""
        prepared = self._prepared
        mixture = prepared is not None and any(layer.experts for layer in prepared.decoder.layers)
        return MoeModelOutputWithPast if mixture else BaseModelOutputWithPast

    def _natively(
        self,
        input_ids: Tensor | None,
        embeds: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Any,
    ) -> Tensor | None:
        """Hidden states [1, T, hidden] of tokens of one sequence; None where transformers' layers must do it."""
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        if self._changed:
            self.prepare()
        prepared = self._prepared
        if prepared is None or type(cache) is not DynamicCache:
            return None
        length, count = cache.get_seq_length(), cast(Tensor, input_ids if embeds is None else embeds).shape[1]
        if attention_mask is not None and not _sees_all(attention_mask, length + count):
            return None
        first = length if position_ids is None else _first_of(position_ids, count)
        sequence = None if first is None else self._sequence(cache, prepared, length, count)
        if sequence is None or first is None:
            return None
        x = self._row(input_ids, prepared) if embeds is None and count == 1 else embeds
        if x is None:
            x = cast(Tensor, self.embed_tokens(input_ids))
        floats = x.detach().to(torch.float32)
        if count == 1:
            cos, sin = prepared.angles.at(first)
            state = prepared.step.run(floats.reshape(-1), cos, sin, sequence.bound, length)
        else:
            cos, sin = prepared.angles.between(first, first + count)
            state = prepared.step.run_many(floats[0].contiguous(), cos, sin, sequence.bound, length)
        sequence.grown(count)
        return state.to(x.dtype).reshape(1, count, -1)

    def _row(self, token: Any, prepared: _Prepared) -> Tensor:
        """The embedding [1, 1, hidden] of a token int [1, 1]. Quantized rows are kept for when a token comes again."""
        if not isinstance(self.embed_tokens, QuantEmbedding):
            return cast(Tensor, self.embed_tokens(token))
        index, rows = int(token), prepared.rows
        row = rows.get(index)
        if row is None:
            if len(rows) >= _MOST_ROWS:
                rows.clear()
            row = rows[index] = self.embed_tokens(token)
        return row

    def _sequence(self, cache: DynamicCache, prepared: _Prepared, length: int, count: int) -> Sequence | None:
        """The sequence of a cache with room for more tokens; None for a cache that is not one sequence."""
        known = self._sequences.get(cache)
        if known is not None and known.fits(cache, prepared.step, length, count):
            return known
        d = prepared.decoder
        if not make_growing(cache, len(d.layers)):
            return None
        empty = torch.empty(1, d.kv_heads, 0, d.head_dim, dtype=self.inner.dtype)
        for layer in cache.layers:
            if not layer.is_initialized:
                layer.lazy_initialization(empty, empty)
        rooms = [room for layer in cache.layers for room in (layer.key_room, layer.value_room)]
        if any(room.length != length or room.reserve(count).shape[0] != 1 for room in rooms):
            return None
        even(rooms)
        if rooms[0].reserve(count).dtype not in DTYPES:
            return None
        self._sequences[cache] = Sequence(cache, prepared.step)
        return self._sequences[cache]

    def _apply(self, *args: Any, **kwargs: Any) -> StepwiseModel:
        self._changed = True
        return cast(StepwiseModel, super()._apply(*args, **kwargs))  # type: ignore[no-untyped-call]

    def __getattr__(self, name: str) -> Any:
        """What this has not itself is the inner model's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["inner"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Children and settings belong to both."""
        if "inner" in self.__dict__ and (
            name == "training" or hasattr(type(self.inner), name) or name in self._modules
        ):
            setattr(self.inner, name, value)
            self.__dict__["_changed"] = True
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """Without what points into memory: a copy makes its own when it is used."""
        own = ("_prepared", "_sequences")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, not yet prepared."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._clear()
        self._changed = True


def _identical(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def _asks_nothing(kwargs: Mapping[str, Any], config: Any) -> bool:
    """Whether the keywords and the configuration ask for a hidden state and a cache only."""
    if any(value is not None and value is not False and name not in _HARMLESS for name, value in kwargs.items()):
        return False
    if kwargs.get("return_dict") is False or kwargs.get("is_causal") is False:
        return False
    return not (getattr(config, "output_hidden_states", False) or getattr(config, "output_attentions", False))


def _first_of(positions: Tensor, count: int) -> int | None:
    """The first of `count` positions that follow each other; None for any others."""
    flat = positions.reshape(-1)
    if len(flat) != count:
        return None
    first = int(flat[0])
    return first if count == 1 or torch.equal(flat.long(), torch.arange(first, first + count)) else None


def _sees_all(mask: Any, tokens: int) -> bool:
    """Whether a mask [1, tokens] hides nothing."""
    return isinstance(mask, Tensor) and mask.shape == (1, tokens) and bool(mask.all())
