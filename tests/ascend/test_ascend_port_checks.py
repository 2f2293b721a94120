"""Pitfalls that a port itself looks for: dropped biases, damaged weights, load balancing, other readers of the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from memory_source import random_weight
from safetensors.torch import load_file, save_file
from test_port import LAYER, model, spec
from torch import Tensor

import transload
from launch.plans import CASES
from transload.engines import VLLM_ASCEND_023, VLLM_ASCEND_MAIN, Layer
from transload.errors import CannotHold
from transload.launch import Site
from transload.launch.render import render
from transload.models.roles import role_of
from transload.porting.notes import LEAST_SQNR
from transload.quant import ActSpec, QTensor, QuantSpec
from transload.reference import quantize_rtn

GOLDEN = Path(__file__).parents[1] / "golden"
EXPERT = LAYER + "mlp.experts.0."


def test_e15_dense_w4a8_layers_with_a_bias_are_refused_because_023_drops_it(tmp_path: Path) -> None:
    layer = Layer(QuantSpec(4, 64, act=ActSpec()), bias=True)
    assert "without a bias, which it would drop" in str(VLLM_ASCEND_023.covers("msmodelslim", layer))
    source = model(tmp_path / "a", {LAYER + "self_attn.q_proj": random_weight(spec(4, 64), 64, 128)})  # with a bias
    with pytest.raises(CannotHold, match=r"without a bias.*self_attn\.q_proj.*--requantize int8-channel-a8"):
        transload.port(source, tmp_path / "b", "vllm-ascend==0.23")
    report = transload.port(source, tmp_path / "b", "vllm-ascend==0.23", requantize="int8-channel-a8")
    assert {e.executed for e in report.executed} == {"W8A8"}


def test_e18_damaged_weights_are_named_in_the_report_and_sound_ones_are_not(tmp_path: Path) -> None:
    sound = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    spoiled = sound.clone()
    spoiled[:, 5] = 20  # what a wrong smoothing factor leaves: one channel takes the scale of all others
    weights = {
        f"{EXPERT}{n}": quantize_rtn(x, QuantSpec(8, 32)) for n, x in (("up_proj", sound), ("gate_proj", spoiled))
    }
    source = model(tmp_path / "a", weights, num_hidden_layers=1)
    report = transload.port(source, tmp_path / "b", "vllm-ascend==main", requantize={"experts": "int4-channel-a8"},
                            requantize_all=True)  # fmt: skip
    by_name = {m.name: m.difference for m in report.modules}
    bad, good = by_name[f"{EXPERT}gate_proj"], by_name[f"{EXPERT}up_proj"]
    assert bad is not None
    assert good is not None
    assert bad.sqnr_db < LEAST_SQNR < good.sqnr_db
    (note,) = [note for note in report.notes if "SQNR below" in note]
    assert "gate_proj" in note
    assert "examples/perplexity.py" in note


def test_e19_the_report_says_that_w4a16_experts_have_no_load_balancing(tmp_path: Path) -> None:
    source = model(tmp_path / "a", {f"{EXPERT}up_proj": random_weight(spec(4, 32), 64, 128)}, num_hidden_layers=1)
    report = transload.port(source, tmp_path / "b", "vllm-ascend==main")
    assert (report.target_format, report.exact) == ("compressed-tensors", True)
    assert any("EPLB" in note for note in report.notes)


@pytest.mark.parametrize("case", [c for c in CASES if "910" in str(c.cluster) or "ascend" in c.id], ids=lambda c: c.id)
def test_e19_launch_files_ask_for_no_load_balancing_and_no_all_reduce_by_hand(case) -> None:  # type: ignore[no-untyped-def]
    site = Site(addresses=case.site.addresses, interfaces=case.site.interfaces, form=case.site.form)
    files = {n: t.lower() for n, t in render(case.plan(), "/models/m", site=site).files.items() if n != "README.md"}
    for name, text in files.items():
        for word in ("eplb", "dynamic_eplb", "manual_all_reduce", "expert_map_path"):
            assert word not in text, (name, word)


def test_e20_the_report_says_that_sglang_refuses_float_experts_of_multi_token_prediction(tmp_path: Path) -> None:
    source = model(tmp_path / "a", {f"{EXPERT}up_proj": random_weight(spec(4, 32), 64, 128)}, num_hidden_layers=1)
    behind = "model.layers.1."
    tensors = load_file(source / "model.safetensors") | {
        f"{behind}eh_proj.weight": torch.ones(64, 128),
        f"{behind}mlp.experts.0.up_proj.weight": torch.ones(64, 128),
    }
    save_file(tensors, source / "model.safetensors")
    report = transload.port(source, tmp_path / "b", "vllm-ascend==0.23", requantize="auto", requantize_all=True)
    types = json.loads((tmp_path / "b" / "quant_model_description.json").read_text())
    assert types[f"{behind}mlp.experts.0.up_proj.weight"] == "FLOAT"  # vllm-ascend needs it so
    assert any("SGLang" in note for note in report.notes)


@pytest.mark.parametrize("arch", ["a2", "a3", "310p"])
def test_architectures_of_ascend_decide_about_four_bits(arch: str) -> None:
    layer = Layer(QuantSpec(4, -1, act=ActSpec()), experts=True)
    wide = Layer(QuantSpec(8, -1, act=ActSpec()), experts=True)
    for engine in (VLLM_ASCEND_023, VLLM_ASCEND_MAIN):
        assert isinstance(engine.covers("msmodelslim", layer, arch), str) == (arch == "310p")
        assert not isinstance(engine.covers("msmodelslim", wide, arch), str)


FLOATS = GOLDEN / "msmodelslim_w4a8.float.safetensors"


def _theirs() -> dict[str, Tensor]:
    return load_file(GOLDEN / "msmodelslim_w4a8" / "quant_model_weights.safetensors")


def test_one_command_makes_of_the_float_model_what_msmodelslim_made_of_it(tmp_path: Path) -> None:
    """Names, shapes, dtypes and types of the tool's result, weights as near to the float ones, the right scale_bias."""
    (tmp_path / "float").mkdir()
    save_file(load_file(FLOATS), tmp_path / "float" / "model.safetensors")
    config = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": 2}
    (tmp_path / "float" / "config.json").write_text(json.dumps(config))
    report = transload.port(tmp_path / "float", tmp_path / "ours", "vllm-ascend==0.23", requantize="auto",
                            requantize_all=True)  # fmt: skip
    ours, theirs = load_file(tmp_path / "ours" / "model.safetensors"), _theirs()
    assert {n: (t.dtype, t.shape) for n, t in ours.items()} == {n: (t.dtype, t.shape) for n, t in theirs.items()}
    types = [json.loads((f / "quant_model_description.json").read_text()) for f in
             (tmp_path / "ours", GOLDEN / "msmodelslim_w4a8")]  # fmt: skip
    assert types[0] == types[1]
    assert {role_of(m.name) for m in report.modules} == {"attention", "experts"}
    floats = load_file(FLOATS)
    made, tools = transload.open(tmp_path / "ours"), transload.open(GOLDEN / "msmodelslim_w4a8")
    for m in report.modules:
        x = floats[f"{m.name}.weight"].float()
        a, b = made[m.name], tools[m.name]
        assert isinstance(a, QTensor)
        assert isinstance(b, QTensor)
        assert float((a.dequantize() - x).norm()) < 1.1 * float((b.dequantize() - x).norm()), m.name
        if a.spec.bits == 4:
            stored = ours[f"{m.name}.scale_bias"]
            exact = 8 * a.dequantize().double().reshape(a.n, stored.shape[1], -1).sum(-1)
            assert torch.allclose(stored.double(), exact, rtol=1e-5, atol=1e-4)


def test_msmodelslims_result_goes_to_compressed_tensors_and_back_to_the_same_bytes(tmp_path: Path) -> None:
    there = transload.port(GOLDEN / "msmodelslim_w4a8", tmp_path / "ct", "compressed-tensors")
    back = transload.port(tmp_path / "ct", tmp_path / "back", "vllm-ascend==0.23")
    assert there.exact
    assert back.exact
    ours, theirs = load_file(tmp_path / "back" / "model.safetensors"), _theirs()
    assert ours.keys() == theirs.keys()
    for name, t in theirs.items():
        assert torch.equal(ours[name], t), name
