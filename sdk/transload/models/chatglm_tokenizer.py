"""The tokenizer of ChatGLM2/3 and GLM-4-9b as files that transformers loads without the publisher's tokenization code.

GLM-4's tokenizer.model is tiktoken's: a line per token, base64 and rank. ChatGLM2/3's is a sentencepiece model. Both
begin every text with [gMASK] and sop, and number their special tokens after the vocabulary. Source:
tokenization_chatglm.py of glm-4-9b-chat, chatglm2-6b and chatglm3-6b.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transload.errors import FormatError
from transload.headers import read_json
from transload.models.sentencepiece import SentencePiece, read_sentencepiece

_MODEL, _JSON, _CONFIG = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
_CODE, _TEMPLATE = "tokenization_chatglm.py", "chat_template.jinja"
_MOST_BYTES, _MOST_CODE = 1 << 26, 1 << 20
_LONGEST = 1024  # letters of a token; merges are looked for at every place in it
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GLM4_SPECIAL = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>",
    "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
)  # fmt: skip
_CHATGLM_SPECIAL = (
    "[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
)  # fmt: skip
_ROLES = _CHATGLM_SPECIAL[5:]  # of ChatGLM3; in ChatGLM2 these words are text
_CLASSES = ("ChatGLMTokenizer", "ChatGLM4Tokenizer")
# How the publishers' code puts a conversation together, for folders from before it was written down as a template:
# `build_single_message` of GLM-4 and ChatGLM3 (sentencepiece gives every part a space of its own), `build_prompt` of
# ChatGLM2.
_GLM4_CHAT, _CHATGLM3_CHAT = (
    f"[gMASK]{start}{{% for message in messages %}}<|{{{{ message['role'] }}}}|>\n{space}{{{{ message['content'] }}}}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    for start, space in (("<sop>", ""), ("sop", " "))
)
_CHATGLM2_CHAT = (
    "[gMASK]sop{% set rounds = namespace(count=0) %}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] }}\n\n{% else %}"
    "{% set rounds.count = rounds.count + 1 %}[Round {{ rounds.count }}]\n\n问："
    "{{ message['content'] }}\n\n答：{% endif %}{% endfor %}"
)
# Fields of tokenizer_config.json that say how the publisher's own class is found and built.
_OF_THE_CODE = ("auto_map", "tokenizer_class", "added_tokens_decoder", "do_lower_case", "remove_space")


def native_files(folder: Path) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json for a folder with a ChatGLM tokenizer; {} where there is none.

    Raises FormatError when tokenizer.model is neither of the two kinds.
    """
    settings = read_json(folder / _CONFIG) if (folder / _CONFIG).is_file() else {}
    model = folder / _MODEL
    if str(settings.get("tokenizer_class")) not in _CLASSES or not model.is_file() or (folder / _JSON).is_file():
        return {}
    if model.stat().st_size > _MOST_BYTES:
        raise FormatError(f"{model}: {model.stat().st_size} bytes are too many for a vocabulary")
    data = model.read_bytes()
    ranks = _ranks(data)
    _check_lengths(ranks, model)
    if ranks:
        special = _special(settings, _GLM4_SPECIAL, len(ranks), model)
        tokenizer, names = _tiktoken(ranks, special), ("<sop>", "<|endoftext|>", "<|endoftext|>", _GLM4_CHAT)
    else:
        pieces = read_sentencepiece(data, str(model))
        _check_lengths(pieces.tokens, model)
        roles = _knows_roles(folder, settings)
        usual = _CHATGLM_SPECIAL if roles else _CHATGLM_SPECIAL[:5]
        special = _special(settings, usual, len(pieces.tokens), model)
        chat = _CHATGLM3_CHAT if roles else _CHATGLM2_CHAT
        tokenizer, names = _sentencepiece(pieces, special), ("sop", "</s>", "<unk>", chat)
    _begin(tokenizer, names[0])
    own = {"eos_token": names[1], "pad_token": names[2], "additional_special_tokens": list(special)}
    if "chat_template" not in settings:
        own["chat_template"] = _text(folder / _TEMPLATE) or names[3]
    return {_JSON: tokenizer.to_str(pretty=True).encode(), _CONFIG: _settings(settings, own)}


def _knows_roles(folder: Path, settings: Mapping[str, object]) -> bool:
    """True for ChatGLM3: its chat template, or the code beside it, names the roles."""
    texts = (json.dumps(settings), _text(folder / _TEMPLATE), _text(folder / _CODE))
    return any(_ROLES[-1] in text for text in texts)


def _text(file: Path) -> str:
    """A small text file, "" where there is none."""
    small = file.is_file() and file.stat().st_size < _MOST_CODE
    return file.read_text(encoding="utf-8", errors="replace") if small else ""


def _settings(stored: Mapping[str, object], own: Mapping[str, object]) -> bytes:
    kept = {name: value for name, value in stored.items() if name not in _OF_THE_CODE and name not in own}
    fixed: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    return (json.dumps(fixed | kept | dict(own), indent=2, ensure_ascii=False) + "\n").encode()


def _special(settings: Mapping[str, object], usual: Sequence[str], first: int, file: Path) -> dict[str, int]:
    """Special tokens and their numbers: as tokenizer_config.json lists them, else the usual ones."""
    listed = settings.get("added_tokens_decoder")
    found: dict[str, int] = {}
    for number, token in (listed if isinstance(listed, dict) else {}).items():
        content = token.get("content") if isinstance(token, dict) else None
        if isinstance(content, str) and number.isdecimal() and int(number) >= first:
            found[content] = int(number)
    found = dict(sorted(found.items(), key=lambda item: item[1])) or {t: first + i for i, t in enumerate(usual)}
    if list(found.values()) != list(range(first, first + len(found))):
        raise FormatError(f"{file.parent / _CONFIG}: special tokens {found} do not follow the {first} of {file.name}")
    return found


def _check_lengths(tokens: Iterable[bytes | str], file: Path) -> None:
    longest = max(map(len, tokens), default=0)
    if longest > _LONGEST:
        raise FormatError(f"{file}: a token of {longest} letters; {_LONGEST} are more than any vocabulary has")


def _ranks(data: bytes) -> dict[bytes, int]:
    """tiktoken's vocabulary: bytes -> rank, {} when the data is something else."""
    ranks: dict[bytes, int] = {}
    for line in data.splitlines():
        parts = line.split()
        if not parts:
            continue
        try:
            token, rank = base64.b64decode(parts[0], validate=True), int(parts[1])
        except (ValueError, IndexError, binascii.Error):
            return {}
        ranks[token] = rank
    return ranks if sorted(ranks.values()) == list(range(len(ranks))) else {}


def _tiktoken(ranks: Mapping[bytes, int], special: Mapping[str, int]) -> Any:
    """The byte-level BPE that merges the pair with the lowest rank first, and takes a whole word where it has one."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    letters = _byte_letters()
    words = {token: "".join(letters[b] for b in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [(a, b) for a, b in pairs if a in ranks and b in ranks]
        merges += [(words[a], words[b]) for a, b in sorted(pairs, key=lambda p: (ranks[p[0]], ranks[p[1]]))]
    vocabulary = {words[token]: rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, fuse_unk=False, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(_added(special))
    return tokenizer


def _sentencepiece(pieces: SentencePiece, special: Mapping[str, int]) -> Any:
    """sentencepiece's BPE: spaces are letters, pairs merge by score, unknown letters fall back to their bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    numbers = {token: i for i, token in enumerate(pieces.tokens)}
    pairs = []
    for token, score in zip(pieces.tokens, pieces.scores, strict=True):
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs += [(-score, numbers[a], numbers[b], a, b) for a, b in cuts if a in numbers and b in numbers]
    merges = [(a, b) for _, _, _, a, b in sorted(pairs)]
    tokenizer = Tokenizer(models.BPE(numbers, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps: list[Any] = [normalizers.Precompiled(pieces.charsmap)] if pieces.charsmap else []
    if pieces.remove_extra_whitespaces:
        steps += [normalizers.Strip(left=True, right=True), normalizers.Replace("  ", " ")]
    if pieces.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1 if pieces.add_dummy_prefix else 0),
        ]
    )
    tokenizer.add_special_tokens(_added(special))
    return tokenizer


def _begin(tokenizer: Any, start: str) -> None:
    """Every text begins with [gMASK] and the start token, as the publisher's code builds it."""
    from tokenizers import processors

    tokens = [(t, tokenizer.token_to_id(t)) for t in ("[gMASK]", start)]
    if all(number is not None for _, number in tokens):
        prefix = f"[gMASK]:0 {start}:0"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{prefix} $A:0", pair=f"{prefix} $A:0 $B:1", special_tokens=tokens
        )


def _added(special: Mapping[str, int]) -> list[Any]:
    """Special tokens to be found in text; sop and eop, which are letters only, not inside a word (philosophy)."""
    from tokenizers import AddedToken

    return [AddedToken(token, special=True, normalized=False, single_word=token.isalpha()) for token in special]


def _byte_letters() -> dict[int, str]:
    """A printable letter for every byte, as byte-level BPE writes them: itself where printable, else from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
