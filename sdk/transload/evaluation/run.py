"""transload.evaluate: how good a model is, alone or beside the one it was made from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from transload import checkpoint as checkpoints
from transload.errors import ConfigError, FormatError
from transload.evaluation.measures import Compared, compare
from transload.evaluation.reader import Layers
from transload.evaluation.record import Done, Record
from transload.evaluation.result import EvalReport
from transload.evaluation.subject import About, about
from transload.evaluation.summary import LayerNoise, difference
from transload.evaluation.text import BUILT_IN, read_text, token_ids
from transload.evaluation.windows import Window, windows
from transload.hal import find_device
from transload.memory import peak_memory
from transload.runtime import load, tokenizer

Progress = Callable[[int, int, str], None]  # tokens scored, tokens in all, which model
_LAYER_TOKENS = 512  # every layer's output of these is kept: enough for a tenth of a decibel


@dataclass(frozen=True, slots=True)
class Request:
    """A model to measure: where it is and how to run it. Fields as in `transload.load`.

    A float model on the CPU is measured in float32 unless dtype says otherwise, so that bfloat16's own rounding does
    not count as the model's.
    """

    path: Path
    device: str = "auto"
    scheme: str | None = None
    bits: int | None = None
    dtype: torch.dtype | None = None

    def load(self) -> About:
        """The model, loaded and looked at."""
        on_cpu = find_device(self.device)[1].backend == "cpu"
        dtype = self.dtype or (torch.float32 if on_cpu else None)
        model = load(self.path, self.device, self.scheme, dtype=dtype, bits=self.bits)
        return about(model, str(self.path), checkpoints.open(self.path).format.name)


def evaluate(
    model: Request | str | Path,
    against: Request | str | Path | None = None,
    text: str | Path = BUILT_IN,
    tokens: int = 8192,
    window: int = 1024,
    stride: int | None = None,
    worst: int = 20,
    progress: Progress | None = None,
) -> EvalReport:
    """Perplexity, speed and memory of a model; with `against`, how far it is from that source, token by token.

    text: a UTF-8 file, or "docstrings". tokens: how many of it are read at most. window and stride: see `windows`; the
    default stride is half a window. Both models must split the text into the same tokens. The source is read first and
    only its head and hidden states are kept, so that one model at a time is in memory.

    Raises ConfigError for texts, windows and pairs that make no sense, FormatError where a model gives NaN, and what
    `transload.load` raises.
    """
    asked, source = _request(model), None if against is None else _request(against)
    ids = _ids(asked, text, tokens)
    length = min(window, len(ids))
    step = stride or max(length // 2, 1)
    pieces = list(windows(ids, length, step))
    before = None
    if source is not None:
        _check_same_tokens(asked, source, ids, _ids(source, text, tokens))
        before = _read_source(source, pieces, _counter(pieces, progress, "source"))
    subject = asked.load()
    noise = LayerNoise()
    parts = list(_measure(subject, pieces, before, noise, _counter(pieces, progress, "model")))
    total = Compared.join(parts)
    found = None if before is None else difference(parts, pieces, noise.by_layer(), tokenizer(asked.path), worst)
    return EvalReport(
        subject.subject(total.loss),
        None if before is None else before.about.subject(total.source_loss),
        found,
        str(text),
        len(ids),
        length,
        step,
        peak_memory(),
    )


@dataclass(frozen=True, slots=True)
class _Source:
    """The source after it has read the text."""

    about: About
    record: Record


def _read_source(source: Request, pieces: Sequence[Window], done: Done) -> _Source:
    about = source.load()
    return _Source(about, Record(about.reader, pieces, _LAYER_TOKENS, done))


def _measure(
    subject: About, pieces: Sequence[Window], source: _Source | None, noise: LayerNoise, done: Done
) -> Iterator[Compared]:
    """The measures of every window; without a source the model is compared with itself."""
    for index, window in enumerate(pieces):
        layers = source.record.layers[index] if source is not None and index < len(source.record.layers) else ()
        hidden, own = subject.reader.read(window, len(layers[0]) if layers else 0)
        if layers:
            _check_same_layers(subject.path, layers, own)
            noise.add(layers, own)
        theirs = subject.reader.logits(hidden) if source is None else source.record.logits(index)
        yield _scored(subject, subject.reader.logits(hidden), theirs, window)
        done(window.scored)


def _scored(subject: About, own: Iterator[Tensor], theirs: Iterator[Tensor], window: Window) -> Compared:
    """The measures of one window, a chunk of logits at a time."""
    parts, at = [], window.first
    for logits, source in zip(own, theirs, strict=True):
        targets = window.ids[at : at + len(logits)]
        if not bool(logits.isfinite().all()):
            raise FormatError(
                f"{subject.path}: the logits after token {window.start + at} are not finite (NaN or infinite): the "
                "weights or a kernel are broken, so there is nothing to measure"
            )
        width = min(logits.shape[-1], source.shape[-1])  # vocabularies are padded differently
        parts.append(compare(logits[:, :width], source[:, :width].to(logits.device), targets.to(logits.device)))
        at += len(logits)
    return Compared.join(parts)


def _request(model: Request | str | Path) -> Request:
    return model if isinstance(model, Request) else Request(Path(model))


def _ids(asked: Request, text: str | Path, tokens: int) -> Tensor:
    return token_ids(tokenizer(asked.path), read_text(text), tokens)


def _check_same_tokens(asked: Request, source: Request, ids: Tensor, theirs: Tensor) -> None:
    if not torch.equal(ids, theirs):
        raise ConfigError(
            f"{asked.path} and {source.path} split the text into different tokens, so their predictions cannot be "
            "compared: give a source with the same tokenizer"
        )


def _check_same_layers(path: str, source: Layers, own: Layers) -> None:
    shapes = [[tuple(h.shape) for h in layers] for layers in (source, own)]
    if shapes[0] != shapes[1]:
        raise ConfigError(
            f"{path} has {len(own) - 1} layers of width {own[0].shape[-1]}, its source {len(source) - 1} of width "
            f"{source[0].shape[-1]}: they are not the same architecture"
        )


def _counter(pieces: Sequence[Window], progress: Progress | None, what: str) -> Done:
    total, done = sum(window.scored for window in pieces), 0

    def count(scored: int) -> None:
        nonlocal done
        done += scored
        if progress is not None:
            progress(done, total, what)

    return count
