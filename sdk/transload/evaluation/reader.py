"""A model as two steps: hidden states of a window, then logits of as few tokens at a time as memory wants.

The logits of one window of a 150,000-token vocabulary are 600 MB, so they never exist at once. And a source model that
has read the text can go: its hidden states and its head give its logits again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from transload.evaluation.windows import Window

CHUNK = 64  # tokens whose logits exist at once
Layers = tuple[Tensor, ...]  # float32 [T, H] each: the embedding, then the output of every layer


class Reader:
    """Reads windows with one model. exact_head: False where the model does more than a head to its hidden states.

    tokens and seconds: what was read so far, without the logits.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.device = model.device
        self.tokens, self.seconds = 0, 0.0
        decoder, head = _parts(model)
        self.exact_head = decoder is not None and head is not None and _head_suffices(model, decoder, head)
        self._decoder: Any = decoder if self.exact_head else model
        self._head: Callable[[Tensor], Tensor] = head if self.exact_head else _as_it_is

    def read(self, window: Window, layer_tokens: int = 0) -> tuple[Tensor, Layers]:
        """The states [T, H] (or the logits) that predict the window's T scored tokens.

        And the output of every layer for the first `layer_tokens` of them.
        """
        layers, start = layer_tokens > 0, time.perf_counter()
        ids = window.ids.unsqueeze(0).to(self.device)
        with torch.inference_mode():
            # With a cache the tokens take the way of a prompt, which on the CPU is one native call.
            out = self._decoder(input_ids=ids, use_cache=not layers, output_hidden_states=layers)
            last = (out.last_hidden_state if self.exact_head else out.logits)[0]
            rows = slice(window.first - 1, len(window.ids) - 1)
            states = tuple(h[0, rows][:layer_tokens].float().cpu() for h in out.hidden_states) if layers else ()
        self.tokens += len(window.ids)
        self.seconds += time.perf_counter() - start
        return last[rows], states

    def logits(self, hidden: Tensor) -> Iterator[Tensor]:
        """Logits [CHUNK, V] for all of the hidden states [T, H], on the model's device."""
        for piece in torch.split(hidden, CHUNK):
            with torch.inference_mode():
                logits = self._head(piece.to(self.device))
            yield logits  # outside: a generator that waits would leave its mode to whoever reads it

    def forget_layers(self) -> None:
        """Gives up everything but the head: what was read can still be turned into logits, nothing new can be read."""
        self._decoder = None


def _parts(model: PreTrainedModel) -> tuple[Any, Any]:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return (None if decoder is model else decoder), model.get_output_embeddings()


def _head_suffices(model: PreTrainedModel, decoder: Any, head: Any) -> bool:
    """True when head(decoder(ids)) is what the model gives: no scaling or capping in between."""
    ids = torch.arange(8, device=model.device).unsqueeze(0) % model.config.get_text_config().vocab_size
    with torch.inference_mode():
        whole = model(input_ids=ids, use_cache=False).logits.float()
        parts = head(decoder(input_ids=ids, use_cache=False).last_hidden_state).float()
    return whole.shape == parts.shape and torch.allclose(whole, parts, rtol=1e-3, atol=1e-3)


def _as_it_is(logits: Tensor) -> Tensor:
    return logits
