"""ChatGLM's tokenizers without their code: the numbers of tiktoken and sentencepiece, broken files refused."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import chatglm_oracle as chatglm
import pytest
import torch
from transformers import AutoTokenizer

import transload
from transload.errors import FormatError, TransloadError
from transload.models.chatglm_tokenizer import native_files
from transload.runtime import tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
EXPECTED = json.loads((GOLDEN / "chatglm_tokens.json").read_text(encoding="utf-8"))
CLASSES = {"tiktoken": "ChatGLM4Tokenizer", "sentencepiece": "ChatGLMTokenizer"}
START = {"tiktoken": ["[gMASK]", "<sop>"], "sentencepiece": ["[gMASK]", "sop"]}


def folder_with(kind: str, folder: Path, **settings: Any) -> Path:
    """A folder as the publisher has it: tokenizer.model, and a configuration that names code."""
    folder.mkdir(exist_ok=True)
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text('{"model_type": "chatglm"}')
    shutil.copy(GOLDEN / f"chatglm_{kind}.model", folder / "tokenizer.model")
    code = {"auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLM4Tokenizer", None]}}
    text = json.dumps(code | {"tokenizer_class": CLASSES[kind]} | settings)
    (folder / "tokenizer_config.json").write_text(text)
    return folder


@pytest.mark.parametrize("kind", CLASSES)
def test_tokens_are_those_of_the_library(kind: str, tmp_path: Path) -> None:
    made = tokenizer(folder_with(kind, tmp_path))
    for row in EXPECTED[kind]:
        assert made.encode(row["text"], add_special_tokens=False) == row["ids"]
        assert made.decode(row["ids"]) == row["decoded"]
    assert made.convert_ids_to_tokens(made.encode("a"))[:2] == START[kind]


@pytest.mark.parametrize("kind", CLASSES)
def test_a_ported_folder_needs_no_code_for_its_tokenizer(kind: str, tmp_path: Path) -> None:
    settings = chatglm.CONFIG | {"padded_vocab_size": 512}
    folder = folder_with(kind, chatglm.write(tmp_path / "remote", chatglm.weights(settings), settings))
    transload.port(folder, tmp_path / "native", to="fp32", layout="native")
    made = AutoTokenizer.from_pretrained(tmp_path / "native")
    row = EXPECTED[kind][0]
    assert made.encode(row["text"], add_special_tokens=False) == row["ids"]
    assert "auto_map" not in json.loads((tmp_path / "native" / "tokenizer_config.json").read_text())


def test_a_model_answers_in_text(tmp_path: Path) -> None:
    settings = chatglm.CONFIG | {"padded_vocab_size": 512, "eos_token_id": 500, "pad_token_id": 500}
    folder = folder_with("tiktoken", chatglm.write(tmp_path / "m", chatglm.weights(settings), settings))
    answer = transload.generate(transload.load(folder, device="cpu"), "Hello", max_new_tokens=3)
    assert len(answer.tokens) <= 3
    assert isinstance(answer.text, str)


def test_chatglm3_has_roles_and_chatglm2_has_none(tmp_path: Path) -> None:
    plain = tokenizer(folder_with("sentencepiece", tmp_path / "2"))
    assert len(plain.encode("<|user|>", add_special_tokens=False)) > 1
    chat = tokenizer(folder_with("sentencepiece", tmp_path / "3", chat_template="[gMASK]sop<|user|><|observation|>"))
    assert len(chat.encode("<|user|>", add_special_tokens=False)) == 1
    assert chat.chat_template == "[gMASK]sop<|user|><|observation|>"


HISTORY = [
    {"role": "user", "content": "Hello world"},
    {"role": "assistant", "content": "scales"},
    {"role": "user", "content": "你好"},
]


def conversation(made: Any) -> list[int]:
    ids: list[int] = made.apply_chat_template(HISTORY, add_generation_prompt=True, return_dict=False)
    return ids


def test_a_conversation_is_put_together_as_the_publishers_code_does(tmp_path: Path) -> None:
    glm4 = tokenizer(folder_with("tiktoken", tmp_path / "4"))
    parts = [
        [glm4.convert_tokens_to_ids(f"<|{m['role']}|>"), *bare(glm4, "\n"), *bare(glm4, m["content"])] for m in HISTORY
    ]
    start, end = glm4.encode(""), glm4.convert_tokens_to_ids("<|assistant|>")
    assert conversation(glm4) == [*start, *(i for part in parts for i in part), end]

    folder = folder_with("sentencepiece", tmp_path / "3")
    (folder / "tokenization_chatglm.py").write_text("'<|observation|>'")
    three = tokenizer(folder)
    parts = [
        [three.convert_tokens_to_ids(f"<|{m['role']}|>"), *bare(three, "\n"), *bare(three, m["content"])]
        for m in HISTORY
    ]
    start, end = three.encode(""), three.convert_tokens_to_ids("<|assistant|>")
    assert conversation(three) == [*start, *(i for part in parts for i in part), end]

    two = tokenizer(folder_with("sentencepiece", tmp_path / "2"))
    text = "[Round 1]\n\n问：Hello world\n\n答：scales\n\n[Round 2]\n\n问：你好\n\n答："
    assert conversation(two) == two.encode(text)


def test_a_template_beside_the_tokenizer_comes_first(tmp_path: Path) -> None:
    folder = folder_with("tiktoken", tmp_path)
    (folder / "chat_template.jinja").write_text("[gMASK]<sop>{{ messages[0]['content'] }}")
    assert conversation(tokenizer(folder)) == tokenizer(folder).encode("Hello world")


def bare(made: Any, text: str) -> list[int]:
    ids: list[int] = made.encode(text, add_special_tokens=False)
    return ids


def test_listed_special_tokens_come_first(tmp_path: Path) -> None:
    listed = {str(500 + i): {"content": name} for i, name in enumerate(("<|endoftext|>", "[gMASK]", "<sop>", "<x>"))}
    made = tokenizer(folder_with("tiktoken", tmp_path, added_tokens_decoder=listed))
    assert made.encode("<x>") == [501, 502, 503]


def test_a_folder_without_the_publishers_tokenizer_is_left_alone(tmp_path: Path) -> None:
    assert native_files(tmp_path) == {}
    folder = folder_with("tiktoken", tmp_path / "m", tokenizer_class="LlamaTokenizer")
    assert native_files(folder) == {}


@pytest.mark.parametrize(
    ("data", "settings", "reason"),
    [
        (b"\n".join(base64.b64encode(t) + b" %d" % i for i, t in enumerate((b"a", b"b" * 2000))), {}, "2000 letters"),
        (b"\x00\xff broken", {}, "neither a tiktoken vocabulary nor a sentencepiece model"),
        (b"", {}, "it has no pieces"),
        (b"\x0a\x7f\x0a", {}, "ends after the data"),
        (b"\x0a\x02\x10\x01", {}, "a piece without text"),
        (b"\x0a" + b"\xff" * 12, {}, "a number is too long"),
        (b"\x0a\x03\x0a\x01a\x12\x02\x18\x01", {}, "only BPE"),
        (None, {"added_tokens_decoder": {"900": {"content": "<x>"}}}, "do not follow the 500"),
    ],
)
def test_broken_vocabularies_are_refused(
    data: bytes | None, settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    folder = folder_with("tiktoken", tmp_path, **settings)
    if data is not None:
        (folder / "tokenizer.model").write_bytes(data)
    with pytest.raises(TransloadError, match=reason) as failed:
        native_files(folder)
    assert str(folder) in str(failed.value)


def test_a_huge_vocabulary_is_not_read(tmp_path: Path) -> None:
    folder = folder_with("tiktoken", tmp_path)
    with (folder / "tokenizer.model").open("wb") as f:
        f.truncate(1 << 27)
    with pytest.raises(FormatError, match="too many for a vocabulary"):
        native_files(folder)


def test_a_gguf_file_gets_weights_and_tokenizer_of_the_native_layout(tmp_path: Path) -> None:
    settings = chatglm.CONFIG | {"padded_vocab_size": 544}
    weights = chatglm.weights(settings)
    folder = folder_with("tiktoken", chatglm.write(tmp_path / "remote", weights, settings))
    with pytest.raises(TransloadError, match="with layout 'native' this is 'glm'"):
        transload.port(folder, tmp_path / "m.gguf", to="gguf")
    transload.port(folder, tmp_path / "m.gguf", to="gguf", layout="native")
    model = transload.load(tmp_path / "m.gguf", device="cpu")
    ids = torch.tensor([3, 99, 7, 41, 500])
    with torch.no_grad():
        found, meant = model(ids[None]).logits[0], chatglm.logits(weights, settings, ids)
    assert float((found - meant).norm() / meant.norm()) < 1e-4
    made = tokenizer(model)
    for row in EXPECTED["tiktoken"]:
        assert made.encode(row["text"], add_special_tokens=False) == row["ids"]
