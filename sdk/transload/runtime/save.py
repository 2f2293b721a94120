"""What a quantized model is saved as: Transload's neutral format under the names of the original checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightTransform, revert_weight_conversion

from transload.errors import Unsupported
from transload.formats.neutral import Neutral
from transload.quant import QTensor, QuantSpec
from transload.runtime.experts import PROJECTIONS, QuantExperts
from transload.runtime.gather import Weight, assemble
from transload.runtime.standins import Quantized
from transload.runtime.trace import Recipe, stored_from


def stored_state(
    model: PreTrainedModel, conversions: Sequence[WeightTransform]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Every tensor to be written, and the quantization_config that describes the quantized ones.

    conversions: transformers' rules by which the model was loaded; their reverse gives the names on disk and one module
    per expert. Memory: the written tensors and one module.
    """
    standins = {name: module for name, module in model.named_modules() if isinstance(module, Quantized)}
    if any(p.device.type == "meta" for module in standins.values() for p in (*module.parameters(), *module.buffers())):
        raise Unsupported("a model that lies partly on disk is not saved: load it whole, or port its checkpoint")
    weights = _weights(standins)
    tensors, recipes = _names_on_disk(model, standins, weights, conversions)

    @lru_cache(maxsize=1)
    def numbers(parameter: str) -> Weight:
        module, member = weights[parameter]
        return module.qtensor(member)

    specs: dict[str, QuantSpec] = {}
    for name, recipe in recipes.items():
        w = assemble(name, recipe, numbers)
        if not isinstance(w, QTensor):
            raise Unsupported(f"{name}: rows of several schemes have no place in one stored module")
        specs[name] = w.spec
        tensors |= Neutral().encode(name, w)
    config = Neutral().finish(specs, {})["config.json"]["quantization_config"]
    assert isinstance(config, dict)
    return tensors, config


def _weights(standins: dict[str, Quantized]) -> dict[str, tuple[Quantized, str]]:
    """The stand-in and the member that hold each quantized parameter; one of several tied ones."""
    found: dict[str, tuple[Quantized, str]] = {}
    for name, module in standins.items():
        if isinstance(module, QuantExperts):
            found |= {f"{name}.{member}": (module, member) for member in PROJECTIONS}
        elif not module.tied:
            found[f"{name}.weight"] = (module, "weight")
    return found


def _names_on_disk(
    model: PreTrainedModel,
    standins: dict[str, Quantized],
    weights: dict[str, tuple[Quantized, str]],
    conversions: Sequence[WeightTransform],
) -> tuple[dict[str, Tensor], dict[str, Recipe]]:
    """The float tensors under their names on disk, and the recipe of every quantized module there."""
    inner = tuple(f"{name}." for name in standins)
    floats = {n: t for n, t in model.state_dict().items() if n.endswith(".bias") or not n.startswith(inner)}
    shapes = {parameter: module.weight_shape(member) for parameter, (module, member) in weights.items()}
    model._weight_conversions = list(conversions)
    try:
        floats, recipes = dict(revert_weight_conversion(model, floats)), stored_from(shapes, model)
        return {_published(n): t for n, t in floats.items()}, {_published(n): r for n, r in recipes.items()}
    finally:
        model._weight_conversions = []  # save_pretrained reverts what it is given: nothing is left to revert


def _published(name: str) -> str:
    """The name in published checkpoints.

    transformers 5.23 takes the renaming of Kimi-K2.5's vision blocks back in the language model too, where its layers
    would get names that no engine knows.
    """
    return name.replace("language_model.model.blocks.", "language_model.model.layers.")
