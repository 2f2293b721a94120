"""What the model benchmark says to every engine, and what it thinks of the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transload.errors import ConfigError

_STARTS = 64  # beginnings that are tried until a text has exactly the wanted tokens


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text and its token ids, special tokens included."""

    text: str
    ids: tuple[int, ...]


def prompt_of(tokenizer: Any, text: str, length: int) -> Prompt:
    """Words from the text that are exactly `length` tokens. The text is repeated when it is too short.

    Raises ConfigError when the tokenizer gives no piece of the text that many tokens.
    """
    words = text.split()
    if not words:
        raise ConfigError("the text for the prompt is empty")
    words *= -(-(length + _STARTS) // len(words))  # a word has a token at least
    for start in range(_STARTS):
        fits, too_many = 1, length + 1
        while fits + 1 < too_many:
            middle = (fits + too_many) // 2
            if len(_ids(tokenizer, words[start : start + middle])) <= length:
                fits = middle
            else:
                too_many = middle
        ids = _ids(tokenizer, words[start : start + fits])
        if len(ids) == length:
            return Prompt(" ".join(words[start : start + fits]), ids)
    raise ConfigError(f"no piece of the text has exactly {length} tokens: ask for another --prompt-tokens")


def _ids(tokenizer: Any, words: Sequence[str]) -> tuple[int, ...]:
    return tuple(int(i) for i in tokenizer(" ".join(words))["input_ids"])


def degenerate(tokens: Sequence[int]) -> str | None:
    """What is wrong with an answer that is no text any more: a sentence's rest, or None.

    A period of up to eight tokens that fills the last half of the answer, and at least four times, is no text; a
    greedy answer of a small model may well end like that without any fault of the engine.
    """
    half = len(tokens) // 2
    for period in range(1, 9):
        steps = 0
        while steps + period < len(tokens) and tokens[-1 - steps] == tokens[-1 - steps - period]:
            steps += 1
        if steps >= max(half, 3 * period):
            return f"repeats {period} token{'s' if period > 1 else ''} from token {len(tokens) - steps - period + 1} on"
    return None


def shared(tokens: Sequence[int], reference: Sequence[int]) -> int:
    """How many tokens at the beginning are the same."""
    return next((i for i, (a, b) in enumerate(zip(tokens, reference, strict=False)) if a != b), len(reference))
