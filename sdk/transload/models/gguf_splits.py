"""How text is cut before BPE: the regular expressions behind llama.cpp's names (`tokenizer.ggml.pre`).

A tokenizer.json says the expressions, a GGUF file says a name, and each must be found from the other. Expressions are
those of the models' own tokenizers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from transload.errors import Unsupported
from transload.headers.info import shown

Splits = tuple[str, ...]

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WHITESPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_DIGITS = r"\p{N}"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _gpt4(digits: str) -> str:
    return rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_WHITESPACE}"


_LLAMA3 = (_gpt4(r"\p{N}{1,3}"),)
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_WHITESPACE}",
)
_UPPER, _LOWER = (rf"[{letters}\p{{Lm}}\p{{Lo}}\p{{M}}&&[^\p{{Han}}]]" for letters in (r"\p{Lu}\p{Lt}", r"\p{Ll}"))
_KIMI = (
    rf"\p{{Han}}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_WHITESPACE}",
)

SPLITS: Mapping[str, Splits] = {
    "gpt-2": (_GPT2,),
    "smollm": (_DIGITS, _GPT2),
    "qwen2": (_gpt4(_DIGITS),),
    "llama-bpe": _LLAMA3,
    "glm4": _LLAMA3,
    "chatglm-bpe": _LLAMA3,
    "deepseek-v3": _DEEPSEEK_V3,
    "kimi-k2": _KIMI,
}
# Where transformers' conversion of a GGUF tokenizer has no entry and would fall back to GPT-2's rule.
CONVERTED: Mapping[str, Splits] = {
    name: SPLITS[name] for name in ("smollm", "glm4", "chatglm-bpe", "deepseek-v3", "kimi-k2")
}
# Of names with the same expressions, the one that also means the architecture's special tokens.
_OWN_NAME = {"glm4": "glm4", "glm4moe": "glm4", "chatglm": "chatglm-bpe"}


def split_name(arch: str, tokenizer: Mapping[str, object]) -> str:
    """llama.cpp's name for how a tokenizer.json cuts text. Raises Unsupported for a way without a name here."""
    found = tuple(_expressions(tokenizer.get("pre_tokenizer")))
    names = [name for name, splits in SPLITS.items() if splits == found]
    if not names:
        raise Unsupported(
            f"tokenizer.json cuts text by {shown(found)}, for which no name in GGUF is known here; known are "
            f"{', '.join(SPLITS)}"
        )
    own = _OWN_NAME.get(arch)
    return own if own in names else names[0]


def _expressions(cut: object) -> Iterator[str]:
    """The expressions of a pre-tokenizer, in order; other kinds appear as their own words, which no name has."""
    if not isinstance(cut, Mapping):
        return
    pattern = cut.get("pattern")
    match cut.get("type"):
        case "Sequence":
            for part in cut.get("pretokenizers") or []:
                yield from _expressions(part)
        case "Split" if isinstance(pattern, Mapping) and "Regex" in pattern and cut.get("behavior") == "Isolated":
            yield str(pattern["Regex"])
        case "Digits":
            yield _DIGITS if cut.get("individual_digits") else rf"{_DIGITS}+"
        case "ByteLevel" if not cut.get("add_prefix_space"):
            yield from (_GPT2,) if cut.get("use_regex", True) else ()
        case kind:
            yield f"{kind}"
