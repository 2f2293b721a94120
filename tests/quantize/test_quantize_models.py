"""Whole tiny models: every method, architecture and target; the layer's own function is never changed by a fold."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
from quantized_models import Bytes, recipe, run, text_file

import transload
from transload.errors import CannotHold
from transload.quant import QTensor
from transload.quantize.fold import Fold, gain_offset, pairs_of
from transload.quantize.held import held_of
from transload.quantize.hidden import Hidden
from transload.quantize.rotate import Rotation
from transload.quantize.skeleton import Skeleton, forward
from transload.quantize.text import windows

MODELS = ("llama", "qwen2-tied", "qwen3-moe", "glm4-moe")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    for name in MODELS:
        tiny_models.make(name, folder / name)
    return {name: folder / name for name in MODELS}


def logits_of(path: Path, scheme: str | None = None) -> torch.Tensor:
    return tiny_models.logits(transload.load(path, "cpu", scheme))


@pytest.mark.parametrize("name", MODELS)
def test_the_skeleton_computes_what_the_model_computes(name: str, sources: dict[str, Path]) -> None:
    skeleton = Skeleton(transload.open(sources[name]))
    model = transload.load(sources[name], "cpu")
    ids = tiny_models.inputs(model)["input_ids"]
    with torch.no_grad():
        want = model.get_decoder()(ids, output_hidden_states=True).hidden_states
        hidden = skeleton.embedded(ids)
        arguments = skeleton.arguments(ids.shape[1])
        for i in range(skeleton.layers):
            assert torch.allclose(hidden, want[i], atol=1e-4)
            hidden = forward(skeleton.layer(i).layer, arguments[i])(hidden)


@pytest.mark.parametrize("name", MODELS)
def test_folds_and_rotation_keep_the_function_of_a_layer(name: str, sources: dict[str, Path]) -> None:
    torch.manual_seed(0)
    skeleton = Skeleton(transload.open(sources[name]))
    arguments = skeleton.arguments(12)
    x = torch.randn(2, 12, 64)
    for i in range(skeleton.layers):
        filled = skeleton.layer(i)
        run_layer = forward(filled.layer, arguments[i])
        with torch.no_grad():
            before = run_layer(x)
            pairs = list(pairs_of(filled, held_of(filled.layer)))
            producers = {p.producer.partition(".")[0] for p in pairs}
            assert producers == {"input_layernorm", "post_attention_layernorm", "self_attn", "mlp"}
            for pair in pairs:
                width = pair.consumers[0].k // pair.repeat
                Fold(pair, torch.rand(width) + 0.5, "test").apply(filled, None)
            assert torch.allclose(run_layer(x), before, atol=1e-3, rtol=1e-3)
            turn = Rotation(64, seed=0)
            turn.layer(filled)
            assert torch.allclose(run_layer(turn.rows(x)), turn.rows(before), atol=1e-3, rtol=1e-3)


# 8 bits lose next to nothing, so what is left would be a mistake in folding, rotating, naming or writing.
WAYS = {
    "gptq": recipe("int8-g32"),
    "awq": recipe("int8-g32", "awq"),
    "awq+gptq": recipe("int8-g32", "awq+gptq"),
    "smooth": recipe("int8-g32-a8", smooth=0.5),
    "rotate": recipe("int8-g32", "rtn", rotate=True),
    "sequential": recipe("int8-g32", sequential=True),
    "asym": recipe("int8-g32-asym", "mse"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["qwen2-tied", "glm4-moe"])
def test_eight_bits_keep_the_logits(name: str, way: str, sources: dict[str, Path], tmp_path: Path) -> None:
    report = run(sources[name], tmp_path / "out", WAYS[way])
    apart = tiny_models.distance(logits_of(tmp_path / "out", "w4a16"), logits_of(sources[name]))
    assert apart < (0.12 if "moe" in name else 0.03)  # a router may choose another expert
    assert not report.fallbacks
    assert sorted(p.name for p in tmp_path.iterdir()) == ["calibration.txt", "out"]


def test_gptq_is_better_than_rounding_on_the_text_it_saw(sources: dict[str, Path], tmp_path: Path) -> None:
    ids, _ = windows(text_file(tmp_path), recipe().calibration, Bytes())
    model = transload.load(sources["qwen3-moe"], "cpu")
    with torch.no_grad():
        want = model(ids).logits
    apart = {}
    for method in ("rtn", "gptq"):
        run(sources["qwen3-moe"], tmp_path / method, recipe(method=method))
        with torch.no_grad():
            apart[method] = tiny_models.distance(transload.load(tmp_path / method, "cpu")(ids).logits, want)
    assert apart["gptq"] < 0.85 * apart["rtn"]


@pytest.mark.parametrize("name", ["qwen3-moe", "glm4-moe"])
def test_the_ascend_recipe_on_mixtures_of_experts(name: str, sources: dict[str, Path], tmp_path: Path) -> None:
    report = run(sources[name], tmp_path / "out", "w4a8-ascend-moe", to="vllm-ascend==main")
    result = transload.open(tmp_path / "out")
    assert result.format.name == "msmodelslim"
    schemes = {n: s.scheme for n, s in result.modules().items() if s is not None}
    assert {s for n, s in schemes.items() if ".experts." in n} == {"W4A8"}
    assert {s for n, s in schemes.items() if ".experts." not in n} == {"W8A8"}
    assert not any("gate" in n.split(".") or "lm_head" in n for n in schemes)  # routers and heads stay in float
    engine = next(a for a in report.port.engines if a.engine.startswith("vllm-ascend main"))
    assert engine.command is not None
    source = transload.open(sources[name])
    for made in report.modules:
        w, want = result[made.name], source[made.name]
        assert isinstance(w, QTensor)
        assert isinstance(want, torch.Tensor)
        error = (w.dequantize() - want).double().square().sum()
        sqnr = float(10 * torch.log10(want.double().square().sum() / error))
        assert sqnr == pytest.approx(made.weight_sqnr, abs=1e-3)
        assert sqnr > (12 if ".experts." in made.name else 38)
    assert tiny_models.distance(logits_of(tmp_path / "out", "w4a16"), logits_of(sources[name])) < 0.5
    routed = [m for m in report.modules if ".experts." in m.name]
    assert len({m.tokens for m in routed}) > 1  # every expert's own count


def test_experts_that_see_few_tokens_are_rounded_and_listed(sources: dict[str, Path], tmp_path: Path) -> None:
    made = recipe(calibration={"expert_tokens": 300, "samples": 20})
    report = run(sources["qwen3-moe"], tmp_path / "out", made)
    few = [m for m in report.modules if ".experts." in m.name and m.tokens < 300]
    assert few
    assert [m.name for m in report.fallbacks] == [m.name for m in few]
    assert all(f"only {m.tokens} tokens reached it" in m.note and m.method == "rtn" for m in few)


@pytest.mark.parametrize("to", ["compressed-tensors", "gptq", "vllm", "bf16"])
def test_targets_of_a_port_are_targets_here(to: str, sources: dict[str, Path], tmp_path: Path) -> None:
    report = run(sources["llama"], tmp_path / "out", recipe("int4-g32", "rtn"), to=to)
    assert report.port.target_format == transload.open(tmp_path / "out").format.name or to == "bf16"
    apart = tiny_models.distance(logits_of(tmp_path / "out"), logits_of(sources["llama"]))
    assert 0 < apart < 0.5


def test_schemes_that_the_target_refuses_are_refused_before_any_work(sources: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CannotHold, match="vllm-ascend"):
        run(sources["llama"], tmp_path / "out", recipe("int5-g32", "rtn"), to="vllm-ascend")
    assert [p.name for p in tmp_path.iterdir()] == ["calibration.txt"]


def test_a_quantized_source_is_read_through_its_format(sources: dict[str, Path], tmp_path: Path) -> None:
    run(sources["llama"], tmp_path / "wide", recipe("int8-g32", "mse"))
    run(tmp_path / "wide", tmp_path / "narrow", recipe("int4-g32", "gptq"))
    found = transload.open(tmp_path / "narrow")["model.layers.0.mlp.up_proj"]
    assert isinstance(found, QTensor)
    assert found.spec.bits == 4


def test_a_quantized_head_is_rotated_with_the_rest(sources: dict[str, Path], tmp_path: Path) -> None:
    config = transload.TransloadConfig(bits=8, group_size=32, quantize_head=True)
    transload.load(sources["llama"], "cpu", quantize=config).save_pretrained(tmp_path / "wide")
    assert isinstance(transload.open(tmp_path / "wide")["lm_head"], QTensor)
    run(tmp_path / "wide", tmp_path / "out", recipe("int8-g32", "rtn", rotate=True), floats="fp32")
    assert isinstance(transload.open(tmp_path / "out")["lm_head"], torch.Tensor)
    assert tiny_models.distance(logits_of(tmp_path / "out"), logits_of(sources["llama"])) < 0.05


def test_first_and_last_layers_may_be_wider(sources: dict[str, Path], tmp_path: Path) -> None:
    rules = [
        {"modules": ["v_proj"], "scheme": "float"},
        {"modules": ["*"], "layers": [-1], "scheme": "int8-g32", "method": "rtn"},
        {"modules": ["mlp"], "scheme": "int4-g32", "method": "rtn"},
    ]
    run(sources["llama"], tmp_path / "out", recipe(rules=rules))
    found = {n: s and s.bits for n, s in transload.open(tmp_path / "out").modules().items()}
    assert found["model.layers.1.self_attn.q_proj"] == 8
    assert found["model.layers.0.mlp.up_proj"] == 4
    assert found["model.layers.0.self_attn.q_proj"] is None
    assert found["model.layers.1.self_attn.v_proj"] is None


def test_linears_with_one_input_may_have_their_own_scheme_and_method(sources: dict[str, Path], tmp_path: Path) -> None:
    rules = [
        {"modules": ["q_proj"], "scheme": "int8-channel", "method": "mse"},
        {"modules": ["k_proj"], "scheme": "int8-g16", "method": "gptq"},
        {"modules": ["gate_proj"], "scheme": "int8-g32", "method": "awq"},
        {"modules": ["*"], "scheme": "int8-channel", "method": "gptq"},
    ]
    report = run(sources["llama"], tmp_path / "out", recipe(rules=rules))
    assert min(m.weight_sqnr for m in report.modules) > 30
    assert tiny_models.distance(logits_of(tmp_path / "out"), logits_of(sources["llama"])) < 0.05


def test_experts_whose_hessians_do_not_fit_are_done_in_rounds(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(sources["qwen3-moe"], tmp_path / "whole", recipe("int8-g32", smooth=None))
    monkeypatch.setattr("transload.quantize.layerwise._GRAM_BYTES", 40_000)
    report = run(sources["qwen3-moe"], tmp_path / "rounds", recipe("int8-g32", smooth=None))
    assert all(m.tokens for m in report.modules)
    apart = tiny_models.distance(logits_of(tmp_path / "rounds"), logits_of(tmp_path / "whole"))
    assert apart < 0.12


def test_hidden_states_live_in_a_file(tmp_path: Path) -> None:
    states = Hidden(tmp_path / "h", 5, 4, 3, create=True)
    states[slice(1, 3)] = torch.ones(2, 4, 3)
    again = Hidden(tmp_path / "h", 5, 4, 3, create=False)
    assert float(again[slice(0, 5)].sum()) == 24
    assert [(s.start, s.stop) for s in states.batches(8)] == [(0, 2), (2, 4), (4, 5)]


def test_a_norm_that_stores_gain_minus_one_is_recognized() -> None:
    class Offset(torch.nn.Module):
        def __init__(self, offset: float) -> None:
            super().__init__()
            self.weight, self.offset = torch.nn.Parameter(torch.rand(8)), offset

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True)) * (self.offset + self.weight)

    assert (gain_offset(Offset(1.0)), gain_offset(Offset(0.0))) == (1.0, 0.0)
