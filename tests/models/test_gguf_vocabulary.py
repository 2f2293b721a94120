"""Tokenizers on their way into a GGUF file: what reads them back cuts text into the same tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from transload.errors import FormatError, Unsupported
from transload.models.gguf_assets import tokenizer_of
from transload.models.gguf_splits import SPLITS, split_name
from transload.models.gguf_vocabulary import add_tokenizer

TEXT = ["the quick brown fox jumps over the lazy dog", "a quick fox and the other fox", "0123 12 1999"]
ASKED = ["the fox", "the  quick", "12 foxes jump", "Ünïcödé 你好", "the dog</s>"]


def sentencepiece(folder: Path) -> Tokenizer:
    """A tokenizer.json as Llama 2 has it: pieces with a mark for the space, bytes for what has no piece."""
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *bytes_]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([line.replace(" ", "▁") for line in TEXT], trainer)
    made = json.loads(tokenizer.to_str())
    made["added_tokens"] = made["added_tokens"][:3]  # bytes are ordinary pieces
    (folder / "tokenizer.json").write_text(json.dumps(made))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return Tokenizer.from_str(json.dumps(made))


def metadata(arch: str, folder: Path, size: int) -> dict[str, Any]:
    writer = gguf.GGUFWriter(None, arch)
    add_tokenizer(writer, arch, folder, size)
    return {"general.architecture": arch} | {key: value.value for key, value in writer.kv_data[0].items()}


def test_pieces_are_merged_in_the_same_order(tmp_path: Path) -> None:
    meant = sentencepiece(tmp_path)
    found = metadata("llama", tmp_path, meant.get_vocab_size())
    assert found["tokenizer.ggml.model"] == "llama"
    kinds = found["tokenizer.ggml.token_type"]
    assert (kinds[:4], kinds[258], kinds[259]) == ([2, 3, 3, 6], 6, 1)
    assert found["tokenizer.ggml.add_space_prefix"] is True
    read = tokenizer_of(found)
    for text in ASKED:
        assert read(text, add_special_tokens=False)["input_ids"] == meant.encode(text).ids, text


@pytest.mark.parametrize(("arch", "name"), [("llama", "llama-bpe"), ("glm4moe", "glm4"), ("chatglm", "chatglm-bpe")])
def test_one_rule_has_several_names(arch: str, name: str) -> None:
    cut = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": SPLITS["llama-bpe"][0]}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ],
    }
    assert split_name(arch, {"pre_tokenizer": cut}) == name


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "qwen2", "deepseek-v3", "kimi-k2"])
def test_rules_are_found_as_tokenizers_writes_them(name: str) -> None:
    cuts = [pre_tokenizers.Split(Regex(s), "isolated") for s in SPLITS[name]]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(False, use_regex=False)])
    assert split_name("llama", json.loads(tokenizer.to_str())) == name


def test_digits_and_byte_levels_own_rule_are_smollms() -> None:
    tokenizer = Tokenizer(models.BPE())
    cuts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    assert split_name("llama", json.loads(tokenizer.to_str())) == "smollm"


def test_tokenizers_that_have_no_place_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"no tokenizer\.json"):
        metadata("llama", tmp_path, 8)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram"}}))
    with pytest.raises(Unsupported, match="type 'Unigram'; BPE has a place"):
        metadata("llama", tmp_path, 8)


def test_a_token_beyond_the_table_is_named(tmp_path: Path) -> None:
    made = {"model": {"type": "BPE", "vocab": {"a": 9}, "merges": []}, "pre_tokenizer": {"type": "ByteLevel"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(made))
    with pytest.raises(FormatError, match="token 'a' has number 9, the embedding table has 8 rows"):
        metadata("llama", tmp_path, 8)
