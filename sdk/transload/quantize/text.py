"""The text that calibrates: from a file, or a small sample in Chinese, English and code that comes with Transload."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transload.errors import ConfigError
from transload.quantize.recipe import Calibration

_LARGEST_FILE = 64 << 20


def windows(source: str | Path | None, settings: Calibration, tokenizer: Any) -> tuple[Tensor, str]:
    """Token windows int64 [count, tokens], and a sentence about where they come from.

    source: a text file, a .jsonl file with one {"text": ...} or {"messages": [...]} a line, or None for the sample. The
    text is one stream of tokens, cut into windows; the seed picks which of them, when there are more than
    settings.samples. Raises ConfigError for text that is missing, empty, or shorter than one window.
    """
    name = "the built-in sample" if source is None else str(source)
    ids: list[int] = []
    for text, ready in _documents(source, settings, tokenizer):
        ids += tokenizer(text, add_special_tokens=not ready)["input_ids"]
    count = len(ids) // settings.tokens
    if not ids:
        raise ConfigError(f"{name}: holds no text to calibrate with")
    if not count:
        raise ConfigError(f"{name}: {len(ids)} tokens, fewer than one window of {settings.tokens}; give more text")
    stream = torch.tensor(ids[: count * settings.tokens], dtype=torch.int64).view(count, settings.tokens)
    if count <= settings.samples:
        short = "" if count == settings.samples else f"; the recipe asks for {settings.samples} windows"
        return stream, f"{count} windows of {settings.tokens} tokens, all of {name}{short}"
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(settings.seed))[: settings.samples]
    return stream[chosen.sort().values], f"{settings.samples} windows of {settings.tokens} tokens from {name}"


def _documents(source: str | Path | None, settings: Calibration, tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """Texts, and whether special tokens are in them already."""
    for document in _read(source):
        if isinstance(document, str) and not settings.chat:
            yield document, False
            continue
        chat = document if isinstance(document, list) else [{"role": "user", "content": document}]
        try:
            yield tokenizer.apply_chat_template(chat, tokenize=False), True
        except (ValueError, TypeError, KeyError) as e:
            raise ConfigError(f"the chat template of this model does not take the calibration text: {e}") from e


def _read(source: str | Path | None) -> Iterator[str | list[dict[str, str]]]:
    """Plain text, or the messages of a conversation."""
    if source is None:
        for part in sorted(files("transload.quantize").joinpath("sample").iterdir(), key=lambda p: p.name):
            yield part.read_text(encoding="utf-8")
        return
    path = Path(source)
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise ConfigError(f"{path}: larger than {_LARGEST_FILE >> 20} MiB of calibration text")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: cannot be read as text: {e}") from e
    if path.suffix != ".jsonl":
        yield text
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield _record(line, f"{path}: line {number}")


def _record(line: str, where: str) -> str | list[dict[str, str]]:
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as e:
        raise ConfigError(f"{where}: not valid JSON: {e}") from e
    if isinstance(value, dict) and isinstance(value.get("text"), str):
        return str(value["text"])
    messages = value.get("messages") if isinstance(value, dict) else None
    if isinstance(messages, list) and all(isinstance(m, dict) for m in messages):
        return messages
    raise ConfigError(f'{where}: expected {{"text": "..."}} or {{"messages": [...]}}')
