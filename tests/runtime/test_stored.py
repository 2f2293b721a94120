"""Quantized checkpoints of other tools: loaded with their numbers, saved, and loaded again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gguf_model import CASES, Case, build
from tiny_models import MODELS, distance, inputs, logits, make
from transformers import AutoModelForCausalLM

import transload
from transload.errors import ConfigError, FormatError, Unsupported
from transload.quant import QTensor
from transload.runtime import TransloadConfig, report
from transload.runtime.embedding import QuantEmbedding
from transload.runtime.experts import QuantExperts
from transload.runtime.linear import QuantLinear

W4A16 = 1e-3  # kernels may carry float activations as 15-bit integers: 5e-5 a layer
BY_ARCH = {case.arch: case for case in CASES}


def float_twin(config: object, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """transformers' own model with float weights under their names on disk."""
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    return model_class.from_pretrained(None, config=config, state_dict=dict(weights), dtype=torch.float32)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.arch)
def test_a_gguf_model_computes_what_its_numbers_say(case: Case, tmp_path: Path) -> None:
    config, meant = build(case, tmp_path / "m.gguf")
    model = transload.load(tmp_path / "m.gguf", device="cpu")
    assert distance(logits(model), logits(float_twin(config, meant))) < W4A16
    floats = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert floats <= {"shared_expert_gate", "kv_b_proj"}  # stored in float: a router's gate, MLA's halves


@pytest.mark.parametrize("arch", ["qwen2", "llama", "glm4", "deepseek2"])
def test_a_gguf_model_is_saved_and_loaded_again(arch: str, tmp_path: Path) -> None:
    build(BY_ARCH[arch], tmp_path / "m.gguf")
    model = transload.load(tmp_path / "m.gguf", device="cpu", scheme="w4a8")
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", device_map="cpu")
    assert torch.equal(logits(again), logits(model))


def test_experts_of_two_schemes_run_and_are_saved_apart(tmp_path: Path) -> None:
    build(BY_ARCH["qwen3moe"], tmp_path / "m.gguf")
    model = transload.load(tmp_path / "m.gguf", device="cpu")
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, QuantExperts)
    assert len({p.spec for p in experts.gate_up.packed_parts()}) == 2
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(transload.load(tmp_path / "saved", device="cpu")), logits(model))


def test_a_tied_embedding_is_in_memory_once(tmp_path: Path) -> None:
    config, meant = build(BY_ARCH["qwen2"], tmp_path / "m.gguf", tied=True)
    model = transload.load(tmp_path / "m.gguf", device="cpu")
    assert isinstance(model.model.embed_tokens, QuantEmbedding)
    assert model.model.embed_tokens.table is model.lm_head.packed
    assert distance(logits(model), logits(float_twin(config, meant))) < W4A16


def test_tying_again_after_loading_changes_nothing(tmp_path: Path) -> None:
    """Evaluation harnesses call tie_weights on a model that they are given."""
    build(BY_ARCH["qwen2"], tmp_path / "m.gguf", tied=True)
    model = transload.load(tmp_path / "m.gguf", "cpu")
    before = model(torch.arange(6).unsqueeze(0)).logits
    model.tie_weights()
    assert torch.equal(model(torch.arange(6).unsqueeze(0)).logits, before)


@pytest.mark.parametrize("target", ["compressed-tensors", "gptq", "awq"])
def test_other_formats_give_the_same_model(target: str, tmp_path: Path) -> None:
    make("llama", tmp_path / "float")
    asymmetric = target == "awq"
    recipe = TransloadConfig(group_size=32, symmetric=not asymmetric, device="cpu")
    model = transload.load(tmp_path / "float", quantize=recipe, dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    transload.port(tmp_path / "saved", tmp_path / "ported", to=target)
    ported = transload.load(tmp_path / "ported", device="cpu")
    assert any(isinstance(m, QuantLinear) for m in ported.modules())
    assert torch.equal(logits(ported), logits(model))


@pytest.mark.parametrize("target", ["compressed-tensors", "gptq"])
def test_experts_stored_one_by_one_are_fused(target: str, tmp_path: Path) -> None:
    make("qwen3-moe", tmp_path / "float")
    model = transload.load(tmp_path / "float", quantize=TransloadConfig(group_size=32, device="cpu"))
    model.save_pretrained(tmp_path / "saved")
    transload.port(tmp_path / "saved", tmp_path / "ported", to=target)
    ported = transload.load(tmp_path / "ported", device="cpu")
    assert any(isinstance(m, QuantExperts) for m in ported.modules())
    assert torch.equal(logits(ported), logits(model))


def test_a_vision_language_model_of_another_format_keeps_its_tower(tmp_path: Path) -> None:
    make("qwen2.5-vl", tmp_path / "float")
    model = transload.load(tmp_path / "float", quantize=TransloadConfig(group_size=32, device="cpu"))
    model.save_pretrained(tmp_path / "saved")
    transload.port(tmp_path / "saved", tmp_path / "ported", to="compressed-tensors")
    ported = transload.load(tmp_path / "ported", device="cpu")
    assert torch.equal(logits(ported), logits(model))
    assert not [m for m in report(ported).modules if "visual" in m.name]


def test_the_report_counts_what_runs_and_every_byte(tmp_path: Path) -> None:
    build(BY_ARCH["qwen2"], tmp_path / "m.gguf")
    seen: list[tuple[int, int]] = []
    model = transload.load(tmp_path / "m.gguf", device="cpu", scheme="w4a8", progress=lambda *p: seen.append(p))
    found = report(model)
    assert len([m for m in found.modules if m.kind == "linear"]) == 15
    assert {m.requested[-2:] for m in found.modules if m.kind == "linear"} == {"A8"}
    assert found.quantized_bytes + found.float_bytes == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert "15 x" in str(found) or " x linear" in str(found)
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]


def test_a_quantized_checkpoint_is_not_quantized_again(tmp_path: Path) -> None:
    build(BY_ARCH["qwen2"], tmp_path / "m.gguf")
    with pytest.raises(ConfigError, match="is quantized already \\(gguf\\) and keeps its numbers"):
        transload.load(tmp_path / "m.gguf", bits=4)


def _saved(tmp_path: Path) -> Path:
    make("llama", tmp_path / "float")
    model = transload.load(tmp_path / "float", quantize=TransloadConfig(group_size=32, device="cpu"))
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def _edit(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


BROKEN = {
    "more layers": ({"num_hidden_layers": 3}, FormatError, "9 weights of the model are missing: model.layers.2.input"),
    "other width": (
        {"intermediate_size": 64},
        FormatError,
        r"is \(64, 128\) in the checkpoint, but .* says \(64, 64\)",
    ),
    "no such model": ({"model_type": "nonesuch"}, Unsupported, "has no model 'nonesuch'"),
    "no model type": ({"model_type": None}, FormatError, "has no model_type"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_config_that_contradicts_the_weights_is_an_error_that_says_so(case: str, tmp_path: Path) -> None:
    fields, error, words = BROKEN[case]
    folder = _saved(tmp_path)
    _edit(folder, **fields)
    with pytest.raises(error, match=words):
        transload.load(folder)


def test_a_model_with_fewer_layers_reports_what_it_has_no_place_for(tmp_path: Path) -> None:
    folder = _saved(tmp_path)
    _edit(folder, num_hidden_layers=1)
    found = report(transload.load(folder))
    assert "model.layers.1.mlp.up_proj" in found.unused
    assert "7 x stored, but the model has no place for it, such as model.layers.1.mlp.down_proj" in str(found)


def test_a_stored_layer_that_the_model_computes_in_float_becomes_float(tmp_path: Path) -> None:
    folder = _saved(tmp_path)
    name = "model.layers.0.self_attn.q_proj"
    w = transload.open(folder)[name]
    assert isinstance(w, QTensor)

    class Exact(torch.nn.Linear):
        """A linear of a model's own kind, which may do more than multiply."""

    from transformers import LlamaForCausalLM

    class Model(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.model.layers[0].self_attn.q_proj = Exact(64, 64, bias=False)

    model = Model.from_pretrained(folder)
    assert torch.equal(model.get_submodule(name).weight, w.dequantize())
    assert report(model).kept == {
        f"{name}.weight": "stored quantized, used in float: Exact computes with float weights"
    }
    assert distance(logits(model), logits(transload.load(folder))) < W4A16


def test_moving_a_model_keeps_its_answers(tmp_path: Path) -> None:
    model = transload.load(_saved(tmp_path))
    before = logits(model)
    assert torch.equal(logits(model.to("cpu").eval()), before)


def test_inputs_of_a_picture_model_hold_pictures() -> None:
    assert "pixel_values" in inputs(MODELS["qwen2.5-vl"]())


def test_a_saved_model_says_what_loads_it(tmp_path: Path) -> None:
    make("llama", tmp_path / "float")
    transload.load(tmp_path / "float", device="cpu", bits=4).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert "import transload.runtime" in saved["needs"]
