"""Names and rows between checkpoints and models, traced through transformers' own conversions."""

from __future__ import annotations

import pytest
import torch
from tiny_models import MODELS
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Chunk, Transpose, WeightConverter, revert_weight_conversion

from transload.errors import FormatError, Unsupported
from transload.runtime.trace import Piece, parameters_from, stored_from


def on_meta(name: str) -> PreTrainedModel:
    with torch.device("meta"):
        return MODELS[name]()


def linears_on_disk(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Name and shape of every 2-D weight as transformers saves it."""
    saved = revert_weight_conversion(model, model.state_dict())
    return {
        n.removesuffix(".weight"): tuple(t.shape) for n, t in saved.items() if n.endswith(".weight") and t.dim() == 2
    }


@pytest.mark.parametrize("name", MODELS)
def test_every_module_on_disk_finds_its_parameter_and_the_way_back(name: str) -> None:
    model = on_meta(name)
    sources = linears_on_disk(model)
    recipes, unused = parameters_from(sources, [], model, get_model_conversion_mapping(model))
    assert unused == []
    assert {source for recipe in recipes.values() for source in recipe.sources()} == set(sources)
    back = stored_from({p: tuple(model.get_parameter(p).shape) for p in recipes}, model)
    assert set(back) == set(sources)
    for source, recipe in back.items():
        assert sum(piece.stop - piece.start for run in recipe.runs for piece in run) == sources[source][0]


def test_experts_become_gate_rows_above_up_rows_in_order() -> None:
    model = on_meta("qwen3-moe")
    recipes, _ = parameters_from(linears_on_disk(model), [], model, get_model_conversion_mapping(model))
    recipe = recipes["model.layers.0.mlp.experts.gate_up_proj"]
    prefix = "model.layers.0.mlp.experts"
    assert recipe.stacked
    assert recipe.runs == tuple(
        (Piece(f"{prefix}.{e}.gate_proj", None, 0, 32), Piece(f"{prefix}.{e}.up_proj", None, 0, 32)) for e in range(5)
    )


def test_a_stack_of_experts_is_cut_by_expert() -> None:
    model = on_meta("qwen3-moe")
    sources = {f"model.layers.0.mlp.experts.{m}_proj": (5, 32, 64) for m in ("gate", "up")}
    recipes, unused = parameters_from(sources, [], model, get_model_conversion_mapping(model))
    recipe = recipes["model.layers.0.mlp.experts.gate_up_proj"]
    assert unused == []
    assert recipe.runs[3] == tuple(Piece(name, 3, 0, 32) for name in sources)


def test_a_stack_under_the_models_own_name_is_taken_whole() -> None:
    model = on_meta("qwen3-moe")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    recipes, _ = parameters_from({name: (5, 64, 64)}, [], model, get_model_conversion_mapping(model))
    assert recipes[name].runs[4] == (Piece(name, 4, 0, 64),)


def test_more_than_nine_experts_keep_their_order() -> None:
    model = on_meta("qwen3-moe")
    model.config.num_experts = 12
    model = type(model)(model.config).to("meta")
    recipes, _ = parameters_from(linears_on_disk(model), [], model, get_model_conversion_mapping(model))
    runs = recipes["model.layers.0.mlp.experts.down_proj"].runs
    assert [run[0].source.split(".")[-2] for run in runs] == [str(e) for e in range(12)]


def test_a_fused_layer_on_disk_is_cut_into_rows() -> None:
    model = on_meta("llama")
    targets = [f"self_attn.{m}_proj" for m in "qo"]
    fused = WeightConverter("self_attn.qo_proj", targets, operations=[Chunk(dim=0)])
    recipes, _ = parameters_from({"model.layers.0.self_attn.qo_proj": (128, 64)}, [], model, [fused])
    source = "model.layers.0.self_attn.qo_proj"
    assert recipes["model.layers.0.self_attn.q_proj.weight"].runs == ((Piece(source, None, 0, 64),),)
    assert recipes["model.layers.0.self_attn.o_proj.weight"].runs == ((Piece(source, None, 64, 128),),)


def test_a_module_that_the_model_lacks_is_listed() -> None:
    model = on_meta("llama")
    assert parameters_from({"model.layers.7.mlp.up_proj": (128, 64)}, [], model, [])[1] == [
        "model.layers.7.mlp.up_proj"
    ]


def test_a_shape_that_the_model_contradicts_is_an_error() -> None:
    with pytest.raises(FormatError, match=r"up_proj.weight is \(128, 32\) in the checkpoint, but .* says \(128, 64\)"):
        parameters_from({"model.layers.0.mlp.up_proj": (128, 32)}, [], on_meta("llama"), [])


def test_a_conversion_that_turns_a_weight_is_refused() -> None:
    turned = WeightConverter("mlp.up_proj.weight", "mlp.up_proj.weight", operations=[Transpose(0, 1)])
    with pytest.raises(Unsupported, match="quantized groups cannot follow"):
        parameters_from({"model.layers.0.mlp.up_proj": (128, 64)}, [], on_meta("llama"), [turned])
