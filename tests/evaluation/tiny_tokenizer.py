"""A tokenizer of whole words for tiny models, made without a download."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "and", "reads", "what", "it", "has", "found"]


def save_tokenizer(folder: Path, reverse: bool = False) -> None:
    """reverse: the same words with other ids."""
    words = ["<unk>", *(reversed(WORDS) if reverse else WORDS)]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>").save_pretrained(folder)
