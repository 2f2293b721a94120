"""Static activation scales: found on the layer as it will be used, stored where the target has a place for them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models
import torch
from quantized_models import Bytes, recipe, run, text_file
from safetensors.torch import load_file

import transload
from transload.errors import CannotHold, ConfigError
from transload.quant import ActSpec
from transload.quantize.recipe import Calibration, Recipe
from transload.quantize.static import static_scale
from transload.quantize.text import windows

RULES = [
    {"modules": ["down_proj"], "scheme": "int8-channel-a8", "method": "rtn"},
    {"modules": ["*"], "scheme": "int8-channel-a8", "method": "rtn", "activations": "static"},
]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose attention has biases."""
    folder = tmp_path_factory.mktemp("models") / "qwen"
    tiny_models.make("qwen2-tied", folder)
    return folder


def scales(folder: Path) -> dict[str, float]:
    tensors = load_file(next(folder.glob("*.safetensors")))
    return {n.removesuffix(".input_scale"): float(t) for n, t in tensors.items() if n.endswith(".input_scale")}


@pytest.mark.parametrize("to", ["compressed-tensors", "transload", "vllm", "vllm-cpu", "vllm-ascend", "msmodelslim"])
def test_targets_with_a_place_for_them_get_one_scale_a_linear(to: str, qwen: Path, tmp_path: Path) -> None:
    report = run(qwen, tmp_path / "out", recipe(rules=RULES), to)
    found = scales(tmp_path / "out")
    assert len(found) == 12  # two layers: q, k, v, o, gate, up
    first = "model.layers.0.self_attn."
    assert found[f"{first}q_proj"] == found[f"{first}k_proj"] == found[f"{first}v_proj"] != found[f"{first}o_proj"]
    opened = transload.open(tmp_path / "out")
    specs = {m.name: opened.entries[m.name].spec for m in report.modules}
    assert all(s is not None and s.act == ActSpec(static="down_proj" not in n) for n, s in specs.items())


def test_the_scale_is_that_of_the_inputs_which_the_quantized_model_will_see(qwen: Path, tmp_path: Path) -> None:
    run(qwen, tmp_path / "out", recipe(rules=RULES))
    model = transload.load(tmp_path / "out", "cpu", "w4a16")
    seen: list[torch.Tensor] = []
    module = model.get_submodule("model.layers.1.mlp.gate_proj")
    module.register_forward_pre_hook(lambda m, given: seen.append(given[0].flatten(0, 1)))
    ids, _ = windows(text_file(tmp_path), Calibration(samples=24, tokens=32), Bytes())
    with torch.no_grad():
        model(ids)
    rows = torch.cat(seen)
    want = static_scale(rows, float(rows.abs().max()))
    assert scales(tmp_path / "out")["model.layers.1.mlp.gate_proj"] == pytest.approx(
        want, rel=0.08
    )  # another sample of the same tokens


@pytest.mark.parametrize(
    ("to", "reason"),
    [
        ("gptq", "weight-only and has no place for activations int8 static per tensor"),
        ("gguf", "weight-only and has no place for activations int8 static per tensor"),
        ("onnx", "static"),
    ],
)
def test_targets_without_a_place_refuse_with_the_reason(to: str, reason: str, qwen: Path, tmp_path: Path) -> None:
    with pytest.raises(CannotHold, match=reason):
        run(qwen, tmp_path / "out", recipe(rules=RULES), to)
    assert not (tmp_path / "out").exists()


def test_a_bias_is_counted_in_steps_for_ascend(qwen: Path, tmp_path: Path) -> None:
    run(qwen, tmp_path / "out", recipe(rules=RULES), "vllm-ascend")
    stored = load_file(next((tmp_path / "out").glob("*.safetensors")))
    types = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    q = "model.layers.0.self_attn.q_proj."
    parts = ("weight", "weight_scale", "weight_offset", "input_scale", "input_offset", "quant_bias", "deq_scale")
    assert {types[q + part] for part in parts} == {"W8A8"}
    assert types["model.layers.0.mlp.down_proj.weight"] == "W8A8_DYNAMIC"
    assert torch.equal(stored[q + "deq_scale"], stored[q + "input_scale"] * stored[q + "weight_scale"][:, 0])
    bias = load_file(qwen / "model.safetensors")[q + "bias"]
    assert float((stored[q + "quant_bias"] * stored[q + "deq_scale"] - bias).abs().max()) < float(
        stored[q + "deq_scale"].max()
    )


def test_experts_that_no_token_reached_are_an_error(tmp_path: Path) -> None:
    tiny_models.make("qwen3-moe", tmp_path / "m")
    text = tmp_path / "same.txt"
    text.write_text("a" * 64)
    rules = [{"modules": ["*"], "scheme": "int8-channel-a8", "method": "rtn", "activations": "static"}]
    with pytest.raises(ConfigError, match=r"layer 0: no calibration token reached model\.layers\.0\.mlp\.experts\.\d"):
        run(tmp_path / "m", tmp_path / "out", recipe(rules=rules), calibration=text)
    assert not list(tmp_path.glob("out*"))


def test_a_killed_run_keeps_its_scales(qwen: Path, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def kill(done: int, total: int, what: str) -> None:
        if what == "layer 1":
            raise Killed

    run(qwen, tmp_path / "whole", recipe(rules=RULES), "compressed-tensors")
    with pytest.raises(Killed):
        run(qwen, tmp_path / "out", recipe(rules=RULES), "compressed-tensors", resume=True, progress=kill)
    run(qwen, tmp_path / "out", recipe(rules=RULES), "compressed-tensors", resume=True)
    assert scales(tmp_path / "out") == scales(tmp_path / "whole")


def test_static_needs_int8_activations_in_the_scheme() -> None:
    with pytest.raises(ValueError, match="static activations need a scheme with int8 ones"):
        Recipe.model_validate(
            {"name": "x", "rules": [{"modules": ["*"], "scheme": "int8-channel", "activations": "static"}]}
        )
