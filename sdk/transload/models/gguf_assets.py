"""Tokenizer, chat template and special tokens of a model that has only a GGUF file, by transformers' own conversion."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from transload.errors import FormatError, Unsupported
from transload.headers.info import shown
from transload.models.gguf_config import generation_config
from transload.models.gguf_splits import CONVERTED

Metadata = Mapping[str, object]

_FOR_CONVERSION = {
    "ggml.model": "tokenizer_type",
    "ggml.pre": "pre_tokenizer_type",
    "ggml.tokens": "tokens",
    "ggml.scores": "scores",
    "ggml.token_type": "token_type",
    "ggml.merges": "merges",
    "ggml.precompiled_charsmap": "precompiled_charsmap",
    "ggml.bos_token_id": "bos_token_id",
    "ggml.eos_token_id": "eos_token_id",
    "ggml.unknown_token_id": "unk_token_id",
    "ggml.padding_token_id": "pad_token_id",
    "ggml.add_space_prefix": "add_prefix_space",
}
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
# A name that every transformers since 4.0 loads from tokenizer.json as it is.
_TOKENIZER_CLASS = "PreTrainedTokenizerFast"


def tokenizer_of(metadata: Metadata) -> Any:
    """transformers' tokenizer for the vocabulary in a GGUF file, chat template included.

    Raises FormatError when the file has no tokenizer or special tokens outside its vocabulary, Unsupported for kinds
    of tokenizer that transformers cannot build.
    """
    from transformers import PreTrainedTokenizerFast

    given = {
        name: metadata[f"tokenizer.{key}"] for key, name in _FOR_CONVERSION.items() if f"tokenizer.{key}" in metadata
    }
    if "tokens" not in given:
        raise FormatError("metadata has no tokenizer.ggml.tokens: give a folder with a tokenizer instead")
    _check(given)
    tokens = cast("list[str]", given["tokens"])
    settings: dict[str, Any] = {name: _token(metadata, key, tokens) for name, key in _SPECIAL.items()}
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        settings["chat_template"] = template
    for flag in ("add_bos_token", "add_eos_token"):
        if f"tokenizer.ggml.{flag}" in metadata:
            settings[flag] = bool(metadata[f"tokenizer.ggml.{flag}"])
    if given.get("tokenizer_type") == "llama":
        # llama.cpp begins a sentencepiece text with bos unless the file says otherwise.
        settings.setdefault("add_bos_token", True)
    return PreTrainedTokenizerFast(
        tokenizer_object=_convert(str(metadata.get("general.architecture")), given), **settings
    )


def tokenizer_files(metadata: Metadata) -> dict[str, bytes]:
    """What a model folder holds beside its weights: tokenizer, chat template and generation settings, by file name."""
    files = {"generation_config.json": _json(generation_config(metadata))}
    if "tokenizer.ggml.tokens" not in metadata:
        return files
    with tempfile.TemporaryDirectory() as folder:
        tokenizer_of(metadata).save_pretrained(folder)
        files |= {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
    settings = json.loads(files["tokenizer_config.json"])
    settings["tokenizer_class"] = _TOKENIZER_CLASS
    for private in ("backend", "is_local", "local_files_only", "name_or_path"):
        settings.pop(private, None)
    return files | {"tokenizer_config.json": _json(settings)}


def _convert(architecture: str, given: dict[str, object]) -> Any:
    try:
        from transformers.integrations.gguf import convert_gguf_tokenizer
    except ImportError:  # before transformers 5.2x it lived beside the other ggml code
        from transformers.integrations.ggml import convert_gguf_tokenizer
    try:
        backend, _ = convert_gguf_tokenizer(architecture, given)
    except (ValueError, KeyError, NotImplementedError) as e:
        raise Unsupported(
            f"tokenizer {shown(given.get('tokenizer_type'))} of a GGUF file of architecture {shown(architecture)}: "
            f"transformers cannot build it ({e}); give a folder with a tokenizer.json"
        ) from e
    splits = CONVERTED.get(str(given.get("pre_tokenizer_type")))
    if splits is not None:
        backend.pre_tokenizer = _pre_tokenizer(splits)
    return backend


def _check(given: Mapping[str, object]) -> None:
    """transformers' conversion trusts what it is given. Raises FormatError naming the key."""
    keys = {name: key for key, name in _FOR_CONVERSION.items()}
    for name, kind in (("tokens", str), ("merges", str), ("token_type", int), ("scores", float)):
        value = given.get(name, [])
        if not isinstance(value, list) or not all(type(v) is kind for v in value):
            raise FormatError(f"metadata tokenizer.{keys[name]} is no list of {kind.__name__}")
    for name in ("tokenizer_type", "pre_tokenizer_type"):
        if not isinstance(given.get(name, ""), str):
            raise FormatError(f"metadata tokenizer.{keys[name]} is {shown(given[name])}, expected a name")
    vocabulary = set(cast("list[str]", given["tokens"]))
    if not vocabulary:
        raise FormatError("metadata tokenizer.ggml.tokens is empty")
    for merge in cast("list[str]", given.get("merges", [])):
        left, gap, right = merge.partition(" ")
        if not gap or left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise FormatError(f"metadata tokenizer.ggml.merges has {shown(merge)}, whose parts are no tokens")


def _pre_tokenizer(splits: tuple[str, ...]) -> Any:
    from tokenizers import Regex, pre_tokenizers

    cuts = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in splits]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _token(metadata: Metadata, key: str, tokens: list[str]) -> str | None:
    index = metadata.get(f"tokenizer.ggml.{key}_token_id")
    if index is None:
        return None
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(tokens):
        raise FormatError(
            f"metadata tokenizer.ggml.{key}_token_id is {shown(index)}, but there are {len(tokens)} tokens"
        )
    return tokens[index]


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
