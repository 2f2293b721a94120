"""Mixtures of experts in one native call a token: the numbers and words of transformers' layers, or a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_decoding import FOUR, LLAMA, TOKENS, Plain, decode, distance, is_native, plainly
from transformers import DynamicCache, PreTrainedModel

import transload
from transload.runtime import TransloadConfig, report
from transload.runtime.decoding import decoder_of
from transload.runtime.experts import QuantExperts

MOE = {**LLAMA, **FOUR, "head_dim": 32, "moe_intermediate_size": 96}
QWEN3 = {**MOE, "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True}
GLM = {
    **MOE, "n_routed_experts": 12, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "n_shared_experts": 2,
    "first_k_dense_replace": 1, "num_hidden_layers": 3, "routed_scaling_factor": 1.8, "use_qk_norm": True,
}  # fmt: skip

# name -> configuration class, settings.
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-moe": ("Qwen3Moe", QWEN3),
    "qwen3-moe-some-layers-dense": ("Qwen3Moe", {**QWEN3, "mlp_only_layers": [1], "num_hidden_layers": 3}),
    "qwen3-moe-weights-not-normalized": ("Qwen3Moe", {**QWEN3, "norm_topk_prob": False}),
    "qwen3-moe-all-experts-chosen": ("Qwen3Moe", {**QWEN3, "num_experts": 5, "num_experts_per_tok": 5}),
    "qwen3-moe-one-expert": ("Qwen3Moe", {**QWEN3, "num_experts": 1, "num_experts_per_tok": 1}),
    "qwen3-moe-70-experts": ("Qwen3Moe", {**QWEN3, "num_experts": 70, "num_experts_per_tok": 1}),
    "qwen3-moe-window": ("Qwen3Moe", {**QWEN3, "use_sliding_window": True, "sliding_window": 8}),
    "qwen2-moe": ("Qwen2Moe", {**QWEN3, "shared_expert_intermediate_size": 64}),
    "mixtral": ("Mixtral", {**LLAMA, **FOUR, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "glm4-moe": ("Glm4Moe", GLM),
    "glm4-moe-one-group": ("Glm4Moe", {**GLM, "n_group": 1, "topk_group": 1, "use_qk_norm": False}),
    "glm4-moe-all-experts-of-its-groups": ("Glm4Moe", {**GLM, "topk_group": 1}),
}


def tiny(name: str, folder: Path, scheme: str = "w4a16", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A mixture with random weights, correction biases and norms, rounded to 4 bits."""
    kind, settings = MIXTURES[name]
    torch.manual_seed(3)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**settings)).eval()
    with torch.no_grad():
        for label, tensor in model.state_dict().items():
            tensor.normal_(1.0 if "norm" in label else 0.0, 0.15)
            if "correction_bias" in label:
                tensor.abs_()  # transformers 5.0 also chose from outside the groups when scores were negative
    model.save_pretrained(folder)
    return transload.load(folder, quantize=TransloadConfig(group_size=32, scheme=scheme, device="cpu"), dtype=dtype)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return tiny("qwen3-moe", tmp_path_factory.mktemp("qwen3"))


@pytest.mark.parametrize("name", MIXTURES)
def test_logits_and_words_are_those_of_transformers_layers(name: str, tmp_path: Path) -> None:
    model = tiny(name, tmp_path)
    assert is_native(model), decoder_of(model)
    assert distance(decode(model, TOKENS, 5), plainly(model, TOKENS, 5)) < 5e-4
    with Plain(model) as plain:
        want = words(plain)
    assert torch.equal(words(model), want)


@pytest.mark.parametrize("name", MIXTURES)
def test_int8_activations_are_those_of_the_grouped_product(name: str, tmp_path: Path) -> None:
    model = tiny(name, tmp_path, "w4a8")
    ours, theirs = decode(model, TOKENS, 5), plainly(model, TOKENS, 5)
    apart = (ours - theirs).norm(dim=1) / theirs.norm(dim=1)
    # Sums in another order move a number across the middle between two steps now and then; later tokens see that one.
    assert apart[1:].min() < 1e-5
    assert apart.max() < 0.05
    said = words(model)
    likeliest = plainly(model, said, 6)[:-1]
    chosen = likeliest.gather(1, said[0, 6:, None])[:, 0]
    assert (chosen > likeliest.max(1).values - 0.1 * likeliest.std(1)).all()


def words(model: PreTrainedModel) -> torch.Tensor:
    """Six tokens and the twenty that greedy generation adds."""
    ids, settings = TOKENS[:, :6], {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    out: torch.Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return out


@pytest.mark.parametrize("name", ["qwen3-moe", "qwen3-moe-70-experts", "glm4-moe"])
def test_equal_scores_choose_the_experts_that_transformers_chooses(name: str, tmp_path: Path) -> None:
    model = tiny(name, tmp_path)
    with torch.no_grad():
        for layer in model.model.layers:
            if hasattr(layer.mlp, "gate"):
                layer.mlp.gate.weight.zero_()
                layer.mlp.gate._buffers.get("e_score_correction_bias", torch.zeros(1)).zero_()
    assert distance(decode(model, TOKENS, 5), plainly(model, TOKENS, 5)) < 5e-4


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("name", ["qwen3-moe", "glm4-moe"])
def test_a_token_that_is_not_a_number_gives_no_number_and_harms_no_other(name: str, bad: float, tmp_path: Path) -> None:
    model = tiny(name, tmp_path)
    good = decode(model, TOKENS, 5)
    embeds = torch.full((1, 1, model.config.hidden_size), bad)
    with torch.inference_mode():
        state = model.model(inputs_embeds=embeds, past_key_values=DynamicCache(config=model.config), use_cache=True)
    assert is_native(model)
    assert state.last_hidden_state.isnan().all()
    assert torch.equal(decode(model, TOKENS, 5), good)


def test_threads_change_no_bit(qwen3: PreTrainedModel) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = decode(qwen3, TOKENS, 1)
        torch.set_num_threads(3)
        assert torch.equal(decode(qwen3, TOKENS, 1), one)
    finally:
        torch.set_num_threads(before)


def test_bfloat16_routers_and_activations(tmp_path: Path) -> None:
    model = tiny("glm4-moe-one-group", tmp_path, dtype=torch.bfloat16)
    assert is_native(model)
    assert model.model.layers[1].mlp.gate.weight.dtype == torch.bfloat16
    ours, theirs = decode(model, TOKENS, 5).float(), plainly(model, TOKENS, 5).float()
    apart = (ours - theirs).norm(dim=1) / theirs.norm(dim=1)
    assert apart.median() < 3e-2  # transformers rounds after every module, and some tokens take another expert then


def test_experts_left_in_float_decode_as_well(tmp_path: Path) -> None:
    kind, settings = MIXTURES["qwen2-moe"]
    torch.manual_seed(3)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**settings))
    model.save_pretrained(tmp_path)
    config = TransloadConfig(group_size=32, device="cpu", skip_modules=["experts"])
    mixed = transload.load(tmp_path, quantize=config, dtype=torch.float32)
    assert not any(isinstance(module, QuantExperts) for module in mixed.modules())
    assert is_native(mixed), decoder_of(mixed)
    assert distance(decode(mixed, TOKENS, 5), plainly(mixed, TOKENS, 5)) < 5e-4


def test_router_logits_are_transformers_business(qwen3: PreTrainedModel) -> None:
    cache = DynamicCache(config=qwen3.config)
    with torch.inference_mode():
        qwen3(TOKENS[:, :5], past_key_values=cache, use_cache=True)
        out = qwen3(TOKENS[:, 5:6], past_key_values=cache, use_cache=True)
        assert out.router_logits is None
        out = qwen3(TOKENS[:, 6:7], past_key_values=cache, use_cache=True, output_router_logits=True)
    assert len(out.router_logits) == 2
    assert is_native(qwen3)
    assert distance(decode(qwen3, TOKENS, 5), plainly(qwen3, TOKENS, 5)) < 5e-4


def test_a_router_that_chooses_fewer_experts_is_described_anew(tmp_path: Path) -> None:
    model = tiny("qwen3-moe", tmp_path)
    three = decode(model, TOKENS, 5)
    for layer in model.model.layers:
        layer.mlp.gate.top_k = 1
    one = decode(model, TOKENS, 5)
    assert distance(one[1:], three[1:]) > 1e-2
    assert distance(one, plainly(model, TOKENS, 5)) < 5e-4


def test_what_one_call_cannot_reach_is_said(qwen3: PreTrainedModel, tmp_path: Path) -> None:
    model = tiny("qwen3-moe", tmp_path)
    mlp = model.model.layers[1].mlp
    for module, name in ((mlp, "mlp"), (mlp.gate, "mlp.gate"), (mlp.experts, "mlp.experts")):
        handle = module.register_forward_hook(lambda *a: None)
        decode(model, TOKENS, 5)
        reason = f"layers.1.{name} has hooks, which one call for all layers would not reach"
        assert decoder_of(model) == report(model).decoder == f"transformers ({reason})"
        handle.remove()
    decode(model, TOKENS, 5)
    assert is_native(model)
    gate, mlp.gate = mlp.gate, torch.nn.Linear(64, 8)
    model.model.prepare()
    assert "layers.1.mlp.gate is a Linear, expected a router of transformers with a weight only" in decoder_of(model)
    mlp.gate = gate
    mlp.experts.swiglu = False
    decode(model, TOKENS, 5)
    assert "layers.1.mlp.experts combine gate and up projection in a way of their own" in decoder_of(model)
    assert distance(decode(model, TOKENS, 5), plainly(qwen3, TOKENS, 5)) < 1e-6  # the same weights, said to be so


def test_a_mixture_of_another_family_is_refused_by_name(tmp_path: Path) -> None:
    settings = {**QWEN3, "num_key_value_heads": 4}
    transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**settings)).save_pretrained(tmp_path)
    model = transload.load(tmp_path, quantize=TransloadConfig(group_size=32, device="cpu"))
    assert decoder_of(model) == "transformers (OlmoeModel is not a family that decodes natively)"


def test_more_experts_than_the_chosen_groups_have_are_refused(tmp_path: Path) -> None:
    settings = {**GLM, "topk_group": 1, "num_experts_per_tok": 5}
    transformers.Glm4MoeForCausalLM(transformers.Glm4MoeConfig(**settings)).save_pretrained(tmp_path)
    model = transload.load(tmp_path, quantize=TransloadConfig(group_size=32, device="cpu"))
    reason = "layers.1.mlp takes 5 experts, more than 1 of its 4 groups have"
    assert decoder_of(model) == f"transformers ({reason})"
