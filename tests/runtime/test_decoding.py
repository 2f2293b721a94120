"""Single tokens through one native call: the same numbers as transformers' layers, whatever a user does in between."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import distance, make
from transformers import DynamicCache, PreTrainedModel

import transload
from transload.runtime import TransloadConfig, report
from transload.runtime.decoding import decoder_of
from transload.runtime.decoding.cache import GrowingLayer
from transload.runtime.decoding.loop import one_sequence, suits
from transload.runtime.decoding.stepwise import StepwiseModel

LLAMA = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
FOUR = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16, "rope_theta": 10000.0,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}

# name -> configuration class, settings. Head sizes, ratios of query to key heads, biases, norms and positions vary.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**LLAMA, **FOUR}),
    "llama-biases-dim80": ("Llama", {**LLAMA, **FOUR, "head_dim": 80, "attention_bias": True, "mlp_bias": True}),
    "llama-tied-one-key-head": ("Llama", {**LLAMA, **FOUR, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama-llama3-positions": ("Llama", {**LLAMA, **FOUR, "rope_parameters": LLAMA3}),
    "llama-yarn": ("Llama", {**LLAMA, **FOUR, "rope_parameters": YARN}),
    "llama-dynamic": ("Llama", {**LLAMA, **FOUR, "rope_parameters": DYNAMIC, "max_position_embeddings": 16}),
    "mistral-dim128": ("Mistral", {**LLAMA, **FOUR, "head_dim": 128, "sliding_window": None}),
    "mistral-window": ("Mistral", {**LLAMA, **FOUR, "sliding_window": 8}),
    "qwen2-window-above-layer-1": (
        "Qwen2",
        {**LLAMA, **FOUR, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen2": ("Qwen2", {**LLAMA, **FOUR, "hidden_size": 128, "num_key_value_heads": 4}),
    "qwen3-dim96": ("Qwen3", {**LLAMA, **FOUR, "head_dim": 96, "num_attention_heads": 6}),
    "phi3": ("Phi3", {**LLAMA, **FOUR, "sliding_window": 300, "pad_token_id": 0, "hidden_size": 256}),
    "glm": ("Glm", {**LLAMA, **FOUR, "head_dim": 64, "pad_token_id": 0}),
    "glm4": ("Glm4", {**LLAMA, **FOUR, "head_dim": 64, "pad_token_id": 0, "attention_bias": True}),
}


def tiny(name: str, folder: Path, scheme: str = "w4a16", **load: Any) -> PreTrainedModel:
    """A model with random weights, biases and norms, rounded to 4 bits."""
    kind, settings = FAMILIES[name]
    torch.manual_seed(3)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**settings)).eval()
    with torch.no_grad():
        for label, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in label else 0.0, 0.15)
    model.save_pretrained(folder)
    config = TransloadConfig(group_size=32, scheme=scheme, device="cpu")
    return transload.load(folder, quantize=config, dtype=torch.float32, **load)


def decode(model: Any, tokens: torch.Tensor, prompt: int, cache: DynamicCache | None = None) -> torch.Tensor:
    """Logits [T - prompt + 1, vocab]: the prompt at once, then one token after the other."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    with torch.inference_mode():
        out = [model(tokens[:, :prompt], past_key_values=cache, use_cache=True).logits[0, -1]]
        for t in range(prompt, tokens.shape[1]):
            out.append(model(tokens[:, t : t + 1], past_key_values=cache, use_cache=True).logits[0, -1])
    return torch.stack(out)


class Plain:
    """A model whose tokens go through transformers' layers, for as long as this lasts."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.stepwise = model, model.model

    def __enter__(self) -> PreTrainedModel:
        self.model.model = self.stepwise.inner
        return self.model

    def __exit__(self, *_: object) -> None:
        self.model.model = self.stepwise


def plainly(model: PreTrainedModel, tokens: torch.Tensor, prompt: int) -> torch.Tensor:
    with Plain(model) as plain:
        return decode(plain, tokens, prompt)


def is_native(model: PreTrainedModel) -> bool:
    return isinstance(model.model, StepwiseModel) and model.model.reason is None


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def steps(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The length before every native step that the model takes."""
    taken: list[int] = []
    step = llama.model._prepared.step
    run = type(step).run

    def counted(self: Any, x: Any, cos: Any, sin: Any, cache: Any, length: int) -> Any:
        taken.append(length)
        return run(self, x, cos, sin, cache, length)

    monkeypatch.setattr(type(step), "run", counted)
    return taken


@pytest.fixture
def prompts(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(length before, tokens) of every prompt that the model takes natively."""
    taken: list[tuple[int, int]] = []
    step = llama.model._prepared.step
    run_many = type(step).run_many

    def counted(self: Any, x: Any, cos: Any, sin: Any, cache: Any, length: int) -> Any:
        taken.append((length, len(x)))
        return run_many(self, x, cos, sin, cache, length)

    monkeypatch.setattr(type(step), "run_many", counted)
    return taken


TOKENS = torch.arange(3, 33).unsqueeze(0) * 7 % 96


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers_layers(name: str, tmp_path: Path) -> None:
    model = tiny(name, tmp_path)
    assert is_native(model), decoder_of(model)
    plainly(model, TOKENS, 5)  # dynamic positions of older transformers never forget the longest text
    # Both multiply with 15-bit activations; the order of sums differs, and with it some roundings.
    assert distance(decode(model, TOKENS, 5), plainly(model, TOKENS, 5)) < 5e-4


@pytest.mark.parametrize("name", ["llama-biases-dim80", "qwen3-dim96", "glm4"])
def test_int8_activations_are_as_near_to_float_as_through_transformers_layers(name: str, tmp_path: Path) -> None:
    model, exact = tiny(name, tmp_path, "w4a8"), tiny(name, tmp_path)
    truth = plainly(exact, TOKENS, 5)
    ours, theirs = distance(decode(model, TOKENS, 5), truth), distance(plainly(model, TOKENS, 5), truth)
    assert 1e-4 < ours < 1.3 * theirs  # sums in another order round other activations, by as much


def test_a_first_token_alone_and_a_growing_cache(llama: PreTrainedModel, steps: list[int]) -> None:
    tokens = (torch.arange(700) * 31 % 96).unsqueeze(0)
    many = decode(llama, tokens, 1)
    assert steps == list(range(700))
    with Plain(llama) as plain, torch.inference_mode():
        at_once = plain(tokens).logits[0]
    assert distance(many, at_once) < 5e-4


def test_a_conversation_goes_on_with_its_cache(llama: PreTrainedModel, steps: list[int]) -> None:
    cache = DynamicCache(config=llama.config)
    decode(llama, TOKENS[:, :10], 5, cache)
    second = decode(llama, TOKENS[:, 10:], 8, cache)  # eight more tokens at once, then one by one
    assert distance(second, plainly(llama, TOKENS, 5)[13:]) < 5e-4
    assert len(steps) == 5 + 12


@pytest.mark.parametrize("name", ["mistral-window", "qwen2-window-above-layer-1"])
def test_windows_slide_over_prompts_and_conversations(name: str, tmp_path: Path) -> None:
    model = tiny(name, tmp_path)
    want = plainly(model, TOKENS, 12)
    assert distance(decode(model, TOKENS, 12), want) < 5e-4  # the prompt is longer than the window
    cache = DynamicCache(config=model.config)
    decode(model, TOKENS[:, :15], 4, cache)
    assert distance(decode(model, TOKENS[:, 15:], 6, cache), want[9:]) < 5e-4
    dropped = DynamicCache(config=model.config)  # transformers' own layers have let the first tokens go
    with Plain(model) as plain:
        decode(plain, TOKENS[:, :20], 12, dropped)
    assert distance(decode(model, TOKENS[:, 20:], 1, dropped), want[9:]) < 5e-4


def test_a_cache_that_transformers_filled_is_taken_over(llama: PreTrainedModel, steps: list[int]) -> None:
    cache = DynamicCache()
    with Plain(llama) as plain:
        decode(plain, TOKENS[:, :12], 6, cache)
    assert distance(decode(llama, TOKENS[:, 12:], 1, cache), plainly(llama, TOKENS, 12)[1:]) < 5e-4
    assert len(steps) == 18
    assert all(type(layer) is GrowingLayer for layer in cache.layers)


def test_a_cropped_and_a_copied_cache_go_on_from_where_they_are(llama: PreTrainedModel) -> None:
    cache = DynamicCache(config=llama.config)
    decode(llama, TOKENS[:, :20], 5, cache)
    other = copy.deepcopy(cache)
    cache.crop(-8)
    want = plainly(llama, TOKENS, 12)[1:]
    assert distance(decode(llama, TOKENS[:, 12:], 1, cache), want) < 5e-4
    assert distance(decode(llama, TOKENS[:, 20:], 1, other), want[8:]) < 5e-4


def test_generate_gives_the_same_tokens_for_every_way_to_generate(llama: PreTrainedModel, steps: list[int]) -> None:
    ways: dict[str, tuple[dict[str, Any], bool]] = {
        "greedy": ({}, True),
        "repetition penalty": ({"repetition_penalty": 1.3}, True),
        "sampling": ({"do_sample": True, "top_k": 20}, True),
        "beams": ({"num_beams": 3}, False),
        "several": ({"do_sample": True, "num_return_sequences": 2}, False),
        "without cache": ({"use_cache": False}, False),
        "static cache": ({"cache_implementation": "static"}, False),
        "scores": ({"output_scores": True, "output_logits": True, "return_dict_in_generate": True}, True),
    }
    for name, (settings, native) in ways.items():
        steps.clear()
        ours = _generated(llama, settings)
        assert bool(steps) == native, name
        with Plain(llama) as plain:
            assert torch.equal(ours, _generated(plain, settings)), name


def _generated(model: PreTrainedModel, settings: dict[str, Any]) -> torch.Tensor:
    torch.manual_seed(5)
    ids = TOKENS[:, :6]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, pad_token_id=0, **settings)
    return out if isinstance(out, torch.Tensor) else out.sequences


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"repetition_penalty": 1.3},
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 30, "min_p": 0.01},
        {"eos_token_id": [5, 90, 17, 60]},
        {"no_repeat_ngram_size": 2, "min_new_tokens": 4},
        {"max_time": 60.0},
    ],
    ids=lambda s: " ".join(s) or "greedy",
)
def test_our_loop_gives_the_tokens_of_transformers_loop(llama: PreTrainedModel, settings: dict[str, Any]) -> None:
    assert suits(llama, transformers.GenerationConfig(**settings))
    assert torch.equal(_generated(llama, {**settings, "custom_generate": one_sequence}), _generated(llama, settings))


def test_our_loop_leaves_to_transformers_what_it_does_not_do(llama: PreTrainedModel) -> None:
    for settings in ({"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert not suits(llama, transformers.GenerationConfig(**settings))
    with Plain(llama) as plain:
        assert not suits(plain, transformers.GenerationConfig())


def test_what_the_step_does_not_do_goes_through_transformers_layers(
    llama: PreTrainedModel, steps: list[int], prompts: list[tuple[int, int]]
) -> None:
    cases: dict[str, dict[str, Any]] = {
        "two sequences": {"input_ids": torch.tensor([[1], [2]])},
        "padding": {"input_ids": torch.tensor([[1]]), "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]])},
        "hidden states": {"input_ids": torch.tensor([[1]]), "output_hidden_states": True},
        "attentions": {"input_ids": torch.tensor([[1]]), "output_attentions": True},
        "three hidden states": {"input_ids": torch.tensor([[1, 2, 3]]), "output_hidden_states": True},
        "three padded tokens": {
            "input_ids": torch.tensor([[1, 2, 3]]),
            "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]]),
        },
        "positions with a gap": {
            "input_ids": torch.tensor([[1, 2, 3]]),
            "position_ids": torch.tensor([[5, 6, 8]]),
        },
    }
    for name, case in cases.items():
        with Plain(llama) as plain:
            want = _after_five(plain, case)
        got = _after_five(llama, case)
        assert distance(got.logits, want.logits) < 5e-4, name
        assert (got.hidden_states is None) == (want.hidden_states is None), name
        assert (got.attentions is None) == (want.attentions is None), name
    assert steps == []
    assert prompts == [(0, 5)] * (len(cases) - 1)  # two sequences have none
    after = _after_five(llama, {"input_ids": torch.tensor([[1]])})  # hooks that transformers left do not matter
    assert steps == [5]
    assert after.hidden_states is None


def _after_five(model: PreTrainedModel, case: dict[str, Any]) -> Any:
    cache = DynamicCache(config=model.config)
    rows = len(case["input_ids"])
    with torch.no_grad():
        model(TOKENS[:, :5].expand(rows, 5), past_key_values=cache, use_cache=True)
        return model(past_key_values=cache, use_cache=True, **case)


def test_prompts_and_what_follows_take_one_call_each(llama: PreTrainedModel, prompts: list[tuple[int, int]]) -> None:
    cache = DynamicCache(config=llama.config)
    out = []
    with torch.inference_mode():
        embeds = llama.get_input_embeddings()(TOKENS[:, 24:])
        out.append(llama(TOKENS[:, :20], past_key_values=cache, use_cache=True).logits)
        mask, positions = torch.ones(1, 24, dtype=torch.int64), torch.arange(20, 24).unsqueeze(0)
        out.append(llama(TOKENS[:, 20:24], mask, positions, past_key_values=cache, use_cache=True).logits)
        out.append(llama(inputs_embeds=embeds, past_key_values=cache, use_cache=True).logits)
        with Plain(llama) as plain:
            want = plain(TOKENS).logits
    assert prompts == [(0, 20), (20, 4), (24, 6)]
    assert distance(torch.cat(out, dim=1), want) < 5e-4
    assert cache.get_seq_length() == 30


def test_gradients_and_training_go_through_transformers_layers(
    llama: PreTrainedModel, prompts: list[tuple[int, int]]
) -> None:
    llama(TOKENS)
    llama.train()
    with torch.no_grad():
        llama(TOKENS)
    llama.eval()
    assert prompts == []
    with torch.no_grad():
        llama(TOKENS, use_cache=False)
        assert prompts == []
        llama(TOKENS)
    assert prompts == [(0, 30)]


def test_positions_of_the_caller_are_respected(llama: PreTrainedModel) -> None:
    case = {"input_ids": torch.tensor([[4]]), "position_ids": torch.tensor([[11]])}
    with Plain(llama) as plain:
        want = _after_five(plain, case).logits
    assert distance(_after_five(llama, case).logits, want) < 5e-4
    assert distance(_after_five(llama, {"input_ids": torch.tensor([[4]])}).logits, want) > 1e-2


def test_embeddings_instead_of_tokens(llama: PreTrainedModel, steps: list[int]) -> None:
    with torch.no_grad():
        embeds = llama.get_input_embeddings()(torch.tensor([[4]]))
    got = [_embedded(llama, embeds), _after_five(llama, {"input_ids": torch.tensor([[4]])}).logits]
    assert torch.equal(*got)
    assert steps == [5, 5]


def _embedded(model: PreTrainedModel, embeds: torch.Tensor) -> torch.Tensor:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(TOKENS[:, :5], past_key_values=cache, use_cache=True)
        logits: torch.Tensor = model(inputs_embeds=embeds, past_key_values=cache, use_cache=True).logits
    return logits


def states(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Hidden states of tokens that all go through the step."""
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        steps = [model.model(t.view(1, 1), past_key_values=cache, use_cache=True) for t in tokens[0]]
    return torch.cat([step.last_hidden_state[0] for step in steps])


def test_threads_change_no_bit_and_generations_at_once_do_not_meet(llama: PreTrainedModel) -> None:
    before = torch.get_num_threads()
    results: dict[int, torch.Tensor] = {}

    def work(i: int) -> None:
        torch.set_num_threads(2)
        results[i] = states(llama, TOKENS.roll(i))

    try:
        torch.set_num_threads(1)
        alone = [states(llama, TOKENS.roll(i)) for i in range(4)]
        workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[i], alone[i]) for i in range(4))


def test_bfloat16_activations_keep_a_bfloat16_cache(tmp_path: Path) -> None:
    kind, settings = FAMILIES["qwen2"]
    torch.manual_seed(3)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**settings)).eval()
    model.save_pretrained(tmp_path)
    ours = transload.load(tmp_path, quantize=TransloadConfig(group_size=32, device="cpu"), dtype=torch.bfloat16)
    assert is_native(ours)
    cache = DynamicCache(config=ours.config)
    got = decode(ours, TOKENS, 5, cache)
    assert got.dtype == cache.layers[0].keys.dtype == torch.bfloat16
    assert distance(got.float(), plainly(ours, TOKENS, 5).float()) < 2e-2  # transformers rounds after every module


def test_a_saved_model_has_the_same_bytes_with_and_without_the_step(tmp_path: Path) -> None:
    model = tiny("glm4", tmp_path / "float")
    decode(model, TOKENS, 5)
    model.save_pretrained(tmp_path / "with")
    model.model = model.model.inner
    model.save_pretrained(tmp_path / "without")
    files = sorted(p.name for p in (tmp_path / "with").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "without").iterdir())
    for name in files:
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes(), name
    again = transload.load(tmp_path / "with", device="cpu")
    assert is_native(again)
    assert torch.equal(decode(again, TOKENS, 5), decode(tiny("glm4", tmp_path / "float"), TOKENS, 5))


def test_a_copied_model_and_replaced_modules_are_seen(tmp_path: Path) -> None:
    model = tiny("qwen2", tmp_path)
    first = decode(model, TOKENS, 5)
    other = copy.deepcopy(model)
    assert torch.equal(decode(other, TOKENS, 5), first)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj = torch.nn.Linear(160, 128, bias=False)
        other.model.layers[1].mlp.down_proj.weight.zero_()
    changed = decode(other, TOKENS, 5)
    assert distance(changed, first) > 1e-2
    assert distance(changed, plainly(other, TOKENS, 5)) < 5e-4
    assert is_native(other)
    assert torch.equal(decode(model, TOKENS, 5), first)
    handle = other.model.layers[0].register_forward_hook(lambda *a: None)
    decode(other, TOKENS, 5)
    assert "hooks" in decoder_of(other)
    handle.remove()
    decode(other, TOKENS, 5)
    assert is_native(other)


def test_a_layer_that_was_cut_off_is_not_computed_any_more(tmp_path: Path) -> None:
    model = tiny("qwen3-dim96", tmp_path)
    whole = decode(model, TOKENS, 5)
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    cut = decode(model, TOKENS, 5)
    assert distance(cut, plainly(model, TOKENS, 5)) < 5e-4
    assert distance(cut[1:], whole[1:]) > 1e-2
    assert len(model.model._prepared.decoder.layers) == 1


def test_the_report_says_what_decodes_and_why_not(llama: PreTrainedModel, tmp_path: Path) -> None:
    assert report(llama).decoder.startswith("native")
    assert "decoder: native" in str(report(llama))
    make("qwen2.5-vl", tmp_path / "vl")
    pictures = transload.load(tmp_path / "vl", quantize=TransloadConfig(group_size=32, device="cpu"))
    assert decoder_of(pictures) == "transformers (Qwen2_5_VLModel is not a family that decodes natively)"
    config = transformers.LlamaConfig(**{**LLAMA, **FOUR}, hidden_act="gelu")
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "gelu")
    gelu = transload.load(tmp_path / "gelu", quantize=TransloadConfig(group_size=32, device="cpu"))
    assert decoder_of(gelu) == "transformers (its activation is gelu)"
    assert report(torch.nn.Linear(2, 2)).decoder == ""
