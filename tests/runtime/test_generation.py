"""generate and stream on a tiny model with a tokenizer and a chat template of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import make
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import transload
from transload.errors import ConfigError
from transload.runtime import TransloadConfig, generate, stream, tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make("llama", path)
    words = ["<end>", "<unk>", "user", "assistant", "system", "hello"] + [f"w{i}" for i in range(90)]
    vocabulary = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=vocabulary, eos_token="<end>", unk_token="<unk>")
    wrapped.chat_template = TEMPLATE
    wrapped.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return transload.load(folder, quantize=TransloadConfig(group_size=32, device="cpu"), dtype=torch.float32)


def test_greedy_answers_repeat_and_count_their_tokens(model: PreTrainedModel) -> None:
    one, other = (generate(model, "hello", max_new_tokens=8) for _ in range(2))
    assert one.tokens == other.tokens
    assert 1 <= len(one.tokens) <= 8
    assert one.prompt_tokens == 3  # user hello assistant
    assert one.ended == (one.tokens[-1] == 0)
    assert one.prompt_seconds > 0
    assert one.prompt_tokens_per_second > 0


def test_the_callback_gets_the_text_in_pieces(model: PreTrainedModel) -> None:
    pieces: list[str] = []
    answer = generate(model, "hello", max_new_tokens=8, stream=pieces.append)
    assert "".join(pieces).split() == answer.text.split()
    assert len(pieces) > 1


def test_the_iterator_gives_the_same_text_and_returns_the_answer(model: PreTrainedModel) -> None:
    pieces = stream(model, "hello", max_new_tokens=8)
    text = []
    while True:
        try:
            text.append(next(pieces))
        except StopIteration as end:
            answer = end.value
            break
    assert "".join(text).split() == answer.text.split()
    assert answer.tokens == generate(model, "hello", max_new_tokens=8).tokens


def test_errors_in_the_thread_reach_the_caller(model: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match="max_new_tokens=0"):
        list(stream(model, "hello", max_new_tokens=0))


def test_a_seed_makes_sampling_repeatable_and_leaves_torch_alone(model: PreTrainedModel) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    runs = [generate(model, "hello", 12, temperature=1.5, seed=s).tokens for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert torch.equal(torch.rand(1), expected)


def test_messages_and_plain_text_give_other_prompts(model: PreTrainedModel) -> None:
    messages = [{"role": "system", "content": "w1 w2"}, {"role": "user", "content": "hello"}]
    assert generate(model, messages, max_new_tokens=1).prompt_tokens == 6
    assert generate(model, "hello", max_new_tokens=1, chat=False).prompt_tokens == 1


def test_a_path_is_loaded_with_the_defaults(folder: Path) -> None:
    assert generate(folder, "hello", max_new_tokens=2).tokens


REFUSED = {
    "no tokens": ({"prompt": "hello", "max_new_tokens": 0}, "max_new_tokens=0"),
    "cold": ({"prompt": "hello", "temperature": -1.0}, "temperature=-1.0"),
    "nothing": ({"prompt": "", "chat": False}, "the prompt is empty"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_requests_that_make_no_sense_are_refused(model: PreTrainedModel, case: str) -> None:
    arguments, words = REFUSED[case]
    with pytest.raises(ConfigError, match=words):
        generate(model, **arguments)


def test_messages_need_a_chat_template(model: PreTrainedModel, folder: Path) -> None:
    plain = tokenizer(folder)
    plain.chat_template = None
    with pytest.raises(ConfigError, match="needs a chat template"):
        generate(model, [{"role": "user", "content": "hello"}], tokenizer=plain)


def test_a_folder_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    make("llama", tmp_path)
    with pytest.raises(ConfigError, match="no tokenizer could be loaded"):
        generate(tmp_path, "hello")
