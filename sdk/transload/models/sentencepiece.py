"""Reading a sentencepiece model file: the few fields of its protocol buffer that a BPE tokenizer is made of.

Field numbers: sentencepiece 0.2 `sentencepiece_model.proto` (ModelProto, SentencePiece, TrainerSpec, NormalizerSpec).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from transload.errors import FormatError, Unsupported

_BPE = 2
_VARINT, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5  # wire types


@dataclass(frozen=True, slots=True)
class SentencePiece:
    """A BPE vocabulary: tokens by number with their scores, and how text is normalized before."""

    tokens: tuple[str, ...]
    scores: tuple[float, ...]
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool


def read_sentencepiece(data: bytes, where: str) -> SentencePiece:
    """The model in the bytes of a tokenizer.model. where names the file in errors.

    Raises FormatError for other data, Unsupported for vocabularies that are not BPE.
    """
    try:
        return _model(data, where)
    except (ValueError, struct.error, UnicodeDecodeError) as e:
        raise FormatError(f"{where}: neither a tiktoken vocabulary nor a sentencepiece model: {e}") from e


def _model(data: bytes, where: str) -> SentencePiece:
    tokens: list[str] = []
    scores: list[float] = []
    trainer: dict[int, object] = {}
    normalizer: dict[int, object] = {}
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            piece = dict(_fields(value))
            token, score = piece.get(1), piece.get(2, 0.0)
            if not isinstance(token, bytes) or not isinstance(score, float):
                raise ValueError("a piece without text")
            tokens.append(token.decode())
            scores.append(score)
        elif number == 2 and isinstance(value, bytes):
            trainer = dict(_fields(value))
        elif number == 3 and isinstance(value, bytes):
            normalizer = dict(_fields(value))
    if not tokens:
        raise ValueError("it has no pieces")
    if trainer.get(3, 1) != _BPE:
        raise Unsupported(f"{where}: a sentencepiece model of type {trainer.get(3, 1)}, and only BPE (2) is converted")
    charsmap = normalizer.get(2, b"")
    return SentencePiece(
        tuple(tokens),
        tuple(scores),
        charsmap if isinstance(charsmap, bytes) else b"",
        bool(normalizer.get(3, 1)),
        bool(normalizer.get(4, 1)),
    )


def _fields(data: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """Field numbers and values of a protocol buffer; 4-byte values are floats here."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind, number = key & 7, key >> 3
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield number, value
        elif kind == _BYTES:
            size, at = _varint(data, at)
            if size > len(data) - at:
                raise ValueError(f"field {number} ends after the data")
            yield number, data[at : at + size]
            at += size
        elif kind == _FOUR:
            yield number, struct.unpack_from("<f", data, at)[0]
            at += 4
        elif kind == _EIGHT:
            yield number, struct.unpack_from("<d", data, at)[0]
            at += 8
        else:
            raise ValueError(f"field {number} has the unknown kind {kind}")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("it ends inside a number")
        value |= (data[at] & 0x7F) << shift
        at += 1
        if not data[at - 1] & 0x80:
            return value, at
    raise ValueError("a number is too long")
