"""Recipes: what ships, what is refused, and what other tools' configurations become."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from transload.cli import app
from transload.errors import ConfigError, TransloadError, Unsupported
from transload.quantize import import_recipe, read_recipe, shipped
from transload.quantize.imported import find_recipe, imported
from transload.quantize.recipe import fitted
from transload.requantize import parse_spec


def test_the_shipped_recipes() -> None:
    found = shipped()
    assert list(found) == [
        "int4-g128",
        "int4-g128-awq",
        "int4-g128-rotated",
        "int4-g32",
        "w4a8-ascend-moe",
        "w4a8-g128",
        "w8a8",
        "w8a8-static",
    ]
    moe = found["w4a8-ascend-moe"]
    experts = moe.rule("model.layers.3.mlp.experts.7.up_proj", 3, 4)
    attention = moe.rule("model.layers.3.self_attn.q_proj", 3, 4)
    assert experts is not None
    assert attention is not None
    assert str(experts.spec) == "int4 channel sym fp32 + int8 dynamic per token"
    assert str(attention.spec) == "int8 channel sym fp32 + int8 dynamic per token"
    for name in ("lm_head", "model.layers.3.mlp.gate", "model.layers.3.self_attn.indexer.wk", "model.embed_tokens"):
        assert all(r.rule(name, 3, 4) is None for r in found.values())


def test_the_command_line_lists_and_explains_them() -> None:
    out = CliRunner().invoke(app, ["recipes"], env={"COLUMNS": "200"})
    assert out.exit_code == 0
    assert "w4a8-ascend-moe" in out.stdout
    assert json.loads(CliRunner().invoke(app, ["recipes", "--json"]).stdout).keys() == shipped().keys()


BROKEN = [
    ("name: a", "rules: Field required"),
    ("name: a\nrules: []", "rules"),
    ("name: a\nrules: [{modules: ['*'], scheme: int9-g4}]", "scheme 'int9-g4'"),
    ("name: a\nrules: [{modules: ['*'], scheme: int4-g32, method: magic}]", "method"),
    ("name: a\nrules: [{modules: ['*'], scheme: float}]", "no rule quantizes anything"),
    ("name: a\nrules: [{modules: ['*'], scheme: int4-g32}]\nsmoth: 0.5", "smoth"),
    ("[1, 2]", "a recipe is a mapping"),
    ("name: [", "not valid YAML"),
]


@pytest.mark.parametrize(("text", "message"), BROKEN, ids=[m for _, m in BROKEN])
def test_a_broken_recipe_says_what_is_wrong(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"r\.yaml") as e:
        read_recipe(tmp_path / "r.yaml")
    assert message in str(e.value)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="w4a8-ascend-moe"):
        read_recipe("int4")


def test_the_largest_group_that_divides() -> None:
    spec = parse_spec("int4-g128")
    assert [f.group_size if (f := fitted(spec, k)) else None for k in (896, 576, 96, 48, 40)] == [128, 64, 32, 16, None]


COMPRESSOR = """
quant_stage:
  quant_modifiers:
    SmoothQuantModifier: {smoothing_strength: 0.7}
    GPTQModifier:
      dampening_frac: 0.02
      ignore: [lm_head, "re:.*router"]
      config_groups:
        group_0:
          targets: [Linear]
          weights: {num_bits: 4, type: int, symmetric: false, strategy: group, group_size: 64}
          input_activations: {num_bits: 8, type: int, symmetric: true, strategy: token, dynamic: true}
"""


def test_a_recipe_of_llm_compressor(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(COMPRESSOR)
    found = import_recipe(tmp_path / "recipe.yaml")
    assert (found.smooth, found.damping, found.act_order) == (0.7, 0.02, True)
    assert [(r.modules, r.scheme) for r in found.rules] == [(("re:.*router",), "float"), (("*",), "int4-g64-asym-a8")]
    assert found.rules[1].method == "gptq"


def test_a_preset_of_llm_compressor() -> None:
    found = import_recipe(
        {"stage": {"m": {"AWQModifier": {"targets": "Linear", "scheme": "W4A16_ASYM", "ignore": []}}}}
    )
    assert (found.rules[0].scheme, found.rules[0].method) == ("int4-g128-asym", "awq")


def test_a_configuration_of_gptqmodel(tmp_path: Path) -> None:
    dynamic = {"-:.*lm_head.*": {}, "+:.*layers\\.0\\..*": {"bits": 8, "group_size": 64}}
    config = {
        "bits": 4, "group_size": -1, "sym": True, "desc_act": False, "damp_percent": 0.05, "dynamic": dynamic,
        "quant_method": "gptq", "act_group_aware": True,
    }  # fmt: skip
    (tmp_path / "quantize_config.json").write_text(json.dumps(config))
    found = import_recipe(tmp_path / "quantize_config.json")
    assert [r.scheme for r in found.rules] == ["float", "int8-g64", "int4-channel"]
    assert (found.damping, found.act_order) == (0.05, True)


def test_static_activations_of_llm_compressor() -> None:
    acts = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}, "input_activations": acts}
    found = import_recipe({"s": {"QuantizationModifier": {"config_groups": {"group_0": group}}}})
    assert (found.rules[0].scheme, found.rules[0].activations) == ("int8-channel-a8", "static")


def test_groups_for_some_linears_come_before_those_for_all() -> None:
    def group(targets: list[str], bits: int) -> dict[str, Any]:
        return {"targets": targets, "weights": {"num_bits": bits, "strategy": "group", "group_size": 32}}

    groups = {"group_0": group(["Linear"], 4), "group_1": group(["re:.*down_proj"], 8)}
    found = import_recipe({"s": {"GPTQModifier": {"config_groups": groups}}})
    assert [r.scheme for r in found.rules] == ["int8-g32", "int4-g32"]


def test_what_a_file_says_besides_is_named(tmp_path: Path) -> None:
    file = tmp_path / "my recipe.yaml"
    file.write_text("s: {m: {AWQModifier: {scheme: W4A16, mappings: [{smooth_layer: a}], block_size: 128}}}")
    found = imported(file)
    assert found.recipe.name == "my-recipe"
    assert found.notes == ("AWQModifier.mappings: which linears share a scale is read from the model here",)
    newer = imported({"bits": 4, "group_size": 64, "desc_act": False, "hypermode": 3, "meta": {}})
    assert newer.notes == ("hypermode: nothing here has this setting",)


def test_an_imported_recipe_is_a_file_of_our_own(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(COMPRESSOR)
    asked = ["recipes", "--import", str(tmp_path / "recipe.yaml")]
    out = CliRunner().invoke(app, asked)
    assert out.exit_code == 0
    assert out.stdout.startswith("# from a recipe of llm-compressor\n")
    (tmp_path / "own.yaml").write_text(out.stdout)
    assert read_recipe(tmp_path / "own.yaml") == find_recipe(tmp_path / "recipe.yaml").recipe
    assert json.loads(CliRunner().invoke(app, [*asked, "--json"]).stdout)["smooth"] == 0.7


@pytest.mark.parametrize("name", list(shipped()))
def test_a_shipped_recipe_can_be_shown_and_changed(name: str, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(CliRunner().invoke(app, ["recipes", name]).stdout)
    assert read_recipe(tmp_path / "own.yaml") == shipped()[name]


NO_RECIPES = [
    ("a.json", "{", "cannot be read"),
    ("a.json", "[1]", "a recipe is a mapping"),
    ("a.json", '{"vocab_size": 3}', "neither a recipe of llm-compressor"),
    ("a.json", '{"bits": [4]}', "a value of another kind"),
    ("a.yaml", "s: {GPTQModifier: {config_groups: {g: 3}}}", "a value of another kind"),
    ("a.yaml", "s: {GPTQModifier: {scheme: W4A16, dampening_frac: 7}}", "damping"),
    ("a.yaml", "s: {GPTQModifier: {scheme: FP8}}", "scheme 'FP8'"),
]


@pytest.mark.parametrize(("file", "text", "message"), NO_RECIPES, ids=[t for _, t, _ in NO_RECIPES])
def test_files_that_are_no_recipe_say_so(file: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text(text)
    with pytest.raises(TransloadError, match=rf"a\.(json|yaml): .*{message}"):
        find_recipe(tmp_path / file)


FOREIGN: list[tuple[dict[str, Any], str]] = [
    ({"bits": 4, "desc_act": True}, "g_idx"),
    ({"bits": 4, "quant_method": "hqq"}, "hqq"),
    ({"bits": 4, "lm_head": True}, "head"),
    ({"bits": 4, "v2": True}, "v2"),
    ({"s": {"GPTQModifier": {"scheme": "FP8"}}}, "FP8"),
    ({"s": {"GPTQModifier": {"scheme": "W4A16", "actorder": "group"}}}, "g_idx"),
    ({"s": {"SpinQuantModifier": {}}}, "SpinQuantModifier"),
    ({"s": {"GPTQModifier": {"scheme": "W4A16", "magic": 1}}}, "magic"),
]


@pytest.mark.parametrize(("config", "message"), FOREIGN, ids=[m for _, m in FOREIGN])
def test_settings_with_another_meaning_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        import_recipe(config)
