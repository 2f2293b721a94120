"""Sources that are quantized already: FP8 in blocks, GPTQ and GGUF-like ones are read through their formats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models
import torch
from quantized_models import recipe, run, text_file
from safetensors.torch import load_file, save_file
from torch import Tensor

import transload
from transload.quant import QTensor

BLOCK = 32
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def fp8_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight as DeepSeek and Qwen3-FP8 store it: float8_e4m3fn codes and weight_scale_inv, one per block."""
    n, k = (-(-size // BLOCK) for size in weight.shape)
    padded = torch.nn.functional.pad(weight, (0, k * BLOCK - weight.shape[1], 0, n * BLOCK - weight.shape[0]))
    scale = padded.view(n, BLOCK, k, BLOCK).abs().amax((1, 3)).clamp(min=1e-9) / 448
    wide = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: weight.shape[0], : weight.shape[1]]
    return (weight / wide).to(torch.float8_e4m3fn), scale


def as_fp8(source: Path, out: Path) -> Path:
    """The model with its decoder linears in FP8 blocks."""
    tensors: dict[str, Tensor] = {}
    for name, t in load_file(source / "model.safetensors").items():
        if name.removesuffix(".weight").endswith(LINEARS):
            tensors[name], tensors[f"{name}_scale_inv"] = fp8_blocks(t)
        else:
            tensors[name] = t
    out.mkdir()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    declared = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": declared}
    (out / "config.json").write_text(json.dumps(config))
    return out


def as_gptq(source: Path, out: Path) -> Path:
    transload.port(source, out, "gptq", requantize="int8-g32", requantize_all=True)
    return out


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same numbers, stored quantized and as float32."""
    folder = tmp_path_factory.mktemp("sources")
    made: dict[str, Path] = {}
    for model in ("llama", "qwen3-moe"):
        tiny_models.make(model, folder / model)
        made[f"fp8 {model}"] = as_fp8(folder / model, folder / f"fp8-{model}")
    made["gptq llama"] = as_gptq(folder / "llama", folder / "gptq")
    for name, path in list(made.items()):
        transload.port(path, folder / f"float-{name}", "fp32")
        made[f"float {name}"] = folder / f"float-{name}"
    return made


WAYS = {
    "int4-g32 gptq": recipe(),
    "w4a8 rotated": recipe("int4-g32-a8", rotate=True),
    "int4-g32 awq": recipe(method="awq"),
    "int4-g32 rounded": recipe(method="mse"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("source", ["fp8 llama", "fp8 qwen3-moe", "gptq llama"])
def test_a_quantized_source_gives_what_its_numbers_as_floats_give(
    source: str, way: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    report = run(sources[source], tmp_path / "out", WAYS[way], "compressed-tensors")
    run(sources[f"float {source}"], tmp_path / "float", WAYS[way], "compressed-tensors")
    ours, theirs = transload.open(tmp_path / "out"), transload.open(tmp_path / "float")
    for made in report.modules:
        a, b = ours[made.name], theirs[made.name]
        assert isinstance(a, QTensor)
        assert isinstance(b, QTensor)
        same = float((a.codes == b.codes).float().mean())
        assert same > 0.98, made.name  # a rotation is computed from another dtype, and codes on an edge may turn
    (note,) = [n for n in report.notes if "quantized in the source" in n]
    assert note.startswith(f"{len(report.modules)} modules are quantized in the source")
    assert ("e4m3" in note) == source.startswith("fp8")


def test_a_float_source_has_no_such_note(sources: dict[str, Path], tmp_path: Path) -> None:
    report = run(sources["float fp8 llama"], tmp_path / "out", recipe(method="rtn"))
    assert not [n for n in report.notes if "quantized in the source" in n]


def test_modules_that_a_recipe_leaves_keep_the_numbers_of_the_source(sources: dict[str, Path], tmp_path: Path) -> None:
    rules = [{"modules": ["mlp"], "scheme": "int4-g32"}]
    run(sources["gptq llama"], tmp_path / "out", recipe(rules=rules))
    before, after = transload.open(sources["gptq llama"]), transload.open(tmp_path / "out")
    kept, made = before["model.layers.0.self_attn.q_proj"], after["model.layers.0.self_attn.q_proj"]
    assert isinstance(kept, QTensor)
    assert isinstance(made, QTensor)
    assert made.spec.bits == 8
    assert torch.equal(made.dequantize(), kept.dequantize())


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_what_is_left_of_a_quantized_source_becomes_floats_where_the_target_does_not_take_it(
    method: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    """A layer behind the last one, as of multi-token prediction, in FP8 blocks, which compressed-tensors has not."""
    out = tmp_path / "m"
    out.mkdir()
    tensors = load_file(sources["fp8 llama"] / "model.safetensors")
    behind = {n.replace("layers.1", "layers.2"): t.clone() for n, t in tensors.items() if "layers.1." in n}
    save_file(tensors | behind, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text((sources["fp8 llama"] / "config.json").read_text())
    report = run(out, tmp_path / "out", recipe(method=method), "compressed-tensors")
    name = "model.layers.2.mlp.down_proj"
    want = transload.open(out)[name]
    got = transload.open(tmp_path / "out")[f"{name}.weight"]
    assert isinstance(want, QTensor)
    assert isinstance(got, Tensor)
    assert torch.equal(got, want.dequantize().bfloat16())
    assert any("and 6 more, quantized in the source and left by the recipe, became bf16: " in n for n in report.notes)


def test_a_recipe_of_another_tool_quantizes_and_its_notes_are_in_the_report(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    foreign = tmp_path / "recipe.yaml"
    group = "{targets: [Linear], weights: {num_bits: 4, strategy: group, group_size: 32}}"
    foreign.write_text(f"s: {{m: {{QuantizationModifier: {{config_groups: {{g: {group}}}}}}}}}")
    report = run(sources["float fp8 llama"], tmp_path / "out", str(foreign))
    assert {m.method for m in report.modules} == {"rtn"}
    assert report.recipe == "recipe"
    foreign.write_text(f"s: {{m: {{AWQModifier: {{mappings: [{{smooth_layer: a}}], config_groups: {{g: {group}}}}}}}}}")
    report = run(sources["float fp8 llama"], tmp_path / "other", str(foreign), calibration=text_file(tmp_path, 70_000))
    assert report.notes[0].startswith("AWQModifier.mappings: ")
