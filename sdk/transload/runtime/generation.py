"""Text from a model: transformers' generate with a chat template, streaming, a seed and honest timings."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, TextStreamer

from transload.errors import ConfigError
from transload.runtime.decoding.loop import one_sequence, suits
from transload.runtime.loading import load
from transload.runtime.tokenizers import tokenizer as tokenizer_of

Message = Mapping[str, object]  # {"role": "user", "content": "..."}


@dataclass(frozen=True, slots=True)
class Generation:
    """What a model answered. Seconds are wall time; the first token counts to the prompt."""

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    prompt_seconds: float
    decode_seconds: float
    ended: bool  # True: the model ended by itself; False: max_new_tokens was reached

    @property
    def prompt_tokens_per_second(self) -> float:
        """Speed of reading the prompt."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Speed of writing, of all tokens after the first."""
        return (len(self.tokens) - 1) / self.decode_seconds if self.decode_seconds and len(self.tokens) > 1 else 0.0


def generate(
    model: PreTrainedModel | str | Path,
    prompt: str | Sequence[Message],
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    stream: Callable[[str], None] | None = None,
    chat: bool = True,
    tokenizer: Any = None,
) -> Generation:
    """The model's answer to a prompt or to a list of messages.

    model: what `transload.load` gave, any transformers model, or a path to load with the defaults. prompt: with a chat
    template and chat=True a string is one user message; else it is continued as it is. temperature 0 is greedy.
    seed: makes sampling repeatable and leaves torch's own random state alone. stream: called with each piece of text.
    tokenizer: where the model's own is not to be used.

    Raises ConfigError for messages without a chat template, an empty prompt, or numbers that make no sense.
    """
    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ConfigError(
            f"max_new_tokens={max_new_tokens}, temperature={temperature}, top_p={top_p}: give at least 1, at least 0, "
            "and above 0 up to 1"
        )
    if not isinstance(model, PreTrainedModel):
        model = load(model)
    tokens = tokenizer if tokenizer is not None else tokenizer_of(model)
    ids = encode(tokens, prompt, chat).to(model.device)
    settings = _settings(model, tokens, max_new_tokens, temperature, top_p)
    with torch.random.fork_rng(enabled=seed is not None), torch.inference_mode():
        if seed is not None:
            torch.manual_seed(seed)
        clock = _Clock(tokens, stream)
        ours = suits(model, settings)
        loop = {"custom_generate": one_sequence, "listener": clock} if ours else {"streamer": clock}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings, **loop)
    new = tuple(int(t) for t in out[0, ids.shape[1] :])
    text = tokens.decode(new, skip_special_tokens=True)
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    return Generation(text, new, ids.shape[1], clock.prompt, clock.decode, bool(new) and new[-1] in ends)


def stream(
    model: PreTrainedModel | str | Path,
    prompt: str | Sequence[Message],
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    chat: bool = True,
    tokenizer: Any = None,
) -> Generator[str, None, Generation]:
    """The answer piece by piece, as an iterator; its return value is the Generation. Arguments as in `generate`.

    The model works in a thread of its own and stops at max_new_tokens even if nobody takes the pieces.
    """
    pieces: Queue[str | Generation | BaseException] = Queue()

    threads = torch.get_num_threads()

    def work() -> None:
        try:
            torch.set_num_threads(threads)  # this thread's own number, whatever another generation has at this moment
            pieces.put(generate(model, prompt, max_new_tokens, temperature, top_p, seed, pieces.put, chat, tokenizer))
        except BaseException as e:
            pieces.put(e)

    Thread(target=work, daemon=True).start()
    while isinstance(piece := pieces.get(), str):
        yield piece
    if isinstance(piece, BaseException):
        raise piece
    return piece


def encode(tokenizer: Any, prompt: str | Sequence[Message], chat: bool) -> Tensor:
    """Token ids int64 [1, T]."""
    template = getattr(tokenizer, "chat_template", None)
    if not isinstance(prompt, str) and not template:
        raise ConfigError("a list of messages needs a chat template, and this tokenizer has none: give a string")
    if template and chat:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
        given = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        given = tokenizer(prompt, return_tensors="pt")
    ids: Tensor = given["input_ids"]
    if ids.shape[1] == 0:
        raise ConfigError("the prompt is empty")
    return ids


def _settings(
    model: PreTrainedModel, tokenizer: Any, max_new_tokens: int, temperature: float, top_p: float
) -> GenerationConfig:
    """The model's own generation settings with the caller's on top."""
    settings = deepcopy(model.generation_config)
    settings.max_new_tokens, settings.max_length = max_new_tokens, None
    settings.do_sample = temperature > 0
    settings.temperature, settings.top_p = (temperature, top_p) if temperature > 0 else (None, None)
    settings.top_k = settings.top_k if temperature > 0 else None
    if settings.eos_token_id is None:
        settings.eos_token_id = tokenizer.eos_token_id
    if settings.pad_token_id is None:
        ends = settings.eos_token_id
        settings.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else _first(ends)
    return settings


def _first(ends: int | list[int] | None) -> int | None:
    return ends[0] if isinstance(ends, list) else ends


class _Clock(TextStreamer):  # type: ignore[misc]
    """Times the prompt and the rest, and passes text on."""

    def __init__(self, tokenizer: Any, sink: Callable[[str], None] | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._sink = sink
        self._start = time.perf_counter()
        self._first: float | None = None
        self.prompt = self.decode = 0.0

    def put(self, value: Tensor) -> None:
        """The prompt comes first, then one token at a time."""
        is_prompt = self.next_tokens_are_prompt
        if not is_prompt:
            now = time.perf_counter()
            if self._first is None:
                self._first, self.prompt = now, now - self._start
            self.decode = now - self._first
        if self._sink is not None or is_prompt:
            super().put(value)

    def end(self) -> None:
        """Flushes what is left of the text."""
        if self._sink is not None:
            super().end()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """A piece of text that will not change any more."""
        if text and self._sink is not None:
            self._sink(text)
