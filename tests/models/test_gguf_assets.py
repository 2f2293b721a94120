"""The tokenizer, template and settings that a GGUF file carries, against transformers' own reading of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf_model import CASES, add_tokenizer, build

import transload
from transload.errors import FormatError, Unsupported
from transload.headers import read_gguf_header
from transload.models.gguf_assets import tokenizer_files, tokenizer_of
from transload.models.gguf_config import special_ids

STRINGS = [
    "Hello world", "  leading and  double  spaces ", "def f(x):\n\treturn x**2  # 注释\n\n\n", "你好，世界！这是测试。",
    "<|im_start|>user\nhi<|im_end|>", "1234567 3.14 0x1F", "I'LL don't it's", "emoji 😀👩‍👧 Ünïcödé", "", " ",
    "日本語 한국어",
    "<|endoftext|><|unknown|>",
]  # fmt: skip
CHAT = [{"role": "user", "content": "Reverse a string"}, {"role": "assistant", "content": "s[::-1]"}]


def unpacked(path: Path, folder: Path) -> Path:
    """The folder that a GGUF file becomes, without weights."""
    checkpoint = transload.open(path)
    folder.mkdir()
    for name, data in checkpoint.format.files(checkpoint.source).items():
        (folder / name).write_bytes(data)
    (folder / "config.json").write_text(json.dumps(checkpoint.config))
    return folder


def same_tokenizer(file: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    ours = AutoTokenizer.from_pretrained(unpacked(file, folder))
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in STRINGS:
        ids = ours(text)["input_ids"]
        assert ids == theirs(text)["input_ids"], text
        assert ours.decode(ids) == theirs.decode(ids)
    for prompt in (True, False):
        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": prompt}
        assert ours.apply_chat_template(CHAT, **options) == theirs.apply_chat_template(CHAT, **options)
    for name in ("bos_token", "eos_token", "pad_token", "unk_token", "all_special_tokens"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert len(ours) == len(theirs)


def test_a_written_tokenizer_gives_the_same_ids_and_prompts(tmp_path: Path) -> None:
    build(CASES[1], tmp_path / "m.gguf")
    same_tokenizer(tmp_path / "m.gguf", tmp_path / "hf")


@pytest.mark.model
@pytest.mark.parametrize("file", ["qwen2.5-coder-0.5b-instruct.gguf", "SmolLM2-135M-Instruct.Q4_1.gguf"])
def test_a_real_tokenizer_gives_the_same_ids_and_prompts(file: str, tmp_path: Path) -> None:
    folder = os.environ.get("TRANSLOAD_TEST_MODELS")
    if not folder or not (Path(folder) / file).is_file():
        pytest.skip(f"no {file}: set TRANSLOAD_TEST_MODELS to a folder that has it")
    same_tokenizer(Path(folder) / file, tmp_path / "hf")


def test_the_generation_config_has_the_special_tokens(tmp_path: Path) -> None:
    from transformers import GenerationConfig

    build(CASES[1], tmp_path / "m.gguf")
    found = GenerationConfig.from_pretrained(unpacked(tmp_path / "m.gguf", tmp_path / "hf"))
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (317, 319, 317)


def header(path: Path, **ids: int) -> Any:
    writer = gguf.GGUFWriter(str(path), "qwen2")
    add_tokenizer(writer)
    for name, value in ids.items():
        writer.kv_data[0].pop(f"tokenizer.ggml.{name}_token_id", None)
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read_gguf_header(path).metadata


def test_several_ends_of_generation_are_a_list(tmp_path: Path) -> None:
    assert special_ids(header(tmp_path / "m.gguf", eot=318, eom=319))["eos_token_id"] == [319, 318]


def test_a_special_token_outside_the_vocabulary_is_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"bos_token_id is '5000', but there are 320 tokens"):
        tokenizer_of(header(tmp_path / "m.gguf", bos=5000))


def test_a_file_without_tokenizer_still_has_settings() -> None:
    assert tokenizer_files({"general.architecture": "qwen2"}).keys() == {"generation_config.json"}
    with pytest.raises(FormatError, match=r"no tokenizer\.ggml\.tokens"):
        tokenizer_of({"general.architecture": "qwen2"})


def test_a_kind_of_tokenizer_that_transformers_lacks_is_named(tmp_path: Path) -> None:
    metadata = {**header(tmp_path / "m.gguf"), "tokenizer.ggml.model": "rwkv"}
    with pytest.raises(Unsupported, match=r"tokenizer 'rwkv'.*give a folder with a tokenizer\.json"):
        tokenizer_of(metadata)


CUTS = {
    "glm4": [("12345 It's\n\nok", ["123", "45", "ĠIt", "'s", "ĊĊ", "ok"])],
    "deepseek-v3": [("12345汉字 a.b", ["123", "45", "æ±īåŃĹ", "Ġa", ".b"])],
    "kimi-k2": [("汉字HelloWorld 12345", ["æ±īåŃĹ", "Hello", "World", "Ġ", "123", "45"])],
}


@pytest.mark.parametrize("pre", CUTS)
def test_text_is_cut_as_the_models_own_tokenizers_cut_it(pre: str, tmp_path: Path) -> None:
    metadata = {**header(tmp_path / "m.gguf"), "tokenizer.ggml.pre": pre}
    cut = tokenizer_of(metadata).backend_tokenizer.pre_tokenizer
    for text, pieces in CUTS[pre]:
        assert [piece for piece, _ in cut.pre_tokenize_str(text)] == pieces
