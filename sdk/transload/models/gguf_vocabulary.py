"""Tokenizer of a model folder as GGUF metadata: tokens, merges, special ids, chat template.

tokenizer.json is the one source; merges, special ids and templates are read by the gguf package. Byte-level BPE is what
most written families use; a sentencepiece vocabulary (Llama 2) gets scores that keep its merge order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transload.errors import FormatError, Unsupported
from transload.headers import read_json
from transload.headers.info import shown
from transload.models.gguf_splits import split_name

# gguf.TokenType
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6


def add_tokenizer(writer: Any, arch: str, folder: Path, size: int) -> None:
    """Adds the tokenizer beside a checkpoint to a gguf.GGUFWriter. size: rows of the embedding table.

    Raises FormatError when there is no tokenizer.json or it contradicts the model, Unsupported for kinds of tokenizer
    that have no place in GGUF here.
    """
    import gguf

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise FormatError(f"{folder}: no tokenizer.json, and a GGUF file carries its tokenizer; save it there first")
    tokenizer = read_json(file)
    model = tokenizer.get("model")
    if not isinstance(model, Mapping) or model.get("type") != "BPE":
        kind = model.get("type") if isinstance(model, Mapping) else model
        raise Unsupported(f"{file}: a tokenizer of type {shown(kind)}; BPE has a place in GGUF here")
    pieces = bool(model.get("byte_fallback"))
    tokens = _tokens(file, tokenizer, model, size)
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    writer.add_tokenizer_pre("default" if pieces else split_name(arch, tokenizer))
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_types([kind for _, kind in tokens])
    if pieces:
        writer.add_token_scores(_scores(model, [text for text, _ in tokens]))
        writer.add_add_space_prefix(_prefixes(tokenizer))
    gguf.SpecialVocab(folder, load_merges=not pieces, n_vocab=size).add_to_gguf(writer, quiet=True)


def _tokens(
    file: Path, tokenizer: Mapping[str, object], model: Mapping[str, object], size: int
) -> list[tuple[str, int]]:
    """Text and type of every row of the embedding table. Rows without a token get a name that no text has."""
    tokens = [(f"[PAD{i}]", _UNUSED) for i in range(size)]
    for text, number, kind in _listed(tokenizer, model):
        if not 0 <= number < size:
            raise FormatError(f"{file}: token {shown(text)} has number {number}, the embedding table has {size} rows")
        tokens[number] = (text, kind)
    return tokens


def _listed(tokenizer: Mapping[str, object], model: Mapping[str, object]) -> Iterator[tuple[str, int, int]]:
    vocabulary, added = model.get("vocab"), tokenizer.get("added_tokens")
    unknown = model.get("unk_token")
    for text, number in vocabulary.items() if isinstance(vocabulary, Mapping) else ():
        is_byte = bool(model.get("byte_fallback")) and len(text) == 6 and text.startswith("<0x")
        yield text, number, _BYTE if is_byte else _NORMAL
    for token in added if isinstance(added, list) else ():
        text = token["content"]
        yield text, token["id"], _UNKNOWN if text == unknown else _CONTROL if token.get("special") else _USER


def _scores(model: Mapping[str, object], tokens: list[str]) -> list[float]:
    """Minus the place of the first merge that makes a token: llama.cpp merges the highest score first."""
    merges = model.get("merges")
    places: dict[str, float] = {}
    for i, merge in enumerate(merges if isinstance(merges, list) else ()):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        places.setdefault(left + right, -float(i))
    return [places.get(token, 0.0) for token in tokens]


def _prefixes(tokenizer: Mapping[str, object]) -> bool:
    """True when a space is put before a text."""
    normalizer = tokenizer.get("normalizer")
    parts = normalizer.get("normalizers", [normalizer]) if isinstance(normalizer, Mapping) else []
    cut = tokenizer.get("pre_tokenizer")
    before = isinstance(cut, Mapping) and cut.get("type") == "Metaspace" and cut.get("prepend_scheme") != "never"
    return before or any(isinstance(p, Mapping) and p.get("type") == "Prepend" for p in parts)
