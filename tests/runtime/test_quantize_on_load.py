"""Float models rounded while they load, through transformers' from_pretrained and through transload.load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import MODELS, distance, logits, make, with_weights_of
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import transload
from transload.errors import ConfigError, Unsupported
from transload.models.roles import kept_in_float
from transload.runtime import TransloadConfig, report
from transload.runtime.experts import QuantExperts
from transload.runtime.linear import QuantLinear

# Kernels may carry float activations as 15-bit integers (5e-5 a layer); int8 activations cost about 1 % a layer.
W4A16, W4A8 = 1e-3, 0.1
SMALL = {"group_size": 32, "device": "cpu"}


@pytest.fixture(scope="module", params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def saved(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(name)
    make(name, folder)
    return folder


def reference(folder: Path, quantized: nn.Module) -> torch.Tensor:
    model = type(quantized).from_pretrained(folder)
    return logits(with_weights_of(quantized, model))


def test_from_pretrained_gives_the_logits_of_the_dequantized_weights(name: str, saved: Path) -> None:
    model_class = type(MODELS[name]())
    model = model_class.from_pretrained(saved, quantization_config=TransloadConfig(**SMALL), device_map="cpu")
    assert distance(logits(model), reference(saved, model)) < W4A16
    assert any(isinstance(m, QuantLinear) for m in model.modules())


def test_load_rounds_to_the_same_numbers_as_from_pretrained(name: str, saved: Path) -> None:
    one = type(MODELS[name]()).from_pretrained(saved, quantization_config=TransloadConfig(**SMALL))
    other = transload.load(saved, quantize=TransloadConfig(**SMALL), dtype=torch.float32)
    assert torch.equal(logits(one), logits(other))


def test_int8_activations_stay_close(name: str, saved: Path) -> None:
    model = transload.load(saved, scheme="w4a8", quantize=TransloadConfig(**SMALL))
    error = distance(logits(model), reference(saved, model))
    assert 1e-4 < error < W4A8  # below: the activations were not quantized at all
    assert {m.executed for m in report(model).modules if m.kind == "linear"} == {"W4A8"}


def test_a_saved_model_loads_again_with_identical_logits(name: str, saved: Path, tmp_path: Path) -> None:
    model = transload.load(saved, scheme="w4a8", quantize=TransloadConfig(**SMALL))
    model.save_pretrained(tmp_path / "once")
    again = type(model).from_pretrained(tmp_path / "once")
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "twice")
    assert torch.equal(logits(transload.load(tmp_path / "twice", scheme="w4a8")), logits(model))


def test_a_saved_model_has_the_names_of_the_original(name: str, saved: Path, tmp_path: Path) -> None:
    model = transload.load(saved, quantize=TransloadConfig(**SMALL))
    model.save_pretrained(tmp_path)
    stored, original = transload.open(tmp_path), transload.open(saved)
    assert stored.format.name == "transload"
    assert {n if e.spec is None else f"{n}.weight" for n, e in stored.entries.items()} == set(original.entries)


def test_what_stays_in_float_is_named_with_the_reason(name: str, saved: Path) -> None:
    model = transload.load(saved, quantize=TransloadConfig(**SMALL))
    holders = {n for n, m in model.named_modules() if any(p.dim() == 2 for p in m.parameters(recurse=False))}
    kept = report(model).kept
    assert holders == {n for n in kept if kept[n] != "Conv3d computes with float weights"}
    assert all(kept_in_float(n) for n in kept)


@pytest.mark.parametrize("name", ["qwen3-moe", "glm4-moe"], indirect=True)
def test_fused_experts_are_quantized_and_routers_are_not(name: str, saved: Path) -> None:
    model = transload.load(saved, quantize=TransloadConfig(**SMALL))
    experts = [n for n, m in model.named_modules() if isinstance(m, QuantExperts)]
    assert experts
    assert all(model.get_submodule(n.replace("experts", "gate")).weight.is_floating_point() for n in experts)


@pytest.mark.parametrize("name", ["qwen2.5-vl"], indirect=True)
def test_vision_tower_and_projector_keep_their_weights(name: str, saved: Path) -> None:
    model, original = transload.load(saved, quantize=TransloadConfig(**SMALL)), MODELS[name]()
    towers = {n for n, _ in original.named_parameters() if ".visual." in n}
    assert towers == {n for n, _ in model.named_parameters() if ".visual." in n}
    assert all(
        isinstance(m, QuantLinear)
        for n, m in model.named_modules()
        if n.endswith("language_model.layers.0.mlp.up_proj")
    )


@pytest.mark.parametrize("name", ["llama", "qwen2-tied"], indirect=True)
def test_the_head_is_quantized_when_asked_and_shares_a_tied_embedding(name: str, saved: Path) -> None:
    model = transload.load(saved, quantize=TransloadConfig(quantize_head=True, **SMALL))
    assert isinstance(model.lm_head, QuantLinear)
    assert distance(logits(model), reference(saved, model)) < W4A16
    heads = [m for m in report(model).modules if m.name in ("lm_head", "model.embed_tokens")]
    assert sum(m.nbytes > 0 for m in heads) == 1


@pytest.mark.parametrize("name", ["qwen2-tied"], indirect=True)
def test_a_tied_quantized_head_is_stored_once(name: str, saved: Path, tmp_path: Path) -> None:
    model = transload.load(saved, quantize=TransloadConfig(quantize_head=True, **SMALL))
    model.save_pretrained(tmp_path)
    entries = transload.open(tmp_path).entries
    assert "model.embed_tokens" in entries
    assert not any(n.startswith("lm_head") for n in entries)
    assert torch.equal(logits(transload.load(tmp_path)), logits(model))


@pytest.mark.parametrize("name", ["qwen2-tied"], indirect=True)
def test_a_group_that_does_not_divide_becomes_smaller_and_is_reported(name: str, saved: Path) -> None:
    model = transload.load(saved, quantize=TransloadConfig(group_size=64, device="cpu"))
    down = next(m for m in report(model).modules if m.name.endswith("0.mlp.down_proj"))
    assert "g32" in down.spec
    assert down.notes == ("group_size 64 does not divide 96 inputs: 32 is used",)


@pytest.mark.parametrize("name", ["llama"], indirect=True)
def test_skipped_modules_stay_float(name: str, saved: Path) -> None:
    skip = ["layers.0", r"re:.*\.k_proj"]
    model = transload.load(saved, quantize=TransloadConfig(skip_modules=skip, **SMALL))
    kept = report(model).kept
    assert kept["model.layers.0.mlp.up_proj"] == "skip_modules has 'layers.0'"
    assert kept["model.layers.1.self_attn.k_proj"] == r"skip_modules has 're:.*\.k_proj'"
    assert "model.layers.1.mlp.up_proj" not in kept


@pytest.mark.parametrize("name", ["llama"], indirect=True)
def test_a_float_checkpoint_stays_float_unless_asked(name: str, saved: Path) -> None:
    model = transload.load(saved)
    assert report(model).modules == ()
    assert torch.equal(logits(model), logits(type(model).from_pretrained(saved)))
    assert len(report(transload.load(saved, bits=4)).modules) == 14


CONTRADICTIONS = {
    "bits twice": ({"bits": 4, "quantize": TransloadConfig()}, "bits and quantize were both given"),
    "scheme of a float model": ({"scheme": "w4a8"}, "is float; scheme 'w4a8' needs bits=4"),
    "two schemes": ({"scheme": "w4a8", "quantize": TransloadConfig(scheme="w4a16")}, "contradicts quantize.scheme"),
    "unknown scheme": ({"bits": 4, "scheme": "w2a2"}, "scheme 'w2a2': there are w4a16, w4a8"),
}


@pytest.mark.parametrize("name", ["llama"], indirect=True)
@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictory_requests_are_refused(name: str, saved: Path, case: str) -> None:
    arguments, words = CONTRADICTIONS[case]
    with pytest.raises(ConfigError, match=words):
        transload.load(saved, **arguments)


@pytest.mark.parametrize("name", ["llama"], indirect=True)
@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}], ids=str)
def test_device_maps_of_one_device_are_taken(name: str, saved: Path, device_map: object) -> None:
    config = TransloadConfig(**SMALL)
    model = type(MODELS[name]()).from_pretrained(saved, quantization_config=config, device_map=device_map)
    assert {m.device for m in report(model).modules} == {"cpu"}
    assert distance(logits(model), reference(saved, model)) < W4A16


@pytest.mark.parametrize("name", ["llama"], indirect=True)
@pytest.mark.parametrize("device_map", ["balanced", {"": "disk"}], ids=str)
def test_device_maps_that_cannot_hold_are_refused(name: str, saved: Path, device_map: object) -> None:
    model_class, config = type(MODELS[name]()), TransloadConfig(**SMALL)
    with pytest.raises(Unsupported, match="device_map"):
        model_class.from_pretrained(saved, quantization_config=config, device_map=device_map)


@pytest.mark.parametrize("name", ["qwen3-moe", "qwen2-tied"], indirect=True)
def test_a_bfloat16_model_is_as_exact_as_bfloat16_is(name: str, saved: Path) -> None:
    model = transload.load(saved, quantize=TransloadConfig(**SMALL), dtype=torch.bfloat16)
    assert next(model.parameters()).dtype == torch.bfloat16
    float_model = type(model).from_pretrained(saved, dtype=torch.bfloat16)
    exact = reference(saved, model)
    # Our error must be that of bfloat16 itself: what transformers' own bfloat16 model has on the same weights.
    assert distance(logits(model), exact) < 1.5 * distance(logits(with_weights_of(model, float_model)), exact)


def test_a_model_without_linear_layers_says_so(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=96, n_positions=32, n_embd=32, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(Unsupported, match="nothing in GPT2LMHeadModel can be quantized on load: Conv1D computes with"):
        transload.load(tmp_path, bits=4)
